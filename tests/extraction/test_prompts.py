import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from extraction_settings import settings
from hf_checkpoints import CHAT_TEMPLATE, add_tokenizer

from ping_llm import tokenizer
from ping_llm.activations.roles import BOS, REAL, SPECIAL
from ping_llm.data.windows import WindowConfig
from ping_llm.errors import ConfigError, DataError
from ping_llm.extraction.prompts import open_source
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


@pytest.mark.parametrize(
    ("record", "format_", "reason"),
    [
        ({"tokens": LONG}, "tokens", "more than max_length=64"),
        ({"tokens": [1, 288]}, "tokens", "288 is not in 0..287"),
        ({"tokens": [1, 2.5]}, "tokens", "whole numbers"),
        ({"tokens": [True]}, "tokens", "whole numbers"),
        ({"words": "x"}, "text", "no string `text`"),
        ({"text": None}, "text", "no string `text`"),
        ({"tokens": [1], "attention_mask": [1, 1]}, "tokens", "not a 0 or 1 for each"),
        ({"tokens": [1], "attention_mask": [2]}, "tokens", "not a 0 or 1 for each"),
        ({"tokens": [1], "attention_mask": "1"}, "tokens", "not a 0 or 1 for each"),
        ({"tokens": [1, 2, 3], "attention_mask": [1, 0, 1]}, "tokens", "has holes"),
        ({"text": "cut \ud83d"}, "text", r"character 4 is '.ud83d', half of a surrogate pair"),
        ({"text": "a", "id": "\ud83d"}, "text", r"in\.jsonl, the id of record \d+: character 0 is"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "chat", "half of a surrogate"),
        ({"messages": "x"}, "chat", "no list `messages`"),
        ({"messages": []}, "chat", "no list `messages`"),
        ({"messages": CHAT, "tools": "["}, "chat", "its `tools` are no JSON"),
        ({"messages": CHAT, "tools": {"name": "x"}}, "chat", "must be a list of objects"),
        ({"messages": CHAT, "tools": ["{}"]}, "chat", "must be a list of objects"),
        ({"messages": ["x"]}, "chat", "an object with a `role`"),
        ({"messages": [{"content": "x"}]}, "chat", "an object with a `role`"),
    ],
)
def test_a_record_that_does_not_do_is_named(record, format_, reason, tmp_path, checkpoint):
    with pytest.raises(DataError, match=reason) as error:
        prompts_of(
            tmp_path,
            [{"tokens": [1], "text": "a", "messages": CHAT}, record],
            checkpoint,
            format=format_,
        )
    assert "in.jsonl" in str(error.value)


@pytest.mark.parametrize("form", ["json", "parquet", "fixed"])
def test_padding_is_left_out(form, tmp_path):
    ids = [[5, 6, 7, 8], [0, 0, 5, 6], [5, 6, 0, 0], [0, 0, 0, 0], [5, 6, 7, 8]]
    masks = [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], None]
    expected = [[5, 6, 7, 8], [5, 6], [5, 6], [], [5, 6, 7, 8]]
    if form == "json":
        records = [{"tokens": t, "attention_mask": m} for t, m in zip(ids, masks, strict=True)]
        assert samples(prompts_of(tmp_path, records, None, format="tokens")) == expected
        return
    kind = pa.list_(pa.int8(), 4) if form == "fixed" else pa.list_(pa.int8())
    table = {"input_ids": ids, "attention_mask": pa.array(masks, kind)}
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    cfg = settings(input=tmp_path / "in.parquet", format="tokens")
    source = open_source(cfg, model=None, vocab_size=288)
    assert samples(source.read(source.units[0])) == expected


@pytest.mark.parametrize("format_", ["text", "chat", "tokens"])
def test_a_column_that_is_missing_is_named_with_those_that_are_there(format_, tmp_path, checkpoint):
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"content": ["a"], "url": ["b"], "id": ["c"]}), path)
    source = open_source(settings(input=path, format=format_), model=checkpoint, vocab_size=288)
    with pytest.raises(DataError, match=r"has no column .*; its columns are content, url, id; ren"):
        source.read(source.units[0])


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
