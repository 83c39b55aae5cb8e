"""`Predictor`: what a trained run says of round trips, for tables of any library."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ping_llm.data.network import Network, read_known
from ping_llm.errors import CheckpointError, DataError
from ping_llm.estimators.pairs import Nodes
from ping_llm.measurements import NO_TIME, MeasurementTable
from ping_llm.prediction.answers import Answerer
from ping_llm.prediction.calibration import Answers
from ping_llm.prediction.distribution import Distribution
from ping_llm.prediction.explain import Evidence, explain
from ping_llm.runs import PRETRAINED, load_run
from ping_llm.storage import Location

TIME_GROUPS = 8  # into which questions at many times are divided, each with what was known then
LEVELS = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}


@dataclasses.dataclass(eq=False, repr=False)
class Predictor:
    """A trained decoder that predicts RTT distributions and failures from what was measured.

    An answer depends on its question and what is known, not on what else is asked with it.

    Attributes:
        model: Its decoder.
        max_tokens: Tokens of the longest sequence that it was trained on.
        known: The measurements that it answers from: those its run keeps of the train rows.
        trained_on: The run's data set, its `path` and `fingerprint`; empty where there is none.
        grids_a_batch: Sequences of grids in each batch of its training; None: not known.
        windows_a_batch: Sequences of windows, likewise.
    """

    model: Answerer
    _: dataclasses.KW_ONLY
    max_tokens: int
    known: MeasurementTable = dataclasses.field(default_factory=MeasurementTable.empty)
    trained_on: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grids_a_batch: int | None = None
    windows_a_batch: int | None = None
    _calibrated: Answerer | None = None

    @classmethod
    def load(cls, run: str | Location, step: int | None = None) -> "Predictor":
        """Returns the decoder of a run directory or an export.

        Args:
            run: Where it is.
            step: Of which checkpoint; None: the best, of the lowest objective on the valid split.

        Raises:
            CheckpointError: `run` is no run, or has no such checkpoint.
        """
        location = Location.of(run)
        loaded = load_run(location, step)
        training = loaded.config["train"]
        grids = round(training["grid_fraction"] * training["batch_size"])
        return cls(
            Answerer(loaded.graphdef, loaded.params),
            max_tokens=training["seq_len"],
            known=read_known(location),
            trained_on=loaded.config["data"],
            grids_a_batch=grids,
            windows_a_batch=training["batch_size"] - grids,
        )

    @classmethod
    def pretrained(cls) -> "Predictor":
        """Returns the model in the box, which answers from the measurements it is given.

        docs/pretrained.md says what it was trained on and how it was judged.
        """
        loaded = load_run(PRETRAINED)
        model = Answerer(loaded.graphdef, loaded.params)
        return cls(model, max_tokens=loaded.config["train"]["seq_len"])

    # --- tables of any library ---------------------------------------------------------------

    def predict(self, frame: Any, *, history: Any = None) -> Any:
        """Returns `frame` with the answers to its rows in further columns.

        These are the quantiles of the RTT in ms given that it is answered, `rtt_p5`, `rtt_p25`,
        `rtt_p50`, `rtt_p75` and `rtt_p95`; the likeliest value, `rtt_mode`; its mean, `rtt_mean`;
        `p_failed`, the probability of a failure; `unseen_src` and `unseen_dst`, whether nothing is
        known of the address; `history`, how many measurements the answer was drawn from; and
        `later`, how many of those given as history were left out as later than the question.

        Args:
            frame: Questions: columns src_addr, dst_addr and, where times are known, event_time, in
                a pandas, polars or Arrow table, a dictionary of lists, or a `MeasurementTable`. Of
                a pair itself, what was measured before the time counts; without a time, all of it.
            history: Further measurements in any of these, of any part of the network; None: none.
                What is later than a question does not count for it. Questions at many times are
                divided into eight groups, whose networks are as known at the first of each.

        Returns:
            A pandas or polars table if `frame` is one, else an Arrow table.

        Raises:
            DataError: A table lacks a column, or a value in it cannot be; or nothing is known.
        """
        if isinstance(frame, pa.RecordBatchReader):  # which gives its rows once
            frame = frame.read_all()
        questions = _table(frame, questions=True)
        try:
            measured = None if history is None else _table(history)
        except DataError as error:
            raise DataError(f"history: {error}") from None
        return _append(frame, self.ask(questions, measured))

    def score(self, frame: Any) -> np.ndarray:
        """Returns how surprising each measurement of a table is [n], in nats, float64.

        That is minus the logarithm of the probability of an RTT within 1 % of its own, or of its
        failure, from what is known and the measurements of its pair before it in the table.

        Args:
            frame: Measurements: as for `predict`, with a column rtt in ms, below 0 for a failure.

        Raises:
            DataError: The table lacks a column, or a value in it cannot be; or nothing is known.
        """
        measured = _table(frame)
        scores = np.zeros(len(measured))
        # What has no time stands before everything, so it would stand before itself.
        past = MeasurementTable.concat([self.known, measured.take(measured.has_time)])
        for rows, distribution, _ in self.answers(measured, history=past):
            scores[rows] = surprise(measured.rtt[rows], distribution)
        return scores

    # --- from questions to answers -----------------------------------------------------------

    def ask(
        self,
        questions: MeasurementTable,
        history: MeasurementTable | None = None,
        see: Callable[[np.ndarray, Distribution], None] | None = None,
    ) -> pa.Table:
        """Returns the columns that `predict` appends; RTTs of the questions are not looked at.

        Args:
            questions: What is asked.
            history: Further measurements.
            see: Is called with (questions by number, their distributions) for all of them.
        """
        n, levels = len(questions), np.array([*LEVELS.values()])
        quantiles, (mode, mean, p_failed) = np.zeros((n, len(levels))), np.zeros((3, n))
        unseen, (shown, later) = np.zeros((n, 2), bool), np.zeros((2, n), np.int32)
        for group, so_far in _as_of(questions, history):
            asked, known = questions.take(group), self._knowing(so_far)
            for rows, answer, count in self.answers(asked, known, self._knowing(history)):
                at = group[rows]
                quantiles[at] = answer.quantiles(levels)
                mode[at], mean[at], p_failed[at] = answer.mode(), answer.mean(), answer.p_failed
                shown[at] = count
                if see is not None:
                    see(at, answer)
            unseen[group] = self.unseen(asked, known)
            later[group] = 0 if history is None or so_far is None else len(history) - len(so_far)
        columns = {f"rtt_{name}": quantiles[:, i] for i, name in enumerate(LEVELS)}
        columns |= {"rtt_mode": mode, "rtt_mean": mean, "p_failed": p_failed}
        columns |= {"unseen_src": unseen[:, 0], "unseen_dst": unseen[:, 1]}
        return pa.table({**columns, "history": shown, "later": later})

    def explain(
        self, question: MeasurementTable, history: MeasurementTable | None = None
    ) -> list[Evidence]:
        """Returns which measurements the answer to one question counts most; see `explain`."""
        return explain(question, self._knowing(history))

    def calibrated_on(self, history: MeasurementTable | None = None) -> dict[str, int]:
        """Returns on how many measurements answers are calibrated, by kind of question."""
        return self.answerer(self._knowing(history)).calibration.counts()

    def _knowing(self, history: MeasurementTable | None) -> MeasurementTable:
        """Returns what is known with some further measurements."""
        return self.known if history is None else MeasurementTable.concat([self.known, history])

    def unseen(
        self, questions: MeasurementTable, known: MeasurementTable | None = None
    ) -> np.ndarray:
        """Returns whether nothing is known of source and destination [n, 2]."""
        known = self.known if known is None else known
        seen = self.network.nodes if known is self.known else Nodes(known.src, known.dst)
        return np.stack([seen.lookup(end) < 0 for end in (questions.src, questions.dst)], axis=1)

    def answers(
        self,
        questions: MeasurementTable,
        known: MeasurementTable | None = None,
        history: MeasurementTable | None = None,
    ) -> Answers:
        """Yields (questions, their distributions, measurements shown), as `Answerer.answer` does.

        Args:
            questions: What to predict.
            known: What the network is known by; None: `self.known`.
            history: Measurements of pairs before the questions; None: `known`.
        """
        known = self.known if known is None else known
        network = self.network if known is self.known else None
        return self.answerer(known).answer(questions, known, history, network)

    @functools.cached_property
    def network(self) -> Network:
        """What is known by nodes and pairs, made once for all that is asked."""
        return Network.of(self.known)

    def answerer(self, known: MeasurementTable) -> Answerer:
        """Returns the decoder calibrated on `self.known`, or where that is nothing, on `known`.

        Raises:
            CheckpointError: The decoder has learnt no grids, which answers are read from.
        """
        if self.grids_a_batch == 0:
            raise CheckpointError(
                "the run has learnt no grids, so it cannot predict; train it with a larger "
                "grid_fraction or batch_size"
            )
        if self._calibrated is None or not len(self.known):
            self._calibrated = self.model.calibrated(self.known if len(self.known) else known)
        return self._calibrated

    def check_windows(self) -> None:
        """Raises a `CheckpointError` if the decoder has learnt no windows, and so only RTTs."""
        if self.windows_a_batch == 0:
            raise CheckpointError(
                "the run has learnt no windows, so it knows of no field but the RTT; train it with "
                "a smaller grid_fraction or a larger batch_size"
            )

    def knowing(self, known: MeasurementTable) -> "Predictor":
        """Returns the predictor of the same decoder for another network."""
        return dataclasses.replace(self, known=known, _calibrated=None)


def surprise(rtt: np.ndarray, distribution: Distribution) -> np.ndarray:
    """Returns minus the log-probability of RTTs within 1 % of `rtt` [n], or of failures below 0."""
    near = distribution.within(np.maximum(rtt, 0), 0.01)
    p_failed = distribution.p_failed
    probability = np.where(rtt < 0, p_failed, (1 - p_failed) * near)
    return -np.log(np.maximum(probability, 1e-300))


def not_later(history: MeasurementTable | None, time: int) -> MeasurementTable | None:
    """Returns what was measured up to a time; all of it at `NO_TIME`."""
    return history if history is None or time == NO_TIME else history.take(history.time <= time)


def _as_of(
    questions: MeasurementTable, history: MeasurementTable | None
) -> Iterator[tuple[np.ndarray, MeasurementTable | None]]:
    """Yields (some questions, what of the history was known at the first of them)."""
    if history is None or not questions.has_time.any():
        yield np.arange(len(questions)), history
        return
    order = np.argsort(history.time, kind="stable")  # unknown times first
    known = np.searchsorted(history.time[order], questions.time, side="right")
    known = np.where(questions.has_time, known, len(history))
    # Four questions of which 3, 3, 7 and 9 measurements came before are asked with 3, 3, 7, 9; of
    # many, as many different numbers as there are groups are kept, and the others go down to these.
    steps = np.unique(known)
    steps = steps[np.unique(np.arange(TIME_GROUPS) * len(steps) // TIME_GROUPS)]
    group = np.searchsorted(steps, known, side="right") - 1
    for i, count in enumerate(steps):
        yield np.flatnonzero(group == i), history.take(np.sort(order[:count]))


def _table(frame: Any, *, questions: bool = False) -> MeasurementTable:
    is_ours = isinstance(frame, MeasurementTable)
    return frame if is_ours else MeasurementTable.from_arrow(frame, questions=questions)


def _append(frame: Any, answers: pa.Table) -> Any:
    """Returns `frame` with the columns of `answers`, which replace any of the same names."""
    library = type(frame).__module__.partition(".")[0]
    if library == "pandas":
        return frame.assign(**answers.to_pandas().set_index(frame.index))
    if library == "polars":
        return frame.with_columns(type(frame)(answers).get_columns())
    table = pa.table(frame)
    table = table.drop_columns(
        [name for name in table.schema.names if name in answers.schema.names]
    )
    for name in answers.schema.names:
        table = table.append_column(name, answers[name])
    return table
