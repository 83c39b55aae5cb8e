"""Extraction by 32 workers on Modal: modal run modal_workers.py

Workers find their work in the store; one that is pre-empted is started again and goes on. Keep the
bucket's credentials in a secret named `bucket`. Not run by us on Modal.
"""

import subprocess

import modal

COMMAND = [
    "ping-llm",
    "extract-activations",
    "--model=Qwen/Qwen2.5-7B",
    "--input=s3://bucket/texts/*.parquet",
    "--output=s3://bucket/activations",
    "--layers=14,21",
    "--overlong=truncate-right",
]

image = modal.Image.debian_slim(python_version="3.12").pip_install("ping-llm[cuda]")
app = modal.App("extract-activations", image=image)


@app.function(gpu="H100", timeout=86_400, retries=5, secrets=[modal.Secret.from_name("bucket")])
def work(index: int) -> None:
    subprocess.run([*COMMAND, f"--worker-id=modal-{index}"], check=True)


@app.local_entrypoint()
def main(workers: int = 32) -> None:
    list(work.map(range(workers)))
