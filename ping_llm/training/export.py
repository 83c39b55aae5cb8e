"""Exporting: a run's decoder as one safetensors file beside its config."""

import dataclasses
import json

import numpy as np

from ping_llm import outputs, settings
from ping_llm.data.network import KNOWN
from ping_llm.runs import EXPORTED, by_name, load_run, tensors_digest, with_checksum
from ping_llm.storage import Location
from ping_llm.training.settings import ExportSettings


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What an export holds.

    Attributes:
        parameters: Number of parameters.
        bytes: Size of their file.
        output: The directory.
    """

    parameters: int
    bytes: int
    output: str


@settings.takes(ExportSettings)
def export_run(chosen: ExportSettings) -> ExportResult:
    """Writes a run's decoder as one safetensors file beside its config and what it knows.

    The directory can stand for the run wherever one is read: `predict`, `evaluate`, `generate`,
    `extract-activations`. Exporting again what is there already changes nothing.

    Raises:
        CheckpointError: `run` cannot be read.
        ConfigError: `output` holds something else, or another process writes it.
        StorageError: `output` cannot be written.
    """
    from safetensors.numpy import save

    output = Location.of(chosen.output)
    with outputs.claim(output, what="export") as claim:
        run = load_run(chosen.run, chosen.step)
        tensors = {name: np.asarray(leaf) for name, leaf in by_name(run.params).items()}
        checksum = tensors_digest(sorted(tensors.items()))
        weights = save(tensors, metadata={"checksum": checksum})  # of several the order varies
        config = (json.dumps(with_checksum(run.config), indent=2) + "\n").encode()
        content = {EXPORTED: weights, "config.json": config}
        known = Location.of(chosen.run) / KNOWN
        if known.is_file():
            content[KNOWN] = known.read_bytes()
        if outputs.contents(output) != sorted(content) or any(
            (output / name).read_bytes() != data for name, data in content.items()
        ):
            with outputs.publish_directory(output, last="config.json", claim=claim) as directory:
                for name, data in content.items():
                    (directory / name).write_bytes(data)
    parameters = sum(tensor.size for tensor in tensors.values())
    return ExportResult(parameters, len(weights), str(output))
