"""Checkpoints in Hugging Face's layout: `config.json` and safetensors, in one directory.

What a configuration asks for is either done or refused by name. Weights go to their devices one
tensor at a time.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open

from ping_llm.errors import CheckpointError, ConfigError, StorageError
from ping_llm.models import families
from ping_llm.models.config import DecoderConfig
from ping_llm.models.decoder import Decoder
from ping_llm.storage import Location, StoredFile

_DTYPES = {"F32": jnp.dtype("float32"), "F16": jnp.dtype("float16"), "BF16": jnp.dtype("bfloat16")}
FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt")  # what is fetched from the hub


def resolve(model: str | Path) -> Path:
    """Returns a local directory with the files of a checkpoint.

    Args:
        model: A directory, local or remote, or a hub id. What is not local is copied once.

    Raises:
        CheckpointError: There is no such directory, and the hub does not give the files either.
        StorageError: A remote directory cannot be read.
    """
    location = Location.of(model)
    if location.is_dir():
        return location.local_copy()
    if location.url.count("/") != 1 or location.url.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{model} is neither a directory nor a hub id such as Qwen/Qwen2.5-0.5B"
        )
    import huggingface_hub

    try:
        directory = huggingface_hub.snapshot_download(location.url, allow_patterns=list(FILES))
    except Exception as error:  # the hub raises many kinds, also those of its HTTP client
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{model} is no directory here and could not be fetched from the hub "
            f"({type(error).__name__}: {reason}); check the id and the network, log in with "
            "`hf auth login` if it is gated, or give the path of a directory"
        ) from error
    return Path(directory)


def read_json(path: Path | Location) -> dict[str, Any]:
    """Returns the JSON object in a file of the checkpoint.

    Raises:
        CheckpointError: The file is absent or holds no JSON object.
    """
    try:
        content = json.loads(Location.of(path).read_bytes())
    except (StorageError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def read_config(directory: Path) -> DecoderConfig:
    """Returns the decoder that `config.json` describes; `dtype` is the checkpoint's own.

    Raises:
        CheckpointError: The file cannot be read.
        ConfigError: It asks for something that this decoder does not do, or lacks a size.
    """
    return _open(directory)[1]


def _open(directory: Path) -> tuple[ModuleType, DecoderConfig]:
    path = directory / "config.json"
    fields = read_json(path)
    family = families.open(fields.get("model_type"), str(path))
    try:
        return family, family.read_config(fields, str(path))
    except ConfigError as error:  # of the decoder's settings, whose error names no file
        named = str(path) in str(error)
        raise error if named else ConfigError(f"{path}: {error}") from None


# --- weights ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One parameter of the decoder: where its values come from.

    Attributes:
        names: The tensors, one a layer where `stacked`.
        shape: Shape of the parameter.
        spec: Its place on a mesh.
        stacked: Whether it has a leading axis of layers.
        transposed: Whether the tensors have their two axes the other way round.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    spec: P
    stacked: bool
    transposed: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def _weights(family: ModuleType, cfg: DecoderConfig, state: nnx.State) -> Iterator[_Weight]:
    """Yields the parameters of a decoder in the order of its flat state."""
    for keys, leaf in nnx.to_flat_state(state):
        path = tuple(map(str, keys))
        stacked = path[0] == "blocks"
        name, transposed = family.BLOCK[path[1:]] if stacked else family.ENDS[path]
        names = tuple(f"layers.{i}.{name}" for i in range(cfg.n_layers)) if stacked else (name,)
        spec = P(*leaf.get_metadata("out_sharding"))
        yield _Weight(names, leaf.shape, spec, stacked, transposed)


class _Tensor(NamedTuple):
    """One tensor of a checkpoint: its file, its name there, its shape and dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        # The file is mapped, and what was read of it counts as resident until it is closed.
        with _opened(self.file) as opened:
            return opened.get_tensor(self.name)


def weight_files(directory: Path) -> list[StoredFile]:
    """Returns the files that hold a checkpoint's weights, in the order of their names.

    As in transformers they are `model.safetensors`, else what its index names. Where there is
    neither, all `*.safetensors`. Other files are not looked at.

    Raises:
        CheckpointError: There are none, one that the index names is missing, or they come with a
            LoRA adapter.
        StorageError: The index leads out of the directory.
    """
    if (adapter := directory / "adapter_config.json").is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        raise CheckpointError(
            f"{directory} holds a LoRA adapter of {base}; merge it first "
            "(merge_and_unload, save_pretrained), or move adapter_config.json away"
        )
    place, index = Location.of(directory), directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        files = [place / "model.safetensors"]
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map; fetch it again")
        files = [place.child(name) for name in sorted({*map(str, weight_map.values())})]
        if missing := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(f"{index} names files that are missing: {', '.join(missing)}")
    else:
        files = [place / path.name for path in sorted(directory.glob("*.safetensors"))]
    if not files:
        raise CheckpointError(f"{directory} has no *.safetensors; other formats are not read")
    return [StoredFile(file, file.path.stat().st_size) for file in files]


def _find_tensors(directory: Path) -> dict[str, _Tensor]:
    """Returns all tensors of a checkpoint, whichever files they are in, by their short names."""
    tensors: dict[str, _Tensor] = {}
    for path in (file.location.path for file in weight_files(directory)):
        with _opened(path) as opened:
            for name in opened.keys():  # noqa: SIM118
                short = name.removeprefix("model.")  # as base checkpoints spell it
                if short in tensors:
                    other = tensors[short].file.name
                    raise CheckpointError(f"{directory}: {name} is in {other} and in {path.name}")
                tensor = opened.get_slice(name)
                if (dtype := tensor.get_dtype()) not in _DTYPES:
                    kinds = ", ".join(_DTYPES)
                    raise CheckpointError(f"{name} in {path.name} is {dtype}, not one of {kinds}")
                shape = tuple(tensor.get_shape())
                tensors[short] = _Tensor(path, name, shape, _DTYPES[dtype])
    return tensors


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


def _check(
    tensors: Mapping[str, _Tensor], wanted: list[_Weight], expected: set[str], where: Path
) -> None:
    """Raises one error that lists every weight that is missing, unknown, or of another shape."""
    needed = {name: weight.tensor_shape for weight in wanted for name in weight.names}
    unknown = [n for n in tensors.keys() - expected if not n.endswith("rotary_emb.inv_freq")]
    wrong = [
        f"{name} {tensors[name].shape} (expected {shape})"
        for name, shape in sorted(needed.items())
        if name in tensors and tensors[name].shape != shape
    ]
    missing = sorted(needed.keys() - tensors.keys())
    lists = {"missing": missing, "unknown": sorted(unknown), "of another shape": wrong}
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
    family, whole = _open(directory)
    n_layers = whole.n_layers if n_layers is None else n_layers
    cfg = dataclasses.replace(
        whole,
        n_layers=n_layers,
        sliding_layers=whole.sliding_layers[:n_layers],
        tie_embeddings=whole.tie_embeddings or not head,
        dtype=dtype or whole.dtype,
        param_dtype=param_dtype or whole.param_dtype,
    )
    tensors = _find_tensors(directory)
    graphdef, state = _split_shapes(cfg)
    wanted = list(_weights(family, cfg, state))
    all_weights = _weights(family, whole, _split_shapes(whole)[1])
    expected = {name for weight in all_weights for name in weight.names}
    _check(tensors, wanted, expected | {"lm_head.weight"}, directory)
    flat = [
        (path, leaf.replace(_load_weight(weight, tensors, param_dtype, mesh, on_tensor)))
        for (path, leaf), weight in zip(nnx.to_flat_state(state), wanted, strict=True)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def to_tensors(cfg: DecoderConfig, params: nnx.State) -> dict[str, np.ndarray]:
    """Returns the parameters of a decoder by the names that a checkpoint has for them."""
    tensors = {}
    flat = nnx.to_flat_state(params)
    for (_, leaf), weight in zip(flat, _weights(families.llama, cfg, params), strict=True):
        values = np.asarray(leaf[...])
        for name, value in zip(weight.names, values if weight.stacked else [values], strict=True):
            value = np.ascontiguousarray(value.T if weight.transposed else value)
            tensors[name if name.startswith("lm_head") else f"model.{name}"] = value
    return tensors


def _split_shapes(cfg: DecoderConfig) -> tuple[Any, Any]:
    """Returns (graphdef, state) of a decoder whose parameters have shapes, but no values."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))))


def checkpoint_bytes(directory: Path) -> int:
    """Returns the size of a checkpoint's weight files."""
    return sum(file.size for file in weight_files(directory))


def _load_weight(
    weight: _Weight,
    tensors: Mapping[str, _Tensor],
    param_dtype: str | None,
    mesh: Mesh | None,
    on_tensor: Callable[[int], None] | None,
) -> jax.Array:
    # Layers of different dtypes share one array: the narrowest that loses nothing.
    own = jnp.result_type(*(tensors[name].dtype for name in weight.names))
    dtype = jnp.dtype(param_dtype) if param_dtype else own
    spec = weight.spec[1:] if weight.stacked else weight.spec

    def sharded(*axes: Any) -> NamedSharding | None:
        return None if mesh is None else NamedSharding(mesh, P(*axes))

    if not weight.stacked and not weight.transposed and dtype == own:
        tensor = tensors[weight.names[0]].read()
        array = jax.block_until_ready(jax.device_put(tensor, sharded(*spec)))
        if on_tensor is not None:
            on_tensor(tensor.nbytes)
        return array
    axes = [*spec, *[None] * (len(weight.tensor_shape) - len(spec))]
    source = sharded(*(axes[::-1] if weight.transposed else axes))
    shape, whole = (1, *weight.shape), (None, *spec)
    if weight.stacked:
        shape, whole = weight.shape, weight.spec
    array = jnp.zeros(shape, dtype, device=sharded(*whole))
    for layer, name in enumerate(weight.names):
        tensor = tensors[name].read()
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
