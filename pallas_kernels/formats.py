"""Number formats: the only place in the project that rounds, clamps or chooses a scale.

Every consumer (the converter, the ``jax.numpy`` references, the Hopper kernels) follows the
rules below, so that a number means the same thing everywhere.

E4M3
    ``float8_e4m3fn``: largest finite value 448, smallest normal 2^-6, smallest subnormal 2^-9.
    Casts round to nearest, ties to even, and saturate: +-Inf becomes +-448. NaN stays NaN, so
    that a broken activation shows instead of turning into a plausible number.
FP4, NF4
    The same codes -7..7, which stand for other magnitudes (``codebooks``): E2M1's, or quantiles of
    the normal distribution (QLoRA, arXiv 2305.14314, here the same on both sides of 0).
INT4
    Integers -7..7 (sign and magnitude; -8 does not exist), so that negation is exact and a
    group's fifteen values are its eight magnitudes with a sign.
Scales
    ``scale = absmax / limit`` over the finite entries of the row or group. A row without a finite
    non-zero entry gets scale 1, so that its codes are zeros (or saturated, or NaN) and nothing is
    ever divided by zero; so does one whose scale would be subnormal, which some devices flush.
    Divisions are products with float32 reciprocals, of ``limit`` and of a row's scale: XLA
    compiles a division by a constant or a broadcast number so anyway, and a kernel that divides
    instead finds other codes where a quotient lies between two.

Sources: FireQ (arXiv 2505.20839), sections on INT4 x FP8 weights and RoPE-aware KV quantization;
OCP 8-bit floating point specification (E4M3).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.codebooks import CODEBOOKS, Codebook

E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0
E4M3_MIN_NORMAL = 2.0**-6
E4M3_MIN_SUBNORMAL = 2.0**-9
INT4_MAX = 7
# P is cast to FP8 as PROBABILITY_SCALE * exp(score - row max): 256 is the largest power of two
# whose product with a probability stays finite in E4M3, and it keeps probabilities down to
# 2^-17 representable.
PROBABILITY_SCALE = 256.0

ScaleDtype = Literal["e4m3", "bf16"]
ChannelScale = Literal["per_channel", "per_tensor_pow2"]
Rounding = Literal["nearest", "table"]
KVFormat = Literal["int4", "fp8", "none"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledArray:
    """Rows in a storage format with their scales: activations, queries, keys and values.

    Attributes:
        values: "int4": uint8 [*rows, H/2], two codes a byte (:func:`pack_int4`); "fp8": E4M3 [*rows, H]; "none":
            floats [*rows, H].
        scale: [*rows, groups], each shared by H / groups consecutive elements; "none": None.
        format: what the values are. Part of the pytree's structure, so that it is static under ``jit``.

    Raises:
        ValueError: if an array of values is not stored as the format says, or for an unknown format.
    """

    values: Array
    scale: Array | None
    format: KVFormat = dataclasses.field(default="fp8", metadata={"static": True})

    def __post_init__(self) -> None:
        if self.format not in get_args(KVFormat):
            raise ValueError(f"format is {self.format!r}; expected one of {get_args(KVFormat)}")
        dtype = getattr(self.values, "dtype", jax.dtypes.float0)
        if dtype == jax.dtypes.float0:
            return  # JAX also makes trees of shardings, axes or tangents of integers.
        if self.format == "none":
            expected, stored = "floats without a scale", jnp.issubdtype(dtype, jnp.floating) and self.scale is None
        else:
            own = jnp.dtype(jnp.uint8 if self.format == "int4" else E4M3)
            expected, stored = f"{own} with a scale", dtype == own and self.scale is not None
        if not stored:
            scale = "no scale" if self.scale is None else "a scale"
            raise ValueError(f"values have dtype {dtype} and {scale}; expected {expected} for format {self.format!r}")

    def __iter__(self) -> Iterator[Any]:
        """``values, scale = rows``."""
        return iter((self.values, self.scale))


def stored_width(kv_format: KVFormat, head_dim: int) -> int:
    """Size of the last axis of the values of rows of ``head_dim`` elements."""
    return head_dim // 2 if kv_format == "int4" else head_dim


def finite_absmax(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """Largest finite magnitude along ``axis`` as float32; 0 where there is none."""
    x = x.astype(jnp.float32)
    return jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0), axis=axis)


def absmax_scale(absmax: Float[Array, "..."], limit: float) -> Float[Array, "..."]:
    """Scale that maps ``absmax`` to ``limit``; 1 where that would be 0 or subnormal."""
    scale = absmax.astype(jnp.float32) * (1 / limit)
    return jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1.0)


def round_to_e4m3(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """float32 numbers rounded to E4M3's: saturating at +-448; NaN stays NaN.

    Arithmetic instead of two casts, because XLA drops a pair of inverse casts on GPUs.
    """
    x = jnp.clip(x.astype(jnp.float32), -E4M3_MAX, E4M3_MAX)
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3)
    subnormal = jnp.round(x / E4M3_MIN_SUBNORMAL) * E4M3_MIN_SUBNORMAL
    return jnp.where(jnp.abs(x) < E4M3_MIN_NORMAL, subnormal, normal)


def to_e4m3(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Cast to E4M3, saturating at +-448; NaN stays NaN.

    Rounded before the cast: a later cast to float32 in the same computation sees the rounded
    numbers even if XLA drops both casts.
    """
    return round_to_e4m3(x).astype(E4M3)


def round_to_int4(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Round to nearest (ties to even) and clamp to -7..7; int8. NaN becomes 0."""
    codes = jnp.clip(jnp.round(x.astype(jnp.float32)), -INT4_MAX, INT4_MAX)
    return jnp.where(jnp.isnan(codes), 0.0, codes).astype(jnp.int8)


# --- rows in FP8: activations and queries -------------------------------------------------------


def quantize_fp8(x: Float[Array, "*rows K"]) -> ScaledArray:
    """E4M3 rows with one float32 scale each: values [*rows, K], scale [*rows, 1]."""
    scale = absmax_scale(finite_absmax(x), E4M3_MAX)[..., None]
    return ScaledArray(to_e4m3(x.astype(jnp.float32) * (1 / scale)), scale)


def dequantize(x: ScaledArray) -> Float[Array, "*rows H"]:
    """The float32 rows that a :class:`ScaledArray` stands for."""
    if x.scale is None:
        return x.values.astype(jnp.float32)
    values = unpack_int4(x.values) if x.format == "int4" else x.values
    groups = x.scale.shape[-1]
    grouped = values.astype(jnp.float32).reshape(*values.shape[:-1], groups, values.shape[-1] // groups)
    return (grouped * x.scale.astype(jnp.float32)[..., None]).reshape(values.shape)


# --- INT4 weights ---------------------------------------------------------------------------------


class WeightCodes(NamedTuple):
    """A 4-bit weight before packing: W[n, k] ~= channel_scale[n] * value(codes[n, k], group_scale)."""

    codes: Int[Array, "N K"]  # int8, -7..7
    group_scale: Float[Array, "N G"]  # E4M3 or bf16, > 0; G = K / group_size
    channel_scale: Float[Array, " N"]  # float32, > 0


def weight_table(group_scale: Float[Array, "..."], codebook: Codebook = "int4") -> Float[Array, "... 8"]:
    """The eight magnitudes that codes 0..7 stand for, float32.

    With E4M3 scales they are fp8(c * sigma), c from the codebook, rounded as the kernel's table is; with
    bf16 scales c * sigma, exact, because the kernel multiplies the group's FP32 partial sum instead.
    """
    scale = group_scale.astype(jnp.float32)[..., None]
    magnitudes = scale * jnp.asarray(CODEBOOKS[codebook], jnp.float32).reshape((1,) * group_scale.ndim + (-1,))
    if group_scale.dtype == E4M3:
        magnitudes = round_to_e4m3(magnitudes)
    return magnitudes


def is_e4m3(codebook: Codebook) -> bool:
    """Whether E4M3 has all magnitudes of a codebook, which then need no scale to be multiplied by."""
    magnitudes = np.asarray(CODEBOOKS[codebook], np.float32)
    return bool((magnitudes.astype(E4M3).astype(np.float32) == magnitudes).all())


def weight_channel_scale(weight: Float[Array, "N K"], mode: ChannelScale) -> Float[Array, " N"]:
    """The float32 scale that lifts a weight's group scales into E4M3's range.

    ``absmax / 7`` of a weight group is about 1e-3, below E4M3's normal numbers. Divided by this
    scale the largest group scale of a channel is at most 64 = 448 / 7, so 7 * sigma never
    saturates. "per_tensor_pow2" is FireQ's per-tensor scaling: one power of two (here repeated
    for each channel); "per_channel" costs the same in the kernel's epilogue and is finer.
    """
    absmax = finite_absmax(weight)
    if mode == "per_channel":
        return absmax_scale(absmax, E4M3_MAX)
    if mode == "per_tensor_pow2":
        largest = absmax_scale(jnp.max(absmax), E4M3_MAX)
        return jnp.full_like(absmax, _next_power_of_two(largest))
    raise ValueError(f"channel scale mode is {mode!r}; expected one of {get_args(ChannelScale)}")


def _next_power_of_two(x: Float[Array, ""]) -> Float[Array, ""]:
    """Smallest power of two that is at least ``x``, exactly (exp2 and log2 are only approximate)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    mantissa = jnp.uint32((1 << 23) - 1)
    return jax.lax.bitcast_convert_type((bits + mantissa) & ~mantissa, jnp.float32)


def round_group_scale(
    scale: Float[Array, "..."], dtype: ScaleDtype, codebook: Codebook = "int4"
) -> Float[Array, "..."]:
    """Round positive group scales to their storage type, never to 0.

    A zero scale would erase a whole group; the smallest positive value of the type loses less.
    """
    if dtype == "e4m3":
        rounded = to_e4m3(jnp.minimum(scale, E4M3_MAX / CODEBOOKS[codebook][-1]))
        return jnp.where(rounded == 0, jnp.asarray(E4M3_MIN_SUBNORMAL, E4M3), rounded)
    if dtype == "bf16":
        rounded = jax.lax.reduce_precision(scale.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
        return jnp.where(rounded == 0, jnp.finfo(jnp.bfloat16).tiny, rounded).astype(jnp.bfloat16)
    raise ValueError(f"scale dtype is {dtype!r}; expected one of {get_args(ScaleDtype)}")


def largest_scale(scaled: Float[Array, "*rows g"], codebook: Codebook = "int4") -> Float[Array, " *rows"]:
    """The float32 scale with which the codebook's largest magnitude meets the group's."""
    return absmax_scale(finite_absmax(scaled), CODEBOOKS[codebook][-1])


def encode_weight(
    scaled: Float[Array, "N G g"], group_scale: Float[Array, "N G"], rounding: Rounding, codebook: Codebook = "int4"
) -> Int[Array, "N G g"]:
    """Codes -7..7 of channel-scaled weights under rounded group scales.

    "nearest" takes the codebook's nearest magnitude to w / sigma (for INT4 the nearest integer); "table"
    the nearest of the values the kernel will really use, fp8(c * sigma), which is never worse.
    """
    if rounding == "nearest" and codebook == "int4":
        return round_to_int4(scaled / group_scale.astype(jnp.float32)[..., None])
    if rounding in ("nearest", "table"):
        table = weight_table(group_scale if rounding == "table" else group_scale.astype(jnp.float32), codebook)
        midpoints = (table[..., 1:] + table[..., :-1]) / 2
        magnitude = jnp.zeros(scaled.shape, jnp.int8)
        for i in range(INT4_MAX):
            magnitude += (jnp.abs(scaled) > midpoints[..., i, None]).astype(jnp.int8)
        return jnp.where(scaled < 0, -magnitude, magnitude)
    raise ValueError(f"rounding is {rounding!r}; expected one of {get_args(Rounding)}")


def quantize_weight(
    weight: Float[Array, "N K"],
    *,
    group_size: int = 128,
    scale_dtype: ScaleDtype = "e4m3",
    channel_scale: ChannelScale = "per_channel",
    rounding: Rounding = "nearest",
    codebook: Codebook = "int4",
) -> WeightCodes:
    """Codes -7..7 with a scale for each group of ``group_size`` inputs and each output channel.

    Scales round first; codes are computed from the rounded scales.

    Raises:
        ValueError: if K is not a multiple of ``group_size``.
    """
    n, k = weight.shape
    if k % group_size:
        raise ValueError(f"weight has shape {weight.shape}; expected K to be a multiple of group_size {group_size}")
    weight = weight.astype(jnp.float32)
    channel = weight_channel_scale(weight, channel_scale)
    scaled = (weight / channel[:, None]).reshape(n, k // group_size, group_size)
    group_scale = round_group_scale(largest_scale(scaled, codebook), scale_dtype, codebook)
    codes = encode_weight(scaled, group_scale, rounding, codebook)
    return WeightCodes(codes.reshape(n, k), group_scale, channel)


def decode_weight(
    codes: Int[Array, "N K"], group_scale: Float[Array, "N G"], codebook: Codebook = "int4"
) -> Float[Array, "N K"]:
    """The float32 values that the tensor cores see: sign(q) * table[|q|], without channel scale."""
    n, k = codes.shape
    groups = group_scale.shape[1]
    values = codes.astype(jnp.float32)
    if codebook != "int4":
        values = jnp.sign(values) * jnp.asarray(CODEBOOKS[codebook], jnp.float32)[jnp.abs(codes)]
    values = values.reshape(n, groups, k // groups)
    values = values * group_scale.astype(jnp.float32)[..., None]
    if group_scale.dtype == E4M3:
        values = round_to_e4m3(values)
    return values.reshape(n, k)


def dequantize_weight(weight: WeightCodes, codebook: Codebook = "int4") -> Float[Array, "N K"]:
    """float32 weight that the codes stand for."""
    return decode_weight(weight.codes, weight.group_scale, codebook) * weight.channel_scale[:, None]


# --- keys and values ------------------------------------------------------------------------------


def pack_int4(codes: Int[Array, "*rows H"]) -> UInt8[Array, "*rows half"]:
    """Two codes a byte, elements i and i + H/2, as :func:`sign_magnitude`; the second's nibbles are swapped.

    From the highest bit: the first's sign, the second's magnitude, the second's sign, the first's magnitude.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"codes have shape {codes.shape}; expected an even last dimension")
    first, second = jnp.split(sign_magnitude(codes), 2, axis=-1)
    return first | _swap_nibbles(second)


def unpack_int4(packed: UInt8[Array, "*rows half"]) -> Int[Array, "*rows H"]:
    """int8 codes, the inverse of :func:`pack_int4`."""
    return from_sign_magnitude(jnp.concatenate([packed, _swap_nibbles(packed)], axis=-1))


def _swap_nibbles(x: UInt8[Array, "..."]) -> UInt8[Array, "..."]:
    return (x << 4) | (x >> 4)


def sign_magnitude(codes: Int[Array, "..."]) -> UInt8[Array, "..."]:
    """A code as an E4M3 subnormal, which is worth 2^-9 of it: bit 7 is the sign, bits 0-2 the magnitude."""
    return jnp.where(codes < 0, 0x80, 0).astype(jnp.uint8) | jnp.abs(codes).astype(jnp.uint8)


def from_sign_magnitude(x: UInt8[Array, "..."]) -> Int[Array, "..."]:
    """int8 code of the bits 7 and 0-2; both zeros decode to 0."""
    magnitude = (x & 7).astype(jnp.int8)
    return jnp.where(x & 0x80, -magnitude, magnitude)


def quantize_kv(
    x: Float[Array, "*rows H"],
    kv_format: KVFormat,
    group_size: int | None = None,
    clip: float = 1.0,
    *,
    unbiased: bool = False,
) -> ScaledArray:
    """Keys or values in cache format, one scale for each row (token and head) and group.

    Args:
        x: [..., H]; H is head_dim.
        kv_format: "int4" (bf16 scales), "fp8" (float32 scales) or "none" (kept as they are).
        group_size: channels that share a scale; None means all of H.
        clip: INT4 scales are ``clip * absmax / 7``. Below 1 the largest elements lose up to
            ``1 - clip`` of themselves and all others gain resolution.
        unbiased: store INT4 rows with the scale for which x . stored = x . x (RaBitQ, arXiv
            2405.12497): rounding shrinks a row along itself, and so the scores of the queries
            that look for it.

    Raises:
        ValueError: for an unknown format or a group size that does not divide H.
    """
    if kv_format == "none":
        return ScaledArray(x, None, "none")
    if kv_format not in get_args(KVFormat):
        raise ValueError(f"kv_format is {kv_format!r}; expected one of {get_args(KVFormat)}")
    head_dim = x.shape[-1]
    group = group_size or head_dim
    if head_dim % group:
        raise ValueError(f"group_size is {group}; expected a divisor of head_dim {head_dim}")
    grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], head_dim // group, group)
    absmax = finite_absmax(grouped)
    if kv_format == "fp8":
        scale = absmax_scale(absmax, E4M3_MAX)
        return ScaledArray(to_e4m3(grouped * (1 / scale[..., None])).reshape(x.shape), scale, "fp8")
    scale = round_group_scale(absmax_scale(clip * absmax, INT4_MAX), "bf16")
    scaled = grouped * (1 / scale.astype(jnp.float32)[..., None])
    codes = round_to_int4(scaled)
    if unbiased:
        finite = jnp.where(jnp.isfinite(scaled), scaled, 0.0)
        energy, kept = jnp.sum(finite * finite, axis=-1), jnp.sum(finite * codes, axis=-1)
        ratio = jnp.where(kept > 0, energy / jnp.where(kept > 0, kept, 1.0), 1.0)
        scale = round_group_scale(scale.astype(jnp.float32) * ratio, "bf16")
    return ScaledArray(pack_int4(codes.reshape(x.shape)), scale, "int4")


def quantize_probabilities(p: Float[Array, "..."]) -> Float[Array, "..."]:
    """float32 attention weights (0..1) after the FP8 cast that the P.V product applies."""
    return round_to_e4m3(p * PROBABILITY_SCALE) / PROBABILITY_SCALE


def nbytes(tree: object) -> int:
    """Bytes of all arrays in a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
