"""Small runs with random weights, for tests of what is done with trained ones."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from ping_llm.checkpoints import Checkpoints
from ping_llm.data.network import KNOWN, write_known
from ping_llm.data.pipeline import data_fingerprint
from ping_llm.data.rows import ProbeRows
from ping_llm.data.windows import DEFAULTS
from ping_llm.measurements import MeasurementTable
from ping_llm.models.config import DecoderConfig
from ping_llm.models.decoder import Decoder
from ping_llm.prediction.answers import Answerer
from ping_llm.prediction.predictor import Predictor
from ping_llm.settings import load
from ping_llm.tokenizer import LANGUAGE_VERSION
from ping_llm.training.settings import TrainSettings

CONFIG = DecoderConfig(
    vocab_size=267,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=64,
    dtype="float32",
)
SEQ_LEN = 256
# What a run knows where it was trained on no data set: 10.0.0.1 and 10.0.0.2, measured to others.
KNOWN_MEASUREMENTS = {
    "src_addr": [f"10.0.0.{1 + i % 2}" for i in range(12)],
    "dst_addr": [f"10.0.1.{1 + i // 2}" for i in range(12)],
    "event_time": [1000 * i for i in range(12)],
    "rtt": [10.0 + i for i in range(11)] + [-1.0],
}


def questions(src, dst, times=None) -> MeasurementTable:
    """Returns questions from each of `src` to the `dst` beside it."""
    columns = {"src_addr": src, "dst_addr": dst, "event_time": times or [None] * len(src)}
    return MeasurementTable.from_arrow(columns, questions=True)


def train_settings(*overrides: str, config_file: Path | None = None, **flags) -> TrainSettings:
    """Returns the settings of a training that nobody starts."""
    flags = {"data": "rows", "output": "run", **flags}
    return load(TrainSettings, config_file=config_file, overrides=overrides, flags=flags)


def predictor() -> Predictor:
    """Returns one of that decoder, which knows `KNOWN_MEASUREMENTS`."""
    known = MeasurementTable.from_arrow(KNOWN_MEASUREMENTS)
    return Predictor(Answerer(*decoder()), max_tokens=SEQ_LEN, known=known)


@functools.cache
def decoder(**changes):
    """Returns (graphdef, params) of `CONFIG` with `changes`."""
    cfg = dataclasses.replace(CONFIG, **changes)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))))
    return graphdef, jax.jit(lambda: nnx.state(Decoder(cfg, rngs=nnx.Rngs(0))))()


def write_run(path: Path, data: Path | None = None) -> Path:
    """Returns `path`, made a run directory of that decoder, trained on `data` as it claims."""
    path.mkdir()
    fingerprint = None if data is None else data_fingerprint(data)
    config = {
        "schema_version": 1,
        "language_version": LANGUAGE_VERSION,
        "parameters": CONFIG.parameter_count(),
        "model": dataclasses.asdict(CONFIG),
        "train": {
            "steps": 1,
            "seq_len": SEQ_LEN,
            "batch_size": 8,
            "grid_fraction": 0.875,
            **dataclasses.asdict(DEFAULTS),
        },
        "data": {"path": str(data or path / "gone"), "fingerprint": fingerprint},
    }
    (path / "config.json").write_text(json.dumps(config))
    rows = data and ProbeRows(data, "train").to_table()
    write_known(path / KNOWN, rows or MeasurementTable.from_arrow(KNOWN_MEASUREMENTS))
    with Checkpoints(path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, {"params": decoder()[1], "opt_state": {"count": jnp.zeros(())}}, {})
        checkpoints.wait()
    return path
