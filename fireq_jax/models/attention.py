"""Grouped-query attention with rotary embedding, RoPE-aware key scaling and a quantized cache."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fireq_jax.models.config import ModelConfig
from fireq_jax.models.kv_cache import LayerCache
from fireq_jax.models.layers import Linear, Tap, no_tap
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.dispatch import Implementation
from pallas_kernels.formats import E4M3, ScaledArray
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.rope_quantize import apply_rope, rope_quantize, split_heads
from pallas_kernels.split_sum import SplitSum, finished

# Chunks of at most this many queries go to the decode kernel.
DECODE_QUERIES = 16


class Attention(nnx.Module):
    """Self-attention of one layer; q, k and v are one matmul.

    Attributes:
        post_rope_scale: float32 [kv_heads, H], FireQ's S: rotated keys are multiplied and queries
            divided by it. None without post-RoPE scaling.
        key_offset: float32 [kv_heads, H], subtracted from the scaled keys before they are stored:
            it moves all scores of a query alike, which softmax ignores. None without it.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        quantization: QuantizationConfig,
        *,
        dtype: jax.typing.DTypeLike,
        implementation: Implementation,
        rngs: nnx.Rngs,
    ) -> None:
        linear = functools.partial(
            Linear,
            bias=config.attention_bias,
            quantization=quantization,
            dtype=dtype,
            implementation=implementation,
            rngs=rngs,
        )
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv_proj = linear(f"{name}.qkv_proj", config.hidden_size, (heads + 2 * kv_heads) * head_dim)
        self.o_proj = linear(f"{name}.o_proj", heads * head_dim, config.hidden_size)
        scaled = quantization.smoothing is not None and quantization.smoothing.post_rope_channels > 0
        self.post_rope_scale = nnx.Param(jnp.ones((kv_heads, head_dim), jnp.float32)) if scaled else None
        centered = quantization.smoothing is not None and quantization.smoothing.key_offset
        self.key_offset = nnx.Param(jnp.zeros((kv_heads, head_dim), jnp.float32)) if centered else None
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.quantization = quantization
        self.implementation: Implementation = implementation

    def attend(
        self,
        packed: Float[Array, "B T packed"] | SplitSum,
        dtype: jax.typing.DTypeLike,
        rope: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
        *,
        start: Int[Array, " B"],
        lengths: Int[Array, " B"],
        cache: LayerCache | None = None,
        capacity: int | None = None,
        tap: Tap = no_tap,
    ) -> tuple[ScaledArray | Float[Array, "B T heads_H"], LayerCache | None]:
        """What lies between the projections: from ``qkv_proj``'s result to ``o_proj``'s input.

        Args:
            packed: queries, keys and values of all heads, side by side; sequence b has ``lengths[b]`` valid
                tokens, first in its row.
            dtype: of the hidden states.
            rope: cos and sin of the tokens' positions.
            start: position of each sequence's first token in ``packed``.
            lengths: valid tokens of each sequence in ``packed``.
            cache: earlier keys and values, to be extended; None for the first chunk.
            capacity: slots of the cache to make from the first chunk; None makes no cache.
            tap: sees the intermediate values that calibration measures.

        Returns:
            [B, T, heads * H], in FP8 where ``o_proj`` takes that, and the new cache if ``cache`` or
            ``capacity`` was given.
        """
        self._show(packed, rope, tap)
        batch, length = rope[0].shape[:2]
        entry = cache
        if entry is None:
            slots = length if capacity is None else capacity
            if length > slots:
                raise ValueError(f"the prompt has {length} tokens; the cache holds {slots}")
            entry = LayerCache.create(self.quantization, (batch, self.kv_heads, slots, self.head_dim), dtype)
        query, *rows = rope_quantize(
            packed,
            *rope,
            *entry,
            start=start,
            lengths=lengths,
            post_rope_scale=None if self.post_rope_scale is None else self.post_rope_scale.get_value(),
            key_offset=None if self.key_offset is None else self.key_offset.get_value(),
            key_clip=self.quantization.key_clip,
            value_clip=self.quantization.value_clip,
            unbiased_keys=self.quantization.unbiased_keys,
            quantize_query=self.quantization.query_format == "fp8",
            implementation=self.implementation,
        )
        new_cache = None if cache is None and capacity is None else LayerCache(*rows)
        # What o_proj would do to bf16 anyway; a tap wants to see the floats.
        quantized = self.o_proj.takes_fp8 and dtype == jnp.bfloat16 and tap is no_tap
        lengths = start + lengths
        if cache is not None:
            # Of more tokens than it has slots the last are not there.
            lengths = jnp.minimum(lengths, rows[0].values.shape[2])
        attend = functools.partial(
            decode_attention if cache is not None and length <= DECODE_QUERIES else prefill_attention,
            kv_lengths=lengths,
            scale=self.head_dim**-0.5,
            out_dtype=E4M3 if quantized else dtype,
            implementation=self.implementation,
        )
        attention = attend(query, *rows, query_start=None if cache is None else start)
        if not isinstance(attention, ScaledArray):
            attention = attention.reshape(batch, length, self.heads * self.head_dim)
            tap("o_input", attention)
        return attention, new_cache

    def _show(self, packed: Float[Array, "B T packed"] | SplitSum, rope: tuple[Array, Array], tap: Tap) -> None:
        """What calibration measures on the way; nothing is computed for a tap that nobody reads."""
        if tap is no_tap:
            return
        query, key, value = split_heads(finished(packed), self.kv_heads, rope[0])
        tap("key_before_rope", key)
        tap("value", value)
        tap("key_after_rope", apply_rope(key, *rope))
        tap("query_after_rope", apply_rope(query, *rope))
