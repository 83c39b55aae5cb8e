"""Exporting: a run's decoder as one safetensors file beside its config."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ping_llm import outputs, settings
from ping_llm.data.network import KNOWN
from ping_llm.models import families, huggingface
from ping_llm.models.config import DecoderConfig
from ping_llm.runs import EXPORTED, LoadedRun, by_name, load_run, tensors_digest, with_checksum
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

    In the format `ping-llm` the directory can stand for the run wherever one is read: `predict`,
    `evaluate`, `generate`, `extract-activations`. In the format `hf` it is a checkpoint of
    transformers with a model card. Exporting again what is there already changes nothing.

    Raises:
        CheckpointError: `run` cannot be read.
        ConfigError: `output` holds something else, another process writes it, or no model of
            transformers that we know computes what the run does.
        StorageError: `output` cannot be written.
    """
    output = Location.of(chosen.output)
    with outputs.claim(output, what="export") as claim:
        run = load_run(chosen.run, chosen.step)
        content = _as_checkpoint(run) if chosen.format == "hf" else _as_run(run, chosen.run)
        if outputs.contents(output) != sorted(content) or any(
            (output / name).read_bytes() != data for name, data in content.items()
        ):
            with outputs.publish_directory(output, last="config.json", claim=claim) as directory:
                for name, data in content.items():
                    (directory / name).write_bytes(data)
    parameters = sum(leaf.size for leaf in by_name(run.params).values())
    return ExportResult(parameters, len(content[EXPORTED]), str(output))


def _as_run(run: LoadedRun, source: str) -> dict[str, bytes]:
    """Returns the files of an export that stands for its run, by name."""
    from safetensors.numpy import save

    tensors = {name: np.asarray(leaf) for name, leaf in by_name(run.params).items()}
    checksum = tensors_digest(sorted(tensors.items()))
    weights = save(tensors, metadata={"checksum": checksum})  # of several the order varies
    content = {EXPORTED: weights, "config.json": _json(with_checksum(run.config))}
    known = Location.of(source) / KNOWN
    return content | ({KNOWN: known.read_bytes()} if known.is_file() else {})


def _as_checkpoint(run: LoadedRun) -> dict[str, bytes]:
    """Returns the files of a checkpoint of transformers, by name."""
    from safetensors.numpy import save

    cfg = settings.from_json(DecoderConfig, run.config["model"])
    config = families.llama.write_config(cfg) | {
        "max_position_embeddings": run.config["train"]["seq_len"],
        # Of language models by default; here these ids are tokens as others.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    weights = save(huggingface.to_tensors(cfg, run.params), metadata={"format": "pt"})
    return {
        EXPORTED: weights,
        "config.json": _json(config),
        "README.md": _card(cfg, config, run.config).encode(),
    }


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


_CARD = """\
---
{metadata}
---

# A model of internet latencies

A decoder-only Transformer that `ping-llm` (a Python package) trained on measurements of round-trip
times. It continues sequences of measurements (when, from where, to where, how long, or no answer).
It is no language model and has no text tokenizer.

| | |
| --- | --- |
| architecture | `{architecture}`, {parameters:,} parameters in {param_dtype} |
| layers, width, heads | {n_layers}, {d_model}, {n_heads} ({n_kv_heads} of keys and values) |
| tokens | {vocab_size}: version {language_version} of ping-llm's token language |
| sequence length | {seq_len} |
| trained on | data set `{fingerprint}` |

## Use

```python
import numpy as np
import torch
from ping_llm.measurements import MeasurementTable
from ping_llm.tokenizer import encode
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")  # this directory, or its id on a hub
table = MeasurementTable.from_arrow(
    {{"src_addr": ["192.0.2.1"], "dst_addr": ["192.0.2.9"], "event_time": [0], "rtt": [12.5]}}
)
order = np.array([[0, 1, 2, 3]], np.uint8)  # source, destination, time, result
tokens, _ = encode(table, segment_offsets=np.array([0, 1]), field_order=order)
logits = model(torch.tensor(tokens[None].astype("int64"))).logits
```

Predictions with calibrated distributions need the run itself, or its export in the format
`ping-llm`: they are read from grids of what is known of a network, which is not in here.
"""


def _card(cfg: DecoderConfig, config: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """Returns the model card of a run."""
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        library_name="transformers", tags=["ping-llm", "network-latency", "measurements"]
    )
    return _CARD.format(
        **dataclasses.asdict(cfg),
        metadata=metadata.to_yaml(),
        architecture=config["architectures"][0],
        parameters=cfg.parameter_count(),
        language_version=run.get("language_version", 1),
        seq_len=run["train"]["seq_len"],
        fingerprint=run["data"]["fingerprint"],
    )
