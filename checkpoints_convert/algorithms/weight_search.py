"""Scales of 4-bit weights by search, with the rounding that the kernel will really do.

``absmax / 7`` wastes a group's codes on its largest weight, and the kernel's table fp8(i * sigma)
has gaps that depend on sigma's mantissa. Both are seen by trying scales and keeping the one with
the least squared error, each input weighted by the energy of its activations (AWQ, arXiv
2306.00978, weighs by activations; OmniQuant, arXiv 2308.13137, clips).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import formats
from pallas_kernels.formats import WeightCodes

# Group scales tried, as fractions of absmax / 7; 1 is among them, so that none is worse. Neighbours
# in E4M3 are 6 to 12% apart.
CLIP_RATIOS = (1.1, 1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.65, 0.6)
# Channel scales tried: where in an octave the group scales lie decides which mantissas they get.
CHANNEL_STEPS = 8


def search_group_scale(
    scaled: Float[Array, "N G g"],
    importance: Float[Array, "*N G g"],
    scale_dtype: formats.ScaleDtype,
    rounding: formats.Rounding,
    codebook: formats.Codebook = "int4",
) -> tuple[Float[Array, "N G"], Float[Array, "N G"]]:
    """The scale of each group with the least weighted error.

    Args:
        scaled: weights divided by their channel scales.
        importance: weight of each element's squared error; broadcast over N.
        scale_dtype: type of the scales.
        rounding, codebook: how codes will be chosen, and what they will stand for.

    Returns:
        Group scales, and the weighted squared error of each group.
    """
    largest = formats.largest_scale(scaled, codebook)

    def error_of(scale: Float[Array, "N G"]) -> Float[Array, "N G"]:
        codes = formats.encode_weight(scaled, scale, rounding, codebook)
        n, groups, size = scaled.shape
        values = formats.decode_weight(codes.reshape(n, groups * size), scale, codebook).reshape(scaled.shape)
        return jnp.sum(importance * jnp.square(values - scaled), axis=-1)

    def step(best: tuple[Array, Array], ratio: Array) -> tuple[tuple[Array, Array], None]:
        scale = formats.round_group_scale(largest * ratio, scale_dtype, codebook)
        error = error_of(scale)
        better = error < best[1]
        return (jnp.where(better, scale, best[0]), jnp.where(better, error, best[1])), None

    start = formats.round_group_scale(largest, scale_dtype, codebook), jnp.full(largest.shape, jnp.inf)
    best, _ = jax.lax.scan(step, start, jnp.asarray(CLIP_RATIOS))
    return best


def search_channel_scale(
    weight: Float[Array, "N K"],
    importance: Float[Array, " K"],
    *,
    group_size: int,
    scale_dtype: formats.ScaleDtype,
    rounding: formats.Rounding,
    codebook: formats.Codebook = "int4",
) -> Float[Array, " N"]:
    """The float32 scale of each channel under which its searched group scales err least."""
    base = formats.weight_channel_scale(weight, "per_channel")
    groups = (weight.shape[1] // group_size, group_size)

    def step(best: tuple[Array, Array], octave: Array) -> tuple[tuple[Array, Array], None]:
        channel = base * jnp.exp2(octave)
        scaled = (weight / channel[:, None]).reshape(-1, *groups)
        _, errors = search_group_scale(scaled, importance.reshape(groups), scale_dtype, rounding, codebook)
        error = jnp.sum(errors, axis=1) * jnp.square(channel)
        better = error < best[1]
        return (jnp.where(better, channel, best[0]), jnp.where(better, error, best[1])), None

    worst = jnp.full(base.shape, jnp.inf)
    (channel, _), _ = jax.lax.scan(step, (base, worst), jnp.arange(CHANNEL_STEPS) / CHANNEL_STEPS)
    return channel


def search_weight(
    weight: Float[Array, "N K"],
    importance: Float[Array, " K"],
    *,
    group_size: int = 128,
    scale_dtype: formats.ScaleDtype = "e4m3",
    channel_scale: formats.ChannelScale = "per_channel",
    rounding: formats.Rounding = "table",
    codebook: formats.Codebook = "int4",
) -> WeightCodes:
    """Codes under searched scales: ``formats.quantize_weight`` with less weighted error.

    Args:
        weight: float32; K a multiple of ``group_size``.
        importance: of each input's error: the mean square of its activations.
        group_size, scale_dtype, channel_scale, rounding, codebook: as in ``formats.quantize_weight``.
    """
    n, k = weight.shape
    if channel_scale == "per_channel":
        channel = search_channel_scale(
            weight, importance, group_size=group_size, scale_dtype=scale_dtype, rounding=rounding, codebook=codebook
        )
    else:
        channel = formats.weight_channel_scale(weight, channel_scale)
    scaled = (weight / channel[:, None]).reshape(n, k // group_size, group_size)
    group_scale, _ = search_group_scale(scaled, importance.reshape(-1, group_size), scale_dtype, rounding, codebook)
    codes = formats.encode_weight(scaled, group_scale, rounding, codebook)
    return WeightCodes(codes.reshape(n, k), group_scale, channel)
