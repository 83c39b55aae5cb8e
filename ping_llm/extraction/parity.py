"""Our activations beside those of transformers, which comes with the extra `[parity]`."""

import dataclasses
import gc
import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ping_llm import settings
from ping_llm.errors import ConfigError
from ping_llm.extraction.settings import VerifyParitySettings, in_order, layer_numbers
from ping_llm.models import huggingface
from ping_llm.models.config import END_SITES
from ping_llm.packing import pack

LENGTHS = (1, 7, 64, 33)  # of the prompts that are compared, in tokens


@dataclasses.dataclass(frozen=True)
class ParityResult:
    """What `verify_parity` returns.

    Attributes:
        max_relative_l2: The largest of all, over sites, layers, packed and alone.
        by_site: The largest of each site and layer, such as `residual.3`.
        layers: The layers compared.
        tokens: Number of tokens compared.
    """

    max_relative_l2: float
    by_site: dict[str, float]
    layers: list[int]
    tokens: int


def require_torch() -> None:
    """Checks that torch and transformers can be imported.

    Raises:
        ConfigError: They cannot.
    """
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{name} is not installed; install the extra: ping-llm[parity]")


def reference_activations(
    directory: Path, prompts: Sequence[np.ndarray], *, dtype: str = "float32"
) -> list[dict[tuple[str, int], np.ndarray]]:
    """Returns {(site, layer): [T, D] float32} of each prompt, by transformers, one at a time.

    `embed` and `final_norm` have layer 0.
    """
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    held: dict[tuple[str, int], np.ndarray] = {}

    def keep(site: str, layer: int):
        def hook(_module, _inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            held[site, layer] = output.detach().float().numpy().reshape(-1, output.shape[-1])

        return hook

    def keep_input(site: str, layer: int):
        return lambda module, inputs: keep(site, layer)(module, (), inputs[0])

    model.embed_tokens.register_forward_hook(keep("embed", 0))
    model.norm.register_forward_hook(keep("final_norm", 0))
    for layer, block in enumerate(model.layers):
        block.register_forward_hook(keep("residual", layer))
        block.self_attn.register_forward_hook(keep("attn", layer))
        block.mlp.register_forward_hook(keep("mlp", layer))
        for site in "qkv":
            projection = getattr(block.self_attn, f"{site}_proj")
            projection.register_forward_hook(keep(site, layer))
        block.self_attn.o_proj.register_forward_pre_hook(keep_input("heads", layer))
        block.mlp.down_proj.register_forward_pre_hook(keep_input("mlp_inner", layer))
    results = []
    with torch.inference_mode():
        for prompt in prompts:
            model(torch.from_numpy(np.asarray(prompt, np.int64))[None], use_cache=False)
            results.append(dict(held))
    return results


def relative_l2(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns |ours - theirs| / |theirs|, over all elements."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def own_activations(
    model: Any,
    prompts: Sequence[np.ndarray],
    *,
    sites: tuple[str, ...],
    layers: tuple[int, ...],
    packed: bool,
) -> list[dict[tuple[str, int], np.ndarray]]:
    """Returns what `reference_activations` does, by our decoder, from one batch.

    Args:
        model: A `Decoder`.
        prompts: Token ids of each prompt.
        sites: Which sites.
        layers: Of which layers.
        packed: Whether all prompts share one row, or have one each.
    """
    import jax
    from flax import nnx

    lengths = [len(prompt) for prompt in prompts]
    if packed:
        starts = np.cumsum([0, *lengths]).tolist()
        batch = pack([prompts], sum(lengths))
        slices = [(0, slice(a, b)) for a, b in itertools.pairwise(starts)]
    else:
        batch = pack([[prompt] for prompt in prompts], max(lengths))
        slices = [(row, slice(0, length)) for row, length in enumerate(lengths)]
    graphdef, params = nnx.split(model)

    @jax.jit
    def forward(params, *batch):
        merged = nnx.merge(graphdef, params)
        return merged.activations(*batch, sites=sites, of_layers=layers)

    precision = "highest" if model.cfg.dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        kept = jax.device_get(forward(params, *batch))
    stored = {site: (0,) if site in END_SITES else layers for site in sites}
    return [
        {
            (site, layer): np.asarray(kept[site][n][where], np.float32)
            for site in sites
            for n, layer in enumerate(stored[site])
        }
        for where in slices
    ]


def largest_differences(
    ours: Sequence[Mapping[tuple[str, int], np.ndarray]],
    theirs: Sequence[Mapping[tuple[str, int], np.ndarray]],
) -> dict[tuple[str, int], float]:
    """Returns, of each site and layer of `ours`, the relative L2 over all prompts' tokens."""
    return {
        key: relative_l2(
            np.concatenate([prompt[key] for prompt in ours]),
            np.concatenate([prompt[key] for prompt in theirs]),
        )
        for key in ours[0]
    }


@settings.takes(VerifyParitySettings)
def verify_parity(chosen: VerifyParitySettings) -> ParityResult:
    """Compares our activations with transformers', in float32, on prompts of random token ids.

    Prompts are computed packed into one row, and each in its own.

    Raises:
        ConfigError: torch or transformers is missing, or the model is not supported.
        CheckpointError: The checkpoint cannot be read.
    """
    require_torch()
    directory = huggingface.resolve(chosen.model)
    cfg = huggingface.read_config(directory)
    sites, layers = in_order(chosen.sites), layer_numbers(chosen.layers, cfg.n_layers)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, cfg.vocab_size, length) for length in LENGTHS]
    theirs = reference_activations(directory, prompts)
    gc.collect()  # torch's weights go before ours come
    model = huggingface.load(directory, head=False, dtype="float32")
    largest: dict[str, float] = {}
    for packed in (True, False):
        ours = own_activations(model, prompts, sites=sites, layers=layers, packed=packed)
        for (site, layer), value in largest_differences(ours, theirs).items():
            name = site if site in END_SITES else f"{site}.{layer}"
            largest[name] = max(largest.get(name, 0.0), value)
    return ParityResult(max(largest.values()), largest, list(layers), tokens=sum(LENGTHS))
