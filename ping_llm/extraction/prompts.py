"""Prompts: what the model is given, in token ids, of text, chats, ids, tasks or measurements."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ping_llm.activations.roles import REAL
from ping_llm.activations.store import UnitPrompts
from ping_llm.data import windows
from ping_llm.data.rows import SPLITS, ProbeRows, read_metadata
from ping_llm.errors import ConfigError, DataError
from ping_llm.extraction import arc
from ping_llm.extraction.records import Records, WorkUnit, describe_files, find_files
from ping_llm.extraction.settings import ExtractSettings
from ping_llm.extraction.templates import CheckpointTokenizer
from ping_llm.tokenizer import LANGUAGE_VERSION

COLUMNS = {"text": ("text",), "chat": ("messages",), "tokens": ("tokens", "input_ids")}
ALSO = {
    "text": ("id",),
    "chat": ("id", "tools"),
    "tokens": ("id", "attention_mask", "position_ids"),
}


class PromptSource(Protocol):
    """Where prompts come from.

    Attributes:
        identity: What decides the prompts beside the settings: files, tokenizer, template.
        units: The work units.
    """

    identity: dict[str, Any]
    units: list[WorkUnit]

    def read(self, unit: WorkUnit) -> UnitPrompts:
        """Returns the prompts of a unit."""
        ...


def open_source(
    cfg: ExtractSettings,
    *,
    model: Path | None,
    vocab_size: int,
    sampling: windows.WindowConfig = windows.DEFAULTS,
) -> PromptSource:
    """Returns the prompts of an input.

    Args:
        cfg: The settings, nothing left open.
        model: Directory of the checkpoint, for its tokenizer; None: the model is a run.
        vocab_size: Number of ids the model knows.
        sampling: How windows were sampled for the run.

    Raises:
        ConfigError: The format does not go with the model.
        DataError: The input cannot be read.
        CheckpointError: The tokenizer cannot be read.
    """
    if cfg.format == "measurements":
        if model is not None:
            raise ConfigError(f"format='measurements' needs a run of this package; {model} is none")
        return MeasurementPrompts(cfg, sampling)
    if model is None and cfg.format != "tokens":
        raise ConfigError(
            f"format={cfg.format!r} needs a language model; a run takes measurements or tokens"
        )
    kind = ArcPrompts if cfg.format == "arc" else TextPrompts
    return kind(cfg, model=model, vocab_size=vocab_size)


# --- text, chats, ids -------------------------------------------------------------------------


class TextPrompts:
    """Prompts of records that hold text, a chat, or token ids."""

    def __init__(self, cfg: ExtractSettings, *, model: Path | None, vocab_size: int):
        self._cfg, self._vocab_size = cfg, vocab_size
        self._records = Records(
            cfg.input,
            columns=COLUMNS[cfg.format],
            also=ALSO[cfg.format],
            unit_bytes=max(int(cfg.unit_mb * 1e6), 1),
            limit=cfg.limit,
        )
        self.units = self._records.units
        self._tokenizer = None
        # `open_source` saw to it that text and chats have a model.
        if model and (cfg.format != "tokens" or (model / "tokenizer.json").is_file()):
            chat = cfg.format == "chat"
            self._tokenizer = CheckpointTokenizer(model, chat=chat, vocab_size=vocab_size)
        self.identity = {
            "files": self._records.files,
            "tokenizer": self._tokenizer.identity if self._tokenizer else None,
        }

    def read(self, unit: WorkUnit) -> UnitPrompts:
        """Returns the prompts of a unit.

        Raises:
            DataError: A record is not what the format says, or too long and that is an error.
        """
        records = self._records.read(unit)
        if self._cfg.format == "tokens":
            encoded = ((sample, self._checked(record, sample)) for sample, record in records)
        else:
            assert self._tokenizer is not None
            texts = ((sample, self._text(record, sample)) for sample, record in records)
            # A chat template writes the special tokens itself.
            special = self._cfg.format == "text"
            encoded = self._tokenizer.encode(texts, add_special=special)
        return _gather(encoded, self._cfg, self._tokenizer)

    def _text(self, record: dict[str, Any], sample: str) -> str:
        if self._cfg.format == "chat":
            if not isinstance(record.get("messages"), list):
                raise _missing("list `messages`", record, sample)
            assert self._tokenizer
            assert self._tokenizer.template
            return self._tokenizer.template.render(record, sample)
        if not isinstance(record.get("text"), str):
            raise _missing("string `text`", record, sample)
        return record["text"]

    def _checked(self, record: dict[str, Any], sample: str) -> np.ndarray:
        given = (record[key] for key in COLUMNS["tokens"] if record.get(key) is not None)
        ids = next(given, None)
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise _missing("list of whole numbers `tokens` or `input_ids`", record, sample)
        mask = _per_id("attention_mask", record, ids, sample)
        kept = list(range(len(ids))) if mask is None else _not_padding(mask, sample)
        positions = _per_id("position_ids", record, ids, sample)
        if positions is not None and [positions[i] for i in kept] != list(range(len(kept))):
            raise DataError(f"{sample}: its `position_ids` do not count from 0; make each its own")
        ids = [ids[i] for i in kept]
        if wrong := [i for i in ids if not 0 <= i < self._vocab_size]:
            raise DataError(f"{sample}: id {wrong[0]} is not in 0..{self._vocab_size - 1}")
        return np.array(ids, np.int32)


def _missing(wanted: str, record: dict[str, Any], sample: str) -> DataError:
    return DataError(f"{sample}: it has no {wanted}; its keys are {', '.join(record)}")


def _per_id(key: str, record: dict[str, Any], ids: list[int], sample: str) -> list[Any] | None:
    """Returns what a record says of each of its ids, or None."""
    values = record.get(key)
    if values is not None and not (isinstance(values, list) and len(values) == len(ids)):
        raise DataError(f"{sample}: `{key}` must be a list of {len(ids)}, one for each id")
    return values


def _not_padding(mask: list[Any], sample: str) -> list[int]:
    """Returns where an attention mask is 1, all in a row: elsewhere is padding, at either end."""
    if wrong := [value for value in mask if type(value) not in (int, bool) or value not in (0, 1)]:
        raise DataError(f"{sample}: its `attention_mask` has {wrong[0]!r}; expected 0 or 1")
    kept = np.flatnonzero(mask).tolist()
    if kept and len(kept) != kept[-1] - kept[0] + 1:
        raise DataError(
            f"{sample}: its `attention_mask` has a 0 between 1s; only padding at the ends can go"
        )
    return kept


def _gather(
    encoded: Iterable[tuple[str, np.ndarray]],
    cfg: ExtractSettings,
    tokenizer: CheckpointTokenizer | None,
) -> UnitPrompts:
    """Returns the prompts of each (sample, token ids), those that are too long dealt with."""
    ids: list[str] = []
    prompts: list[np.ndarray] = []
    overlong = 0
    assert cfg.max_length is not None
    for sample, tokens in encoded:
        if len(tokens) > cfg.max_length:
            overlong += 1
            pieces = _cut(tokens, cfg.overlong, cfg.max_length, sample)
        else:
            pieces = [tokens]
        prompts += pieces
        ids += [sample] if len(pieces) == 1 else [f"{sample}/{n}" for n in range(len(pieces))]
    tokens = np.concatenate([np.zeros(0, np.int32), *prompts])
    roles = np.full(len(tokens), REAL, np.uint8) if tokenizer is None else tokenizer.roles(tokens)
    offsets = np.cumsum([0, *map(len, prompts)])
    return UnitPrompts(tokens, offsets, roles, ids, overlong, int((np.diff(offsets) == 0).sum()))


def _cut(tokens: np.ndarray, overlong: str, max_length: int, sample: str) -> list[np.ndarray]:
    """Returns what becomes of a prompt that is too long."""
    if overlong == "truncate-left":
        return [tokens[-max_length:]]
    if overlong == "truncate-right":
        return [tokens[:max_length]]
    if overlong == "split":
        return [tokens[start : start + max_length] for start in range(0, len(tokens), max_length)]
    raise DataError(
        f"{sample} has {len(tokens)} tokens, more than {max_length=}; raise it, or choose "
        "another --overlong than `error`: truncate-left, truncate-right, split"
    )


# --- ARC tasks --------------------------------------------------------------------------------


class ArcPrompts:
    """Prompts that ask for the output of a test of an ARC task, each in several augmentations."""

    def __init__(self, cfg: ExtractSettings, *, model: Path | None, vocab_size: int):
        files = find_files(cfg.input)
        self._tasks = arc.read_tasks(files)[: cfg.limit]
        if not self._tasks:
            raise DataError(f"{cfg.input} holds no tasks")
        assert model is not None  # open_source saw to it
        self._cfg, self._encoder = cfg, arc.parse_encoder(cfg.arc_encoder or "")
        self._tokenizer = CheckpointTokenizer(model, chat=True, vocab_size=vocab_size)
        self.identity = {"files": describe_files(files), "tokenizer": self._tokenizer.identity}
        self.units = []
        start, size = 0, 0.0
        for index, task in enumerate(self._tasks):
            if index > start and size >= cfg.unit_mb * 1e6:
                self.units.append(WorkUnit(0, start, index))
                start, size = index, 0.0
            size += sum(map(len, self._plain(task))) * (cfg.arc_augmentations or 1)
        self.units.append(WorkUnit(0, start, len(self._tasks)))

    def _plain(self, task: arc.ArcTask) -> list[str]:
        """Returns the texts of a task's tests as they are, whose length is that of all others."""
        (same,) = arc.augmentations(task, 1, colors="keep", seed=0)
        return [arc.prompt(task, test, same, self._encoder) for test in range(len(task.tests))]

    def _texts(self, task: arc.ArcTask) -> Iterator[tuple[str, str]]:
        cfg, template = self._cfg, self._tokenizer.template
        assert cfg.arc_augmentations
        assert cfg.arc_colors
        assert cfg.arc_seed is not None
        assert template
        changes = arc.augmentations(
            task, cfg.arc_augmentations, colors=cfg.arc_colors, seed=cfg.arc_seed
        )
        for test in range(len(task.tests)):
            for number, augmentation in enumerate(changes):
                sample = arc.sample_id(task, test, number, augmentation)
                text = arc.prompt(task, test, augmentation, self._encoder)
                chat = {"messages": [{"role": "user", "content": text}]}
                yield sample, template.render(chat, sample, generate=True)

    def read(self, unit: WorkUnit) -> UnitPrompts:
        """Returns the prompts of a unit: a task's tests, each in all its augmentations.

        Raises:
            DataError: A prompt is too long and that is an error.
        """
        tasks = self._tasks[unit.start : unit.stop]
        texts = (pair for task in tasks for pair in self._texts(task))
        encoded = self._tokenizer.encode(texts, add_special=False)
        return _gather(encoded, self._cfg, self._tokenizer)


# --- measurements -----------------------------------------------------------------------------


class MeasurementPrompts:
    """The contexts that one epoch of training on a directory of probe rows would draw."""

    def __init__(self, cfg: ExtractSettings, sampling: windows.WindowConfig):
        assert cfg.max_length is not None
        windows.check_length(cfg.max_length)
        self._length, self._sampling = cfg.max_length, sampling
        self._splits = [(split, ProbeRows(cfg.input, split)) for split in SPLITS]
        self._ends = [
            np.cumsum(windows.windows_per_row(rows.n_measurements)) for _, rows in self._splits
        ]
        self.units = []
        left = cfg.limit
        # A window is counted as if it took all its tokens, of 2 bytes each.
        per_unit = max(int(cfg.unit_mb * 1e6 / (2 * cfg.max_length)), 1)
        for index, ends in enumerate(self._ends):
            total = int(ends[-1]) if len(ends) else 0
            stop = total if left is None else min(total, left)
            left = None if left is None else left - stop
            for start in range(0, stop, per_unit):
                self.units.append(WorkUnit(index, start, min(start + per_unit, stop)))
        if not self.units:
            raise DataError(f"{cfg.input} holds no measurements")
        self.identity = {
            "data": read_metadata(cfg.input)["fingerprint"],
            "language_version": LANGUAGE_VERSION,
            "windows": dataclasses.asdict(sampling),
        }

    def read(self, unit: WorkUnit) -> UnitPrompts:
        """Returns the contexts of a unit, in the order of rows."""
        split, rows = self._splits[unit.file]
        number = np.arange(unit.start, unit.stop)
        row = np.searchsorted(self._ends[unit.file], number, side="right")
        first = np.concatenate([[0], self._ends[unit.file]])[row]
        drawn = windows.Windows(np.zeros_like(number), row, number - first)
        tokens, offsets = windows.encode_windows(
            rows, drawn, seed=0, length=self._length, config=self._sampling
        )
        ids = [f"{split}/{r}/{k}" for r, k in zip(drawn.row, drawn.k, strict=True)]
        roles = np.full(len(tokens), REAL, np.uint8)
        return UnitPrompts(tokens.astype(np.int32), offsets, roles, ids, overlong=0, empty=0)
