import functools
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from extraction_settings import settings
from hypothesis import given
from hypothesis import strategies as st
from stores import assert_equal_stores

from ping_llm.activations.inspection import inspect_activations
from ping_llm.activations.reader import ActivationReader
from ping_llm.errors import ConfigError, DataError, PingLLMError
from ping_llm.extraction import arc
from ping_llm.extraction.prompts import open_source
from ping_llm.extraction.run import extract_activations
from ping_llm.storage import Location

ENCODERS = [
    "+".join(filter(None, (cells, *around)))
    for cells in ("minimal", "separated")
    for count in range(4)
    for around in itertools.combinations(arc.AROUND, count)
]
SIDES = st.integers(1, arc.LONGEST_SIDE)


@st.composite
def grids(draw):
    rows, columns = draw(SIDES), draw(SIDES)
    cells = draw(st.binary(min_size=rows * columns, max_size=rows * columns))
    return (np.frombuffer(cells, np.uint8) % 10).astype(np.int8).reshape(rows, columns)


@st.composite
def tasks(draw):
    pairs = draw(st.lists(st.tuples(grids(), grids()), min_size=1, max_size=4))
    return arc.ArcTask(draw(st.text(max_size=9)), tuple(pairs), (draw(grids()),))


def make_task(seed, *, tests=1):
    rng = np.random.default_rng(seed)

    def grid():
        return rng.integers(0, 10, rng.integers(1, 5, 2)).tolist()

    train = [{"input": grid(), "output": grid()} for _ in range(3)]
    return {"train": train, "test": [{"input": grid(), "output": grid()} for _ in range(tests)]}


def read(path):
    return arc.read_tasks(Location.of(path).find())


# --- grids as text ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
@given(grid=grids())
def test_every_encoder_gives_back_what_it_was_given(name, grid):
    encoder = arc.parse_encoder(name)
    np.testing.assert_array_equal(encoder.decode(encoder.encode(grid)), grid)


def test_encoders_write_as_their_names_say():
    grid = np.array([[1, 2, 3], [4, 5, 6]], np.int8)
    shown = {name: arc.parse_encoder(name).encode(grid) for name in ENCODERS}
    assert shown["minimal"] == "123\n456"
    assert shown["separated"] == "1 2 3\n4 5 6"
    assert shown["minimal+row-numbers"] == "1: 123\n2: 456"
    assert shown["separated+shape-header"] == "2x3\n1 2 3\n4 5 6"
    assert shown["minimal+code-block"] == "```\n123\n456\n```"
    assert len(set(shown.values())) == len(ENCODERS) == 16
    assert arc.parse_encoder("code-block+separated+shape-header") == arc.parse_encoder(
        "shape-header+code-block+separated"
    )
    assert arc.parse_encoder("code-block").encode(grid) == shown["minimal+code-block"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "'' is not one of minimal, separated, row-numbers, shape-header, code-block"),
        ("minimal+json", "'json' is not one of"),
        ("minimal+separated", "choose one of minimal and separated"),
        ("code-block+code-block", "names code-block twice"),
        ("__import__('os')", "is not one of"),
    ],
)
def test_an_encoder_that_can_not_be_is_refused_by_name(name, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        arc.parse_encoder(name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("minimal", "12\n3", "its rows have 1 to 2 cells"),
        ("minimal", "1a", "a cell is 'a'"),
        ("minimal", "", "1 x 0 cells"),
        ("separated", "1  2", "a cell is ''"),
        ("row-numbers", "1: 12\n3: 45", "not numbered from 1"),
        ("shape-header", "3x2\n12\n34", "header '3x2' is not the shape"),
        ("code-block", "12\n34", "no code block"),
    ],
)
def test_text_that_is_no_grid_says_why(name, text, message):
    with pytest.raises(DataError, match=message):
        arc.parse_encoder(name).decode(text)


# --- augmentation -----------------------------------------------------------------------------


@given(
    grid=grids(),
    symmetry=st.sampled_from(sorted(arc.SYMMETRIES)),
    colors=st.permutations(range(10)),
)
def test_the_inverse_of_every_augmentation_restores_the_grid(grid, symmetry, colors):
    change = arc.Augmentation(symmetry, tuple(colors), (0,))
    np.testing.assert_array_equal(change.inverse.grid(change.grid(grid)), grid)
    np.testing.assert_array_equal(change.grid(change.inverse.grid(grid)), grid)
    assert change.inverse.inverse == change


def test_the_symmetries_are_the_eight_of_a_square():
    grid = np.arange(6, dtype=np.int8).reshape(2, 3)
    changed = {
        symmetry(grid).tobytes() + bytes(symmetry(grid).shape)
        for symmetry in arc.SYMMETRIES.values()
    }
    assert len(changed) == 8
    np.testing.assert_array_equal(arc.SYMMETRIES["flip-rows"](grid), [[3, 4, 5], [0, 1, 2]])
    np.testing.assert_array_equal(arc.SYMMETRIES["rotate90"](grid), [[2, 5], [1, 4], [0, 3]])
    np.testing.assert_array_equal(arc.SYMMETRIES["anti-transpose"](grid), [[5, 2], [4, 1], [3, 0]])


@given(
    task=tasks(), seed=st.integers(0, 2**31), colors=st.sampled_from(["keep", "foreground", "all"])
)
def test_augmentations_are_as_many_as_asked_and_decided_by_seed_and_task(task, seed, colors):
    drawn = arc.augmentations(task, 8, colors=colors, seed=seed)
    assert len(set(drawn)) == 8
    assert drawn == arc.augmentations(task, 8, colors=colors, seed=seed)
    assert drawn[:3] == arc.augmentations(task, 3, colors=colors, seed=seed)
    np.testing.assert_array_equal(drawn[0].grid(task.tests[0]), task.tests[0])
    for change in drawn:
        moved = [color for color in range(10) if change.colors[color] != color]
        assert {"keep": moved == [], "foreground": 0 not in moved, "all": True}[colors]
        assert sorted(change.order) == list(range(len(task.train)))


def test_seeds_and_tasks_differ_and_all_colors_move_the_background():
    first, second = (arc.parse_task(name, make_task(0), name) for name in "ab")
    drawn = arc.augmentations(first, 20, colors="all", seed=0)
    assert any(change.colors[0] != 0 for change in drawn)
    assert drawn != arc.augmentations(first, 20, colors="all", seed=1)
    assert drawn != arc.augmentations(second, 20, colors="all", seed=0)


def test_more_augmentations_than_there_are_repeat_some():
    task = make_task(0)
    task = arc.parse_task("a", task | {"train": task["train"][:1]}, "a")
    drawn = arc.augmentations(task, 20, colors="keep", seed=0)
    assert len(drawn) == 20
    assert len(set(drawn)) == len(set(drawn[:8])) == 8


@given(task=tasks(), seed=st.integers(0, 100))
def test_a_sample_s_id_says_what_was_done_to_it(task, seed):
    for number, change in enumerate(arc.augmentations(task, 4, colors="all", seed=seed)):
        sample = arc.sample_id(task, 0, number, change)
        assert arc.parse_sample(sample) == (task.id, 0, change)
        assert arc.parse_sample(f"{sample}/3") == (task.id, 0, change), "a piece of a split prompt"


@pytest.mark.parametrize("sample", ["doc1", "a/0/0:turn:0123456789:0"])
def test_an_id_of_another_kind_is_refused(sample):
    with pytest.raises(DataError, match="not the id of a sample"):
        arc.parse_sample(sample)


# --- reading ----------------------------------------------------------------------------------


def test_tasks_are_read_from_challenge_files_single_files_and_lines(tmp_path):
    whole = make_task(1, tests=2)
    (tmp_path / "a.json").write_text(json.dumps(whole))
    challenge = whole | {"test": [{"input": pair["input"]} for pair in whole["test"]]}
    (tmp_path / "b.json").write_text(json.dumps({"x1": challenge, "x2": challenge}))
    lines = [json.dumps(whole | {"id": "named"}), "", json.dumps(whole)]
    (tmp_path / "C.jsonl").write_text("\n".join(lines))
    found = read(tmp_path)
    assert [task.id for task in found] == ["named", "C@3", "a", "x1", "x2"]
    for task in found:
        assert len(task.train) == 3
        np.testing.assert_array_equal(task.tests[1], whole["test"][1]["input"])


PAIR = {"input": [[1]], "output": [[2]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        (r'{"\ud800": {}}', r"holds half a character, \ud800"),
        ({"id": "\udcff", "train": [PAIR], "test": [PAIR]}, r"holds half a character, \udcff"),
        ({"x": {"train": {"0": PAIR}, "test": [PAIR]}}, "`train` must be a list of pairs"),
        ({"train": [PAIR], "test": [{"input": [[1e400]]}]}, "a cell is inf"),
        ({"train": [PAIR], "test": [{"input": [[10**30]]}]}, "a cell is 1000"),
        ({"train": [PAIR], "test": [{"input": [[-1]]}]}, "a cell is -1"),
        ({"train": [PAIR], "test": [{"input": [[[1]]]}]}, "a cell is [1]"),
        ({"train": [PAIR], "test": [{"input": {"a": 1}}]}, "expected a list of rows"),
        (None, "expected a task, or tasks by their ids; got None"),
        ([], "expected a task, or tasks by their ids; got []"),
        ({}, "expected a task, or tasks by their ids; got {}"),
        ({"x": [[[1]]]}, "task x: expected an object with `train` and `test`; a solutions file?"),
        ({"train": [PAIR]}, "`test` must be a list of pairs, and not empty"),
        ({"train": [], "test": [PAIR]}, "`train` must be a list of pairs, and not empty"),
        (
            {"train": [{"input": [[1]]}], "test": [PAIR]},
            "train 0 must be an object with `input` and `output`",
        ),
        ({"train": [PAIR], "test": [PAIR, {}]}, "test 1 must be an object with `input`"),
        (
            {"train": [PAIR], "test": [{"input": [[1, 2], [3]]}]},
            "input of test 0: its rows have 1 to 2 cells",
        ),
        (
            {"train": [PAIR], "test": [{"input": [[10]]}]},
            "input of test 0: a cell is 10; expected 0 to 9",
        ),
        ({"train": [PAIR], "test": [{"input": [[True]]}]}, "a cell is True"),
        ({"train": [PAIR], "test": [{"input": [["1"]]}]}, "a cell is '1'"),
        ({"train": [PAIR], "test": [{"input": []}]}, "0 x 0 cells; each side is 1 to 30"),
        ({"train": [PAIR], "test": [{"input": [[]]}]}, "1 x 0 cells"),
        ({"train": [PAIR], "test": [{"input": [[0]] * 31}]}, "31 x 1 cells"),
        ({"train": [PAIR], "test": [{"input": "grid"}]}, "expected a list of rows, got 'grid'"),
        (
            {"train": [{"input": [[1]], "output": 5}], "test": [PAIR]},
            "output of train 0: expected a list of rows, got 5",
        ),
    ],
)
def test_a_malformed_task_says_where_and_what_it_is(content, message, tmp_path):
    path = tmp_path / "tasks.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError) as caught:
        read(path)
    assert message in str(caught.value)
    assert "tasks.json" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 10) | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["train", "test", "id"]), inner)
    ),
    max_leaves=12,
)
ROWS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=2), min_size=1, max_size=2)
PAIRS = st.lists(
    st.fixed_dictionaries({}, optional={"input": ROWS | ANYTHING, "output": ROWS | ANYTHING})
)
TASK = st.fixed_dictionaries({"train": PAIRS | ANYTHING, "test": PAIRS | ANYTHING}) | ANYTHING


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@given(
    content=(TASK | st.dictionaries(st.text(), TASK)).map(json.dumps).map(str.encode) | st.binary()
)
def test_any_file_is_tasks_or_refused_in_one_line(ending, content, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / f"tasks.{ending}"
    path.write_bytes(content)
    try:
        for task in read(path):
            assert task.train
            assert task.tests
            task.id.encode()
    except PingLLMError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017


def test_two_tasks_of_one_id_and_other_files_are_refused(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps({"x": make_task(0)}))
    with pytest.raises(DataError, match=r"b\.json, task x: another task has the id 'x'"):
        read(tmp_path)
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(DataError, match=r"read from \.json"):
        read(tmp_path / "a.parquet")


# --- prompts ----------------------------------------------------------------------------------

ARC = {"format": "arc", "arc_encoder": "separated", "arc_colors": "foreground", "arc_seed": 0}


def test_a_prompt_goes_through_the_chat_template_and_ends_where_the_answer_begins(
    checkpoint, tmp_path
):
    import tokenizers

    task = make_task(3)
    (tmp_path / "t.json").write_text(json.dumps(task))
    cfg = settings(**ARC, input=tmp_path, arc_augmentations=2, max_length=4096, batch_tokens=4096)
    source = open_source(cfg, model=checkpoint, vocab_size=288)
    prompts = source.read(source.units[0])
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = tokenizer.decode(
        prompts.tokens[: prompts.offsets[1]].tolist(), skip_special_tokens=False
    )
    assert text.startswith("<|im_start|>user\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    written = arc.parse_encoder("separated").encode
    for pair in task["train"]:
        assert f"input:\n{written(np.array(pair['input']))}\n" in text
        assert f"output:\n{written(np.array(pair['output']))}\n" in text
    assert f"Last input:\n{written(np.array(task['test'][0]['input']))}\n" in text
    second = tokenizer.decode(prompts.tokens[prompts.offsets[1] :].tolist())
    _, _, change = arc.parse_sample(prompts.ids[1])
    first_shown = np.array(task["train"][change.order[0]]["input"], np.int8)
    assert f"Example 1, input:\n{written(change.grid(first_shown))}\n" in second


def test_ten_tasks_in_eight_augmentations_are_eighty_prompts_on_every_worker(checkpoint, tmp_path):
    contents = {f"task{i}": make_task(i) for i in range(10)}
    (tmp_path / "tasks.json").write_text(json.dumps(contents))
    options = {
        "format": "arc",
        "arc_augmentations": 8,
        "layers": "0",
        "max_length": 1024,
        "batch_tokens": 2048,
        "lease_seconds": 2.0,
    }
    url = tmp_path / "store"
    said = extract_activations(checkpoint, tmp_path / "tasks.json", url, dry_run=True, **options)
    done = extract_activations(checkpoint, tmp_path / "tasks.json", url, unit_mb=0.006, **options)
    assert (said.samples, done.samples) == (80, 80)
    assert done.units > 3
    rows = ActivationReader(str(url), layer=0).rows(slice(None))
    samples = list(dict.fromkeys(rows.samples))
    assert len(samples) == 80
    parsed = [arc.parse_sample(sample) for sample in samples]
    assert [name for name, _, _ in parsed] == [f"task{i}" for i in range(10) for _ in range(8)]
    for name, test, change in parsed:
        grid = np.array(contents[name]["test"][test]["input"], np.int8)
        np.testing.assert_array_equal(change.inverse.grid(change.grid(grid)), grid)
    again = tmp_path / "again"
    with ThreadPoolExecutor(2) as pool:
        run = functools.partial(
            extract_activations, checkpoint, tmp_path / "tasks.json", again, unit_mb=0.006
        )
        for _ in range(2):
            pool.submit(run, **options)
    assert len(inspect_activations(str(again)).workers) == 2
    assert_equal_stores(again, url)
    assert inspect_activations(str(url), verify=True).errors == []


def test_the_first_tasks_are_taken_and_a_task_with_two_tests_has_twice_the_prompts(
    checkpoint, tmp_path
):
    contents = {f"task{i}": make_task(i, tests=2) for i in range(3)}
    (tmp_path / "tasks.json").write_text(json.dumps(contents))
    cfg = settings(
        **ARC, input=tmp_path, arc_augmentations=5, max_length=4096, batch_tokens=4096, limit=2
    )
    source = open_source(cfg, model=checkpoint, vocab_size=288)
    samples = [sample for unit in source.units for sample in source.read(unit).ids]
    assert len(samples) == len(set(samples)) == 2 * 2 * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "text"}, "arc_encoder='separated' does not go with format='text'"),
        ({"arc_colors": "some"}, "arc_colors='some' is not one of keep, foreground, all"),
        ({"arc_augmentations": 0}, "arc_augmentations=0 must be above 0"),
        ({"arc_encoder": "x"}, "arc_encoder='x'"),
    ],
)
def test_settings_of_tasks_that_can_not_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(**ARC | {"arc_augmentations": 2} | changes)
