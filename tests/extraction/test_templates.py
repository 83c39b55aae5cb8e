"""Tokenizers and chat templates of many shapes, beside what transformers makes of them."""

import itertools
import json

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from ping_llm.errors import DataError, PingLLMError
from ping_llm.extraction.templates import CheckpointTokenizer

WORDS = transformers.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("Ġ", "t"), ("Ġt", "h"), ("h", "e"), ("1", "2"), ("<", "t"), ("!", "!"), ("Ġ", "Ġ")]


def write_tokenizer(directory, *, qwen, cut=None, special=SPECIAL, post_processor=None):
    """Writes a tokenizer.

    Args:
        directory: Where to.
        qwen: Whether it is of a qwen2, else of a qwen3 that has another tokenizer than Qwen's.
        cut: Whether it cuts words as Qwen's; None: as `qwen`.
        special: Its special tokens.
        post_processor: Its post-processor, if it has one.
    """
    cut = qwen if cut is None else cut
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece: i for i, piece in enumerate([*alphabet, *("".join(m) for m in MERGES)])}
    tokenizer = tokenizers.Tokenizer(models.BPE(pieces, MERGES))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut)
    tokenizer.pre_tokenizer = to_bytes
    if cut:
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    if post_processor:
        tokenizer.post_processor = post_processor
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    model_type = "qwen2" if qwen else "qwen3"
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    if not qwen:
        change(directory, tokenizer_class="PreTrainedTokenizerFast")


def change(directory, file="tokenizer_config.json", **values):
    path = directory / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | values))


def entry(content, **flags):
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
    return {"content": content} | plain | flags


def numbered(*entries, first=266):
    known = {first - 3 + i: entry(text, special=True) for i, text in enumerate(SPECIAL)}
    return {str(i): e for i, e in (known | dict(enumerate(entries, first))).items()}


TEXTS = [
    "",
    "the then  that\n\n12 1212!!",
    "hello a<think>b<|im_start|> <think> c</think>",
    " <think> x<tool>y <|im_end|>\n<s>a [MASK]",
    "e\u0301 über na\u00efve \U0001f600 \u4e2d\u6587 <think>\u00e9",
    "word<think>word thethink",
]

CONFIGS = {
    "plain": {},
    "tokenizer_class": {"tokenizer_class": "Qwen2TokenizerFast"},
    "another tokenizer_class": {"tokenizer_class": "LlamaTokenizerFast"},
    "decoder": {"added_tokens_decoder": numbered(entry("<think>"))},
    "decoder, special": {"added_tokens_decoder": numbered(entry("<think>", special=True))},
    "decoder, strips": {
        "added_tokens_decoder": numbered(entry("<think>", lstrip=True, rstrip=True))
    },
    "decoder, single word": {"added_tokens_decoder": numbered(entry("think", single_word=True))},
    "decoder, normalized": {"added_tokens_decoder": numbered(entry("<think>", normalized=True))},
    "decoder, two": {"added_tokens_decoder": numbered(entry("<think>"), entry("</think>"))},
    "decoder, other flags": {
        "added_tokens_decoder": numbered() | {"264": entry("<|im_start|>", lstrip=True)}
    },
    "decoder, a word of the vocabulary": {
        "added_tokens_decoder": numbered() | {"258": entry("he")}
    },
    "extra, named": {"extra_special_tokens": {"x_token": "<think>"}},
    "extra": {"extra_special_tokens": ["<think>", "<tool>"]},
    "additional": {"additional_special_tokens": ["<think>", "<|im_start|>"]},
    "both": {"additional_special_tokens": ["<think>"], "extra_special_tokens": ["<tool>"]},
    "extra, named, and additional": {
        "extra_special_tokens": {"x_token": "<think>"},
        "additional_special_tokens": ["<tool>"],
    },
    "decoder and extra": {
        "added_tokens_decoder": numbered(entry("<think>")),
        "extra_special_tokens": ["<tool>", "<think>"],
    },
    "named": {"bos_token": "<s>", "mask_token": "[MASK]", "cls_token": None},
    "named object": {"pad_token": {"__type": "AddedToken", **entry("[MASK]", lstrip=True)}},
    "model's own": {"image_token": "<tool>"},
    "split": {"split_special_tokens": True},
    "split and added": {"split_special_tokens": True, "extra_special_tokens": ["<think>"]},
    "prefix": {"add_prefix_space": True},
    "no prefix": {"add_prefix_space": False},
    "bos asked": {"add_bos_token": True, "bos_token": "<|endoftext|>"},
    "saved length": {"model_max_length": 4, "padding_side": "left", "truncation_side": "left"},
}
TWO = {"add_prefix_space": True, "split_special_tokens": True}


def both_ids(directory):
    ours = CheckpointTokenizer(directory, chat=False, vocab_size=1000)
    found = [ids.tolist() for _, ids in ours.encode(((t, t) for t in TEXTS), add_special=True)]
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    return found, [theirs(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("qwen", [True, False], ids=["qwen", "other"])
@pytest.mark.parametrize("name", CONFIGS)
def test_ids_are_those_of_transformers_whatever_stands_beside_the_tokenizer(name, qwen, tmp_path):
    write_tokenizer(tmp_path, qwen=qwen)
    change(tmp_path, **CONFIGS[name])
    if name == "prefix" and not qwen:
        with pytest.raises(DataError, match="add_prefix_space=True"):
            both_ids(tmp_path)
        return
    ours, theirs = both_ids(tmp_path)
    assert ours == theirs


@pytest.mark.parametrize("name", ["plain", "prefix", "no prefix", "decoder", "split"])
def test_how_qwen2_cuts_words_is_known_whatever_the_file_says(name, tmp_path):
    write_tokenizer(tmp_path, qwen=True, cut=False)
    change(tmp_path, **CONFIGS[name])
    ours, theirs = both_ids(tmp_path)
    assert ours == theirs


LLAMA_PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"\u2581the<an>12"]
AT_FRONT = [
    {"type": "Prepend", "prepend": "\u2581"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
]


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize(
    "beside",
    [{}, {"legacy": True}, {"add_prefix_space": False}, {"legacy": False, "add_bos_token": True}],
    ids=str,
)
def test_the_tokenizer_of_llama_2_is_known_whatever_its_file_says(
    beside, kind, model_type, tmp_path
):
    pieces = {piece: i for i, piece in enumerate([*LLAMA_PIECES, "\u2581t", "he"])}
    merges = [("\u2581", "t"), ("h", "e")]
    transformers.LlamaTokenizer(vocab=pieces, merges=merges).save_pretrained(tmp_path)
    old = {"normalizer": {"type": "Sequence", "normalizers": AT_FRONT}, "pre_tokenizer": None}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    change(tmp_path, tokenizer_class=kind, add_prefix_space=None)
    change(tmp_path, **beside)
    ours, theirs = both_ids(tmp_path)
    assert ours == theirs
    change(tmp_path, "tokenizer.json", **old)
    ours, theirs = both_ids(tmp_path)
    assert ours == theirs


def test_dropout_saved_with_a_tokenizer_does_not_apply(tmp_path):
    write_tokenizer(tmp_path, qwen=False)
    expected, _ = both_ids(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.9
    change(tmp_path, "tokenizer.json", **content)
    assert both_ids(tmp_path)[0] == expected


CHARACTERS = {c: i for i, c in enumerate(sorted({*"".join(TEXTS), *" [UNK]\u2581"}))}
BYTES = {f"<0x{i:02X}>": len(CHARACTERS) + i for i in range(256)}
WORDS_OF_TEXTS = {word: i for i, word in enumerate(["[UNK]", *sorted({*" ".join(TEXTS).split()})])}
PARTS = {"[UNK]": 0, "the": 1, "##n": 2, "t": 3, "##h": 4, "a": 5, "word": 6, "!": 7}
SHAPES = {
    "words": (models.WordLevel(WORDS_OF_TEXTS, "[UNK]"), None, pre_tokenizers.Whitespace()),
    "word pieces": (
        models.WordPiece(PARTS, unk_token="[UNK]"),
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    ),
    "unigrams": (
        models.Unigram([("<unk>", 0.0), ("\u2581the", -1.0), ("\u2581", -2.0), ("t", -3.0)], 0),
        normalizers.NFKC(),
        pre_tokenizers.Metaspace(),
    ),
    "bytes where characters fail": (
        models.BPE(BYTES | CHARACTERS, [], byte_fallback=True, fuse_unk=True, unk_token="[UNK]"),
        normalizers.Replace(" ", "\u2581"),
        None,
    ),
    "digits, lower case": (
        models.BPE(CHARACTERS, []),
        normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()]),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True)]),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("config", ["plain", "extra", "named", "split"])
def test_tokenizers_of_other_kinds_are_taken_as_they_are(name, config, tmp_path):
    write_tokenizer(tmp_path, qwen=False)
    model, normalizer, cut = SHAPES[name]
    tokenizer = tokenizers.Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if cut:
        tokenizer.pre_tokenizer = cut
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    change(tmp_path, **CONFIGS[config])
    ours, theirs = both_ids(tmp_path)
    assert ours == theirs


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json is not a tokenizer"),
        ("tokenizer.json", "[" * 9999, r"tokenizer\.json is not a tokenizer"),
        ("tokenizer_config.json", "[]", "holds no JSON object"),
        ("tokenizer_config.json", "[" * 99_999, "cannot be read as JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "malformed"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "malformed"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {"a": 1}}}', "malformed"),
        ("tokenizer_config.json", '{"extra_special_tokens": 5}', "malformed"),
        ("tokenizer_config.json", '{"extra_special_tokens": [5]}', "malformed"),
        ("tokenizer_config.json", '{"bos_token": 5}', "malformed"),
        (
            "tokenizer_config.json",
            json.dumps({"added_tokens_decoder": {"999": entry("<think>")}}),
            "<think> is given the id 999, yet the tokenizer has 266",
        ),
        ("added_tokens.json", '{"<think>": "x"}', "malformed"),
        ("special_tokens_map.json", "x", "cannot be read as JSON"),
    ],
)
def test_malformed_files_of_a_tokenizer_are_refused_in_one_line(file, content, reason, tmp_path):
    write_tokenizer(tmp_path, qwen=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(PingLLMError, match=reason) as refused:
        CheckpointTokenizer(tmp_path, chat=False, vocab_size=1000)
    assert len(str(refused.value).splitlines()) == 1


def test_merges_with_a_prefix_end_in_a_message_and_not_the_process(tmp_path):
    write_tokenizer(tmp_path, qwen=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = "x"
    change(tmp_path, "tokenizer.json", **content)
    with pytest.raises(DataError, match="continuing_subword_prefix of merges is not supported"):
        CheckpointTokenizer(tmp_path, chat=False, vocab_size=1000)


LEGACY = {
    "special_tokens_map.json": {
        "bos_token": "<s>",
        "additional_special_tokens": ["<think>"],
        "pad_token": {"content": "[MASK]", "lstrip": True, "rstrip": False},
    },
    "added_tokens.json": {"<think>": 266, "<tool>": 267},
}


@pytest.mark.parametrize("qwen", [True, False], ids=["qwen", "other"])
@pytest.mark.parametrize("files", [[file] for file in LEGACY] + [list(LEGACY)], ids=str)
@pytest.mark.parametrize("name", ["plain", "additional", "extra, named", "decoder"])
def test_tokens_in_older_files_are_added_too(name, files, qwen, tmp_path):
    write_tokenizer(tmp_path, qwen=qwen)
    change(tmp_path, **CONFIGS[name])
    for file in files:
        change(tmp_path, file, **LEGACY[file])
    ours, theirs = both_ids(tmp_path)
    assert ours == theirs


@pytest.mark.parametrize("qwen", [True, False], ids=["qwen", "other"])
def test_a_post_processor_adds_its_tokens(qwen, tmp_path):
    ends = processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 264)])
    write_tokenizer(tmp_path, qwen=qwen, post_processor=ends)
    ours, theirs = both_ids(tmp_path)
    assert ours == theirs
    assert ours[0] == [264]


@pytest.mark.parametrize("config", [{}, TWO, CONFIGS["decoder"], CONFIGS["extra"]])
def test_a_vocabulary_and_merges_make_a_tokenizer(config, tmp_path):
    write_tokenizer(tmp_path, qwen=True, special=())
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, model["merges"])))
    (tmp_path / "tokenizer.json").unlink()
    special = {str(263 + i): entry(text, special=True) for i, text in enumerate(SPECIAL)}
    change(tmp_path, tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=special)
    change(tmp_path, **config)
    ours, theirs = both_ids(tmp_path)
    assert ours == theirs
    change(tmp_path, tokenizer_class="GPT2Tokenizer")
    change(tmp_path, "config.json", model_type="qwen3")
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist; .*save_pretrained"):
        both_ids(tmp_path)


# --- chat templates ---------------------------------------------------------------------------

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are helpful.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '\\n' + message['content'] | trim }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {{- message.tool_calls[0].function.arguments | tojson }}
    {%- endif %}
{%- endfor %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}
{% endfor %}"""

SMOL = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}
{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}"""

QWEN3 = """{%- set ns = namespace(multi=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" and message.content is string %}
        {%- set ns.multi = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.reasoning_content is string %}
        {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>' }}
    {%- elif '</think>' in content %}
        {{- content.split('</think>')[-1].lstrip('\\n') }}
    {%- endif %}
    {{- message.role ~ content ~ ns.last ~ (enable_thinking is defined) }}
{%- endfor %}"""

SMALL = [
    "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}",
    "{% if bos_token is defined %}yes{% else %}no{% endif %}",
    "{{ sep_token }}{{ cls_token }}{{ mask_token }}{{ additional_special_tokens }}",
    "{{ image_token }}{{ extra_special_tokens }}",
    "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ custom is defined }}",
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent=2) }}",
    "{{ messages | tojson(ensure_ascii=True) }}",
    "{{ messages | tojson(ensure_ascii=False, separators=(',', ':'), sort_keys=True) }}",
    "{{ messages | tojson(true, 1) }}",
    "{{ messages }}",
    "{{ messages[0] }}{{ messages[-1].content }}",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for m in messages if m.role != 'user' %}{{ loop.index }}{% else %}none{% endfor %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}x{% endfor %}",
    "{% macro f(a, b='z') %}{{ a }}{{ b }}{% endmacro %}{{ f(messages[0].role) }}",
    "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x }}",
    "{%- generation -%}  {{ messages[0].content }}  {%- endgeneration -%}",
    "{% for m in messages %}{% generation %}{{ loop.index }}{% endgeneration %}{% endfor %}",
    "{{ strftime_now('%Y-%m') }}{{ strftime_now(format='%d') }}",
    "{{ dict(a=1) }}{% set d = namespace(x=0) %}{% set d.x = 3 %}{{ d.x }}",
    "{{ messages[0].content | upper | replace('A', '\u00e9') | trim | length }}",
    "{{ messages | map(attribute='role') | join(', ') }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ (messages | first).get('missing', 'nothing') }}{{ messages[0].missing }}",
    "{{ messages[0]['tool_calls'] is defined }}{{ messages[1].tool_calls is none }}",
    "{{ messages[1].thinking }}{{ messages[1].reasoning_content }}{{ messages[1].reasoning }}",
    "{{ messages[0].content.split(' ')[0] }}{{ 'a' * 3 }}{{ '%s!' % 'x' }}{{ 7 // 2 }}{{ 1 / 3 }}",
    "{{ range(3) | list }}{{ 2 ** 10 }}{{ 'a' in 'abc' }}{{ none }}{{ true }}",
    "  {% if true %}  \n  x\n{% endif %}\n\n",
    "{# nothing #}a\r\nb\n",
    "{% set content %}{{ messages[0].content }}{% endset %}{{ content }}",
    "{% filter upper %}{{ messages[0].content }}{% endfilter %}",
    "{{ messages[0].content | safe | escape }}{{ '<a>' | e }}",
    "{% call(x) m() %}{% endcall %}",
    "{{ raise_exception('no') }}",
    "{{ messages[0].no.such }}",
    "{{ messages[0].content + 1 }}",
    "{{ 1 / 0 }}",
    "{{ range(10 ** 9) }}",
    "{{ [1, 2][::0] }}",
    "{{ {}[[]] }}",
    "{{ 'x' | nofilter }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{% include 'x' %}",
    "{% if %}",
]

CALL = {
    "type": "function",
    "function": {"name": "f", "arguments": {"b": "\u00e9<>&'", "a": [1.5, None]}},
}
CHATS = [
    [
        {"role": "user", "content": "hi <b> \u4f60\u597d's"},
        {"role": "assistant", "content": " Yes.\n"},
    ],
    [
        {"role": "system", "content": " be the dog "},
        {"role": "user", "content": "a", "tool_calls": None, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "hm"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "<think>x</think>\n\nb", "thinking": "\nso\n"},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
    ],
]
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "z": "\u00e9"}}}
]


def template_of(directory):
    return CheckpointTokenizer(directory, chat=True, vocab_size=1000).template


def assert_as_transformers(directory, template=None, **settings):
    """Checks that what both make of some chats is equal, or refused by both."""
    write_tokenizer(directory, qwen=True)
    if template is not None:
        settings["chat_template"] = template
    change(directory, **settings)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for chat, tools in itertools.product(CHATS, (None, TOOLS, [])):
        try:
            expected = theirs.apply_chat_template(
                chat, tools=tools, tokenize=False, add_generation_prompt=True
            )
        except Exception:
            with pytest.raises(DataError) as refused:
                template_of(directory).render({"messages": chat}, "x@1", generate=True)
            assert "\n" not in str(refused.value)
            continue
        record = {"messages": chat, "tools": tools}
        assert template_of(directory).render(record, "x@1", generate=True) == expected


@pytest.mark.parametrize("template", [QWEN, LLAMA, MISTRAL, SMOL, QWEN3, *SMALL])
def test_templates_write_what_they_write_in_transformers(template, tmp_path):
    assert_as_transformers(tmp_path, template, bos_token="<s>", image_token="<tool>")


def test_a_template_that_is_not_allowed_its_variables_has_them_undefined(tmp_path):
    """As in transformers: no token is there unless it is named."""
    template = "{{ bos_token is defined }} {{ eos_token }} {{ pad_token }}"
    assert_as_transformers(
        tmp_path, template, bos_token=None, pad_token={"__type": "AddedToken", **entry("[PAD]")}
    )


NAMED = [
    {"name": "default", "template": "d{{ tools is none }}"},
    {"name": "tool_use", "template": "t{{ tools | tojson }}"},
]


def test_named_templates_are_chosen_as_in_transformers(tmp_path):
    assert_as_transformers(tmp_path, NAMED)
    assert template_of(tmp_path).render({"messages": [], "tools": []}, "x@1") == "t[]"
    change(tmp_path, chat_template=NAMED[1:])
    with pytest.raises(DataError, match="x@1: there is no chat template `default`, only tool_use"):
        template_of(tmp_path).render({"messages": []}, "x@1")


def test_templates_in_files_go_before_those_in_the_settings(tmp_path):
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("tools: {{ tools | length }}")
    (tmp_path / "chat_template.jinja").write_text("file\n")
    assert_as_transformers(tmp_path, "settings")
    (tmp_path / "chat_template.jinja").unlink()
    (folder / "tool_use.jinja").rename(folder / "default.jinja")
    assert_as_transformers(tmp_path, "settings")


def test_chat_template_json_is_read_where_there_is_nothing_else(tmp_path):
    write_tokenizer(tmp_path, qwen=True)
    change(tmp_path, "chat_template.json", chat_template="of a processor")
    assert template_of(tmp_path).render({"messages": []}, "x@1") == "of a processor"
    change(tmp_path, chat_template="of the tokenizer")
    assert template_of(tmp_path).render({"messages": []}, "x@1") == "of the tokenizer"


@pytest.mark.parametrize(
    "given", [5, [{"template": "x"}], [{"name": "default"}], [5], {"default": None}, ["x"]]
)
def test_malformed_templates_are_refused(given, tmp_path):
    write_tokenizer(tmp_path, qwen=True)
    change(tmp_path, chat_template=given)
    with pytest.raises(DataError, match="its chat template cannot be read"):
        template_of(tmp_path)


def test_a_template_that_is_not_utf_8_is_refused(tmp_path):
    write_tokenizer(tmp_path, qwen=True)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"its chat template cannot be read: .*utf-8"):
        template_of(tmp_path)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'a' * 10**8 }}", "its text has 100000001 characters"),
        ("{{ 'a'.ljust(10**9) }}", "it takes over 512 MiB of memory"),
        ("{{ '%1000000000d' % 1 }}", "it takes over 512 MiB of memory"),
        (
            "{% set n = namespace(x='ab') %}"
            "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "it takes over 512 MiB of memory",
        ),
        ("{{ range(10**9) }}", "OverflowError"),
        ("{{ 10.0 ** 400 }}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "[" * 500 + "]" * 500 + " }}", "RecursionError"),
    ],
)
def test_a_template_without_measure_is_refused_in_one_line(template, reason, tmp_path):
    write_tokenizer(tmp_path, qwen=True)
    change(tmp_path, chat_template="{% if messages %}" + template + "{% endif %}y")
    with pytest.raises(DataError, match=reason) as refused:
        template_of(tmp_path).render({"messages": CHATS[0]}, "x@1")
    assert "\n" not in str(refused.value)


def test_a_template_that_was_stopped_renders_the_next_chat(tmp_path):
    write_tokenizer(tmp_path, qwen=True)
    bomb = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    change(tmp_path, chat_template="{% if messages %}" + bomb + "{% endif %}y")
    template = template_of(tmp_path)
    with pytest.raises(DataError, match=r"x@1: .* it takes over 2 s"):
        template.render({"messages": CHATS[0]}, "x@1")
    assert template.render({"messages": []}, "x@2") == "y"


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("x", "its `tools`: no JSON"),
        ("5", "a list of objects"),
        (5, "a list of objects"),
        ({"name": "f"}, "a list of objects"),
        ('{"name": "f"}', "a list of objects"),
        (['{"name": "f"}'], "a list of objects"),
        ('["f"]', "a list of objects"),
    ],
)
def test_tools_are_a_list_of_objects_or_that_as_json(tools, reason, tmp_path):
    write_tokenizer(tmp_path, qwen=True)
    change(tmp_path, chat_template=QWEN)
    template = template_of(tmp_path)
    as_json = {"messages": CHATS[0], "tools": json.dumps(TOOLS)}
    assert template.render(as_json, "x@1") == template.render(as_json | {"tools": TOOLS}, "x@1")
    with pytest.raises(DataError, match=f"x@1: .*{reason}"):
        template.render({"messages": CHATS[0], "tools": tools}, "x@1")
