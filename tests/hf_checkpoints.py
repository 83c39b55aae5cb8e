"""Tiny random checkpoints in Hugging Face's layout, for tests."""

import json
from pathlib import Path

import torch
import transformers

SIZES = {
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def make_checkpoint(
    directory: Path,
    *,
    model_type: str = "qwen2",
    backbone: bool = False,
    dtype: str = "float32",
    shard_size: str = "1GB",
    config: dict | None = None,
    **settings,
) -> Path:
    """Writes a checkpoint with random weights, also random biases and norms, and returns it.

    Args:
        directory: Where to.
        model_type: "qwen2", "qwen3", "llama" or "mistral".
        backbone: Whether to leave out the head, and `model.` in the names.
        dtype: Of the weights.
        shard_size: The largest file, as transformers takes it.
        config: What to change in config.json afterwards; None removes a key.
        settings: For the configuration.
    """
    name = model_type.capitalize()
    make_config = getattr(transformers, f"{name}Config")
    make_model = getattr(transformers, f"{name}{'Model' if backbone else 'ForCausalLM'}")
    if model_type == "qwen3":
        settings.setdefault("head_dim", 8)
    torch.manual_seed(0)
    model = make_model(make_config(**(SIZES | settings)))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases begin as 0 and norms as 1, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "embed" not in key:
                parameter.mul_(8.0)  # so that attention is not flat
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard_size)
    path = directory / "config.json"
    content = json.loads(path.read_text()) | (config or {})
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return directory


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def add_tokenizer(directory: Path) -> Path:
    """Writes a tokenizer of 262 ids, with Qwen's chat tokens, beside a checkpoint."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece: i for i, piece in enumerate([*alphabet, "Ġt", "Ġth", "he"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(pieces, [("Ġ", "t"), ("Ġt", "h"), ("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
