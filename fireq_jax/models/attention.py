"""Grouped-query attention with rotary embedding, RoPE-aware key scaling and a quantized cache."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fireq_jax.models.config import ModelConfig
from fireq_jax.models.kv_cache import LayerCache
from fireq_jax.models.layers import LayerOptions, Linear, Tap, no_tap, show
from fireq_jax.models.rope import Tables
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.dispatch import Implementation
from pallas_kernels.formats import E4M3, ScaledArray
from pallas_kernels.head_norm import HeadNorm
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.rope_quantize import rope_quantize, rotate_heads, split_heads
from pallas_kernels.split_k import SplitKPartials, reduced

# Chunks of at most this many queries go to the decode kernel.
DECODE_QUERIES = 16


class AttentionOutput(NamedTuple):
    """What :meth:`Attention.attend` returns, with names, without which ``nnx.tabulate`` cannot show it.

    Attributes:
        rows: [B, T, heads * H], in FP8 where ``o_proj`` takes that.
        cache: the new one, if ``cache`` or ``capacity`` was given.
    """

    rows: ScaledArray | Float[Array, "B T heads_H"]
    cache: LayerCache | None


class Attention(nnx.Module):
    """Self-attention of one layer; q, k and v are one matmul.

    Attributes:
        sinks: float32 [heads], a score of each head that joins the softmax without a value. None without.
        q_norm, k_norm: float32 [heads, H] and [kv_heads, H], gains of each head's RMSNorm; None without.
        post_rope_scale: float32 [kv_heads, H], FireQ's S: rotated keys are multiplied and queries
            divided by it. None without post-RoPE scaling.
        key_offset: float32 [kv_heads, H], subtracted from the scaled keys before they are stored:
            it moves all scores of a query alike, which softmax ignores. None without it.
    """

    def __init__(self, name: str, config: ModelConfig, options: LayerOptions, window: int | None = None) -> None:
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        columns = (heads + 2 * kv_heads) * head_dim
        self.qkv_proj = Linear(f"{name}.qkv_proj", config.hidden_size, columns, options, bias=config.attention_bias)
        self.o_proj = Linear(f"{name}.o_proj", heads * head_dim, config.hidden_size, options, bias=config.output_bias)
        normed = config.head_norm != "none"
        self.q_norm = nnx.Param(jnp.ones((heads, head_dim), jnp.float32)) if normed else None
        self.k_norm = nnx.Param(jnp.ones((kv_heads, head_dim), jnp.float32)) if normed else None
        self.sinks = nnx.Param(jnp.zeros((heads,), jnp.float32)) if config.sinks else None
        smoothing = options.quantization.smoothing
        scaled = smoothing is not None and smoothing.post_rope_channels > 0
        self.post_rope_scale = nnx.Param(jnp.ones((kv_heads, head_dim), jnp.float32)) if scaled else None
        centered = smoothing is not None and smoothing.key_offset and config.ignores_offsets
        self.key_offset = nnx.Param(jnp.zeros((kv_heads, head_dim), jnp.float32)) if centered else None
        self.config = config
        self.window = window
        self.quantization = options.quantization.for_attention(name)
        self.implementation: Implementation = options.implementation

    @property
    def head_norm(self) -> HeadNorm | None:
        """The norm of queries and keys."""
        if self.q_norm is None or self.k_norm is None:
            return None
        return HeadNorm(
            self.q_norm.get_value(),
            self.k_norm.get_value(),
            self.config.rms_norm_eps,
            placement="after_rope" if self.config.head_norm == "after_rope" else "before_rope",
            across_heads=self.config.head_norm == "across_heads",
            width=self.config.head_width,
        )

    def attend(
        self,
        packed: Float[Array, "B T packed"] | SplitKPartials,
        rope: Tables,
        *,
        start: Int[Array, " B"],
        lengths: Int[Array, " B"],
        growth: Float[Array, "B T"] | None = None,
        cache: LayerCache | None = None,
        capacity: int | None = None,
        tap: Tap = no_tap,
    ) -> AttentionOutput:
        """What lies between the projections: from ``qkv_proj``'s result to ``o_proj``'s input.

        Args:
            packed: queries, keys and values of all heads, side by side; sequence b has ``lengths[b]`` valid
                tokens, first in its row.
            rope: cos and sin of the tokens' positions.
            start: position of each sequence's first token in ``packed``.
            lengths: valid tokens of each sequence in ``packed``.
            growth: what each token's queries are multiplied by; None means 1.
            cache: earlier keys and values, to be extended; None for the first chunk.
            capacity: slots of the cache to make from the first chunk; None makes no cache.
            tap: sees the intermediate values that calibration measures.

        """
        self._show(packed, rope, growth, tap)
        dtype, (batch, length) = self.qkv_proj.dtype, rope[0].shape[:2]
        earlier = self._empty_cache(batch, length, capacity) if cache is None else cache
        query, *rows = self._rope_quantize(packed, rope, earlier, start, lengths, growth)
        lengths = start + lengths
        if cache is not None:
            # Of more tokens than it has slots the last are not there.
            lengths = jnp.minimum(lengths, rows[0].values.shape[2])
        attend = functools.partial(
            decode_attention if cache is not None and length <= DECODE_QUERIES else prefill_attention,
            kv_lengths=lengths,
            scale=self.config.scale,
            window=self.window,
            softcap=self.config.attention_softcap,
            sinks=None if self.sinks is None else self.sinks.get_value(),
            # o_proj would quantize bf16 rows anyway.
            out_dtype=E4M3 if self.o_proj.takes_fp8 and dtype == jnp.bfloat16 else dtype,
            implementation=self.implementation,
        )
        attention = attend(query, *rows, query_start=None if cache is None else start)
        if not isinstance(attention, ScaledArray):
            attention = attention.reshape(batch, length, self.config.num_heads * self.config.head_dim)
        show(tap, "o_input", attention)
        return AttentionOutput(attention, None if cache is None and capacity is None else LayerCache(*rows))

    def _empty_cache(self, batch: int, length: int, capacity: int | None) -> LayerCache:
        """For a first chunk of ``length`` tokens, with ``capacity`` slots or as many."""
        slots = length if capacity is None else capacity
        if length > slots:
            raise ValueError(f"the prompt has {length} tokens; the cache holds {slots}")
        shape = (batch, self.config.num_kv_heads, slots, self.config.head_dim)
        return LayerCache.create(self.quantization, shape, self.qkv_proj.dtype)

    def _rope_quantize(
        self,
        packed: Float[Array, "B T packed"] | SplitKPartials,
        rope: Tables,
        cache: LayerCache,
        start: Int[Array, " B"],
        lengths: Int[Array, " B"],
        growth: Float[Array, "B T"] | None,
    ) -> tuple[ScaledArray, ScaledArray, ScaledArray]:
        """The chunk's queries, and the cache's keys and values with the chunk's."""
        return rope_quantize(
            packed,
            *rope,
            *cache,
            start=start,
            lengths=lengths,
            norm=self.head_norm,
            query_factor=growth,
            post_rope_scale=None if self.post_rope_scale is None else self.post_rope_scale.get_value(),
            key_offset=None if self.key_offset is None else self.key_offset.get_value(),
            key_clip=self.quantization.key_clip,
            value_clip=self.quantization.value_clip,
            unbiased_keys=self.quantization.unbiased_keys,
            quantize_query=self.quantization.query_format == "fp8",
            implementation=self.implementation,
        )

    def _show(
        self,
        packed: Float[Array, "B T packed"] | SplitKPartials,
        rope: Tables,
        growth: Float[Array, "B T"] | None,
        tap: Tap,
    ) -> None:
        """What calibration measures on the way; nothing is computed for a tap that nobody reads."""
        if tap is no_tap:
            return
        query, key, value = split_heads(reduced(packed), self.config.num_kv_heads, rope[0])
        tap("value", value)
        query, key = rotate_heads(query, key, *rope, self.head_norm)
        tap("key_after_rope", key)
        tap("query_after_rope", query if growth is None else query * growth[..., None, None])
