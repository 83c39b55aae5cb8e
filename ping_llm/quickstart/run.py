"""One small run of every step."""

import dataclasses
import json

from ping_llm import settings
from ping_llm.errors import ConfigError
from ping_llm.extraction.run import extract_activations
from ping_llm.ingest.prepare import prepare_data
from ping_llm.inspection.dataset import inspect_data
from ping_llm.outputs import Claim, claim, publish_json
from ping_llm.prediction.evaluate import evaluate
from ping_llm.quickstart.settings import QuickstartSettings
from ping_llm.simulation.simulate import simulate
from ping_llm.storage import Location
from ping_llm.training.loop import train

# Small enough for two cores and minutes.
PROBES, DAYS, MEASUREMENTS = 100, 7.0, 200_000
SCORED, EXTRACTED = 2000, 200
TRAINING = {"preset": "tiny", "steps": 400}


@dataclasses.dataclass(frozen=True)
class QuickstartResult:
    """What `quickstart` made.

    Attributes:
        output: The directory that holds everything.
        loss_first: Training loss in nats per token, mean over the first logged steps.
        loss_last: The same over the last logged steps.
        errors: By method, (median, 90th percentile) of the relative error on pairs it has not seen,
            the best median first.
        files: The files worth a look, by what they show.
    """

    output: str
    loss_first: float
    loss_last: float
    errors: dict[str, tuple[float, float]]
    files: dict[str, str]


@settings.takes(QuickstartSettings)
def quickstart(chosen: QuickstartSettings) -> QuickstartResult:
    """Returns what a small run of every step gave; run again, it continues where it stopped.

    Raises:
        ConfigError: The output was begun with other settings, or another process is writing it.
        StorageError: It cannot be written.
    """
    output = Location.of(chosen.output)
    if output.is_file():
        raise ConfigError(f"{output} is a file; choose another output directory")
    with claim(output, what="quickstart") as held:
        if output.is_local:
            output.path.mkdir(exist_ok=True)
        return _run_every_step(output, chosen, held)


def _run_every_step(output: Location, chosen: QuickstartSettings, held: Claim) -> QuickstartResult:
    raw, rows, run = (str(output / name) for name in ("measurements.parquet", "rows", "run"))
    report, scores, seed = str(output / "data.html"), str(output / "evaluation.html"), chosen.seed
    if chosen.data is not None:
        raw = chosen.data
    else:
        simulate(raw, probes=PROBES, days=DAYS, measurements=MEASUREMENTS, seed=seed)
    prepare_data([raw], output=rows, seed=seed)
    inspect_data(rows, samples=4, report=report)
    train(rows, run, seed=seed, **TRAINING)
    if not (output / "evaluation.json").exists():
        result = evaluate(run, rows, pretrained=True, max_rows=SCORED, report=scores)
        publish_json(output / "evaluation.json", result.to_json(), claim=held)
    activations = str(output / "activations")
    extract_activations(run, rows, activations, format="measurements", limit=EXTRACTED)
    metrics = (output / "run" / "metrics.jsonl").read_text().splitlines()
    methods = json.loads((output / "evaluation.json").read_text())["methods"]
    errors = {name: (each["median_rel"], each["p90_rel"]) for name, each in methods.items()}
    losses = [json.loads(line)["loss"] for line in metrics]
    return QuickstartResult(
        output=str(output),
        loss_first=losses[0],
        loss_last=losses[-1],
        errors=dict(sorted(errors.items(), key=lambda item: item[1])),
        files={
            "what the data hold": report,
            "how the loss fell": f"{run}/loss.png",
            "every logged step": f"{run}/metrics.jsonl",
            "how well it predicts, beside classical methods": scores,
            "what its layers held, for sparse autoencoders": f"{activations}/manifest.json",
        },
    )
