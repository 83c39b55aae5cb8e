"""ARC tasks: grids as text, prompts out of examples, augmentations that can be undone.

A task shows pairs of grids that follow one rule, and asks for the output of further inputs.
"""

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from ping_llm.errors import ConfigError, DataError
from ping_llm.extraction.records import parse_json
from ping_llm.storage import Location, StoredFile

LONGEST_SIDE = 30
N_COLORS = 10

Grid = np.ndarray  # [rows, columns], int8, 0..9


@dataclasses.dataclass(frozen=True)
class ArcTask:
    """One task.

    Attributes:
        id: Its name.
        train: The examples, pairs of input and output.
        tests: The inputs whose output is asked for.
    """

    id: str
    train: tuple[tuple[Grid, ...], ...]
    tests: tuple[Grid, ...]


# --- reading ----------------------------------------------------------------------------------


def read_tasks(files: list[StoredFile]) -> list[ArcTask]:
    """Returns the tasks in `files`, in their order.

    A `.json` file holds one task, or tasks by their ids as challenge files do; `.jsonl` and
    `.ndjson` hold a task a line. Outputs of tests are not needed, and not read.

    Raises:
        DataError: A file or a task is not what it should be, or two tasks have one id.
        StorageError: A file cannot be read.
    """
    tasks: dict[str, ArcTask] = {}
    for file in files:
        for name, content, where in _contents(file.location):
            if name in tasks:
                raise DataError(f"{where}: another task has the id {name!r}")
            tasks[name] = parse_task(name, content, where)
    return list(tasks.values())


def _contents(location: Location) -> Iterator[tuple[str, Any, str]]:
    """Yields (id, task as JSON, its place) of a file."""
    url = str(location)
    stem, _, ending = location.name.rpartition(".")
    ending = ending.lower()
    if ending not in ("json", "jsonl", "ndjson"):
        raise DataError(f"{url}: tasks are read from .json, .jsonl and .ndjson")
    data = location.read_bytes()
    if ending == "json":
        content = parse_json(data, url)
        if not isinstance(content, dict) or not content:
            raise DataError(f"{url}: expected a task, or tasks by their ids; got {_short(content)}")
        if "train" in content or "test" in content:
            yield str(content.get("id", stem)), content, url
        else:
            yield from ((name, task, f"{url}, task {name}") for name, task in content.items())
        return
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            where = f"{url}, line {number}"
            task = parse_json(line, where)
            given = task.get("id") if isinstance(task, dict) else None
            yield f"{stem}@{number}" if given is None else str(given), task, where


def _short(content: Any) -> str:
    text = repr(content)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def parse_task(name: str, content: Any, where: str) -> ArcTask:
    """Returns the task that JSON describes.

    Raises:
        DataError: It does not; the message says what is wrong, and `where`.
    """
    if not isinstance(content, dict):
        raise DataError(f"{where}: expected an object with `train` and `test`; a solutions file?")
    grids: dict[str, list[tuple[Grid, ...]]] = {"train": [], "test": []}
    for part, keys in (("train", ("input", "output")), ("test", ("input",))):
        pairs = content.get(part)
        if not isinstance(pairs, list) or not pairs:
            raise DataError(f"{where}: `{part}` must be a list of pairs, and not empty")
        for index, pair in enumerate(pairs):
            if not isinstance(pair, dict) or any(key not in pair for key in keys):
                wanted = " and ".join(f"`{key}`" for key in keys)
                raise DataError(f"{where}: {part} {index} must be an object with {wanted}")
            named = ((pair[key], f"{where}: {key} of {part} {index}") for key in keys)
            grids[part].append(tuple(parse_grid(rows, place) for rows, place in named))
    return ArcTask(name, tuple(grids["train"]), tuple(grid for (grid,) in grids["test"]))


def parse_grid(rows: Any, where: str) -> Grid:
    """Returns the grid in lists of numbers.

    Raises:
        DataError: It is none; the message names what is wrong, and `where`.
    """
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise DataError(f"{where}: expected a list of rows, got {_short(rows)}")
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise DataError(f"{where}: its rows have {min(widths)} to {max(widths)} cells, not one")
    width = widths.pop() if widths else 0
    if not (1 <= len(rows) <= LONGEST_SIDE and 1 <= width <= LONGEST_SIDE):
        raise DataError(f"{where}: {len(rows)} x {width} cells; each side is 1 to {LONGEST_SIDE}")
    for cell in itertools.chain(*rows):
        if type(cell) is not int or not 0 <= cell < N_COLORS:
            raise DataError(f"{where}: a cell is {_short(cell)}; expected 0 to {N_COLORS - 1}")
    return np.array(rows, np.int8)


# --- grids as text ----------------------------------------------------------------------------

CELLS = {"minimal": "", "separated": " "}  # what stands between two cells
AROUND = ("row-numbers", "shape-header", "code-block")  # in the order in which they are put on
FENCE = "```"


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How a grid is written.

    Attributes:
        between: The separator of two cells of a row.
        around: Those of `AROUND` that are on, in their order.
    """

    between: str
    around: tuple[str, ...]

    def encode(self, grid: Grid) -> str:
        """Returns a grid as text."""
        lines = [self.between.join(map(str, row)) for row in grid.tolist()]
        if "row-numbers" in self.around:
            lines = [f"{number}: {line}" for number, line in enumerate(lines, 1)]
        if "shape-header" in self.around:
            lines = [f"{grid.shape[0]}x{grid.shape[1]}", *lines]
        if "code-block" in self.around:
            lines = [FENCE, *lines, FENCE]
        return "\n".join(lines)

    def decode(self, text: str) -> Grid:
        """Returns the grid that was written as `text`.

        Raises:
            DataError: `text` is not a grid as this encoder writes it.
        """
        lines = text.strip("\n").split("\n")
        if "code-block" in self.around:
            if len(lines) < 2 or not lines[0] == lines[-1] == FENCE:
                raise DataError(f"no code block around {_short(text)}")
            lines = lines[1:-1]
        header = lines.pop(0) if "shape-header" in self.around and lines else None
        if "row-numbers" in self.around:
            numbered = [line.partition(": ") for line in lines]
            if [number for number, _, _ in numbered] != [str(i + 1) for i in range(len(lines))]:
                raise DataError(f"rows are not numbered from 1 in {_short(text)}")
            lines = [line for _, _, line in numbered]
        cells = [line.split(self.between) if self.between else list(line) for line in lines]
        rows = [[int(cell) if re.fullmatch("[0-9]", cell) else cell for cell in r] for r in cells]
        grid = parse_grid(rows, f"text {_short(text)}")
        if header is not None and header != f"{grid.shape[0]}x{grid.shape[1]}":
            raise DataError(f"the header {header!r} is not the shape {grid.shape}")
        return grid


def parse_encoder(name: str) -> Encoder:
    """Returns the encoder of a name such as `separated` or `shape-header+row-numbers`.

    Options may stand in any order. Cells are written as by `minimal` unless `separated` is named.

    Raises:
        ConfigError: An option is unknown or named twice, or two exclude each other.
    """
    options, choices = name.split("+"), (*CELLS, *AROUND)
    for option in options:
        if option not in choices:
            wanted = ", ".join(choices)
            raise ConfigError(f"arc_encoder={name!r}: {option!r} is not one of {wanted}")
        if options.count(option) > 1:
            raise ConfigError(f"arc_encoder={name!r} names {option} twice")
    cells = [option for option in options if option in CELLS]
    if len(cells) > 1:
        raise ConfigError(f"arc_encoder={name!r}: choose one of {' and '.join(cells)}")
    between = CELLS[cells[0] if cells else "minimal"]
    return Encoder(between, tuple(option for option in AROUND if option in options))


# --- augmentation -----------------------------------------------------------------------------

SYMMETRIES = {
    "identity": lambda grid: grid,
    "rotate90": lambda grid: np.rot90(grid, 1),
    "rotate180": lambda grid: np.rot90(grid, 2),
    "rotate270": lambda grid: np.rot90(grid, 3),
    "flip-rows": lambda grid: grid[::-1],
    "flip-columns": lambda grid: grid[:, ::-1],
    "transpose": lambda grid: grid.T,
    "anti-transpose": lambda grid: grid[::-1, ::-1].T,
}
_UNDOES = {"rotate90": "rotate270", "rotate270": "rotate90"}  # the others undo themselves


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A change of all grids of a task that keeps its rule, and of the order of its examples.

    Attributes:
        symmetry: One of `SYMMETRIES`.
        colors: What each colour becomes [10].
        order: Which example stands at each place.
    """

    symmetry: str
    colors: tuple[int, ...]
    order: tuple[int, ...]

    def grid(self, grid: Grid) -> Grid:
        """Returns a grid changed."""
        return np.array(self.colors, np.int8)[SYMMETRIES[self.symmetry](grid)]

    @property
    def inverse(self) -> "Augmentation":
        """What undoes it: `a.inverse.grid(a.grid(grid))` is `grid`."""
        return Augmentation(
            _UNDOES.get(self.symmetry, self.symmetry),
            tuple(np.argsort(self.colors).tolist()),
            tuple(np.argsort(self.order).tolist()),
        )

    def __str__(self) -> str:
        colors, order = "".join(map(str, self.colors)), ".".join(map(str, self.order))
        return f"{self.symmetry}:{colors}:{order}"


# Example: a task with examples 0, 1, 2; `foreground` keeps colour 0 where it is.
#
#   moved  [3 1 2 9 5 6 7 8 4]           a permutation of 1..9
#   drawn  rotate90:0312956784:2.0.1     colour 1 becomes 3, 3 becomes 2; example 2 is shown first
#
#   grid  1 3   rotate90   3 1   colours   2 3
#         0 1  --------->  1 0  -------->  3 0
#
# There are 8 symmetries x 9! x 3! of these; only when all have been drawn may one come again.
def augmentations(task: ArcTask, count: int, *, colors: str, seed: int) -> list[Augmentation]:
    """Returns `count` augmentations, decided by task and seed; the first changes nothing.

    They differ from each other as long as there are others. More of them begin with fewer.

    Args:
        task: The task.
        count: How many.
        colors: What their permutations of colours move: keep (nothing), foreground (all but 0)
            or all.
        seed: Decides them, with the task's id and number of examples.
    """
    key = hashlib.sha256(f"{seed}/{task.id}".encode()).digest()[:16]
    rng = np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64)))
    fixed = {"keep": N_COLORS, "foreground": 1, "all": 0}[colors]
    examples, same = len(task.train), tuple(range(N_COLORS))
    possible = len(SYMMETRIES) * math.factorial(N_COLORS - fixed) * math.factorial(examples)
    chosen = [Augmentation("identity", same, tuple(range(examples)))]
    seen = {*chosen}
    while len(chosen) < count:
        moved = (fixed + rng.permutation(N_COLORS - fixed)).tolist()
        drawn = Augmentation(
            list(SYMMETRIES)[rng.integers(len(SYMMETRIES))],
            (*same[:fixed], *moved),
            tuple(rng.permutation(examples).tolist()),
        )
        if drawn not in seen or len(chosen) >= possible:
            seen.add(drawn)
            chosen.append(drawn)
    return chosen[:count]


# --- prompts ----------------------------------------------------------------------------------


def prompt(task: ArcTask, test: int, augmentation: Augmentation, encoder: Encoder) -> str:
    """Returns the text that shows the examples of a task and asks for the output of a test."""
    grids = []
    for number, index in enumerate(augmentation.order, 1):
        kinds = zip(("input", "output"), task.train[index], strict=True)
        grids += [(f"Example {number}, {kind}", grid) for kind, grid in kinds]
    grids.append(("Last input", task.tests[test]))
    return "\n\n".join(
        [
            "One rule turns every input grid below into its output grid. A digit stands for a "
            "colour. Find the rule from the examples, then apply it to the last input.",
            *(f"{name}:\n{encoder.encode(augmentation.grid(grid))}" for name, grid in grids),
            "Answer with its output grid alone, written as the grids above are.",
        ]
    )


_SAMPLE = re.compile(r"(.*)/(\d+)/(\d+):([a-z0-9-]+):(\d{10}):([\d.]*)(?:/\d+)?", re.DOTALL)


def sample_id(task: ArcTask, test: int, number: int, augmentation: Augmentation) -> str:
    """Returns the id of a prompt: task, test, number of the augmentation, and what it is."""
    return f"{task.id}/{test}/{number}:{augmentation}"


def parse_sample(sample: str) -> tuple[str, int, Augmentation]:
    """Returns (task, test, augmentation) of a sample's id.

    Raises:
        DataError: It is not the id of a sample made from a task.
    """
    match = _SAMPLE.fullmatch(sample)
    if match is None or match[4] not in SYMMETRIES:
        raise DataError(f"{sample!r} is not the id of a sample made from an ARC task")
    order = tuple(map(int, match[6].split(".")))
    return match[1], int(match[2]), Augmentation(match[4], tuple(map(int, match[5])), order)
