"""Extraction by one worker for each GPU of a Ray cluster: python ray_workers.py

Workers find their work in the store; a task whose node is lost is started again and goes on.
Not run by us on a cluster.
"""

import subprocess

import ray

COMMAND = [
    "ping-llm",
    "extract-activations",
    "--model=Qwen/Qwen2.5-7B",
    "--input=s3://bucket/texts/*.parquet",
    "--output=s3://bucket/activations",
    "--layers=14,21",
    "--overlong=truncate-right",
]


@ray.remote(num_gpus=1, max_retries=-1)
def work(index: int) -> None:
    subprocess.run([*COMMAND, f"--worker-id=ray-{index}"], check=True)


if __name__ == "__main__":
    ray.init()
    workers = int(ray.cluster_resources().get("GPU", 1))
    ray.get([work.remote(index) for index in range(workers)])
