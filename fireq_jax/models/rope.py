"""cos and sin of rotary position embedding, with transformers' context extensions.

``pallas_kernels.rope_quantize`` rotates.

RoPE: arXiv 2104.09864. Position interpolation ("linear"): arXiv 2306.15595. YaRN: arXiv
2309.00071. LongRoPE: arXiv 2402.13753. "dynamic" is NTK-aware scaling; "llama3" is Llama 3.1's band-wise
interpolation.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fireq_jax.models.config import ModelConfig, RopeConfig

Tables = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]


def rope_tables(
    config: ModelConfig, rope: RopeConfig | None, positions: Int[Array, "B T"], sequence_lengths: Int[Array, " B"]
) -> Tables:
    """cos and sin of each position and rotary pair, float32 [B, T, head_dim / 2].

    Pairs that do not turn, all of them without a ``rope``, have 1 and 0. ``sequence_lengths`` (tokens so far, these
    included) decides the frequencies of "dynamic" and "longrope"; it is taken sequence by sequence, so that a batch
    never changes what a sequence computes.
    """
    half = config.head_dim // 2
    if rope is None:
        shape = (*positions.shape, half)
        return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    frequencies = _frequencies(config, rope, sequence_lengths)  # [pairs] or [B, pairs]
    angles = positions[..., None].astype(jnp.float32) * jnp.expand_dims(frequencies, range(frequencies.ndim - 1, 2))
    factor = _attention_factor(config, rope)
    still = ((0, 0), (0, 0), (0, half - angles.shape[-1]))
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    return (cos, sin) if half == angles.shape[-1] else (jnp.pad(cos, still, constant_values=1), jnp.pad(sin, still))


def _frequencies(
    config: ModelConfig, rope: RopeConfig, sequence_lengths: Int[Array, " B"]
) -> Float[Array, "... pairs"]:
    dim = rope.rotary_dim or config.width
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    original = rope.original_max_position_embeddings or config.max_position_embeddings
    plain = 1.0 / rope.theta**exponents
    if rope.rope_type == "linear":
        return plain / rope.factor
    if rope.rope_type == "dynamic":
        trained = config.max_position_embeddings
        length = jnp.maximum(sequence_lengths, trained).astype(jnp.float32)[:, None]
        theta = rope.theta * (rope.factor * length / trained - (rope.factor - 1)) ** (dim / (dim - 2))
        return 1.0 / theta**exponents
    if rope.rope_type == "longrope":
        short, long = (jnp.asarray(factor, jnp.float32) for factor in (rope.short_factor, rope.long_factor))
        if short.shape != plain.shape:
            raise ValueError(f"short_factor has {short.size} numbers; expected one for each of {plain.size} pairs")
        return plain[None] / jnp.where(sequence_lengths[:, None] > original, long[None], short[None])
    if rope.rope_type == "llama3":
        return _llama3(plain, rope, original)
    if rope.rope_type == "yarn":
        return _yarn(plain, rope, original, dim)
    return plain


def _llama3(plain: Float[Array, " half"], rope: RopeConfig, original: int) -> Float[Array, " half"]:
    wavelength = 2 * math.pi / plain
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = jnp.clip(smooth, 0, 1)
    return (1 - smooth) * plain / rope.factor + smooth * plain


def _yarn(plain: Float[Array, " half"], rope: RopeConfig, original: int, dim: int) -> Float[Array, " half"]:
    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    interpolated = jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - low) / (high - low), 0, 1)
    return plain / rope.factor * interpolated + plain * (1 - interpolated)


def _attention_factor(config: ModelConfig, rope: RopeConfig) -> float:
    """What cos and sin are multiplied by."""

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.rope_type not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.rope_type == "longrope":
        original = rope.original_max_position_embeddings or config.max_position_embeddings
        return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(original))
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def query_growth(config: ModelConfig, positions: Int[Array, "B T"]) -> Float[Array, "B T"] | None:
    """What queries are multiplied by at each position, float32; None where that is 1 (``ModelConfig.query_growth``)."""
    if not config.query_growth:
        return None
    original = config.rope.original_max_position_embeddings or config.max_position_embeddings
    return 1 + config.query_growth * jnp.log1p((positions // original).astype(jnp.float32))
