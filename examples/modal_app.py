"""The whole story on Modal: prepare, inspect, train, evaluate, extract.

    modal run examples/modal_app.py::prepare --inputs pings.parquet --split time
    modal run examples/modal_app.py::inspect
    modal run examples/modal_app.py::main --steps 20000
    modal run examples/modal_app.py::evaluate
    modal run examples/modal_app.py::extract --model Qwen/Qwen2.5-0.5B --texts texts.parquet

Put what you measured into the volume first: modal volume put ping-llm pings.parquet. All that is
made stays there: `modal volume get ping-llm report.html`. Name a GPU by PING_LLM_GPU=A100.

Checked against the package `modal` 1.6.4: it imports, and what it passes is taken. Not run by us on
Modal, where we have no account.
"""

import os
import signal
import subprocess
from pathlib import Path

import modal

ROOT = Path("/data")  # where the volume stands in a container
GPU = os.environ.get("PING_LLM_GPU", "H100")
HOUR = 3600
TIME_LIMIT = 23 * HOUR  # of a training; Modal ends a function after a day

image = (
    modal.Image.debian_slim(python_version="3.12")
    .pip_install("ping-llm[cuda]")
    .env({"PING_LLM_GPU": GPU})
)
app = modal.App("ping-llm", image=image)
volume = modal.Volume.from_name("ping-llm", create_if_missing=True)
volumes = {str(ROOT): volume}
# Everything goes on where it was, so what was pre-empted is simply started again.
again = modal.Retries(max_retries=5, initial_delay=1.0)


def run(command: str, *arguments: str, seconds: float | None = None) -> bool:
    """Runs a command in the volume; returns False if it was stopped after `seconds`, and saved."""
    volume.reload()
    process = subprocess.Popen(["ping-llm", command, *arguments], cwd=ROOT)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # it saves a checkpoint and ends
        code = process.wait()
    except BaseException:  # pre-empted
        process.terminate()
        process.wait()
        raise
    finally:
        volume.commit()
    if code == 128 + signal.SIGTERM:
        return False
    if code:
        raise RuntimeError(f"ping-llm {command} ended with {code}; its message is above")
    return True


@app.function(volumes=volumes, cpu=8, memory=16_384, timeout=6 * HOUR, retries=again)
def prepare(inputs: str, split: str = "pair", rows: str = "rows") -> None:
    """Makes probe rows of measurements, several names apart from each other by commas."""
    run("prepare-data", *inputs.split(","), f"--output={rows}", f"--split={split}", "--workers=8")


@app.function(volumes=volumes, cpu=2, memory=8_192, timeout=2 * HOUR)
def inspect(rows: str = "rows", report: str = "data.html") -> None:
    """Writes a page about the data."""
    run("inspect-data", rows, f"--report={report}")


@app.function(volumes=volumes, gpu=GPU, timeout=24 * HOUR, retries=again)
def train(
    steps: int,
    rows: str = "rows",
    output: str = "run",
    preset: str = "base",
    wandb: str = "disabled",
) -> bool:
    """Trains up to the time limit; returns whether all steps are done."""
    given = (f"--data={rows}", f"--output={output}", f"--preset={preset}", f"--steps={steps}")
    return run("train", *given, f"--wandb={wandb}", seconds=TIME_LIMIT)


@app.function(volumes=volumes, gpu=GPU, timeout=4 * HOUR)
def evaluate(rows: str = "rows", output: str = "run", report: str = "report.html") -> None:
    """Writes a page that compares the run with classical methods."""
    run("evaluate", f"--run={output}", f"--data={rows}", f"--report={report}")


@app.function(volumes=volumes, gpu=GPU, timeout=24 * HOUR, retries=again)
def extract(model: str, texts: str, output: str = "activations", layers: str = "all") -> None:
    """Writes a language model's activations over texts.

    By one worker: a volume does not tell two who is first. Many can share a bucket, as in
    launch/modal_workers.py.
    """
    given = (f"--model={model}", f"--input={texts}", f"--output={output}", f"--layers={layers}")
    run("extract-activations", *given)


@app.local_entrypoint()
def main(steps: int = 20_000, preset: str = "base") -> None:
    """Trains until all steps are done, in as many calls as that takes."""
    while not train.remote(steps, preset=preset):
        print("the time limit was reached; going on from the last checkpoint")
