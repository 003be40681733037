"""Rows to FP8, plain or after RMSNorm: what is left to do between two matmuls.

    quantize_rows:      scale = absmax(x) / 448,                values = fp8(x / scale)
    rms_norm_quantize:  scale = absmax(x w) / 448 / rms(x),     values = fp8(x w / absmax(x w) * 448)
    sum_norm_quantize:  the same of x that a matmul left as split-K partials, and x
    post_norm_quantize: x = residual + norm(branch), and either of the first two of that x

RMSNorm divides a row by one number, its rms, and so does quantization: the rms is left to the
scale. The values are those of x * weight in float32, there is no bf16 rounding in between, and
one pass over the row finds both its sum of squares and its absmax.

FireQ (arXiv 2505.20839) for the format; the fusion is ours.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch, formats
from pallas_kernels.formats import ScaledArray
from pallas_kernels.matmul_epilogue import width_out
from pallas_kernels.operands import check_operands
from pallas_kernels.sm90.row_quantize import launch
from pallas_kernels.sm90.row_quantize.config import unsupported, unsupported_branch
from pallas_kernels.split_k import SplitKPartials, reduced


def quantize_rows(x: Float[Array, "*rows D"], *, implementation: dispatch.Implementation = "auto") -> ScaledArray:
    """``formats.quantize_fp8`` in one pass over memory.

    Args:
        x: bfloat16, float16 or float32.
        implementation: see ``dispatch``.

    Returns:
        E4M3 values [*rows, D] and float32 scales [*rows, 1], by the rules of ``formats``: a row
        without a finite non-zero entry has scale 1, Inf saturates, NaN stays NaN.

    Raises:
        ValueError: if ``x`` is not floats.
        NotImplementedError: if ``implementation`` names a kernel that cannot run this.
    """
    _validate_rows(x)
    if dispatch.resolve("quantize_rows", implementation, unsupported(x)) == "mosaic_gpu":
        return launch.quantize_rows(x)
    return formats.quantize_fp8(x)


def rms_norm_quantize(
    x: Float[Array, "*rows D"],
    weight: Float[Array, " D"],
    eps: float,
    *,
    implementation: dispatch.Implementation = "auto",
) -> ScaledArray:
    """x / rms(x) * weight as FP8 rows, computed in float32 throughout.

    Args:
        x: bfloat16, float16 or float32.
        weight: float32 [D].
        eps: added to the mean square, positive.
        implementation: see ``dispatch``.

    Returns:
        E4M3 values [*rows, D] and float32 scales [*rows, 1]. A row with Inf or NaN, or whose
        squares overflow, has scale NaN: it does not turn into plausible numbers.

    Raises:
        ValueError: if shapes or dtypes do not fit together or ``eps`` is not positive.
        NotImplementedError: if ``implementation`` names a kernel that cannot run this.
    """
    _validate_rows(x)
    _validate_norm(x.shape, weight, eps)
    if dispatch.resolve("rms_norm_quantize", implementation, unsupported(x)) == "mosaic_gpu":
        return launch.rms_norm_quantize(x, weight, eps=eps)
    return rms_norm_quantize_reference(x, weight, eps)


def sum_norm_quantize(
    partials: SplitKPartials,
    weight: Float[Array, " D"],
    eps: float,
    *,
    implementation: dispatch.Implementation = "auto",
) -> tuple[ScaledArray, Float[Array, "*rows D"]]:
    """``rms_norm_quantize`` of ``partials.reduce()``, and that.

    Args:
        partials: of x [*rows, D], without an activation.
        weight: float32 [D].
        eps: added to the mean square, positive.
        implementation: see ``dispatch``.

    Returns:
        FP8 rows as ``rms_norm_quantize`` makes them, and bfloat16 x [*rows, D].

    Raises:
        ValueError: if shapes or dtypes do not fit together or ``eps`` is not positive.
        NotImplementedError: if ``implementation`` names a kernel that cannot run this.
    """
    check_operands(SplitKPartials, partials=partials)
    if partials.activation != "none":
        raise ValueError(f"the partials' activation is {partials.activation!r}; expected 'none'")
    _validate_norm((*partials.rows, partials.n), weight, eps)
    if dispatch.resolve("sum_norm_quantize", implementation, unsupported(partials)) == "mosaic_gpu":
        return launch.sum_norm_quantize(partials, weight, eps=eps)
    x = partials.reduce()
    return rms_norm_quantize(x, weight, eps, implementation=implementation), x


def post_norm_quantize(
    branch: Float[Array, "*rows D"] | SplitKPartials,
    post_weight: Float[Array, " D"],
    residual: Float[Array, "*rows D"],
    weight: Float[Array, " D"] | None,
    eps: float,
    *,
    implementation: dispatch.Implementation = "auto",
) -> tuple[ScaledArray, Float[Array, "*rows D"]]:
    """The end of a branch whose norm comes after it, and the start of the next: ``add_post_norm``, then FP8 rows.

    Args:
        branch: what attention or the MLP adds, bfloat16, float16 or float32, or split-K partials (without
            a residual of their own).
        post_weight: of the branch's norm, float32 [D].
        residual: what it is added to, bfloat16, float16 or float32.
        weight: of the next branch's norm, float32 [D] (Gemma 2 and 3, GLM-4), or None where it has none before it
            (OLMo 2 and 3, EXAONE 4).
        eps: added to both mean squares, positive.
        implementation: see ``dispatch``.

    Returns:
        FP8 rows of x as ``rms_norm_quantize`` makes them, or ``quantize_rows`` without a ``weight``; and x
        [*rows, D] in the residual's dtype.

    Raises:
        ValueError: if shapes or dtypes do not fit together or ``eps`` is not positive.
        NotImplementedError: if ``implementation`` names a kernel that cannot run this.
    """
    _validate_branch(branch, post_weight, residual, eps)
    if weight is not None:
        _validate_norm(residual.shape, weight, eps)
    reason = unsupported_branch(branch, residual)
    if dispatch.resolve("post_norm_quantize", implementation, reason) == "mosaic_gpu":
        return launch.post_norm_quantize(branch, post_weight, residual, weight, eps=eps)
    x = add_post_norm(branch, post_weight, residual, eps)
    if weight is None:
        return quantize_rows(x, implementation=implementation), x
    return rms_norm_quantize(x, weight, eps, implementation=implementation), x


def add_post_norm(
    branch: Float[Array, "*rows D"] | SplitKPartials,
    post_weight: Float[Array, " D"],
    residual: Float[Array, "*rows D"],
    eps: float,
) -> Float[Array, "*rows D"]:
    """residual + branch / rms(branch) * post_weight in float32, in the residual's dtype; by XLA.

    A row of the branch with Inf or NaN, or whose squares overflow, becomes NaN. Arguments and errors are those of
    ``post_norm_quantize``.
    """
    _validate_branch(branch, post_weight, residual, eps)
    wide = reduced(branch).astype(jnp.float32)
    normalized = wide * jnp.broadcast_to(post_weight, wide.shape) * _inverse_rms(wide, eps)
    return (normalized + residual.astype(jnp.float32)).astype(residual.dtype)


def rms_norm_quantize_reference(x: Float[Array, "*rows D"], weight: Float[Array, " D"], eps: float) -> ScaledArray:
    """The op in ``jax.numpy``: the kernel's oracle and the path without a Hopper GPU."""
    wide = x.astype(jnp.float32)
    values, scale = formats.quantize_fp8(wide * jnp.broadcast_to(weight, wide.shape))
    assert scale is not None
    return ScaledArray(values, scale * _inverse_rms(wide, eps))


def _inverse_rms(x: Float[Array, "*rows D"], eps: float) -> Float[Array, "*rows 1"]:
    """1 / sqrt(mean(x^2) + eps); NaN if that is not finite."""
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    # Inf's reciprocal is 0, which would hide it.
    return jnp.where(jnp.isfinite(mean_square), jax.lax.rsqrt(mean_square + eps), jnp.nan)


def _validate_rows(x: Array) -> None:
    check_operands(Array, x=x)
    if x.ndim < 1 or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"x has shape {x.shape} and dtype {x.dtype}; expected [*rows, D] bfloat16, float16 or float32")


def _validate_branch(branch: Array | SplitKPartials, post_weight: Array, residual: Array, eps: float) -> None:
    _validate_rows(residual)
    if isinstance(branch, SplitKPartials):
        shape = *branch.rows, width_out(branch.n, branch.activation)
        if branch.residual is not None:
            raise ValueError("the branch has a residual of its own; expected none, for its norm comes first")
    else:
        _validate_rows(branch)
        shape = branch.shape
    if shape != residual.shape:
        raise ValueError(f"the branch has shape {shape} and the residual {residual.shape}; expected the same")
    _validate_norm(residual.shape, post_weight, eps)


def _validate_norm(shape: tuple[int, ...], weight: Array, eps: float) -> None:
    check_operands(Array, weight=weight)
    if weight.shape != shape[-1:] or weight.dtype != jnp.float32:
        raise ValueError(
            f"weight has shape {weight.shape} and dtype {weight.dtype}; expected float32 {shape[-1:]} "
            f"for x of shape {shape}"
        )
    if not eps > 0:
        raise ValueError(f"eps is {eps}; expected a positive number")
