"""Grouped-query attention with rotary embedding, RoPE-aware key scaling and a quantized cache."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fireq_jax.models import kv_cache
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.kv_cache import LayerCache
from fireq_jax.models.layers import Linear, Tap, no_tap
from fireq_jax.models.rope import apply_rope
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels import formats
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.dispatch import Implementation
from pallas_kernels.formats import ScaledArray
from pallas_kernels.prefill_attention import prefill_attention

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

    def __call__(
        self,
        x: Float[Array, "B T D"],
        residual: Float[Array, "B T D"],
        rope: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
        *,
        start: Int[Array, " B"],
        lengths: Int[Array, " B"],
        cache: LayerCache | None = None,
        capacity: int | None = None,
        tap: Tap = no_tap,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attention of a chunk, plus ``residual``.

        Args:
            x: normalized hidden states; sequence b has ``lengths[b]`` valid tokens, first in its row.
            residual: added to the output.
            rope: cos and sin of the tokens' positions.
            start: position of each sequence's first token in ``x``.
            lengths: valid tokens of each sequence in ``x``.
            cache: earlier keys and values, to be extended; None for the first chunk.
            capacity: slots of the cache to make from the first chunk; None makes no cache.
            tap: sees the intermediate values that calibration measures.

        Returns:
            [B, T, D], and the new cache if ``cache`` or ``capacity`` was given.
        """
        tap("qkv_input", x)
        query, key, value = self._project(x, rope, tap)
        quantization = self.quantization
        quantize = functools.partial(
            formats.quantize_kv, kv_format=quantization.kv_format, group_size=quantization.kv_group_size
        )
        stored_key = quantize(jnp.swapaxes(key, 1, 2), clip=quantization.key_clip, unbiased=quantization.unbiased_keys)
        stored_value = quantize(jnp.swapaxes(value, 1, 2), clip=quantization.value_clip)
        scaled_query = formats.quantize_fp8(query) if quantization.query_format == "fp8" else ScaledArray(query, None)
        new_cache = None
        if cache is not None:
            stored_key = kv_cache.append(cache.key, stored_key, start, lengths)
            stored_value = kv_cache.append(cache.value, stored_value, start, lengths)
            new_cache = LayerCache(stored_key, stored_value)
        elif capacity is not None:
            new_cache = LayerCache(kv_cache.fill(stored_key, capacity), kv_cache.fill(stored_value, capacity))
        few = cache is not None and x.shape[1] <= DECODE_QUERIES
        attention = (decode_attention if few else prefill_attention)(
            scaled_query,
            stored_key,
            stored_value,
            query_start=start,
            kv_lengths=start + lengths,
            scale=self.head_dim**-0.5,
            out_dtype=x.dtype,
            implementation=self.implementation,
        )
        merged = attention.reshape(*x.shape[:2], self.heads * self.head_dim)
        tap("o_input", merged)
        return self.o_proj(merged, residual=residual), new_cache

    def _project(
        self, x: Float[Array, "B T D"], rope: tuple[Array, Array], tap: Tap
    ) -> tuple[Float[Array, "B T heads H"], Float[Array, "B T kv_heads H"], Float[Array, "B T kv_heads H"]]:
        heads, kv_heads = self.heads, self.kv_heads
        packed = self.qkv_proj(x).reshape(*x.shape[:2], heads + 2 * kv_heads, self.head_dim)
        query, key, value = jnp.split(packed, [heads, heads + kv_heads], axis=2)
        tap("key_before_rope", key)
        tap("value", value)
        query, key = apply_rope(query, *rope), apply_rope(key, *rope)
        tap("key_after_rope", key)
        tap("query_after_rope", query)
        if self.post_rope_scale is not None:
            scale = self.post_rope_scale.get_value()
            key = (key * scale).astype(key.dtype)
            query = (query / jnp.repeat(scale, heads // kv_heads, axis=0)).astype(query.dtype)
        if self.key_offset is not None:
            key = (key - self.key_offset.get_value()).astype(key.dtype)
        return query, key, value
