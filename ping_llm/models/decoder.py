"""The one decoder: models of measurements and of language differ in their config only."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ping_llm import sharding
from ping_llm.errors import ConfigError
from ping_llm.models import layers
from ping_llm.models.attention import Attend, attention
from ping_llm.models.config import SITES, DecoderConfig

UNROLLED_LAYERS = 8  # up to so many; a loop over more keeps compilation short


class Block(nnx.Module):
    """One pre-norm block. Returns the residual stream and its hook sites."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.attn_norm = layers.rms_norm(cfg, cfg.d_model, rngs=rngs)
        self.attn = layers.Attention(cfg, rngs=rngs)
        self.mlp_norm = layers.rms_norm(cfg, cfg.d_model, rngs=rngs)
        self.mlp = layers.MLP(cfg, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        cos: Float[Array, "B T 1 h"],
        sin: Float[Array, "B T 1 h"],
        window: Int[Array, ""] | None = None,
        attend: Attend = attention,
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B T _"]]]:
        """Returns the residual stream after the block, and {site: what it held}."""
        attn, in_attn = self.attn(self.attn_norm(x), segment_ids, cos, sin, window, attend)
        x = sharding.constrain(x + attn, sharding.RESIDUAL_BTD)
        mlp, in_mlp = self.mlp(self.mlp_norm(x))
        x = sharding.constrain(x + mlp, sharding.RESIDUAL_BTD)
        return x, in_attn | {"attn": attn} | in_mlp | {"mlp": mlp, "residual": x}


class Decoder(nnx.Module):
    """Decoder-only Transformer; every weight in `blocks` has a leading axis L."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = nnx.Embed(
            cfg.vocab_size,
            cfg.d_model,
            dtype=jnp.dtype(cfg.dtype),
            param_dtype=jnp.dtype(cfg.param_dtype),
            embedding_init=nnx.initializers.normal(cfg.d_model**-0.5),
            embedding_metadata=sharding.metadata(sharding.EMBED_VD),
            rngs=rngs,
        )

        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})  # L is not split
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(cfg, rngs=rngs)

        self.blocks = stack(rngs.split(cfg.n_layers))
        self.final_norm = layers.rms_norm(cfg, cfg.d_model, rngs=rngs)
        if not cfg.tie_embeddings:
            self.head = layers.linear(cfg, cfg.d_model, cfg.vocab_size, sharding.HEAD_DV, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns next-token logits, in float32.

        Args:
            tokens: Token ids.
            segment_ids: Segment of each token, equal ids side by side; None: each row is one.
            positions: Place of each token in its segment; None: its place in the row.
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.logits(self.hidden(tokens, segment_ids, positions))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream after the last block, before the final norm."""
        cos, sin = layers.rope_angles(self.cfg, positions)

        def apply(x, layer):
            block, window = layer
            return block(x, segment_ids, cos, sin, window)[0], None

        if self.cfg.remat:
            apply = jax.checkpoint(apply)
        x = sharding.constrain(self.embed(tokens), sharding.RESIDUAL_BTD)
        stacked = self.blocks, self.layer_windows(tokens.shape[1])
        return jax.lax.scan(apply, x, stacked, unroll=self.cfg.n_layers <= UNROLLED_LAYERS)[0]

    def layer_windows(self, length: int) -> Int[Array, " L"] | None:
        """Returns the number of keys that a query of each layer sees; None: all, everywhere."""
        if self.cfg.windows is None:
            return None
        widths = [length if window is None else window for window in self.cfg.windows]
        return jnp.asarray(np.array(widths, np.int32))

    def activations(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        sites: tuple[str, ...],
        of_layers: tuple[int, ...],
    ) -> dict[str, Float[Array, "n B T _"]]:
        """Returns {site: what it held in each of `of_layers`}, in one pass; n is 1 for `END_SITES`.

        Nothing after the last chosen site is computed, and the stacked weights are not copied.

        Args:
            tokens: Token ids.
            segment_ids: Segment of each token, equal ids side by side.
            positions: Place of each token in its segment.
            sites: Which of `SITES` and `END_SITES`.
            of_layers: For which layers, ascending; `END_SITES` have none.
        """
        x = sharding.constrain(self.embed(tokens), sharding.RESIDUAL_BTD)
        ends = {"embed": x[None]} if "embed" in sites else {}
        inner = [site for site in SITES if site in sites]
        depth = of_layers[-1] + 1 if inner else 0
        cos, sin = layers.rope_angles(self.cfg, positions)
        stacked = self.blocks, self.layer_windows(tokens.shape[1])
        # A layer writes where the next chosen one will, so no layer needs a condition.
        slot = jnp.asarray(np.searchsorted(of_layers, np.arange(max(depth, 1))).astype(np.int32))

        def apply(layer, carry):
            x, kept = carry
            block, window = jax.tree.map(lambda leaf: leaf[layer], stacked)
            x, held = block(x, segment_ids, cos, sin, window)
            put = jax.lax.dynamic_update_index_in_dim
            return x, {site: put(kept[site], held[site], slot[layer], 0) for site in kept}

        shape = len(of_layers), *tokens.shape
        kept = {site: jnp.zeros((*shape, self.cfg.width_of(site)), x.dtype) for site in inner}
        x, kept = jax.lax.fori_loop(0, depth, apply, (x, kept))
        if "final_norm" in sites:
            x, _ = jax.lax.fori_loop(depth, self.cfg.n_layers, apply, (x, {}))
            ends["final_norm"] = self.final_norm(x)[None]
        return kept | ends

    def logits_with(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        site: str,
        layer: int | None,
        replace: Callable[[Float[Array, "B T D"]], Float[Array, "B T D"]],
    ) -> Float[Array, "B T V"]:
        """Returns next-token logits with `replace(x)` in the place of what a site held, x.

        Args:
            tokens: Token ids.
            segment_ids: Segment of each token, equal ids side by side.
            positions: Place of each token in its segment.
            site: Which of `SITES` and `END_SITES`, but for `q`, `k` and `v`.
            layer: Of which layer; None for `END_SITES`.
            replace: What is to stand there.

        Raises:
            ConfigError: The site is one of these three.
        """
        if site in ("q", "k", "v"):
            raise ConfigError(f"{site=} cannot be replaced; heads, attn and residual can")
        cos, sin = layers.rope_angles(self.cfg, positions)
        stacked = self.blocks, self.layer_windows(tokens.shape[1])

        def run(index, x):
            block, window = jax.tree.map(lambda leaf: leaf[index], stacked)
            return block, *block(x, segment_ids, cos, sin, window)

        x, done = self.embed(tokens), 0
        if site == "embed":
            x = replace(x)
        elif layer is not None:
            x = jax.lax.fori_loop(0, layer, lambda index, x: run(index, x)[1], x)
            block, after, held = run(layer, x)
            if site == "residual":
                x = replace(after)
            elif site in ("mlp", "mlp_inner"):
                new = replace(held[site])
                x = after - held["mlp"] + (new if site == "mlp" else block.mlp.down(new))
            else:  # what the MLP reads changes too
                new = replace(held[site])
                x = x + (new if site == "attn" else block.attn.out(new))
                x = x + block.mlp(block.mlp_norm(x))[0]
            done = layer + 1
        x = jax.lax.fori_loop(done, self.cfg.n_layers, lambda index, x: run(index, x)[1], x)
        if site == "final_norm":
            return self.head_logits(replace(self.final_norm(x)))
        return self.logits(x)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns the logits of a residual stream, in float32."""
        return self.head_logits(self.final_norm(x))

    def head_logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns the logits of what the final norm gave, in float32."""
        kernel = self.embed.embedding[...].T if self.cfg.tie_embeddings else self.head.kernel[...]
        kernel = kernel.astype(x.dtype)  # [D, V]
        logits = jnp.einsum("btd,dv->btv", x, kernel, preferred_element_type=jnp.float32)
        if self.cfg.logit_softcap is not None:
            logits = self.cfg.logit_softcap * jnp.tanh(logits / self.cfg.logit_softcap)
        return logits
