"""A checkpoint's own tokenizer and chat template."""

import contextlib
import hashlib
import itertools
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm.activations.roles import BOS, REAL, SPECIAL
from ping_llm.errors import DataError
from ping_llm.extraction.records import check_unicode
from ping_llm.models.huggingface import read_json
from ping_llm.text import safe

TEXTS_AT_ONCE = 256
SECONDS = 5  # that a chat template may take
NAMED_TOKENS = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# What transformers' class of Qwen's tokenizers takes where the config names none.
DEFAULT_TOKENS = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
REASONING = ("reasoning_content", "thinking", "reasoning")
# How Qwen's tokenizers cut text, where a checkpoint has `vocab.json` and `merges.txt` alone.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class CheckpointTokenizer:
    """A checkpoint's own tokenizer.

    Attributes:
        identity: Hash of what decides the token ids.
        template: Its chat template, or None.
    """

    def __init__(self, directory: Path, *, chat: bool, vocab_size: int):
        """Reads it as transformers does.

        Raises:
            DataError: There is none, or it asks for something that is not done here.
        """
        self._vocab_size = vocab_size
        self._tokenizer, content = _read_tokenizer(directory)
        # Some checkpoints are saved with either, which would cut or pad prompts unseen.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        path = directory / "tokenizer_config.json"
        settings = DEFAULT_TOKENS | (read_json(path) if path.is_file() else {})
        if settings.get("add_prefix_space"):
            raise DataError(f"{path}: add_prefix_space=true is not supported")
        try:
            _add_tokens(self._tokenizer, settings)
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path} has values that cannot be: {safe(error)}") from None
        self._tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens"))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = np.array([i for i, token in added.items() if token.special], np.int64)
        bos = _content(settings.get("bos_token"))
        self._bos = None if bos is None else self._tokenizer.token_to_id(bos)
        self.template = ChatTemplate(directory, settings) if chat else None
        how = f"{sorted(added.items())} {self._tokenizer.encode_special_tokens}"
        parts = [content, how.encode(), self.template.source.encode() if self.template else b""]
        self.identity = hashlib.sha256(b"".join(parts)).hexdigest()[:32]

    def encode(
        self, texts: Iterable[tuple[str, str]], *, add_special: bool
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (sample, token ids) of each (sample, text).

        Raises:
            DataError: The model does not know a token id, or a text is no Unicode.
        """
        encode, texts = self._tokenizer.encode_batch_fast, iter(texts)
        while batch := list(itertools.islice(texts, TEXTS_AT_ONCE)):
            for sample, text in batch:
                check_unicode(text, sample)
            encoded = encode([text for _, text in batch], add_special_tokens=add_special)
            for (sample, _), one in zip(batch, encoded, strict=True):
                tokens, vocab_size = np.array(one.ids, np.int32), self._vocab_size
                if len(tokens) and tokens.max() >= vocab_size:
                    raise DataError(
                        f"{sample}: token id {tokens.max()} is not below the model's "
                        f"{vocab_size=}; the tokenizer is not this model's"
                    )
                yield sample, tokens

    def roles(self, tokens: np.ndarray) -> np.ndarray:
        """Returns REAL, SPECIAL or BOS of each token [n], uint8."""
        roles = np.where(np.isin(tokens, self._special), SPECIAL, REAL).astype(np.uint8)
        roles[tokens == (-1 if self._bos is None else self._bos)] = BOS
        return roles


def _read_tokenizer(directory: Path) -> tuple[Any, bytes]:
    """Returns (the tokenizer of a checkpoint, the files that it was made of)."""
    import tokenizers

    path, vocab, merges = (
        directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    files = [path] if path.is_file() else [vocab, merges]
    if not all(file.is_file() for file in files):
        raise DataError(
            f"{path} does not exist; the checkpoint needs it, or vocab.json and merges.txt"
        )
    content = b"".join(file.read_bytes() for file in files)
    try:
        if path.is_file():
            return tokenizers.Tokenizer.from_buffer(content), content
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises nothing narrower
        named = " and ".join(map(str, files))
        raise DataError(f"{named} is not a tokenizer: {safe(error)}") from None
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="isolated")
    as_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, as_bytes])
    return tokenizer, content


def _add_tokens(tokenizer: Any, settings: Mapping[str, Any]) -> None:
    """Adds the tokens that stand in `tokenizer_config.json`.

    In the order of transformers, which decides their ids: those of `added_tokens_decoder`, the
    named ones, then the extra ones. The latter two are special, whatever else is said of them.

    Raises:
        ValueError: An entry is no token, or `added_tokens_decoder` lacks tokens of
            `tokenizer.json`, which transformers then does without.
    """
    from tokenizers import AddedToken

    held = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    decoder = settings.get("added_tokens_decoder")
    listed = [entry for _, entry in sorted((decoder or {}).items(), key=lambda item: int(item[0]))]
    if decoder is not None and (lacking := held - {*map(_content, listed)}):
        raise ValueError(
            f"added_tokens_decoder lacks tokens of tokenizer.json: {', '.join(sorted(lacking))}"
        )
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    extra = extra.values() if isinstance(extra, dict) else extra
    entries = [*(settings.get(key) for key in NAMED_TOKENS), *extra]
    special = [_content(entry) for entry in entries if entry is not None]
    if any(not isinstance(text, str) for text in (*map(_content, listed), *special)):
        raise ValueError("an added token has no text")
    flags = [{key: value for key, value in entry.items() if key != "__type"} for entry in listed]
    tokenizer.add_tokens([AddedToken(**each) for each in flags])
    tokenizer.add_tokens([AddedToken(text, special=True) for text in special])


def _content(token: Any) -> str | None:
    """Returns the text of a token in `tokenizer_config.json`, where it is a string or an object."""
    return token.get("content") if isinstance(token, dict) else token


class ChatTemplate:
    """The model's own chat template; renders what transformers' `apply_chat_template` does.

    It runs in a process of its own, for it came with the checkpoint: there it can neither take much
    memory nor hang.

    Attributes:
        source: What decides the texts: the template, or several by name as JSON.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]):
        self._directory = directory
        self._templates = _find_templates(directory, settings)
        if "default" not in self._templates:
            raise DataError(
                f"{directory} has no chat template; use an instruct model or --format text"
            )
        alone = len(self._templates) == 1
        self.source = self._templates["default"] if alone else json.dumps(self._templates)
        named = {key: _content(settings.get(key)) for key in NAMED_TOKENS}
        self._tokens = {key: token for key, token in named.items() if token is not None}
        self._process: subprocess.Popen[str] | None = None
        self._answer_of(self._templates, "")

    def render(self, record: dict[str, Any], sample: str, *, generate: bool = False) -> str:
        """Returns the text of the chat in a record's `messages`, with its `tools` if it has any.

        Args:
            record: The chat.
            sample: What to call it in an error.
            generate: Whether the text ends where the model's answer begins.

        Raises:
            DataError: The template refuses it, or takes too long or too much memory.
        """
        tools = _tools(record.get("tools"), sample)
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        variables = {
            "messages": [_message(message) for message in record["messages"]],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": generate,
            **self._tokens,
        }
        return self._answer_of({"name": name, "variables": variables}, sample)["text"]

    def _answer_of(self, request: dict[str, Any], sample: str) -> dict[str, str]:
        """Returns what the process answers; the first request are the templates."""
        if self._process is None:
            self._process = _start()
            weakref.finalize(self, _stop, self._process)
            if "variables" in request:
                self._answer_of(self._templates, "")
        lines: list[str] = []
        asked = threading.Thread(
            target=_exchange, args=(self._process, json.dumps(request), lines), daemon=True
        )
        asked.start()
        asked.join(SECONDS)
        if lines and lines[0]:
            answer = json.loads(lines[0])
        else:
            slow = asked.is_alive()
            answer = {"error": f"it takes more than {SECONDS} s" if slow else "its process died"}
            self._process.kill()
            asked.join()
            self._process = None
        if "error" in answer:
            refuses = f"{self._directory}: its chat template cannot be used"
            if sample:
                refuses = f"{sample}: the chat template refuses these messages"
            raise DataError(f"{refuses}: {safe(answer['error'])}")
        return answer


def _find_templates(directory: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Returns the chat templates of a checkpoint by name; a single one is `default`."""
    source = settings.get("chat_template")
    if (path := directory / "chat_template.json").is_file() and source is None:
        source = read_json(path).get("chat_template")
    if isinstance(source, list):  # several, by name
        entries = [entry for entry in source if isinstance(entry, dict)]
        source = {entry.get("name"): entry.get("template") for entry in entries}
    templates = source if isinstance(source, dict) else {"default": source}
    files = [directory / "chat_template.jinja", *directory.glob("additional_chat_templates/*")]
    for file in files:
        if file.is_file() and file.suffix == ".jinja":
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise DataError(f"{file} cannot be read: {error}") from None
            templates["default" if file.parent == directory else file.stem] = text
    return {
        name: text
        for name, text in templates.items()
        if isinstance(name, str) and isinstance(text, str)
    }


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message as templates see it: without what is null, reasoning by all its names."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _tools(tools: Any, sample: str) -> list[dict[str, Any]] | None:
    """Returns the tools of a record, which may be JSON, as Parquet holds them."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{sample}: its `tools` are no JSON: {error}") from None
    is_list = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    if tools is not None and not is_list:
        raise DataError(f"{sample}: its `tools` must be a list of objects, or JSON of one")
    return tools


def _start() -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "ping_llm.extraction.template_process"]
    pipe = subprocess.PIPE
    # In a session of its own, Ctrl-C is told to this process alone.
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, start_new_session=True)


def _stop(process: "subprocess.Popen[str]") -> None:
    process.kill()
    with contextlib.suppress(OSError):  # what was not yet sent
        process.__exit__(None, None, None)


def _exchange(process: "subprocess.Popen[str]", request: str, lines: list[str]) -> None:
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write(request + "\n")
        process.stdin.flush()
        lines.append(process.stdout.readline())
    except OSError:  # it died
        lines.append("")
