"""Error compensation: choose INT4 codes for the layer's output, not for the weights one by one.

For inputs X with H = X^T X, a weight's error E costs tr(E H E^T). Columns are rounded in order, and
what rounding one of them does to the output is made up for by the columns after it (GPTQ, arXiv
2210.17323); then further passes revisit each column given all others (coordinate descent, QuantEase,
arXiv 2309.01885). Rounding is the kernel's: group scales come from ``weight_search``, codes from
``formats.encode_weight``.

A group of columns is a step: within it columns follow one another, beyond it one matrix product
carries their errors to all others. Nothing is unrolled, so a weight of any size compiles as fast.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from checkpoints_convert.algorithms.weight_search import search_channel_scale, search_group_scale, search_weight
from fireq_jax.compilation import COMPILE_QUICKLY
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels import formats, layouts
from pallas_kernels.formats import WeightCodes
from pallas_kernels.quantized_tensor import QuantizedTensor, over_stack

# Ridges, as fractions of the mean diagonal: of H in GPTQ, and of H when a weight is re-fitted to
# other inputs, where calibration noise could otherwise move the weight itself. Less fits calibration text better, and
# any other text worse.
GPTQ_DAMPING = 0.1
TARGET_DAMPING = 0.1

# Passes of coordinate descent after GPTQ.
DESCENT_PASSES = 4

# float32 products throughout: a GPU's default, TF32, is too coarse for sums that nearly cancel.
_dot = functools.partial(jnp.matmul, precision="highest")


class InputMoments(NamedTuple):
    """Mean second moments of a linear layer's inputs over the calibration tokens.

    ``hessian`` is of the inputs X' that the layer will see; ``cross`` is X^T X' with the float
    model's inputs X, or None if these are the same. Of experts they are stacked.
    """

    hessian: Float[Array, "*experts K K"]
    cross: Float[Array, "*experts K K"] | None = None


@functools.partial(jax.jit, static_argnums=2, compiler_options=COMPILE_QUICKLY)
def quantize_measured(
    weight: Float[Array, "*experts N K"], inputs: InputMoments, config: QuantizationConfig
) -> QuantizedTensor:
    """Quantize and pack a 4-bit weight, or each of a stack, by ``scale_search`` and ``error_compensation``."""
    return over_stack(functools.partial(_quantize_matrix, config=config))(weight, inputs)


def _quantize_matrix(weight: Float[Array, "N K"], inputs: InputMoments, config: QuantizationConfig) -> QuantizedTensor:
    codebook = config.weight_format
    assert codebook != "fp8"
    assert codebook != "none"
    n, k = weight.shape
    extra = layouts.padded_shape(n, k)[1] - k
    weight = weight.astype(jnp.float32)
    if config.error_compensation and inputs.cross is not None:
        weight = compensated_target(weight, inputs.cross, inputs.hessian, TARGET_DAMPING)
    weight = jnp.pad(weight, ((0, 0), (0, extra)))
    hessian = jnp.pad(inputs.hessian, ((0, extra), (0, extra)))
    importance = jnp.diagonal(hessian)
    if not config.error_compensation:
        codes = search_weight(
            weight,
            importance,
            group_size=config.group_size,
            scale_dtype=config.scale_dtype,
            channel_scale=config.channel_scale,
            rounding=config.rounding,
            codebook=codebook,
        )
    else:
        channel = formats.weight_channel_scale(weight, config.channel_scale)
        if config.scale_search and config.channel_scale == "per_channel":
            channel = search_channel_scale(
                weight,
                importance,
                group_size=config.group_size,
                scale_dtype=config.scale_dtype,
                rounding=config.rounding,
                codebook=codebook,
            )
        codes = compensate(
            weight,
            hessian,
            channel,
            group_size=config.group_size,
            scale_dtype=config.scale_dtype,
            rounding=config.rounding,
            codebook=codebook,
            search=config.scale_search,
        )
    return dataclasses.replace(QuantizedTensor.from_codes(codes, codebook), shape=(n, k))


def rounding_operations(n: int, k: int) -> int:
    """About how many operations ``error_compensation`` of an [N, K] weight is: products with a [K, K] matrix.

    Two for the target, one each for GPTQ, for the first gradient and for the refit, and the passes.
    """
    return 2 * n * k * k * (5 + DESCENT_PASSES)


def damped(hessian: Float[Array, "K K"], damping: float) -> Float[Array, "K K"]:
    """H plus ``damping`` times its mean diagonal: invertible, and less sure of what little text showed."""
    ridge = damping * jnp.mean(jnp.diagonal(hessian))
    return hessian + jnp.where(ridge > 0, ridge, 1.0) * jnp.eye(len(hessian), dtype=hessian.dtype)


def compensated_target(
    weight: Float[Array, "N K"],
    cross: Float[Array, "K K"],
    hessian: Float[Array, "K K"],
    damping: float,
) -> Float[Array, "N K"]:
    """The weight that on disturbed inputs comes closest to what W makes of the true ones.

    With true inputs X and the quantized model's X', least squares of X W^T - X' W'^T gives
    W' = W + W (X - X')^T X' H^-1, ridge-damped towards W (GPTAQ, arXiv 2504.02692, corrects the
    same error column by column).

    Args:
        weight: W.
        cross: X^T X'.
        hessian: H = X'^T X'.
        damping: ridge, as a fraction of H's mean diagonal.
    """
    factor = jax.scipy.linalg.cho_factor(damped(hessian, damping), lower=True)
    return weight + jax.scipy.linalg.cho_solve(factor, _dot(weight, cross - hessian).T).T


@functools.partial(jax.jit, static_argnames=("group_size", "scale_dtype", "rounding", "codebook", "search", "damping"))
def compensate(
    weight: Float[Array, "N K"],
    hessian: Float[Array, "K K"],
    channel_scale: Float[Array, " N"],
    *,
    group_size: int = 128,
    scale_dtype: formats.ScaleDtype = "e4m3",
    rounding: formats.Rounding = "table",
    codebook: formats.Codebook = "int4",
    search: bool = True,
    damping: float = GPTQ_DAMPING,
    passes: int = DESCENT_PASSES,
) -> WeightCodes:
    """Codes that keep the layer's output: GPTQ, then coordinate descent.

    Args:
        weight: float32; K a multiple of ``group_size``.
        hessian: X^T X of the layer's inputs, any positive factor.
        channel_scale: float32 scale of each channel.
        group_size, scale_dtype, rounding, codebook: as in ``formats.quantize_weight``.
        search: group scales by search instead of from the largest weight.
        damping: see :func:`damped`.
        passes: coordinate descent passes after GPTQ.

    Returns:
        Codes and scales. With ``search`` the channel scales are refitted by least squares.
    """
    hessian = damped(hessian, damping)
    normal = weight / channel_scale[:, None]
    codes, scales = _gptq(normal, hessian, group_size, scale_dtype, rounding, codebook, search)
    values = formats.decode_weight(codes, scales, codebook)

    def descend(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        codes, values = state
        return _descend(normal, codes, values, scales, hessian, rounding, codebook)

    codes, values = jax.lax.fori_loop(0, passes, descend, (codes, values))
    if not search:
        return WeightCodes(codes, scales, channel_scale)
    weighted = _dot(values, hessian)
    energy = jnp.sum(weighted * values, axis=1)
    fit = jnp.sum(weighted * normal, axis=1) / jnp.where(energy > 0, energy, 1.0)
    return WeightCodes(codes, scales, channel_scale * jnp.where(fit > 0, fit, 1.0))


def inverse_factor(hessian: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """The upper triangular U with H^-1 = U^T U, from one factorization: read backwards, H is L L^T and U is L^-1."""
    lower = jnp.linalg.cholesky(hessian[::-1, ::-1])
    identity = jnp.eye(len(hessian), dtype=hessian.dtype)
    return jax.scipy.linalg.solve_triangular(lower, identity, lower=True)[::-1, ::-1]


def _gptq(
    weight: Float[Array, "N K"],
    hessian: Float[Array, "K K"],
    group_size: int,
    scale_dtype: formats.ScaleDtype,
    rounding: formats.Rounding,
    codebook: formats.Codebook,
    search: bool,
) -> tuple[Int[Array, "N K"], Float[Array, "N G"]]:
    n, k = weight.shape
    upper = inverse_factor(hessian)

    def group_step(weight: Array, group: Array) -> tuple[Array, tuple[Array, Array]]:
        begin = group * group_size
        rows = jax.lax.dynamic_slice(upper, (begin, 0), (group_size, k))
        local = jax.lax.dynamic_slice(rows, (0, begin), (group_size, group_size))
        columns = jax.lax.dynamic_slice(weight, (0, begin), (n, group_size))
        if search:
            importance = 1 / jnp.square(jnp.diagonal(local))
            scale, _ = search_group_scale(columns[:, None], importance, scale_dtype, rounding, codebook)
        else:
            scale = formats.largest_scale(columns, codebook)
            scale = formats.round_group_scale(scale, scale_dtype, codebook)[:, None]

        def column_step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            columns, errors, codes = state
            column = columns[:, i]
            code = formats.encode_weight(column[:, None, None], scale, rounding, codebook)[:, 0]
            error = (column - formats.decode_weight(code, scale, codebook)[:, 0]) / local[i, i]
            columns = columns - error[:, None] * local[i]
            return columns, errors.at[:, i].set(error), codes.at[:, i].set(code[:, 0])

        start = (columns, jnp.zeros_like(columns), jnp.zeros(columns.shape, jnp.int8))
        _, errors, codes = jax.lax.fori_loop(0, group_size, column_step, start)
        return weight - _dot(errors, rows), (codes, scale[:, 0])

    _, (codes, scales) = jax.lax.scan(group_step, weight, jnp.arange(k // group_size))
    return jnp.moveaxis(codes, 0, 1).reshape(n, k), scales.T


def _descend(
    weight: Float[Array, "N K"],
    codes: Int[Array, "N K"],
    values: Float[Array, "N K"],
    scales: Float[Array, "N G"],
    hessian: Float[Array, "K K"],
    rounding: formats.Rounding,
    codebook: formats.Codebook,
) -> tuple[Int[Array, "N K"], Float[Array, "N K"]]:
    n, k = weight.shape
    group_size = k // scales.shape[1]

    def group_step(state: tuple[Array, Array], group: Array) -> tuple[tuple[Array, Array], Array]:
        values, gradient = state
        begin = group * group_size
        rows = jax.lax.dynamic_slice(hessian, (begin, 0), (group_size, k))
        local = jax.lax.dynamic_slice(rows, (0, begin), (group_size, group_size))
        scale = jax.lax.dynamic_slice(scales, (0, group), (n, 1))
        before = jax.lax.dynamic_slice(values, (0, begin), (n, group_size))
        slope = jax.lax.dynamic_slice(gradient, (0, begin), (n, group_size))

        def column_step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            current, slope, codes = state
            best = current[:, i] - slope[:, i] / local[i, i]
            code = formats.encode_weight(best[:, None, None], scale, rounding, codebook)[:, 0]
            value = formats.decode_weight(code, scale, codebook)[:, 0]
            slope = slope + (value - current[:, i])[:, None] * local[i]
            return current.at[:, i].set(value), slope, codes.at[:, i].set(code[:, 0])

        start = (before, slope, jnp.zeros(before.shape, jnp.int8))
        after, _, codes = jax.lax.fori_loop(0, group_size, column_step, start)
        values = jax.lax.dynamic_update_slice(values, after, (0, begin))
        return (values, gradient + _dot(after - before, rows)), codes

    state = (values, _dot(values - weight, hessian))
    (values, _), codes = jax.lax.scan(group_step, state, jnp.arange(k // group_size))
    return jnp.moveaxis(codes, 0, 1).reshape(n, k), values
