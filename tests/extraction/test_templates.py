"""Tokenizers and chat templates of many shapes: what transformers makes of them, or a refusal."""

import itertools
import json
import random
import shutil

import pytest
import transformers
from hf_checkpoints import CHAT_TEMPLATE, add_tokenizer

from ping_llm.errors import DataError
from ping_llm.extraction import template_process, templates
from ping_llm.extraction.templates import CheckpointTokenizer

TEXTS = [
    "hello a<think>b<|im_start|>",
    " <think> </think>  the<|extra|>\n",
    "über <|im_end|>\U0001f436 the the <|endoftext|>",
    "<tool>x</tool>  <|fim|>",
    "",
]


def entry(content, special=False, **flags):
    usual = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content, "special": special} | usual | flags


def of_config(directory, changes):
    """Returns (ours, transformers') of a tokenizer whose `tokenizer_config.json` is `changes`."""
    (directory / "tokenizer_config.json").write_text(json.dumps(changes))
    ours = CheckpointTokenizer(directory, chat=False, vocab_size=1000)
    return ours, transformers.AutoTokenizer.from_pretrained(directory)


def assert_same_ids(ours, theirs, texts=TEXTS):
    for special in (False, True):
        asked = [("", text) for text in texts]
        got = [ids.tolist() for _, ids in ours.encode(asked, add_special=special)]
        assert got == [theirs(text, add_special_tokens=special)["input_ids"] for text in texts]


@pytest.fixture
def directory(tmp_path):
    add_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    return tmp_path


HELD = {
    str(259 + i): entry(text, True) for i, text in enumerate(["<|endoftext|>", "<|im_start|>"])
} | {"261": entry("<|im_end|>", True)}
THINK, TOOL, X = entry("<think>"), entry("<tool>", lstrip=True), entry("<|x|>", True)
CONFIGS = [
    {},
    {"added_tokens_decoder": HELD},
    {"added_tokens_decoder": HELD | {"262": THINK, "263": TOOL, "264": X}},
    {"added_tokens_decoder": HELD | {"300": entry("<think>", rstrip=True), "290": X}},
    {"added_tokens_decoder": HELD | {"261": entry("<|im_end|>", True, rstrip=True)}},
    {"added_tokens_decoder": HELD | {"262": THINK}, "bos_token": "<think>"},
    {"extra_special_tokens": {"x": "<think>", "y_token": "<tool>"}},
    {"extra_special_tokens": ["<think>", "<|im_end|>", "<tool>"]},
    {"additional_special_tokens": ["<think>", "<tool>"]},
    {"additional_special_tokens": ["<think>"], "extra_special_tokens": ["<tool>"]},
    {"split_special_tokens": True},
    {"split_special_tokens": True, "additional_special_tokens": ["<think>"]},
    {"bos_token": "<think>", "eos_token": "<|im_end|>", "pad_token": "<pad>"},
    {"eos_token": None, "pad_token": None, "unk_token": None},
    {"bos_token": "<|im_start|>", "add_bos_token": True},
    {"bos_token": "<think>", "add_bos_token": True, "eos_token": "<tool>", "add_eos_token": True},
    {"eos_token": {"__type": "AddedToken"} | entry("<|im_end|>", True), "add_eos_token": True},
    {"add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": 4},
    {"tokenizer_class": "Qwen2Tokenizer", "sep_token": "<tool>"},
]


@pytest.mark.parametrize("changes", CONFIGS)
def test_ids_are_those_of_transformers(changes, directory):
    assert_same_ids(*of_config(directory, changes))


def test_ids_are_those_of_transformers_for_any_mix_of_settings(directory):
    rng = random.Random(0)
    for _ in range(40):
        changes = {}
        for part in rng.sample(CONFIGS, 3):
            changes |= part
        assert_same_ids(*of_config(directory, changes))


def test_special_tokens_that_stand_in_the_config_alone_have_their_role(directory):
    ours, _ = of_config(directory, {"additional_special_tokens": ["<think>"]})
    ((_, ids),) = ours.encode([("", "a<think>b")], add_special=False)
    assert ours.roles(ids).tolist() == [0, 1, 0]
    plain, _ = of_config(directory, {})
    assert plain.identity != ours.identity


def test_vocabulary_and_merges_alone_are_a_tokenizer(directory):
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (directory / "tokenizer.json").unlink()
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    decoder = {"260": entry("<|endoftext|>", True), "261": entry("<|im_start|>", True)}
    assert_same_ids(
        *of_config(directory, names | {"added_tokens_decoder": decoder}),
        [*TEXTS, "It's 1234 l'été\r\n\n  done", "e\u0301"],
    )
    (directory / "merges.txt").unlink()
    with pytest.raises(DataError, match=r"needs it, or vocab\.json and merges\.txt"):
        CheckpointTokenizer(directory, chat=False, vocab_size=1000)


@pytest.mark.parametrize(
    "changes",
    [
        {"add_prefix_space": True},
        {"added_tokens_decoder": ["x"]},
        {"added_tokens_decoder": {"x": entry("y")}},
        {"added_tokens_decoder": HELD | {"262": {"no": 1}}},
        {"added_tokens_decoder": {"262": THINK}},
        {"extra_special_tokens": 7},
    ],
)
def test_settings_that_are_not_done_are_refused(changes, directory):
    (directory / "tokenizer_config.json").write_text(json.dumps(changes))
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        CheckpointTokenizer(directory, chat=False, vocab_size=1000)


# --- chat templates ---------------------------------------------------------------------------

TOOLS = [
    {"type": "function", "function": {"name": "ü", "parameters": {"b": [1, 2.5], "a": "<'>"}}},
    {"type": "function", "function": {"name": "y", "description": None}},
]
CHATS = [
    [{"role": "user", "content": 'the "cat" <b>'}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": ["a", {"type": "text"}]}],
    [
        {"role": "user", "content": "x", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": {}}}]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "reasoning": "hm", "content": " <think>a</think> b "},
    ],
]
EACH = "{% for m in messages %}"
PIECES = [
    EACH + "{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "{% for m in messages -%} {{ m['role'] | upper }} {%- if loop.last %}!{% endif %} {% endfor %}",
    EACH + "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    EACH + "{% if loop.index > 1 %}{% break %}{% endif %}{{ m }}{% endfor %}",
    EACH + "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    EACH + "{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.name is defined }}{% endfor %}",
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}",
    "{% if tools is not none %}{{ tools | tojson(indent=2) }}{% else %}no tools{% endif %}",
    "{{ messages | tojson(ensure_ascii=True, sort_keys=True) }}",
    "{{ messages | tojson(separators=(',', ':')) }}",
    "{{ messages[0] | tojson }}{{ 'a<b' | tojson }}",
    "{% if bos_token is defined %}{{ bos_token }}{% else %}none{% endif %}",
    "{{ eos_token }}{{ sep_token is defined }}{{ mask_token is defined }}",
    "{% if add_generation_prompt %}<go>{% endif %}{{ documents is none }}",
    "{% set ns = namespace(n=0) %}" + EACH + "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% macro show(m) %}[{{ m.role }}]{% endmacro %}" + EACH + "{{ show(m) }}{% endfor %}",
    "{{ strftime_now('%Y') }}",
    "{{ messages[0].content | trim | replace('c', 'k') }}{{ messages[0]['content'][1:3] }}",
    "{% for k, v in messages[0] | items %}{{ k }}={{ v }};{% endfor %}{{ messages | length }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ (messages | map(attribute='role') | list) | join(',') }}{{ dict(a=1) }}",
    "{%- if messages[0].content is string -%}  s {%- elif x is undefined %} u {% endif %}",
    "{{ '%s-%03d' | format('a', 7) }}{{ 'A' ~ 1 ~ none }}{{ range(3) | list }}",
    r"{{ messages[-1].content.split('</think>')[-1].lstrip('\n') }}",
    "    {% if true %}\n  x\n    {% endif %}\n{# note #}  y\n",
]
NAMED = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "sep_token": "<|endoftext|>"}


def both(directory, changes, chat, tools, generate):
    """Returns what ours and transformers' make of a chat; None where it is refused."""
    (directory / "tokenizer_config.json").write_text(json.dumps(changes))
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    record = {"messages": chat, "tools": tools}
    try:
        template = CheckpointTokenizer(directory, chat=True, vocab_size=1000).template
        ours = template.render(record, "s", generate=generate)
    except DataError:
        ours = None
    try:
        expected = theirs.apply_chat_template(
            chat, tools=tools, add_generation_prompt=generate, tokenize=False
        )
    except Exception:
        expected = None
    return ours, expected


@pytest.mark.parametrize("piece", PIECES)
def test_texts_are_those_of_transformers(piece, directory):
    cases = itertools.cycle([(None, False), (TOOLS, True), ([], True)])
    answered = 0
    for named, chat in itertools.product(({}, NAMED), CHATS):
        tools, generate = next(cases)
        ours, expected = both(directory, named | {"chat_template": piece}, chat, tools, generate)
        assert ours == expected
        answered += ours is not None
    assert answered >= 2


@pytest.mark.parametrize("tools", [None, [], TOOLS])
def test_the_template_for_tools_is_taken_where_there_are_tools(tools, directory):
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }}"},
        {"name": "rag", "template": "x"},
    ]
    ours, expected = both(directory, {"chat_template": named}, CHATS[0], tools, False)
    assert ours is not None
    assert ours == expected


def test_templates_in_files_are_those_of_transformers(directory):
    (directory / "chat_template.jinja").write_text("file {{ messages[0].role }}")
    more = directory / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("tools")
    for tools in (None, TOOLS):
        ours, expected = both(directory, {"chat_template": "config"}, CHATS[0], tools, False)
        assert ours is not None
        assert ours == expected
    shutil.rmtree(more)
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    (directory / "tokenizer_config.json").write_text("{}")
    template = CheckpointTokenizer(directory, chat=True, vocab_size=1000).template
    assert template.render({"messages": CHATS[0]}, "s").startswith("<|im_start|>user")
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"chat_template\.jinja cannot be read"):
        CheckpointTokenizer(directory, chat=True, vocab_size=1000)


@pytest.fixture
def render(directory, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 1.5)

    def render(template):
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        made = CheckpointTokenizer(directory, chat=True, vocab_size=1000).template
        return made, lambda: made.render({"messages": CHATS[0]}, "sample 7")

    return render


@pytest.mark.parametrize(
    "bomb",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ 'abc'[::0] }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ messages[0].nothing.at_all }}",
        "{{ {}['x'].y }}",
        "{{ 'a' * 10**10 }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '%010000000000d' % 1 }}",
        "{{ 'a' * 10**8 }}",
        "{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s~n.s %}{% endfor %}",
        "{% set n = namespace(a=1) %}{% set n.__class__ = 2 %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% include 'x' %}",
        "{{ raise_exception('no') }}",
        "{{ messages | tojson(indent=[]) }}",
    ],
)
def test_any_error_of_a_template_is_one_line_that_names_the_sample(bomb, render):
    _, asked = render(bomb)
    with pytest.raises(DataError, match=r"^sample 7: the chat template refuses") as error:
        asked()
    assert "\n" not in str(error.value)


def test_a_template_that_hangs_is_stopped_and_the_next_chat_is_answered(render):
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    made, asked = render(
        "{% if messages[0].content == 'ok' %}fine{% else %}" + loops + "{% endif %}"
    )
    for _ in range(2):
        with pytest.raises(DataError, match=r"sample 7: .* takes more than 1\.5 s"):
            asked()
    assert made.render({"messages": [{"role": "user", "content": "ok"}]}, "s") == "fine"


@pytest.mark.parametrize("template", ["{% if %}", "{{", "{% for %}", "{{ " + "(" * 5000])
def test_a_template_that_cannot_be_compiled_names_the_checkpoint(template, render, directory):
    with pytest.raises(DataError, match="its chat template cannot be used") as error:
        render(template)
    assert str(directory) in str(error.value)


def test_the_process_answers_whatever_it_is_asked():
    made = template_process.make_environment().from_string("{{ 'ab' * n }}")

    def answer(n):
        return template_process.answer({"x": made}, {"name": "x", "variables": {"n": n}})

    assert answer(2) == {"text": "abab"}
    assert "characters, more than" in answer(2**26)["error"]
    assert answer(None)["error"].startswith("TypeError: ")
