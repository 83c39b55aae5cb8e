"""`Predictor`: what a trained run says of round trips, for tables of any library."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ping_llm import addresses
from ping_llm.data.network import read_known
from ping_llm.data.rows import ProbeRows, data_fingerprint, is_dataset
from ping_llm.errors import DataError, PingLLMError
from ping_llm.estimators.pairs import Nodes
from ping_llm.measurements import MeasurementTable
from ping_llm.prediction import rtt
from ping_llm.prediction.answers import Answerer, Answers
from ping_llm.prediction.contexts import (
    Contexts,
    EncodedPrompts,
    encode_prompts,
    hide_sources,
    newest_before,
    no_contexts,
    same_source,
)
from ping_llm.prediction.distribution import Distribution
from ping_llm.runs import load_run
from ping_llm.storage import Location

LEVELS = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
_POOLED = 512  # questions whose distributions are held at once


@dataclasses.dataclass(eq=False, repr=False)
class Predictor:
    """A trained decoder that predicts RTT distributions and failures.

    An answer depends on its question and context, not on what else is asked with it.

    Attributes:
        graphdef: The decoder's static part.
        params: Its parameters.
        max_tokens: Tokens of the longest sequence that it was trained on.
        seen: The addresses it was trained on; None: not known.
        hide_unseen: Whether to hide the source of each question whose source training has not seen,
            which is for a decoder that was trained on hidden ones.
        trained_on: The run's data set, its `path` and `fingerprint`; empty where there is none.
        known: What a run that learnt grids keeps of its train rows, and answers from; None: it did
            not, and answers from the contexts of sources.
    """

    graphdef: Any
    params: Any
    _: dataclasses.KW_ONLY
    max_tokens: int
    seen: Nodes | None = None
    hide_unseen: bool = False
    trained_on: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    known: MeasurementTable | None = None

    @classmethod
    def load(cls, run: str | Location) -> "Predictor":
        """Returns the best decoder of a run directory or an export.

        The best one has the lowest objective on the valid split. The addresses it was trained on
        are known where its data set is still in its place. A source that is not among them is
        hidden if training has hidden some.

        Raises:
            CheckpointError: `run` is no run, or has no checkpoint.
        """
        loaded = load_run(run)
        config = loaded.config
        learnt_grids = config["train"].get("grid_fraction", 0) > 0
        if learnt_grids:
            known = read_known(Location.of(run))
            seen = Nodes(known.src, known.dst)
        else:
            known, seen = None, _trained_addresses(config["data"])
        return cls(
            loaded.graphdef,
            loaded.params,
            max_tokens=config["train"]["seq_len"],
            seen=seen,
            hide_unseen=config["train"]["hidden_source_fraction"] > 0,
            trained_on=config["data"],
            known=known,
        )

    # --- tables of any library ---------------------------------------------------------------

    def predict(self, frame: Any, *, history: Any = None) -> Any:
        """Returns `frame` with the answers to its rows in further columns.

        These are the quantiles of the RTT in ms given that it is answered, `rtt_p5`, `rtt_p25`,
        `rtt_p50`, `rtt_p75` and `rtt_p95`; its mean, `rtt_mean`; `p_failed`, the probability of a
        failure; `unseen_src` and `unseen_dst`, whether the address was not in training, null where
        that is not known; and `history`, how many measurements were read first.

        Args:
            frame: Questions: columns src_addr, dst_addr and, where times are known, event_time, in
                a pandas, polars or Arrow table, a dictionary of lists, or a `MeasurementTable`.
            history: Measurements in any of these, of which each question is given the newest of its
                source, or all to a run that learnt grids; None: none.

        Returns:
            A pandas or polars table if `frame` is one, else an Arrow table.

        Raises:
            DataError: A table lacks a column, or a value in it cannot be.
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

        That is minus the logarithm of the probability that the model gives to its RTT, or to its
        failure, after the measurements of its source before it in the table. A measurement without
        a time is judged without any.

        Args:
            frame: Measurements: as for `predict`, with a column rtt in ms, below 0 for a failure.

        Raises:
            DataError: The table lacks a column, or a value in it cannot be.
        """
        measured = _table(frame)
        room = self.max_tokens - rtt.QUESTION_TOKENS
        past = newest_before(measured, measured, max_tokens=room)
        return -self.log_likelihood(measured, past)

    # --- from questions to answers -----------------------------------------------------------

    def contexts(self, history: MeasurementTable | None, questions: MeasurementTable) -> Contexts:
        """Returns for each question the newest measurements of its source that fit."""
        if history is None:
            return no_contexts(len(questions))
        return same_source(history, questions, max_tokens=self.max_tokens - rtt.QUESTION_TOKENS)

    def ask(self, questions: MeasurementTable, history: MeasurementTable | None = None) -> pa.Table:
        """Returns the columns that `predict` appends; RTTs of the questions are not looked at."""
        n, unseen = len(questions), self.unseen(questions)
        quantiles, mean, p_failed = np.zeros((n, len(LEVELS))), np.zeros(n), np.zeros(n)
        shown = np.zeros(n, np.int32)
        for rows, answer, count in self.answers(questions, history):
            quantiles[rows] = answer.quantiles(np.array([*LEVELS.values()]))
            mean[rows], p_failed[rows], shown[rows] = answer.mean(), answer.p_failed, count
        columns = {f"rtt_{name}": quantiles[:, i] for i, name in enumerate(LEVELS)}
        columns |= {"rtt_mean": mean, "p_failed": p_failed}
        for i, name in enumerate(("unseen_src", "unseen_dst")):
            columns[name] = pa.nulls(n, pa.bool_()) if unseen is None else unseen[:, i]
        return pa.table({**columns, "history": shown})

    def answers(self, questions: MeasurementTable, history: MeasurementTable | None) -> Answers:
        """Yields (questions, their distributions, measurements shown) until all had their turn."""
        if self.known is not None:
            known = self.known
            if history is not None:
                known = MeasurementTable.concat([known, history])
            yield from self.from_grids(questions, known)
            return
        contexts = self.contexts(history, questions)
        for rows, answer in self.distributions(questions, contexts):
            yield rows, answer, contexts.lengths()[rows]

    def from_grids(
        self,
        questions: MeasurementTable,
        known: MeasurementTable,
        history: MeasurementTable | None = None,
    ) -> Answers:
        """Yields answers as `Answerer.answer` does, calibrated on what is known."""
        answerer = Answerer(self.graphdef, self.params).calibrated(known)
        yield from answerer.answer(questions, known, history)

    def unseen(self, questions: MeasurementTable) -> np.ndarray | None:
        """Returns whether source and destination were not in training [n, 2]; None: not known."""
        if self.seen is None:
            return None
        ends = (questions.src, questions.dst)
        return np.stack([self.seen.lookup(end) < 0 for end in ends], axis=1)

    def distributions(
        self, questions: MeasurementTable, contexts: Contexts | None = None
    ) -> Iterator[tuple[np.ndarray, Distribution]]:
        """Yields (rows, their distributions) until every question has had its turn."""
        yield from rtt.distributions(self.graphdef, self.params, self._encode(questions, contexts))

    def mixtures(
        self, prompts: Sequence[tuple[MeasurementTable, Contexts]]
    ) -> Iterator[tuple[np.ndarray, Distribution]]:
        """Yields (rows, their distributions), each the mean over several prompts.

        Args:
            prompts: (questions, their contexts); question i of all is about the same measurement.
        """
        order = np.argsort(prompts[0][1].of_query, kind="stable")  # of one context together
        for start in range(0, len(order), _POOLED):
            rows = order[start : start + _POOLED]
            answers = [
                answer
                for questions, contexts in prompts
                for answer in self.distributions(
                    questions.take(rows),
                    dataclasses.replace(contexts, of_query=contexts.of_query[rows]),
                )
            ]
            yield rows, Distribution.mixture(len(rows), answers)

    def log_likelihood(
        self, measurements: MeasurementTable, contexts: Contexts | None = None
    ) -> np.ndarray:
        """Returns the log of the probability of each measurement's result [n], in nats.

        That is of its failure, or of its RTT's code.
        """
        prompts = self._encode(measurements, contexts)
        return rtt.log_likelihood(self.graphdef, self.params, prompts, measurements.rtt)

    def _encode(self, questions: MeasurementTable, contexts: Contexts | None) -> EncodedPrompts:
        contexts = contexts or no_contexts(len(questions))
        unseen = self.unseen(questions)
        if self.hide_unseen and unseen is not None:
            contexts, questions = hide_sources(contexts, questions, unseen[:, 0])
        return encode_prompts(contexts, questions)


def _trained_addresses(data: Mapping[str, Any]) -> Nodes | None:
    """Returns the addresses a run was trained on; None where its data set is gone or another."""
    location = Location.of(data["path"])
    try:
        if not is_dataset(location) or data_fingerprint(location) != data["fingerprint"]:
            return None
    except PingLLMError:
        return None
    # Batch by batch: not all measurements at once.
    batches = ProbeRows(location, "train").batches
    nodes = [Nodes(batch.src, batch.dst).addresses for batch in batches]
    return Nodes(*nodes, np.zeros(0, addresses.ADDRESS))


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
