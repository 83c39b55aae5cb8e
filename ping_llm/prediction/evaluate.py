"""The model beside classical methods, on the same measurements."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ping_llm import outputs, settings
from ping_llm.data.pipeline import eval_batches
from ping_llm.data.rows import ProbeRows, data_fingerprint, is_dataset
from ping_llm.errors import ConfigError, DataError
from ping_llm.estimators.pairs import Training, pair_keys
from ping_llm.measurements import MeasurementTable
from ping_llm.places import Places
from ping_llm.prediction import baselines, scores
from ping_llm.prediction.divergence import divergence
from ping_llm.prediction.evaluation_report import write_report
from ping_llm.prediction.fields import field_losses, token_table
from ping_llm.prediction.metrics import PINBALL_LEVELS
from ping_llm.prediction.predictor import Predictor
from ping_llm.prediction.protocols import Condition, load_task
from ping_llm.prediction.settings import EvaluateSettings
from ping_llm.progress import progress
from ping_llm.storage import Location
from ping_llm.training.metrics import by_field
from ping_llm.training.step import make_eval_step

FIELD_BATCHES, FIELD_BATCH_SIZE = 4, 8

Scores = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """How well a model and classical methods predict the same measurements.

    Attributes:
        protocol: "pair", "probe", "asn", "region", "time" or "raw".
        n: Answered measurements that were scored.
        n_failed: Failed ones.
        rows_available: How many there were to choose from.
        pairs: Unordered pairs of addresses among the scored ones.
        context: What all methods know, in words.
        trained_on_this_data: Whether the run was trained on this data set; false without a run.
        unseen_fraction: Measurements of an address of which nothing is known.
        methods: By method, its kind, errors of its predictions, of a model those of its mode, and
            their 95 % intervals.
        calibration: Coverage, reliability, pinball loss and CRPS of the model, of the run's where
            there are two.
        calibration_pretrained: The same of the model in the box; None where it was not asked.
        failures: AUC and Brier score of P(failed), by the models and by classical methods.
        noise_floor: Errors of the median of the other measurements of the same pair.
        ranking: By method, how it orders the destinations of each source.
        by: Errors by family, RTT, measurements that the answer was drawn from, and hour; with
            `prefixes` also by AS and country of the source, and distance.
        history: `methods` by number of measurements of the new source; None but for new sources.
        calibrated_on: Measurements that each model was calibrated on, by kind of question.
        loss_per_field: Loss of the run in nats per token by field; None without a run, and for
            files of measurements.
        divergence: How far measured RTTs are from predicted ones, for the pairs of most
            measurements; None where none has enough. See `divergence`.
        field_orders: With `field_orders`, the losses of each field; else None.
        tokens: With `tokens`, the actual and expected ones; else None.
        seconds: How long it took.
    """

    protocol: str
    n: int
    n_failed: int
    rows_available: int
    pairs: int
    context: str
    trained_on_this_data: bool
    unseen_fraction: float
    methods: Scores
    calibration: dict[str, Any]
    calibration_pretrained: dict[str, Any] | None
    failures: dict[str, Any]
    noise_floor: dict[str, Any]
    ranking: dict[str, dict[str, float] | None]
    by: dict[str, Scores]
    history: dict[str, Scores] | None
    calibrated_on: dict[str, dict[str, int]]
    loss_per_field: dict[str, float] | None
    divergence: dict[str, Any] | None
    field_orders: dict[str, dict[str, float]] | None
    tokens: list[dict[str, Any]] | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Returns what JSON holds of it: fields that are None are left out."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class ModelAnswers:
    """What the model says of n scored measurements.

    Attributes:
        mode: The likeliest RTTs in ms [n].
        quantiles: RTTs in ms at `PINBALL_LEVELS` [n, 5].
        below: Probability below the actual RTT; means nothing where it failed [n].
        crps: Continuous ranked probability score in ms; likewise [n].
        p_failed: Probability of failure [n].
        shown: Measurements that the answer was drawn from [n].
    """

    mode: np.ndarray
    quantiles: np.ndarray
    below: np.ndarray
    crps: np.ndarray
    p_failed: np.ndarray
    shown: np.ndarray


@settings.takes(EvaluateSettings)
def evaluate(chosen: EvaluateSettings) -> EvaluationResult:
    """Returns how well a model and classical methods predict the same measurements.

    Raises:
        ConfigError: A baseline is not for this protocol.
        DataError: The data cannot be read, or nothing in them can be scored.
        StorageError: The data are absent, or the report cannot be written.
        CheckpointError: `run` is no run.
    """
    if chosen.report is None:
        return _evaluate(chosen)
    report = Location.of(chosen.report)
    with outputs.claim(report, what="evaluate") as claim:
        result = _evaluate(chosen)
        title = f"{chosen.run or 'the pretrained model'} on {chosen.data}"
        write_report(result.to_json(), report, title=title, claim=claim)
        return result


def _evaluate(chosen: EvaluateSettings) -> EvaluationResult:
    started = time.monotonic()
    data = Location.of(chosen.data)
    predictors = {}
    if chosen.run is not None:
        predictors["model"] = Predictor.load(chosen.run, chosen.step)
    if chosen.pretrained:
        predictors["model_pretrained"] = Predictor.pretrained()
    first = next(iter(predictors.values()))
    if chosen.field_orders or chosen.tokens:
        predictors["model"].check_windows()
    places = None if chosen.prefixes is None else Places.read(chosen.prefixes)
    task = load_task(data, known=first.known, max_rows=chosen.max_rows)
    prepared = is_dataset(data)
    own = prepared and data_fingerprint(data) == first.trained_on.get("fingerprint")
    if prepared:  # a run knows a part of the train rows of its own data already
        train = ProbeRows(data, "train").to_table()
        predictors = {
            name: each if own and each is first else each.knowing(train)
            for name, each in predictors.items()
        }
    names, rows = _baselines(chosen.baselines, task.protocol), task.rows
    n = int(np.count_nonzero(rows.rtt >= 0))
    if n == 0:
        raise DataError(f"{data}: none of the {len(rows)} rows to score was answered")
    methods, by_history = {}, {}
    for history, make_condition in task.conditions.items():
        condition = make_condition()
        note = "" if history is None else f", {history} measurements of the source"
        answers = {}
        for name, predictor in predictors.items():
            asked: dict[str, MeasurementTable | None] = {name: None}
            if condition.history is not None:
                asked[f"{name}_online"] = condition.history
            answers |= {
                each: _ask(predictor, rows, condition, own_past, f"{each}{note}")
                for each, own_past in asked.items()
            }
        predicted = {name: answer.mode for name, answer in answers.items()}
        predicted |= _ask_baselines(names, rows, condition, note)
        methods = scores.errors(rows, predicted)
        if history is not None:
            by_history[str(history)] = methods
    # All but `history` is about the last condition, where most is known.
    first_name, first = next(iter(predictors.items()))
    model, unseen = answers[first_name], first.unseen(rows, condition.train)
    calibration = {
        name: scores.calibration(rows, each.quantiles, each.below, each.crps)
        for name, each in answers.items()
    }
    decoder, orders, tokens = (first.model.graphdef, first.model.params), None, None
    if chosen.field_orders:
        losses = field_losses(*decoder, rows, condition.train)
        orders = {name: dataclasses.asdict(each) for name, each in losses.items()}
    if chosen.tokens:
        tokens = token_table(*decoder, rows, chosen.tokens, longest=first.max_tokens)
    return EvaluationResult(
        protocol=task.protocol,
        n=n,
        n_failed=len(rows) - n,
        rows_available=task.available,
        pairs=len(np.unique(pair_keys(rows))),
        context=task.context,
        trained_on_this_data=own,
        unseen_fraction=float(unseen.any(axis=1).mean()),
        methods=methods,
        calibration=calibration[first_name],
        calibration_pretrained=calibration.get("model_pretrained"),
        failures=scores.failures(
            rows, condition.train, {name: answers[name].p_failed for name in predictors}
        ),
        noise_floor=scores.noise_floor(rows, task.pair_medians, model.mode),
        ranking=scores.rankings(rows, predicted),
        by=scores.breakdowns(rows, model.shown, predicted, places),
        history=by_history or None,
        calibrated_on={
            name: each.calibrated_on(condition.train) for name, each in predictors.items()
        },
        loss_per_field=_loss_per_field(first, data) if prepared and chosen.run else None,
        divergence=divergence(task.repeated, lambda some: first.answers(some, condition.train)),
        field_orders=orders,
        tokens=tokens,
        seconds=round(time.monotonic() - started, 1),
    )


def _baselines(names: Sequence[str], protocol: str) -> list[str]:
    """Returns the methods that are chosen for a protocol."""
    if names == ("all",):
        return [*baselines.STATIC, *(baselines.ONLINE if protocol == "time" else ())]
    online = [name for name in names if name in baselines.ONLINE]
    if online and protocol != "time":
        raise ConfigError(
            f"baseline {online[0]!r} is for data prepared with --split time; this is {protocol}"
        )
    return [name for name in names if name != "none"]


def _ask(
    predictor: Predictor,
    rows: MeasurementTable,
    condition: Condition,
    history: MeasurementTable | None,
    title: str,
) -> ModelAnswers:
    n, levels, actual = len(rows), np.array(PINBALL_LEVELS), scores.actual_rtt(rows)
    answers = ModelAnswers(np.zeros(n), np.zeros((n, len(levels))), *np.zeros((4, n)))
    asked = predictor.answers(rows, condition.train, history)
    with progress(title, total=n, unit="measurements") as bar:
        for index, distribution, shown in asked:
            answers.mode[index] = distribution.mode()
            answers.quantiles[index] = distribution.quantiles(levels)
            answers.below[index] = distribution.below(actual[index])
            answers.crps[index] = distribution.crps(actual[index])
            answers.p_failed[index] = distribution.p_failed
            answers.shown[index] = shown
            bar.update(len(index))
    return answers


def _ask_baselines(
    names: Sequence[str], rows: MeasurementTable, condition: Condition, note: str
) -> dict[str, np.ndarray]:
    if not names:
        return {}
    train, predicted = Training.of(condition.train), {}
    with progress(f"baselines{note}", total=len(names), unit="methods") as bar:
        for name in names:
            predicted[name] = baselines.predict(name, rows, train, condition.history)
            bar.update(1, note=name)
    return predicted


def _loss_per_field(predictor: Predictor, data: Location) -> dict[str, float]:
    """Returns the loss in nats a token on fixed batches of the test rows, in all and by field."""
    eval_step = make_eval_step(predictor.model.graphdef)
    batches = eval_batches(
        data.url,
        "test",
        batch_size=FIELD_BATCH_SIZE,
        seq_len=predictor.max_tokens,
        count=FIELD_BATCHES,
    )
    sums = [jax.device_get(eval_step(predictor.model.params, vars(batch))) for batch in batches]
    nll, count = np.array(sums, np.float64).sum(axis=0)
    losses = {"all": float(nll.sum() / count.sum()), **by_field("", nll, count)}
    return {name: loss for name, loss in losses.items() if loss is not None}
