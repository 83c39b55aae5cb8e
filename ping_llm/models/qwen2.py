"""Qwen2, Qwen2.5 and Qwen3 checkpoints in Hugging Face's layout: the same decoder, other values.

A checkpoint is a directory with `config.json` and safetensors. Whatever its configuration asks for
is either done or refused by name. Weights go to their devices one tensor at a time.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open

from ping_llm.errors import CheckpointError, ConfigError
from ping_llm.models.config import DTYPES, DecoderConfig, Dtype, YarnScaling
from ping_llm.models.decoder import Decoder
from ping_llm.storage import Location

MODEL_TYPES = ("qwen2", "qwen3")
FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt")  # what is fetched from the hub

_DTYPES = {"F32": jnp.dtype("float32"), "F16": jnp.dtype("float16"), "BF16": jnp.dtype("bfloat16")}

# Keys of config.json that change nothing in a forward pass.
_NO_EFFECT = {
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_YARN_KEYS = (
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
)

# Where the weights of a block come from, and whether they are stored [out, in].
_BLOCK: dict[tuple[str, ...], tuple[str, bool]] = {
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
_ENDS: dict[tuple[str, ...], tuple[str, bool]] = {
    ("embed", "embedding"): ("embed_tokens.weight", False),
    ("final_norm", "scale"): ("norm.weight", False),
    ("head", "kernel"): ("lm_head.weight", True),
}


def resolve(model: str | Path) -> Path:
    """Returns the directory of a checkpoint: `model` itself, or a hub id's files in the cache.

    Raises:
        CheckpointError: There is no such directory, and the hub does not give the files either.
    """
    location, text = Location.of(model), str(model)
    if location.is_local and location.is_dir():
        return location.path
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{model} is neither a directory nor a hub id such as Qwen/Qwen2.5-0.5B"
        )
    import huggingface_hub

    try:
        directory = huggingface_hub.snapshot_download(text, allow_patterns=list(FILES))
        return Path(directory)
    except Exception as error:  # the hub raises many kinds, also those of its HTTP client
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{model} is no directory here and could not be fetched from the hub "
            f"({type(error).__name__}: {reason}); check the id and the network, log in with "
            "`hf auth login` if it is gated, or give the path of a directory"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file of the checkpoint.

    Raises:
        CheckpointError: The file is absent or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


# --- config -----------------------------------------------------------------------------------


def read_config(directory: Path) -> DecoderConfig:
    """Returns the decoder that `config.json` describes; `dtype` is the checkpoint's own.

    Raises:
        CheckpointError: The file cannot be read.
        ConfigError: It asks for something that this decoder does not do, or lacks a size.
    """
    path = Path(directory) / "config.json"
    return config_from_json(read_json(path), where=str(path))


def config_from_json(fields: Mapping[str, Any], *, where: str = "config.json") -> DecoderConfig:
    """Returns the decoder that the content of a `config.json` describes.

    Raises:
        ConfigError: It asks for something that this decoder does not do, or lacks a size.
    """
    left = {key: value for key, value in fields.items() if key not in _NO_EFFECT}

    def take(key: str, default: Any = None) -> Any:
        return left.pop(key, default)

    def size(key: str) -> int:
        value = take(key)
        if not isinstance(value, int):
            raise ConfigError(f"{where}: {key} is {value!r}; expected a whole number")
        return value

    model_type = take("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{where}: model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}"
        )
    is_qwen3 = model_type == "qwen3"
    if (act := take("hidden_act", "silu")) != "silu":
        raise ConfigError(f"{where}: hidden_act {act!r} is not supported; only 'silu' is")
    d_model, n_layers = size("hidden_size"), size("num_hidden_layers")
    n_heads = size("num_attention_heads")
    n_kv_heads = take("num_key_value_heads") or n_heads
    head_dim = take("head_dim") or (128 if is_qwen3 else d_model // n_heads)
    theta, yarn = _rope(left, fields.get("max_position_embeddings"), where)
    window, flags = _sliding(left, n_layers, where)
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
        rope_scaling=yarn,
        qkv_bias=not is_qwen3,
        qk_norm=is_qwen3,
        tie_embeddings=bool(take("tie_word_embeddings", False)),
        sliding_window=window,
        sliding_layers=flags,
        dtype=_dtype(fields, where),
        param_dtype=_dtype(fields, where),
    )
    # Qwen2 has its three biases whatever this says; with it, Qwen3 has a fourth.
    if take("attention_bias", False) and is_qwen3:
        raise ConfigError(f"{where}: attention_bias=True is not supported for {model_type}")
    refused = [key for key, value in left.items() if value and not key.startswith("_")]
    if refused:
        shown = ", ".join(f"{key}={left[key]!r}" for key in sorted(refused))
        raise ConfigError(
            f"{where}: not supported: {shown}; remove it only if it does not change the model"
        )
    return config


def _dtype(fields: Mapping[str, Any], where: str) -> Dtype:
    name = str(fields.get("dtype") or fields.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"{where}: dtype {name!r} is not one of {', '.join(DTYPES)}")
    return cast(Dtype, name)


def _rope(
    left: dict[str, Any], max_positions: int | None, where: str
) -> tuple[float, YarnScaling | None]:
    """Takes all of RoPE's settings out of `left`; returns (theta, scaling)."""
    scaling, parameters = left.pop("rope_scaling", None), left.pop("rope_parameters", None)
    if scaling and parameters and scaling != parameters:
        raise ConfigError(f"{where}: rope_scaling={scaling} and {parameters=} differ; keep one")
    rope = dict(scaling or parameters or {})
    theta = left.pop("rope_theta", None)
    theta = rope.pop("rope_theta", None) or theta or 10_000.0
    original = left.pop("original_max_position_embeddings", None)
    kinds = {rope.pop("rope_type", None), rope.pop("type", None)} - {None} or {"default"}
    if len(kinds) > 1:
        raise ConfigError(
            f"{where}: RoPE has both type and rope_type, which differ: {sorted(kinds)}"
        )
    (kind,) = kinds
    partial = {rope.pop("partial_rotary_factor", None), left.pop("partial_rotary_factor", None)}
    if partial - {None, 1.0}:
        raise ConfigError(f"{where}: partial_rotary_factor other than 1 is not supported")
    yarn = None
    if kind == "yarn":
        original = original or rope.pop("original_max_position_embeddings", None) or max_positions
        rope.pop("original_max_position_embeddings", None)
        if original is None:
            raise ConfigError(f"{where}: YaRN needs original_max_position_embeddings")
        factor = rope.pop("factor", None) or (max_positions or original) / original
        given = {key: rope.pop(key, None) for key in _YARN_KEYS}
        given = {key: value for key, value in given.items() if value is not None}
        yarn = YarnScaling(factor=factor, original_max_positions=original, **given)
    elif kind != "default":
        raise ConfigError(
            f"{where}: RoPE of type {kind!r} is not supported; only default and yarn are"
        )
    if rope:
        shown = ", ".join(f"{key}={value!r}" for key, value in sorted(rope.items()))
        raise ConfigError(f"{where}: RoPE setting not supported for type {kind!r}: {shown}")
    return theta, yarn


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


# --- weights ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One parameter of the decoder: where its values come from.

    Attributes:
        path: Its place in the decoder.
        names: The tensors, one a layer where `stacked`.
        shape: Shape of the parameter.
        spec: Its place on a mesh.
        stacked: Whether it has a leading axis of layers.
        transposed: Whether the tensors have their two axes the other way round.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    spec: P
    stacked: bool
    transposed: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def _weights(cfg: DecoderConfig) -> Iterator[_Weight]:
    state = nnx.state(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))), nnx.Param)
    for keys, leaf in nnx.to_flat_state(state):
        path = tuple(map(str, keys))
        stacked = path[0] == "blocks"
        name, transposed = _BLOCK[path[1:]] if stacked else _ENDS[path]
        names = tuple(f"layers.{i}.{name}" for i in range(cfg.n_layers)) if stacked else (name,)
        spec = P(*leaf.get_metadata("out_sharding"))
        yield _Weight(path, names, leaf.shape, spec, stacked, transposed)


def _short(name: str) -> str:
    """Returns a tensor's name as base checkpoints spell it."""
    return name.removeprefix("model.")


class _Tensors:
    """All tensors of a checkpoint, whichever files they are in, by their short names."""

    def __init__(self, directory: Path):
        self._directory = directory
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
        else:
            files = sorted(path.name for path in directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory} has no *.safetensors; other formats are not read")
        self.where: dict[str, tuple[str, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        for file in files:
            with _opened(directory / file) as opened:
                for name in opened.keys():  # noqa: SIM118
                    short, tensor = _short(name), opened.get_slice(name)
                    if short in self.where:
                        raise CheckpointError(
                            f"{directory}: {name} is in {self.where[short][0]} and in {file}"
                        )
                    self.where[short], self.shapes[short] = (file, name), tuple(tensor.get_shape())
                    if (dtype := tensor.get_dtype()) not in _DTYPES:
                        known = ", ".join(_DTYPES)
                        raise CheckpointError(f"{name} in {file} is {dtype}, not one of {known}")
                    self.dtypes[short] = _DTYPES[dtype]

    def read(self, short: str) -> np.ndarray:
        # The file is mapped, and what was read of it counts as resident until it is closed.
        file, name = self.where[short]
        with _opened(self._directory / file) as opened:
            return opened.get_tensor(name)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a sound safetensors file ({error}); fetch it again"
        ) from None


def _check(tensors: _Tensors, wanted: list[_Weight], whole: DecoderConfig, where: Path) -> None:
    """Raises one error that lists every weight that is missing, unknown, or of another shape."""
    needed = {name: weight.tensor_shape for weight in wanted for name in weight.names}
    known = {name for weight in _weights(whole) for name in weight.names} | {"lm_head.weight"}
    missing = sorted(needed.keys() - tensors.shapes.keys())
    unknown = sorted(
        name for name in tensors.shapes.keys() - known if not name.endswith("rotary_emb.inv_freq")
    )
    wrong = [
        f"{name} {tensors.shapes[name]} (expected {shape})"
        for name, shape in sorted(needed.items())
        if name in tensors.shapes and tensors.shapes[name] != shape
    ]
    lists = {"missing": missing, "unknown": unknown, "of another shape": wrong}
    parts = [f"{what}: {', '.join(names)}" for what, names in lists.items() if names]
    if parts:
        raise CheckpointError(f"{where}: weights do not fit config.json; {'; '.join(parts)}")


def load(
    directory: Path,
    *,
    n_layers: int | None = None,
    head: bool = True,
    dtype: str | None = None,
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    on_tensor: Callable[[int], None] | None = None,
) -> Decoder:
    """Returns the decoder with the checkpoint's weights.

    One tensor at a time is read and put in its place on its devices, so the host holds little more
    than the largest one beside what the devices hold.

    Args:
        directory: With `config.json` and safetensors.
        n_layers: Number of blocks to load, the first ones; None: all.
        head: Whether the output projection is loaded, where it is not the embedding.
        dtype: Dtype of activations; None: the checkpoint's.
        param_dtype: Dtype of parameters; None: each keeps its own.
        mesh: The mesh to spread over; None: the default device.
        on_tensor: Called with the bytes of each tensor once it is in place.

    Raises:
        CheckpointError: A file is missing or damaged, or weights do not fit `config.json`.
        ConfigError: The configuration is not supported.
    """
    directory = Path(directory)
    whole = read_config(directory)
    n_layers = whole.n_layers if n_layers is None else n_layers
    cfg = dataclasses.replace(
        whole,
        n_layers=n_layers,
        sliding_layers=whole.sliding_layers[:n_layers],
        tie_embeddings=whole.tie_embeddings or not head,
        dtype=dtype or whole.dtype,
        param_dtype=param_dtype or whole.param_dtype,
    )
    tensors = _Tensors(directory)
    wanted = list(_weights(cfg))
    _check(tensors, wanted, whole, directory)
    leaves = {
        weight.path: _load_weight(weight, tensors, param_dtype, mesh, on_tensor)
        for weight in wanted
    }
    model = nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    flat = [
        (path, leaf.replace(leaves[tuple(map(str, path))]))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def checkpoint_bytes(directory: Path) -> int:
    """Returns the size of a checkpoint's weight files."""
    return sum(os.path.getsize(path) for path in Path(directory).glob("*.safetensors"))


def _load_weight(
    weight: _Weight,
    tensors: _Tensors,
    param_dtype: str | None,
    mesh: Mesh | None,
    on_tensor: Callable[[int], None] | None,
) -> jax.Array:
    # Layers of different dtypes share one array: the narrowest that loses nothing.
    own = jnp.result_type(*(tensors.dtypes[name] for name in weight.names))
    dtype = jnp.dtype(param_dtype) if param_dtype else own
    place = source = None
    if mesh is not None:
        place = NamedSharding(mesh, weight.spec)
        spec = weight.spec[1:] if weight.stacked else weight.spec
        spec = [*spec, *[None] * (len(weight.tensor_shape) - len(spec))]
        source = NamedSharding(mesh, P(*(spec[::-1] if weight.transposed else spec)))
    if not weight.stacked and not weight.transposed and dtype == own:
        tensor = tensors.read(weight.names[0])
        array = jax.block_until_ready(jax.device_put(tensor, place))
        if on_tensor is not None:
            on_tensor(tensor.nbytes)
        return array
    shape = weight.shape if weight.stacked else (1, *weight.shape)
    whole = place
    if mesh is not None and not weight.stacked:
        whole = NamedSharding(mesh, P(None, *weight.spec))
    array = jnp.zeros(shape, dtype, device=whole)
    for layer, name in enumerate(weight.names):
        tensor = tensors.read(name)
        placed = jax.device_put(tensor, source)
        array = _put(array, placed, np.int32(layer), transposed=weight.transposed)
        jax.block_until_ready(array)  # or the next tensor would be read beside this one
        if on_tensor is not None:
            on_tensor(tensor.nbytes)
    return array if weight.stacked else array.reshape(weight.shape)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="transposed")
def _put(array: jax.Array, tensor: jax.Array, layer: jax.Array, *, transposed: bool) -> jax.Array:
    """Returns `array` with the layer set; in place, for `array` is given up."""
    tensor = (tensor.T if transposed else tensor).astype(array.dtype)
    return jax.lax.dynamic_update_index_in_dim(array, tensor, layer, 0)
