"""A checkpoint's own tokenizer and chat template, both as transformers has them."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ping_llm.activations.roles import BOS, REAL, SPECIAL
from ping_llm.errors import DataError
from ping_llm.extraction.records import parse_json, whole_text
from ping_llm.extraction.rendering import Renderer
from ping_llm.models.huggingface import read_json
from ping_llm.text import safe

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

TEXTS_AT_ONCE, CHARACTERS_AT_ONCE = 256, 1 << 20  # a character takes 140 bytes on its way
NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # each a setting, as `bos_token`

# How Qwen2Tokenizer cuts a text into words.
_QWEN_WORDS = (
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
        self._vocab_size = vocab_size
        settings = _read_optional(directory / "tokenizer_config.json")
        model_type = _read_optional(directory / "config.json").get("model_type")
        usual = "Qwen2Tokenizer" if model_type in ("qwen2", "qwen3") else ""
        kind = str(settings.get("tokenizer_class") or usual).removesuffix("Fast")
        is_qwen = model_type == "qwen2" or kind == "Qwen2Tokenizer"
        is_llama = model_type == "llama" and kind == "LlamaTokenizer"
        content, self._tokenizer = _read_tokenizer(directory, settings, is_qwen=is_qwen)
        # Some checkpoints are saved with either, which would cut or pad prompts unseen.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        try:
            _set_steps(self._tokenizer, settings, is_qwen=is_qwen, is_llama=is_llama)
            named, added = _add_tokens(self._tokenizer, directory, settings, is_qwen=is_qwen)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise DataError(
                f"{directory / 'tokenizer_config.json'} or a file beside it is malformed: {error}"
            ) from None
        self._tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens"))
        tokens = self._tokenizer.get_added_tokens_decoder()
        self._special = np.array([i for i, token in tokens.items() if token.special], np.int64)
        self._bos = (
            self._tokenizer.token_to_id(named["bos_token"]) if "bos_token" in named else None
        )
        self.template = ChatTemplate(directory, settings, named) if chat else None
        beside = [
            settings.get("split_special_tokens"),
            settings.get("add_prefix_space"),
            [str(token) + repr(token) for token in added],
            [self.template.sources, named] if self.template else None,
        ]
        self.identity = hashlib.sha256(content + json.dumps(beside).encode()).hexdigest()[:32]

    def encode(
        self, texts: Iterable[tuple[str, str]], *, add_special: bool
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (sample, token ids) of each (sample, text).

        Raises:
            DataError: A text holds half a character, or the model does not know a token id.
        """
        encode = self._tokenizer.encode_batch_fast
        for batch in _batches(texts):
            for sample, text in batch:
                whole_text(text, f"{sample}: its text")
            encoded = encode([text for _, text in batch], add_special_tokens=add_special)
            for (sample, _), one in zip(batch, encoded, strict=True):
                tokens, vocab_size = np.array(one.ids, np.int32), self._vocab_size
                if len(tokens) and tokens.max() >= vocab_size:
                    raise DataError(
                        f"{sample}: token id {tokens.max()} is not below the model's "
                        f"{vocab_size=}; the tokenizer is not this model's"
                    )
                yield sample, tokens

    def texts(self, tokens: np.ndarray) -> list[str]:
        """Returns each token [n] as text; of half a character, a replacement character."""
        ids = [[token] for token in tokens.tolist()]
        return self._tokenizer.decode_batch(ids, skip_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def roles(self, tokens: np.ndarray) -> np.ndarray:
        """Returns REAL, SPECIAL or BOS of each token [n], uint8."""
        roles = np.where(np.isin(tokens, self._special), SPECIAL, REAL).astype(np.uint8)
        roles[tokens == (-1 if self._bos is None else self._bos)] = BOS
        return roles


def _batches(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, characters = [], 0
    for sample, text in texts:
        batch.append((sample, text))
        characters += len(text)
        if len(batch) == TEXTS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_tokenizer(
    directory: Path, settings: dict[str, Any], *, is_qwen: bool
) -> tuple[bytes, "Tokenizer"]:
    """Returns what a tokenizer was read from, and the tokenizer."""
    import tokenizers

    path, words, merges = (
        directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    try:
        if path.is_file():
            content = path.read_bytes()
            # On merges that lack their prefix the library ends the process.
            prefix = re.search(rb'"continuing_subword_prefix"\s*:\s*"[^"]', content)
            if prefix and json.loads(content)["model"].get("type") != "WordPiece":
                raise DataError(f"{path}: continuing_subword_prefix of merges is not supported")
            return content, tokenizers.Tokenizer.from_buffer(content)
        ends = settings.get("add_bos_token") or settings.get("add_eos_token")
        if not (is_qwen and words.is_file() and merges.is_file()) or ends:
            raise DataError(
                f"{path} does not exist; write it with transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        path = words
        bpe = tokenizers.models.BPE.from_file(str(words), str(merges))
        return words.read_bytes() + merges.read_bytes(), tokenizers.Tokenizer(bpe)
    except DataError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path} is not a tokenizer: {error}") from None


def _set_steps(
    tokenizer: "Tokenizer", settings: dict[str, Any], *, is_qwen: bool, is_llama: bool
) -> None:
    """Sets what comes before the merges as transformers 5 does, which knows some by heart."""
    from tokenizers import Regex, models, normalizers, pre_tokenizers

    prefix, steps = settings.get("add_prefix_space"), tokenizer.pre_tokenizer
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None  # would cut a text another way each time
        if is_qwen:
            words = pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated")
            to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix), use_regex=False)
            tokenizer.normalizer = normalizers.NFC()
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
            return
        # Files of Llama 2 have a normalizer that puts a space before a space, too.
        if is_llama and tokenizer.model.byte_fallback:
            scheme = "never" if prefix is False else "always" if settings.get("legacy") else "first"
            tokenizer.normalizer = None
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
            return
    for step in steps if isinstance(steps, pre_tokenizers.Sequence) else [steps]:
        given = step.add_prefix_space if isinstance(step, pre_tokenizers.ByteLevel) else prefix
        if prefix is not None and prefix != given:  # versions of transformers differ on this
            raise DataError(
                f"tokenizer_config.json says add_prefix_space={prefix}, tokenizer.json {given}; "
                "make them agree"
            )


def _token(value: Any) -> "AddedToken":
    """Returns a token as settings write it: a string, which is special, or an object."""
    from tokenizers import AddedToken

    fields = value if isinstance(value, dict) else {"content": value, "special": True}
    return AddedToken(**{key: field for key, field in fields.items() if key != "__type"})


def _add_tokens(
    tokenizer: "Tokenizer", directory: Path, settings: dict[str, Any], *, is_qwen: bool
) -> tuple[dict[str, str], list["AddedToken"]]:
    """Adds the tokens that stand beside `tokenizer.json`, in the order in which transformers does.

    Returns:
        The named tokens, such as `bos_token`, and the tokens that were added.
    """
    from tokenizers import AddedToken

    older = {}  # what older versions of transformers saved elsewhere
    if "added_tokens_decoder" not in settings:
        older = _read_optional(directory / "special_tokens_map.json")
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    settings = settings | older
    if is_qwen:
        usual = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
        settings = usual | settings
    standard = [f"{name}_token" for name in NAMED_TOKENS]
    named = {key: settings.get(key) for key in standard} | {
        key: value
        for key, value in settings.items()
        if key.endswith("_token") and key not in standard and isinstance(value, str | dict)
    }
    if isinstance(extra, dict):
        named, extra = named | extra, None
    if extra is None:
        extra = settings.get("additional_special_tokens") or []
    if not isinstance(extra, list):
        raise TypeError("extra_special_tokens is neither a list nor an object")
    named = {key: _token(value) for key, value in named.items() if value is not None}
    extra = [_token(value) for value in extra]
    present = tokenizer.get_added_tokens_decoder()
    if "added_tokens_decoder" in settings:
        numbered = {int(i): _token(t) for i, t in settings["added_tokens_decoder"].items()}
    else:
        specials = {token.content for token in (*named.values(), *extra)}
        numbered = {
            int(i): AddedToken(
                content, normalized=content not in specials, special=content in specials
            )
            for content, i in _read_optional(directory / "added_tokens.json").items()
        } | present
    shown = {repr(token) for token in present.values()}
    wanted = [token for _, token in sorted(numbered.items()) if repr(token) not in shown]
    known = {token.content for token in (*present.values(), *wanted)}
    for token in (*named.values(), *extra):
        if token.content not in known and token not in wanted:
            wanted.append(token)
    names = {key: token.content for key, token in named.items()}
    for token in wanted:
        token.special = token.special or token.content in names.values()
    tokenizer.add_tokens(wanted)
    if is_qwen:
        specials = dict.fromkeys([*names.values(), *(token.content for token in extra)])
        tokenizer.add_tokens([AddedToken(content, special=True) for content in specials])
    for i, token in numbered.items():
        if tokenizer.token_to_id(token.content) != i:
            raise DataError(
                f"{directory}: {token.content} is given the id {i}, yet the tokenizer has "
                f"{tokenizer.token_to_id(token.content)} for it"
            )
    return names, wanted


def _read_templates(directory: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Returns the chat templates of a checkpoint by name; where there is one, it is `default`."""
    files = {path.stem: path for path in directory.glob("additional_chat_templates/*.jinja")}
    if (path := directory / "chat_template.jinja").is_file():
        files["default"] = path
    try:
        if files:
            return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        legacy = _read_optional(directory / "chat_template.json")
        given = settings.get("chat_template") or legacy.get("chat_template") or {}
        if isinstance(given, list):
            given = {entry["name"]: entry["template"] for entry in given}
        sources = given if isinstance(given, dict) else {"default": given}
        if not all(isinstance(source, str) for source in sources.values()):
            raise TypeError("a template is a string")
    except (TypeError, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{directory}: its chat template cannot be read: {error!r}") from None
    if not sources:
        raise DataError(f"{directory} has no chat template; use an instruct model or --format text")
    return sources


class ChatTemplate:
    """The model's own chat templates; they write what transformers' `apply_chat_template` does.

    Attributes:
        sources: The templates by name.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], named: dict[str, str]):
        self.sources, self._named = _read_templates(directory, settings), named
        self._renderer = Renderer(self.sources)
        try:
            self._renderer.compile()
        except ValueError as error:
            reason = safe(error)
            raise DataError(f"{directory}: its chat template cannot be used: {reason}") from None

    def render(self, record: dict[str, Any], sample: str, *, generate: bool = False) -> str:
        """Returns the text of the chat in a record's `messages`, with its `tools` if it has any.

        Args:
            record: The chat; `tools` is a list of objects, or that as JSON.
            sample: What to call it in an error.
            generate: Whether the text ends where the model's answer begins.

        Raises:
            DataError: The chat is not what it should be, or the template refuses it.
        """
        messages = [_message(message, sample) for message in record["messages"]]
        tools = record.get("tools")
        if isinstance(tools, str):
            tools = parse_json(tools.encode(), f"{sample}: its `tools`")
        if tools is not None and not (
            isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
        ):
            raise DataError(f"{sample}: its `tools` must be a list of objects, or that as JSON")
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise DataError(
                f"{sample}: there is no chat template `default`, only {', '.join(self.sources)}"
            )
        chat = {"messages": messages, "tools": tools, "documents": None}
        try:
            return self._renderer.render(
                name, self._named | chat | {"add_generation_prompt": generate}
            )
        except ValueError as error:
            raise DataError(
                f"{sample}: the chat template refuses these messages: {error}"
            ) from None


def _message(message: Any, sample: str) -> dict[str, Any]:
    """Returns a message as transformers gives it to templates."""
    # A template takes what is missing for empty, and says nothing.
    if not isinstance(message, dict) or not message.get("role"):
        raise DataError(f"{sample}: each of its `messages` must be an object with a `role`")
    message = {key: value for key, value in message.items() if value is not None}
    thoughts = [message[k] for k in ("reasoning_content", "thinking", "reasoning") if k in message]
    if thoughts:  # templates read one name or another
        message = {"thinking": thoughts[0]} | message | {"reasoning_content": thoughts[0]}
    return message
