import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import train_settings

from ping_llm.errors import StorageError, TrainingError
from ping_llm.training.flops import training_flops
from ping_llm.training.metrics import Meter, RunLog

CFG = train_settings("log_every=2", "batch_size=2", "seq_len=10")


def step_metrics(loss, *, tokens=18, grad_norm=1.0):
    count = np.array([4.0, 6.0, 0.0, 2.0, 4.0])
    values = {
        "loss": loss,
        "grad_norm": grad_norm,
        "skipped": not np.isfinite(loss + grad_norm),
        "field_nll": loss * count,
        "field_count": count,
        "tokens": tokens,
        "pairs": 100.0,
    }
    return {name: jnp.asarray(value) for name, value in values.items()}


def test_a_line_holds_the_mean_over_the_last_steps():
    meter = Meter(CFG)
    for step, loss in enumerate([9.0, 2.0, 4.0], start=1):
        meter.add(step, step_metrics(loss))
    meter.fetch()
    row = meter.row(3, learning_rate=0.5)
    assert row["loss"] == 3.0
    assert row["loss_rtt"] == 3.0
    assert row["loss_destination"] is None  # it had no targets
    assert row["tokens"] == 54
    assert row["padding_fraction"] == pytest.approx(0.1)
    assert row["flops"] == training_flops(CFG.model, 54, 300.0)
    assert row["mfu"] is None  # no peak is known for this device
    json.dumps(row, allow_nan=False)


def test_a_meter_goes_on_from_what_was_saved():
    whole, first = Meter(CFG), Meter(CFG)
    for meter in (whole, first):
        meter.add(1, step_metrics(2.5))
        meter.fetch()
    second = Meter(CFG, json.loads(json.dumps(first.state())))
    for meter in (whole, second):
        meter.add(2, step_metrics(0.1))
        meter.fetch()
    timed = ("seconds", "real_tokens_per_second", "peak_device_bytes")
    one, other = (
        {name: value for name, value in meter.row(2, 0.5).items() if name not in timed}
        for meter in (whole, second)
    )
    assert one == other


@pytest.mark.parametrize("bad", [dict(loss=np.nan), dict(loss=1.0, grad_norm=np.inf)])
def test_a_skipped_step_is_told_counted_and_left_out_of_the_loss(bad, capsys):
    meter = Meter(CFG)
    for step, values in enumerate([dict(loss=3.0), bad, dict(loss=5.0)], start=1):
        meter.add(step, step_metrics(**values))
    meter.fetch()
    assert "step 2 skipped, nothing was changed: loss=" in capsys.readouterr().err
    row = meter.row(3, learning_rate=0.5)
    assert row["loss"] == 4.0
    assert row["skipped_steps"] == 1
    assert row["tokens"] == 54
    json.dumps(row, allow_nan=False)


def test_too_many_skipped_steps_in_a_row_end_the_run():
    meter = Meter(dataclasses.replace(CFG, max_skipped_steps=3))
    for step, loss in enumerate([np.nan, np.nan, 1.0, np.nan, np.nan, np.nan], start=1):
        meter.add(step, step_metrics(loss))
    with pytest.raises(TrainingError, match=r"step 6 is number 3 in a row .* learning_rate than"):
        meter.fetch()


def test_a_line_needs_a_step_that_was_not_skipped():
    meter = Meter(CFG)
    meter.add(1, step_metrics(np.nan))
    meter.fetch()
    with pytest.raises(TrainingError, match="each of the first 1 steps was skipped"):
        meter.row(1, learning_rate=0.5)


def test_lines_after_the_last_step_and_torn_ones_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.5}\n{"step": 2, "loss": 3.25}\n{"step": 3, "lo')
    log = RunLog(path, last_step=1)
    log.cut()
    log.append({"step": 2, "loss": 3.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == log.rows == [{"step": 1, "loss": 3.5}, {"step": 2, "loss": 3.0}]


@pytest.mark.parametrize(
    "bad", ["{", "7", "[]", '{"loss": 1}', '{"step": "x"}', "\x00", "[" * 9999]
)
def test_a_damaged_line_is_left_out_and_said(bad, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
    assert RunLog(path, last_step=2).rows == [{"step": 1}, {"step": 2}]
    assert capsys.readouterr().err == f"{path}: line 2 is damaged and left out\n"


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    absent = tmp_path / "absent" / "metrics.jsonl"
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written"):
        RunLog(absent, last_step=0).append({"step": 1})
