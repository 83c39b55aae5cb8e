"""Llama and its kin: what their `config.json` means, and what their tensors are called.

Llama 2 and 3, Mistral, Qwen2, Qwen2.5 and Qwen3 name their tensors alike; `Traits` holds in what
they differ.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast

from ping_llm.errors import ConfigError
from ping_llm.models.config import DTYPES, DecoderConfig, Dtype, RopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """In what a member of the family differs from the others.

    Attributes:
        qkv_bias: Whether queries, keys and values have a bias, whatever `attention_bias` says.
        qk_norm: Whether queries and keys are normalised.
        head_dim: Width of a head where the config does not say; None: d_model / heads.
        sliding: Which settings the sliding window has: none, Mistral's (one width for all layers),
            or Qwen's (a width, a switch, and the layers).
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    sliding: Literal["none", "mistral", "qwen"] = "none"


MEMBERS = {  # by `model_type`
    "llama": Traits(),
    "mistral": Traits(sliding="mistral"),
    "qwen2": Traits(qkv_bias=True, sliding="qwen"),
    "qwen3": Traits(qk_norm=True, head_dim=128, sliding="qwen"),
}

# Keys of config.json that change nothing in a forward pass, of all that transformers has written.
_NO_EFFECT = frozenset(
    """
    architectures attention_dropout bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward classifier_dropout decoder_start_token_id diversity_penalty do_sample
    dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label initializer_range is_decoder keys_to_ignore_at_inference label2id length_penalty
    max_length max_new_tokens max_position_embeddings min_length model_max_length name_or_path
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class
    top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)
_OWN_PREFIXES = ("_", "unsloth_")  # of keys that others note for themselves
# Keys that change nothing as long as they have these values.
_NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_causal": True,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
    "use_mrope": False,
}
_NUMBERS = ("rms_norm_eps", "rope_theta", "max_position_embeddings", "num_key_value_heads")
_NUMBERS += ("head_dim", "sliding_window", "max_window_layers", "original_max_position_embeddings")
_LARGEST = 2**31 - 1  # size of anything
_ORIGINAL = "original_max_position_embeddings"
_YARN_KEYS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
# Settings of RoPE by its type, each with the field of `RopeScaling` that it becomes.
_ROPE_KEYS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {},
    "llama3": {"low_freq_factor": "beta_slow", "high_freq_factor": "beta_fast"},
    "yarn": {key: key for key in _YARN_KEYS},
}

# Parameter of the decoder: (tensor in the checkpoint, whether that is stored [out, in]).
BLOCK: dict[tuple[str, ...], tuple[str, bool]] = {
    ("attn_norm", "scale"): ("input_layernorm.weight", False),
    ("mlp_norm", "scale"): ("post_attention_layernorm.weight", False),
    ("attn", "q", "kernel"): ("self_attn.q_proj.weight", True),
    ("attn", "q", "bias"): ("self_attn.q_proj.bias", False),
    ("attn", "k", "kernel"): ("self_attn.k_proj.weight", True),
    ("attn", "k", "bias"): ("self_attn.k_proj.bias", False),
    ("attn", "v", "kernel"): ("self_attn.v_proj.weight", True),
    ("attn", "v", "bias"): ("self_attn.v_proj.bias", False),
    ("attn", "out", "kernel"): ("self_attn.o_proj.weight", True),
    ("attn", "q_norm", "scale"): ("self_attn.q_norm.weight", False),
    ("attn", "k_norm", "scale"): ("self_attn.k_norm.weight", False),
    ("mlp", "gate", "kernel"): ("mlp.gate_proj.weight", True),
    ("mlp", "up", "kernel"): ("mlp.up_proj.weight", True),
    ("mlp", "down", "kernel"): ("mlp.down_proj.weight", True),
}
ENDS: dict[tuple[str, ...], tuple[str, bool]] = {
    ("embed", "embedding"): ("embed_tokens.weight", False),
    ("final_norm", "scale"): ("norm.weight", False),
    ("head", "kernel"): ("lm_head.weight", True),
}


def read_config(fields: Mapping[str, Any], where: str) -> DecoderConfig:
    """Returns the decoder that the content of a `config.json` describes.

    Args:
        fields: The content; its `model_type` is one of `MEMBERS`.
        where: What messages call it.

    Raises:
        ConfigError: It asks for something that this decoder does not do, or lacks a size.
    """
    _check_types(fields, where)
    left = {key: value for key, value in fields.items() if key not in _NO_EFFECT}

    def take(key: str, default: Any = None) -> Any:
        return left.pop(key, default)

    def size(key: str) -> int:
        value = take(key)
        if type(value) is not int or not 0 < value <= _LARGEST:
            raise ConfigError(f"{where}: {key} is {value!r}; expected a whole number above 0")
        return value

    model_type = take("model_type")
    traits = MEMBERS[cast(str, model_type)]
    if (act := take("hidden_act", "silu")) != "silu":
        raise ConfigError(f"{where}: hidden_act {act!r} is not supported; only 'silu' is")
    d_model, n_layers = size("hidden_size"), size("num_hidden_layers")
    n_heads = size("num_attention_heads")
    n_kv_heads = take("num_key_value_heads") or n_heads
    head_dim = take("head_dim") or traits.head_dim or d_model // n_heads
    theta, scaling = _rope(left, fields.get("max_position_embeddings"), where)
    window, flags = None, ()
    if traits.sliding == "qwen":
        window, flags = _sliding(left, n_layers, where)
    elif traits.sliding == "mistral":  # no window where it is null, 4,096 keys where it is absent
        window = left.pop("sliding_window", 4096)
    dtype = _dtype(fields, where)
    config = DecoderConfig(
        vocab_size=size("vocab_size"),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=size("intermediate_size"),
        rms_norm_eps=take("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=traits.qkv_bias,
        qk_norm=traits.qk_norm,
        tie_embeddings=bool(take("tie_word_embeddings", False)),
        sliding_window=window,
        sliding_layers=flags,
        dtype=dtype,
        param_dtype=dtype,
    )
    # Qwen2 has its three biases whatever this says; with it, the others have a fourth.
    if take("attention_bias", False) and not traits.qkv_bias:
        raise ConfigError(f"{where}: attention_bias=True is not supported for {model_type}")
    # A value of false or 0 may mean something: `is_causal` false makes every token see all others.
    refused = [
        key
        for key, value in left.items()
        if value is not None
        and not key.startswith(_OWN_PREFIXES)
        and (key not in _NEUTRAL or value != _NEUTRAL[key])
    ]
    if refused:
        shown = ", ".join(f"{key}={left[key]!r}" for key in sorted(refused))
        raise ConfigError(
            f"{where}: not supported: {shown}; remove it only if it does not change the model"
        )
    return config


def write_config(cfg: DecoderConfig) -> dict[str, Any]:
    """Returns the `config.json` of a decoder, for the member of the family that computes the same.

    Raises:
        ConfigError: None of them does.
    """
    slides = cfg.windows is not None
    if cfg.qk_norm:
        model_type = "qwen3"
    elif cfg.qkv_bias:
        model_type = "qwen2"
    else:
        model_type = "mistral" if slides else "llama"
    unknown = {
        f"logit_softcap={cfg.logit_softcap}": cfg.logit_softcap is not None,
        "qk_norm=true with qkv_bias=true": cfg.qk_norm and cfg.qkv_bias,
        "sliding_layers without qk_norm or qkv_bias": (
            model_type == "mistral" and not all(cfg.windows or ())
        ),
        f"d_model={cfg.d_model} that is no multiple of n_heads={cfg.n_heads}": (
            model_type == "llama" and cfg.d_model % cfg.n_heads > 0
        ),
    }
    if refused := [setting for setting, is_so in unknown.items() if is_so]:
        raise ConfigError(
            f"no model of {', '.join(MEMBERS)} has {' or '.join(refused)}, so that such a run "
            "cannot be written as one; export it in the format ping-llm"
        )
    content: dict[str, Any] = {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None if cfg.rope_scaling is None else _rope_content(cfg.rope_scaling),
        "tie_word_embeddings": cfg.tie_embeddings,
        "dtype": cfg.param_dtype,
    }
    if model_type == "mistral":
        content["sliding_window"] = cfg.sliding_window
    elif slides:
        kinds = ["full_attention" if w is None else "sliding_attention" for w in cfg.windows or ()]
        content |= {"use_sliding_window": True, "sliding_window": cfg.sliding_window}
        content["layer_types"] = kinds
    return content


def _rope_content(scaling: RopeScaling) -> dict[str, Any]:
    fields = {key: getattr(scaling, field) for key, field in _ROPE_KEYS[scaling.kind].items()}
    content = {"rope_type": scaling.kind, "factor": scaling.factor, **fields}
    if scaling.kind != "linear":
        content[_ORIGINAL] = scaling.original_max_positions
    return {key: value for key, value in content.items() if value is not None}


def _check_types(fields: Mapping[str, Any], where: str) -> None:
    """Raises a `ConfigError` where a value is of a kind that it cannot be."""
    kinds: dict[str, tuple[type, ...]] = dict.fromkeys(_NUMBERS, (int, float))
    kinds |= {"rope_scaling": (dict,), "rope_parameters": (dict,), "layer_types": (list,)}
    scaling = fields.get("rope_scaling") or fields.get("rope_parameters")
    inner = scaling if isinstance(scaling, dict) else {}
    names = ("factor", "rope_theta", *_ROPE_KEYS["llama3"], *_YARN_KEYS, _ORIGINAL)
    numbers = {key: inner[key] for key in names if key in inner}
    inner_kinds = {"rope_type": (str,), "type": (str,), "partial_rotary_factor": (int, float)}
    kinds |= dict.fromkeys(numbers, (int, float)) | inner_kinds | {"a layer type": (str,)}
    named = {key: inner[key] for key in inner_kinds if key in inner}
    layers = fields.get("layer_types")
    for name in layers if isinstance(layers, list) else []:
        if not isinstance(name, str):
            named["a layer type"] = name
    for key, value in {**fields, **numbers, **named}.items():
        if key not in kinds or value is None or (key == "truncate" and isinstance(value, bool)):
            continue
        is_number = kinds[key] == (int, float)
        wrong = not isinstance(value, kinds[key]) or (is_number and isinstance(value, bool))
        if wrong or (is_number and not 0 <= value <= _LARGEST):
            expected = "a number" if is_number else f"a {kinds[key][0].__name__}"
            raise ConfigError(f"{where}: {key} is {value!r}; expected {expected}")


def _dtype(fields: Mapping[str, Any], where: str) -> Dtype:
    name = str(fields.get("dtype") or fields.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"{where}: dtype {name!r} is not one of {', '.join(DTYPES)}")
    return cast(Dtype, name)


def _rope(
    left: dict[str, Any], max_positions: int | None, where: str
) -> tuple[float, RopeScaling | None]:
    """Takes all of RoPE's settings out of `left`; returns (theta, scaling)."""
    scaling, parameters = left.pop("rope_scaling", None), left.pop("rope_parameters", None)
    if scaling and parameters and scaling != parameters:
        raise ConfigError(f"{where}: rope_scaling={scaling} and {parameters=} differ; keep one")
    rope = dict(scaling or parameters or {})
    theta = left.pop("rope_theta", None)
    theta = rope.pop("rope_theta", None) or theta or 10_000.0
    original = left.pop(_ORIGINAL, None)
    kinds = {rope.pop("rope_type", None), rope.pop("type", None)} - {None} or {"default"}
    if len(kinds) > 1:
        raise ConfigError(
            f"{where}: RoPE has both type and rope_type, which differ: {sorted(kinds)}"
        )
    (kind,) = kinds
    partial = {rope.pop("partial_rotary_factor", None), left.pop("partial_rotary_factor", None)}
    if partial - {None, 1.0}:
        raise ConfigError(f"{where}: partial_rotary_factor other than 1 is not supported")
    if kind not in _ROPE_KEYS:
        raise ConfigError(
            f"{where}: RoPE of type {kind!r} is not supported; only {', '.join(_ROPE_KEYS)} are"
        )
    given = {field: rope.pop(key, None) for key, field in _ROPE_KEYS[kind].items()}
    given = {field: value for field, value in given.items() if value is not None}
    factor = 0.0 if kind == "default" else rope.pop("factor", None) or 0.0
    if kind in ("yarn", "llama3"):
        inner = rope.pop(_ORIGINAL, None)
        original = original or inner or max_positions
        if original is None:
            raise ConfigError(f"{where}: RoPE of type {kind!r} needs {_ORIGINAL}")
    if rope:
        shown = ", ".join(f"{key}={value!r}" for key, value in sorted(rope.items()))
        raise ConfigError(f"{where}: RoPE setting not supported for type {kind!r}: {shown}")
    if kind == "default":
        return theta, None
    if kind == "yarn" and not factor:
        factor = (max_positions or original) / original
    if missing := ["factor"] * (not factor) + ["low_freq_factor", "high_freq_factor"] * (
        kind == "llama3" and len(given) < 2
    ):
        raise ConfigError(f"{where}: RoPE of type {kind!r} needs {', '.join(missing)}")
    return theta, RopeScaling(kind=kind, factor=factor, original_max_positions=original, **given)


def _sliding(
    left: dict[str, Any], n_layers: int, where: str
) -> tuple[int | None, tuple[bool, ...]]:
    """Takes the settings of the sliding window out of `left`; returns (width, flag per layer)."""
    use, width = left.pop("use_sliding_window", False), left.pop("sliding_window", 4096)
    first, kinds = left.pop("max_window_layers", 28), left.pop("layer_types", None)
    width = width if use else None
    if kinds is None:
        flags = tuple(width is not None and layer >= first for layer in range(n_layers))
    else:
        if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
            raise ConfigError(f"{where}: layer_types {unknown} are not supported")
        flags = tuple(kind == "sliding_attention" for kind in kinds)
    if not any(flags):
        return None, ()
    if width is None:
        raise ConfigError(
            f"{where}: layer_types has sliding_attention, but {use=} for use_sliding_window and no "
            "width; set use_sliding_window and sliding_window"
        )
    return width, flags
