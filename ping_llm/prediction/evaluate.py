"""The model beside classical methods, on the same measurements."""

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from ping_llm import tokenizer
from ping_llm.data.pipeline import data_fingerprint, eval_batches
from ping_llm.data.rows import is_dataset
from ping_llm.errors import ConfigError, DataError
from ping_llm.estimators.pairs import MIN_RTT_MS, training_table
from ping_llm.hashing import hash_addresses
from ping_llm.measurements import MeasurementTable
from ping_llm.prediction import baselines as classical
from ping_llm.prediction import metrics
from ping_llm.prediction.contexts import Contexts
from ping_llm.prediction.protocols import Task, Trial, describe, load_task, pair_keys
from ping_llm.prediction.rtt import QUESTION_TOKENS, Predictor
from ping_llm.progress import progress
from ping_llm.runs import read_config
from ping_llm.storage import Location

MAX_ROWS = 10_000
FIELD_BATCHES, FIELD_BATCH_SIZE = 4, 8
BANDS_MS = (10, 50, 100, 200)
HISTORY_STEPS = (1, 5, 17, 65)
HOURS = 6


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the model says of n scored measurements.

    Attributes:
        quantiles: At `metrics.PINBALL_LEVELS` [n, 5].
        below: Probability below the actual RTT; means nothing where it failed [n].
        crps: Score in ms; likewise [n].
        p_failed: Probability of failure [n].
    """

    quantiles: np.ndarray
    below: np.ndarray
    crps: np.ndarray
    p_failed: np.ndarray

    @property
    def median(self) -> np.ndarray:
        """The predicted median RTTs."""
        return self.quantiles[:, metrics.PINBALL_LEVELS.index(0.5)]


def evaluate(
    run: str | Path,
    data: str | Path,
    *,
    baselines: str = "all",
    max_rows: int | None = MAX_ROWS,
    contexts: int = 1,
    report: str | Path | None = None,
) -> dict[str, Any]:
    """Returns how well a model and classical methods predict the same measurements, fit for JSON.

    Args:
        run: A run directory.
        data: A directory of probe rows, whose test rows are scored by the protocol of its split; or
            a file of measurements, all of which are scored.
        baselines: "all", "none", or names divided by commas.
        max_rows: Measurements to score at most, drawn at random; None: all.
        contexts: Contexts drawn for each question, whose answers are averaged; for pairs only.
            Every second is of the destination, the pair turned round, if the data were prepared
            with both ends.
        report: Where to write one HTML page about it; None: nowhere.

    Raises:
        ConfigError: A baseline is not known, or it or several contexts are not for this protocol.
        DataError: The data cannot be read, or nothing in them can be scored.
        CheckpointError: `run` is no run.
    """
    started = time.monotonic()
    data = Path(data)
    names = _chosen(baselines)
    predictor = Predictor.load(run)
    config = read_config(Location.of(run))
    task = load_task(
        data,
        trained_on=Path(config["data"]["path"]),
        max_rows=max_rows,
        max_tokens=predictor.max_tokens - QUESTION_TOKENS,
        n_contexts=contexts,
    )
    names = _for_protocol(names, task.protocol, explicit=baselines != "all")
    if not np.any(task.rows.rtt >= 0):
        raise DataError(f"{data}: none of the {len(task.rows)} rows to score was answered")
    result: dict[str, Any] = describe(task)
    prepared = is_dataset(data)
    result["trained_on_this_data"] = (
        prepared and data_fingerprint(data) == config["data"]["fingerprint"]
    )
    unseen = predictor.unseen(task.rows)
    if unseen[0] is not None and unseen[1] is not None:
        result["unseen_fraction"] = float(np.mean(unseen[0] | unseen[1]))
    by_history = {}
    for history, make in task.trials.items():
        trial = make()
        note = "" if history is None else f", {history} measurements of context"
        answers, predicted = _answers(predictor, task, trial, names, note)
        scored = _score(task, predicted)
        if history is not None:
            by_history[str(history)] = scored
        # The last trial, that of most context, is the one the rest is about.
        result |= {"methods": scored, **_details(task, trial, answers, predicted)}
    if by_history:
        result["history"] = by_history
    if prepared:
        result["loss_per_field"] = _loss_per_field(predictor, data)
    result["seconds"] = round(time.monotonic() - started, 1)
    if report is not None:
        from ping_llm.prediction.evaluation_report import write_report

        write_report(result, Path(report), title=f"{run} on {data}")
    return result


def _chosen(baselines: str) -> list[str]:
    known = [*classical.STATIC, *classical.ONLINE]
    if baselines == "none":
        return []
    names = known if baselines == "all" else [name.strip() for name in baselines.split(",")]
    for name in names:
        if name not in known:
            raise ConfigError(f"baseline {name!r} is not one of all, none, {', '.join(known)}")
    return names


def _for_protocol(names: list[str], protocol: str, *, explicit: bool) -> list[str]:
    online = [name for name in names if name in classical.ONLINE]
    if online and protocol != "time":
        if explicit:
            raise ConfigError(
                f"baseline {online[0]!r} is for data prepared with --split time; this is {protocol}"
            )
        return [name for name in names if name not in classical.ONLINE]
    return names


def _answers(
    predictor: Predictor, task: Task, trial: Trial, names: list[str], note: str
) -> tuple[dict[str, Answers], dict[str, np.ndarray]]:
    """Returns (what the models say by name, the RTT that every method predicts by name)."""
    ways = {"model": ((task.questions, trial.contexts), *trial.also)}
    if trial.online is not None:
        ways["model_online"] = ((task.rows, trial.online),)
    answers = {name: _ask(predictor, asked, f"{name}{note}") for name, asked in ways.items()}
    predicted = {name: answer.median for name, answer in answers.items()}
    static = [name for name in names if name in classical.STATIC]
    if static:
        train = training_table(trial.train)
        with progress(f"baselines{note}", total=len(static), unit="methods") as bar:
            for name in static:
                predicted[name] = classical.fit(name, train)(task.rows)
                bar.update(1, note=name)
    if trial.everything is not None:
        for name in (name for name in names if name in classical.ONLINE):
            values = classical.ONLINE[name](trial.everything, task.rows)
            fallback = classical.fit("src_median", training_table(trial.train))(task.rows)
            predicted[name] = np.where(np.isnan(values), fallback, values)
    return answers, predicted


def _ask(
    predictor: Predictor, ways: Sequence[tuple[MeasurementTable, Contexts]], title: str
) -> Answers:
    rows, contexts = ways[0]
    n, levels = len(rows), np.array(metrics.PINBALL_LEVELS)
    found = Answers(np.zeros((n, len(levels))), np.zeros(n), np.zeros(n), np.zeros(n))
    actual = _actual(rows)
    with progress(title, total=n, unit="measurements") as bar:
        several = len(ways) > 1
        asked = predictor.pooled(ways) if several else predictor.distributions(rows, contexts)
        for at, distribution in asked:
            found.quantiles[at] = distribution.quantiles(levels)
            found.below[at] = distribution.below(actual[at])
            found.crps[at] = distribution.crps(actual[at])
            found.p_failed[at] = distribution.p_failed
            bar.update(len(at))
    return found


def _actual(rows: MeasurementTable) -> np.ndarray:
    return np.maximum(rows.rtt.astype(np.float64), MIN_RTT_MS)


def _kind(name: str) -> str:
    return "online" if name in classical.ONLINE or name == "model_online" else "static"


def _score(task: Task, predicted: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    answered = task.rows.rtt >= 0
    actual = _actual(task.rows)[answered]
    given = {name: values[answered] for name, values in predicted.items()}
    ranges = metrics.intervals(given, actual, pair_keys(task.rows)[answered])
    return {
        name: {
            "kind": _kind(name),
            **metrics.point_metrics(values, actual),
            "intervals": ranges[name],
        }
        for name, values in given.items()
    }


def _details(
    task: Task, trial: Trial, answers: Mapping[str, Answers], predicted: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    rows, answered = task.rows, task.rows.rtt >= 0
    actual = _actual(rows)
    model = answers["model"]
    floor = task.others[answered]
    several = ~np.isnan(floor)
    noise: dict[str, Any] = {"n": int(several.sum())}
    if several.any():
        noise |= metrics.point_metrics(floor[several], actual[answered][several])
        same = metrics.point_metrics(model.median[answered][several], actual[answered][several])
        noise["ratio"] = {name: same[name] / noise[name] if noise[name] else None for name in same}
    return {
        "calibration": {
            name: metrics.calibration(
                answer.below[answered],
                answer.quantiles[answered],
                answer.crps[answered],
                actual[answered],
            )
            for name, answer in answers.items()
        }["model"],
        "failures": _failures(trial, rows, model),
        "noise_floor": noise,
        "ranking": _rankings(rows, predicted),
        "by": _breakdowns(rows, trial, predicted),
    }


def _failures(trial: Trial, rows: MeasurementTable, model: Answers) -> dict[str, Any]:
    """Returns AUC and Brier score of the model, and of the training failure rates of both ends."""
    failed = rows.rtt < 0
    rates = _failure_rates(trial.train, rows)
    return {
        "n_failed": int(failed.sum()),
        "n": len(rows),
        "model": {
            "auc": metrics.auc(model.p_failed, failed),
            "brier": metrics.brier(model.p_failed, failed),
        },
        "failure_rate": {"auc": metrics.auc(rates, failed), "brier": metrics.brier(rates, failed)},
    }


def _failure_rates(train: MeasurementTable, rows: MeasurementTable) -> np.ndarray:
    """Returns the mean of the training failure rates of source and destination, smoothed."""
    failed = (train.rtt < 0).astype(float)
    overall, rates = failed.mean(), np.zeros(len(rows))
    for name in ("src", "dst"):
        keys, number = np.unique(hash_addresses(getattr(train, name)), return_inverse=True)
        counts, sums = np.bincount(number), np.bincount(number, failed)
        smoothed = np.append((sums + 10 * overall) / (counts + 10), overall)
        wanted = hash_addresses(getattr(rows, name))
        at = np.searchsorted(keys, wanted)
        known = np.append(keys, np.uint64(0))[at] == wanted
        rates += smoothed[np.where(known & (at < len(keys)), at, -1)] / 2
    return rates


def _rankings(
    rows: MeasurementTable, predicted: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float] | None]:
    """Returns how each method ranks the destinations of each source, by medians of their rows."""
    answered = np.flatnonzero(rows.rtt >= 0)
    source = np.unique(hash_addresses(rows.src[answered]), return_inverse=True)[1]
    target = np.unique(hash_addresses(rows.dst[answered]), return_inverse=True)[1]
    key = source * (target.max(initial=0) + 1) + target

    def by_pair(values: np.ndarray) -> np.ndarray:
        order = np.lexsort((values, key))
        starts = np.flatnonzero(np.diff(key[order], prepend=-1))
        counts = np.diff(np.r_[starts, len(order)])
        return values[order][starts + (counts - 1) // 2]

    actual = by_pair(_actual(rows)[answered])
    sources = by_pair(source)
    return {
        name: metrics.ranking(by_pair(values[answered]), actual, sources)
        for name, values in predicted.items()
    }


def _breakdowns(
    rows: MeasurementTable, trial: Trial, predicted: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    actual, answered = _actual(rows), rows.rtt >= 0
    hour = rows.time // 3600 % 24 // HOURS
    groupings = {
        "family": (rows.family == 6, ["IPv4", "IPv6"]),
        "rtt_band": (np.searchsorted(BANDS_MS, actual, side="right"), _ranges(BANDS_MS, " ms")),
        "history": (
            np.searchsorted(HISTORY_STEPS, trial.contexts.lengths(), side="right"),
            _ranges(HISTORY_STEPS, ""),
        ),
        "hour_utc": (hour, [f"{h}-{h + HOURS}" for h in range(0, 24, HOURS)]),
    }
    result: dict[str, dict[str, Any]] = {}
    for name, (group, labels) in groupings.items():
        result[name] = {}
        for i, label in enumerate(labels):
            chosen = answered & (group == i)
            if chosen.any():
                methods = {
                    method: metrics.point_metrics(values[chosen], actual[chosen])
                    for method, values in predicted.items()
                }
                result[name][label] = {"n": int(chosen.sum()), "methods": methods}
    return result


def _ranges(steps: tuple[int, ...], unit: str) -> list[str]:
    middle = [f"{a}-{b}{unit}" for a, b in itertools.pairwise(steps)]
    return [f"under {steps[0]}{unit}", *middle, f"from {steps[-1]}{unit}"]


def _loss_per_field(predictor: Predictor, data: Path) -> dict[str, float]:
    """Returns the loss in nats a token on fixed batches of the test rows, in all and by field."""

    @jax.jit
    def losses(params, inputs, segment_ids, positions, targets):
        model = nnx.merge(predictor.graphdef, params)
        logits = model(inputs, segment_ids, positions)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    sums, counts = np.zeros(len(tokenizer.FIELDS)), np.zeros(len(tokenizer.FIELDS))
    batches = eval_batches(
        data,
        "test",
        batch_size=FIELD_BATCH_SIZE,
        seq_len=predictor.max_tokens,
        count=FIELD_BATCHES,
        hide_unseen=predictor.hide_unseen,
    )
    for batch in batches:
        nll = losses(
            predictor.params, batch.inputs, batch.segment_ids, batch.positions, batch.targets
        )
        whole = np.concatenate([batch.inputs[:, :1], batch.targets], axis=1)
        field, counted = tokenizer.field_of(whole)[:, 1:], batch.mask > 0
        sums += np.bincount(field[counted], np.asarray(nll)[counted], len(sums))
        counts += np.bincount(field[counted], minlength=len(counts))
    named = zip(tokenizer.FIELDS, sums, counts, strict=True)
    found = {name: float(total / count) for name, total, count in named if count}
    return {"all": float(sums.sum() / counts.sum()), **found}
