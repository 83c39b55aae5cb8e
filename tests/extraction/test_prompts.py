import functools
import json
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from extraction_settings import settings
from hf_checkpoints import CHAT_TEMPLATE, add_tokenizer
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from ping_llm import tokenizer
from ping_llm.activations.roles import BOS, REAL, SPECIAL
from ping_llm.data.windows import WindowConfig
from ping_llm.errors import ConfigError, DataError, PingLLMError
from ping_llm.extraction import prompts as prompts_module
from ping_llm.extraction.prompts import open_source
from ping_llm.extraction.templates import CheckpointTokenizer
from ping_llm.ingest.prepare import prepare_data
from ping_llm.simulation.simulate import simulate

CHAT = [
    {"role": "system", "content": "be the dog"},
    {"role": "user", "content": "that <|im_end|> cat"},
]


def prompts_of(tmp_path, records, model, **changes):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = open_source(settings(input=path, **changes), model=model, vocab_size=288)
    (unit,) = source.units
    return source.read(unit)


def samples(prompts):
    return [part.tolist() for part in np.split(prompts.tokens, prompts.offsets[1:-1])]


def test_text_and_chats_get_the_ids_of_transformers(tmp_path, checkpoint):
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    texts = ["the cat", "über naïve <|im_start|> the", "then"]
    ours = prompts_of(tmp_path, [{"text": text} for text in texts], checkpoint)
    assert samples(ours) == [theirs(text)["input_ids"] for text in texts]
    ours = prompts_of(tmp_path, [{"messages": CHAT}], checkpoint, format="chat")
    expected = theirs.apply_chat_template(CHAT, tokenize=False)
    assert samples(ours) == [theirs(expected, add_special_tokens=False)["input_ids"]]


def test_special_tokens_are_marked(tmp_path, checkpoint):
    prompts = prompts_of(tmp_path, [{"text": "the <|im_end|>a"}], checkpoint)
    assert prompts.roles.tolist()[-2:] == [SPECIAL, REAL]
    assert (prompts.roles == SPECIAL).sum() == 1


def test_a_bos_token_is_marked_as_such(tmp_path):
    add_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"bos_token": {"content": "<|endoftext|>"}}))
    prompts = prompts_of(tmp_path, [{"text": "<|endoftext|>a"}], tmp_path)
    assert prompts.roles.tolist() == [BOS, REAL]


def test_truncation_saved_with_a_tokenizer_does_not_apply(tmp_path):
    add_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(content))
    assert len(prompts_of(tmp_path, [{"text": "a dog of a cat"}], tmp_path).tokens) > 10


LONG = list(range(100))


@pytest.mark.parametrize(
    ("overlong", "expected"),
    [
        ("truncate-left", [LONG[36:]]),
        ("truncate-right", [LONG[:64]]),
        ("split", [LONG[:64], LONG[64:]]),
    ],
)
def test_what_becomes_of_overlong_prompts(overlong, expected, tmp_path):
    records = [{"tokens": [1]}, {"tokens": LONG}, {"input_ids": LONG[:64]}, {"tokens": []}]
    prompts = prompts_of(tmp_path, records, None, format="tokens", overlong=overlong)
    assert samples(prompts) == [[1], *expected, LONG[:64], []]
    assert (prompts.overlong, prompts.empty) == (1, 1)
    assert len(prompts.ids) == len(expected) + 3
    assert len(set(prompts.ids)) == len(prompts.ids)


IDS, PADS = [5, 6, 7, 8], [250, 250, 999]  # a pad need not be an id of the model
MASKED = [
    {"input_ids": IDS},
    {"input_ids": IDS, "attention_mask": [1, 1, 1, 1]},
    {"input_ids": PADS + IDS, "attention_mask": [0, 0, 0, 1, 1, 1, 1]},
    {"input_ids": IDS + PADS, "attention_mask": [1, 1, 1, 1, 0, 0, 0]},
    {"input_ids": PADS + IDS + PADS, "attention_mask": [0] * 3 + [1] * 4 + [0] * 3},
    {"tokens": None, "input_ids": IDS, "attention_mask": None, "position_ids": [0, 1, 2, 3]},
    {
        "input_ids": PADS + IDS,
        "attention_mask": [0, 0, 0, 1, 1, 1, 1],
        "position_ids": [1, 1, 1, 0, 1, 2, 3],
    },
]


def test_padding_that_an_attention_mask_names_is_no_token(tmp_path):
    prompts = prompts_of(tmp_path, MASKED, None, format="tokens")
    assert samples(prompts) == [IDS] * len(MASKED)
    masked = [{"input_ids": PADS, "attention_mask": [0, 0, 0]}, {"tokens": [7, 8]}]
    prompts = prompts_of(tmp_path, masked, None, format="tokens")
    assert (samples(prompts), prompts.empty) == ([[], [7, 8]], 1)


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        (pa.list_(pa.int64()), pa.list_(pa.int8())),
        (pa.list_(pa.int32(), 7), pa.list_(pa.int8(), 7)),
        (pa.large_list(pa.uint16()), pa.list_(pa.bool_())),
    ],
    ids=["list", "fixed_size_list", "bool"],
)
def test_attention_masks_of_parquet(ids, mask, tmp_path):
    rows = [MASKED[2], MASKED[3]]
    columns = {
        "input_ids": pa.array([row["input_ids"] for row in rows], ids),
        "attention_mask": pa.array([row["attention_mask"] for row in rows], pa.list_(pa.int8())),
    }
    columns["attention_mask"] = columns["attention_mask"].cast(mask)
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    cfg = settings(input=tmp_path / "in.parquet", format="tokens")
    source = open_source(cfg, model=None, vocab_size=288)
    assert samples(source.read(source.units[0])) == [IDS, IDS]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"attention_mask": [1, 0, 1, 1]}, "a 0 between 1s"),
        ({"attention_mask": [0, 1, 0, 1]}, "a 0 between 1s"),
        ({"attention_mask": [1, 1, 1]}, "`attention_mask` must be a list of 4"),
        ({"attention_mask": []}, "`attention_mask` must be a list of 4"),
        ({"attention_mask": "1111"}, "`attention_mask` must be a list of 4"),
        ({"attention_mask": 1}, "`attention_mask` must be a list of 4"),
        ({"attention_mask": [1, 1, 2, 1]}, "`attention_mask` has 2; expected 0 or 1"),
        ({"attention_mask": [1, 1, -1, 1]}, "`attention_mask` has -1; expected 0 or 1"),
        ({"attention_mask": [1.0, 1, 1, 1]}, "`attention_mask` has 1.0; expected 0 or 1"),
        ({"attention_mask": [None, 1, 1, 1]}, "`attention_mask` has None; expected 0 or 1"),
        ({"attention_mask": [[1], 1, 1, 1]}, r"`attention_mask` has \[1\]; expected 0 or 1"),
        ({"position_ids": [0, 1, 0, 1]}, "`position_ids` do not count from 0"),
        ({"position_ids": [3, 4, 5, 6]}, "`position_ids` do not count from 0"),
        ({"position_ids": [[0, 1, 2, 3]]}, "`position_ids` must be a list of 4"),
    ],
)
def test_a_mask_or_positions_that_do_not_do_are_refused_by_name(said, reason, tmp_path):
    record = {"id": "mine", "input_ids": IDS} | said
    with pytest.raises(DataError, match=f"mine: .*{reason}"):
        prompts_of(tmp_path, [record], None, format="tokens")


@pytest.mark.parametrize(
    ("record", "format_", "reason"),
    [
        ({"tokens": LONG}, "tokens", "more than max_length=64"),
        ({"tokens": [1, 288]}, "tokens", "288 is not in 0..287"),
        ({"tokens": [1, 2.5]}, "tokens", "whole numbers"),
        ({"tokens": [True]}, "tokens", "whole numbers"),
        ({"words": "x"}, "text", "no string `text`"),
        ({"text": None}, "text", "no string `text`"),
        ({"messages": "x"}, "chat", "no list `messages`"),
        ({"messages": ["x"]}, "chat", "an object with a `role`"),
        ({"messages": [{"content": "x"}]}, "chat", "an object with a `role`"),
    ],
)
def test_a_record_that_does_not_do_is_named(record, format_, reason, tmp_path, checkpoint):
    with pytest.raises(DataError, match=reason) as error:
        prompts_of(
            tmp_path,
            [{"tokens": [1], "text": "a", "messages": []}, record],
            checkpoint,
            format=format_,
        )
    assert "in.jsonl@" in str(error.value)


def test_a_template_can_not_reach_out_of_its_sandbox(tmp_path):
    add_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    for template in ("{{ ''.__class__.__mro__ }}", "{{ raise_exception('no system role') }}"):
        path.write_text(json.dumps({"chat_template": template}))
        with pytest.raises(DataError, match="refuses"):
            prompts_of(tmp_path, [{"messages": CHAT}], tmp_path, format="chat")


def test_templates_in_a_file_or_by_name_are_found(tmp_path):
    add_tokenizer(tmp_path)
    expected = samples(prompts_of(tmp_path, [{"messages": CHAT}], tmp_path, format="chat"))
    named = [{"name": "tool", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}]
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": named}))
    assert samples(prompts_of(tmp_path, [{"messages": CHAT}], tmp_path, format="chat")) == expected
    path.write_text("{}")
    with pytest.raises(DataError, match="no chat template"):
        prompts_of(tmp_path, [{"messages": CHAT}], tmp_path, format="chat")
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert samples(prompts_of(tmp_path, [{"messages": CHAT}], tmp_path, format="chat")) == expected


def test_a_template_that_writes_half_a_character_is_refused(tmp_path):
    add_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": "{{ messages[0].content[:1] }}\ud83d"}))
    with pytest.raises(
        DataError, match=r"in\.jsonl@0: its text holds half a character, \\ud83d after 'b'"
    ):
        prompts_of(tmp_path, [{"messages": CHAT}], tmp_path, format="chat")


# Values of any kind where something else may be expected.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": VALUES, "content": VALUES}, optional={"tool_calls": VALUES})
)
IDS_LIKE = st.lists(st.integers(-1, 300) | VALUES, max_size=8) | VALUES
RECORD = st.fixed_dictionaries(
    {},
    optional={
        "id": VALUES,
        "text": VALUES,
        "messages": MESSAGES | VALUES,
        "tools": VALUES,
        "input_ids": IDS_LIKE,
        "tokens": IDS_LIKE,
        "attention_mask": st.lists(st.integers(0, 1), max_size=8) | VALUES,
        "position_ids": IDS_LIKE,
    },
)
read_once = functools.cache(CheckpointTokenizer)
LINE = RECORD.map(lambda record: json.dumps(record).encode()) | st.binary(max_size=40)


@pytest.mark.parametrize("format_", ["text", "chat", "tokens"])
@settings_of_hypothesis(max_examples=100)
@given(lines=st.lists(LINE, min_size=1, max_size=4))
def test_any_input_is_read_or_refused_in_one_line(format_, lines, checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "in.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    try:
        cfg = settings(input=path, format=format_, overlong="truncate-left")
        with mock.patch.object(prompts_module, "CheckpointTokenizer", read_once):
            source = open_source(cfg, model=checkpoint, vocab_size=288)
        for unit in source.units:
            prompts = source.read(unit)
            assert len(prompts.tokens) == len(prompts.roles) == prompts.offsets[-1]
            "".join(prompts.ids).encode()
    except PingLLMError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017


def test_a_tokenizer_of_another_model_is_refused(tmp_path, checkpoint):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a<|im_end|>"}\n')
    source = open_source(settings(input=path), model=checkpoint, vocab_size=100)
    with pytest.raises(DataError, match="vocab_size=100"):
        source.read(source.units[0])


def test_a_format_that_does_not_go_with_the_model_is_refused(tmp_path, checkpoint):
    with pytest.raises(ConfigError, match="needs a run"):
        open_source(settings(format="measurements"), model=checkpoint, vocab_size=1)
    with pytest.raises(ConfigError, match="needs a language model"):
        open_source(settings(), model=None, vocab_size=1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    place = tmp_path_factory.mktemp("rows")
    simulate(place / "p.parquet", probes=8, days=2.0, measurements=800, seed=0)
    prepare_data([str(place / "p.parquet")], output=str(place / "rows"))
    return place / "rows"


def test_measurements_are_the_contexts_of_training_whatever_the_units_are(rows):
    def read(**changes):
        cfg = settings(input=rows, format="measurements", max_length=200, **changes)
        source = open_source(cfg, model=None, vocab_size=267)
        return source, [source.read(unit) for unit in source.units]

    whole, parts = read(unit_mb=1.0)
    fine, many = read(unit_mb=0.001)
    assert len(fine.units) > len(whole.units)
    tokens = np.concatenate([part.tokens for part in parts])
    np.testing.assert_array_equal(np.concatenate([part.tokens for part in many]), tokens)
    ids = [sample for part in parts for sample in part.ids]
    assert [sample for part in many for sample in part.ids] == ids
    assert max(np.diff(part.offsets).max() for part in parts) <= 200
    law = WindowConfig(result_last_fraction=1.0, untimed_fraction=1.0)
    cfg = settings(input=rows, format="measurements", max_length=200)
    own = open_source(cfg, model=None, vocab_size=267, sampling=law)
    assert own.identity != whole.identity
    part = own.read(own.units[0])
    shown, _ = tokenizer.decode(part.tokens[: part.offsets[1]])
    assert not shown.has_time.any()
    _, limited = read(limit=5)
    assert [sample for part in limited for sample in part.ids] == ids[:5]
