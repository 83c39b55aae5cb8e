"""One thread that answers the questions of all requests, some of each at a time."""

import collections
import dataclasses
import hashlib
import threading
from concurrent.futures import CancelledError, Future, InvalidStateError

import numpy as np
import pyarrow as pa

from ping_llm.errors import PingLLMError
from ping_llm.measurements import MeasurementTable
from ping_llm.prediction.distribution import Distribution
from ping_llm.prediction.predictor import Predictor, surprise

BLOCK = 16  # questions answered at once: one of the shapes that `reading` computes
MOST_JOBS = 64  # that wait, before more are refused
MOST_NETWORKS = 2  # of histories of requests, each kept with its matrices
CURVE = np.arange(1, 100) / 100  # levels of the quantiles that draw a distribution


class BusyError(PingLLMError):
    """As many requests wait as may."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """What is said of n questions.

    Attributes:
        columns: Those of `Predictor.ask`.
        curve: Quantiles of the RTT in ms at `CURVE` [n, 99].
        below: Probability of an answer that takes less than the limit [n], given one.
        surprise: Of the RTT that stands in the question [n], in nats.
    """

    columns: pa.Table
    curve: np.ndarray
    below: np.ndarray
    surprise: np.ndarray

    @classmethod
    def concat(cls, parts: list["Answered"]) -> "Answered":
        """Returns parts, end to end."""
        columns = pa.concat_tables([part.columns for part in parts])
        names = ("curve", "below", "surprise")
        return cls(columns, *(np.concatenate([getattr(p, n) for p in parts]) for n in names))

    def slice(self, start: int, stop: int) -> "Answered":
        """Returns questions [start, stop)."""
        columns = self.columns.slice(start, stop - start)
        return Answered(columns, *(each[start:stop] for each in list(vars(self).values())[1:]))


@dataclasses.dataclass(eq=False)
class _Job:
    questions: MeasurementTable
    limit: np.ndarray
    history: MeasurementTable | None
    key: bytes  # of jobs that may be answered together
    future: Future
    done: list[Answered] = dataclasses.field(default_factory=list)
    at: int = 0  # questions that were answered


class AnswerQueue:
    """Answers what is submitted to it, in one thread, as `Predictor.ask` does."""

    def __init__(self, predictor: Predictor):
        """Starts the thread.

        Args:
            predictor: Who answers; it may know nothing, where every question brings a history.
        """
        model = dataclasses.replace(predictor.model, remembered={})
        self.predictor = dataclasses.replace(predictor, model=model, _calibrated=None)
        self.blocks = self.questions = 0
        self._networks: dict[bytes, Predictor] = {}
        self._waiting: collections.deque[_Job] = collections.deque()
        self._idle: collections.deque[_Job] = collections.deque()
        self._change = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    def submit(
        self,
        questions: MeasurementTable,
        history: MeasurementTable | None = None,
        *,
        limit: np.ndarray | float = np.inf,
        idle: bool = False,
    ) -> "Future[Answered]":
        """Returns the future answers to some questions; one that is cancelled is forgotten.

        Args:
            questions: What is asked; the RTTs are those whose surprise is told.
            history: Further measurements, which count for these questions alone.
            limit: RTTs in ms of `Answered.below`, one or [n].
            idle: Whether they may wait until nothing else does.

        Raises:
            BusyError: `MOST_JOBS` wait already.
        """
        n = len(questions)
        job = _Job(questions, np.broadcast_to(limit, n), history, _key(history), Future())
        if history is not None and questions.has_time.any() and history.has_time.any():
            job.key += b"at their times"
        with self._change:
            if len(self._waiting) >= MOST_JOBS and not idle:
                raise BusyError("too many requests wait; try again in a second")
            (self._idle if idle else self._waiting).append(job)
            self._change.notify()
        return job.future

    @property
    def waiting(self) -> int:
        """How many requests are not answered yet."""
        return len(self._waiting)

    def close(self) -> None:
        """Ends the thread after what it is at; what waits is cancelled."""
        with self._change:
            self._open = False
            for job in (*self._waiting, *self._idle):
                job.future.cancel()
            self._change.notify()
        self._thread.join()

    def _work(self) -> None:
        while (parts := self._next()) is not None:
            jobs = [job for job, _, _ in parts]
            try:
                answered, first = self._answer(parts), 0
                for job, start, stop in parts:
                    job.done.append(answered.slice(first, first + stop - start))
                    first += stop - start
                    if stop == len(job.questions):
                        self._settle(job, Answered.concat(job.done))
            except Exception as error:  # it belongs to those who asked
                for job in jobs:
                    self._settle(job, error)

    # Jobs of 1, 40 and 3 questions are answered in blocks of 1 + 15, 3 + 13, and 12: a long one
    # goes to the end after each, so that short ones hardly wait for it.
    def _next(self) -> list[tuple[_Job, int, int]] | None:
        """Returns (job, start, stop) of the questions of a block; None when closed."""
        with self._change:
            while True:
                self._change.wait_for(lambda: self._waiting or self._idle or not self._open)
                if not self._open:
                    return None
                queue = self._waiting or self._idle
                for job in [job for job in queue if job.future.done()]:  # by who lost patience
                    queue.remove(job)
                if queue:
                    break
            key, room, parts = queue[0].key, BLOCK, []
            for job in [job for job in queue if job.key == key]:
                start, whole = job.at, len(job.questions)
                stop = whole if self._is_timed(job) else min(start + room, whole)
                parts.append((job, start, stop))
                job.at = stop
                queue.remove(job)
                if stop < whole:
                    queue.append(job)
                room -= stop - start
                if room <= 0 or self._is_timed(job):
                    break
            return parts

    @staticmethod
    def _is_timed(job: _Job) -> bool:
        """Whether what is known differs from question to question, so that it is asked whole."""
        return job.key.endswith(b"at their times")

    def _answer(self, parts: list[tuple[_Job, int, int]]) -> Answered:
        first = parts[0][0]
        questions = MeasurementTable.concat([job.questions.slice(a, b) for job, a, b in parts])
        limit = np.concatenate([job.limit[a:b] for job, a, b in parts])
        n = len(questions)
        curve, (below, strange) = np.zeros((n, len(CURVE))), np.zeros((2, n))

        def see(rows: np.ndarray, answer: Distribution) -> None:
            curve[rows] = answer.quantiles(CURVE)
            below[rows] = answer.below(limit[rows])
            strange[rows] = surprise(questions.rtt[rows], answer)

        if self._is_timed(first):
            columns = self.predictor.ask(questions, first.history, see)
        else:
            columns = self._knowing(first).ask(questions, see=see)
        self.blocks += 1
        self.questions += n
        return Answered(columns, curve, below, strange)

    def _knowing(self, job: _Job) -> Predictor:
        """Returns who answers a job: one predictor for all requests with one history."""
        if job.history is None:
            return self.predictor
        found = self._networks.pop(job.key, None)
        if found is None:
            known = MeasurementTable.concat([self.predictor.known, job.history])
            calibrated = self.predictor.answerer(known)
            found = dataclasses.replace(self.predictor, known=known, _calibrated=calibrated)
            while len(self._networks) >= MOST_NETWORKS:
                del self._networks[next(iter(self._networks))]
        self._networks[job.key] = found
        return found

    def _settle(self, job: _Job, outcome: Answered | Exception) -> None:
        with self._change:
            for queue in (self._waiting, self._idle):
                if job in queue:
                    queue.remove(job)
        try:
            if isinstance(outcome, Exception):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)
        except (InvalidStateError, CancelledError):  # who asked has gone
            pass


def _key(history: MeasurementTable | None) -> bytes:
    if history is None:
        return b""
    name = hashlib.sha256()
    for column in (history.time, history.src, history.dst, history.rtt):
        name.update(np.ascontiguousarray(column).data)
    return name.digest()
