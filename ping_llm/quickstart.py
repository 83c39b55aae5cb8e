"""The whole story once: simulate an internet, learn it, predict it, and read what was learnt."""

import dataclasses
import json
from pathlib import Path

from ping_llm.extraction.run import extract_activations
from ping_llm.ingest.prepare import prepare_data
from ping_llm.inspection.dataset import inspect_data
from ping_llm.outputs import publish_json
from ping_llm.prediction.evaluate import evaluate
from ping_llm.simulation.simulate import simulate
from ping_llm.storage import Location
from ping_llm.training.loop import train

# Small enough for two cores and minutes; enough to learn the language and some geography.
PROBES, DAYS, MEASUREMENTS = 100, 7.0, 200_000
STEPS, BATCH_SIZE, SEQ_LEN = 150, 8, 512
SCORED, EXTRACTED = 200, 200


@dataclasses.dataclass(frozen=True)
class QuickstartResult:
    """What `quickstart` made.

    Attributes:
        output: The directory that holds everything.
        loss_first: Training loss in nats a token, mean over the first logged steps.
        loss_last: The same over the last logged steps.
        files: The files worth a look, by what they show.
    """

    output: str
    loss_first: float
    loss_last: float
    files: dict[str, str]


def quickstart(output: Path, *, seed: int = 0) -> QuickstartResult:
    """Returns what a small run of every step gave; run again, it continues where it stopped."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    raw, rows, run = output / "measurements.parquet", output / "rows", output / "run"
    report = output / "data.html"
    simulate(raw, probes=PROBES, days=DAYS, measurements=MEASUREMENTS, seed=seed)
    prepare_data([str(raw)], output=rows, seed=seed)
    inspect_data(rows, samples=4, report=report)
    train(rows, run, preset="tiny", steps=STEPS, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, seed=seed)
    scores, scored = output / "evaluation.html", output / "evaluation.json"
    if not scored.exists():
        result = evaluate(run, rows, max_rows=SCORED, report=scores)
        publish_json(Location.of(scored), result)
    activations = output / "activations"
    extract_activations(run, rows, activations, format="measurements", limit=EXTRACTED)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return QuickstartResult(
        output=str(output),
        loss_first=losses[0],
        loss_last=losses[-1],
        files={
            "what the data hold": str(report),
            "how the loss fell": str(run / "loss.png"),
            "every logged step": str(run / "metrics.jsonl"),
            "how well it predicts, beside classical methods": str(scores),
            "what its layers held, for sparse autoencoders": str(activations / "manifest.json"),
        },
    )
