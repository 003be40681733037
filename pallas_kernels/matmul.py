"""The linear layer's op: y = x W^T with an INT4 or FP8 weight and its epilogue fused.

    y[m, n] = x_scale[m] * channel_scale[n] * sum_k x8[m, k] * value(code[n, k], group_scale)
    y = activation(y + bias) + residual

FireQ (arXiv 2505.20839), INT4 x FP8 kernel; the epilogues are ours.
"""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch, formats, layouts
from pallas_kernels.formats import ScaledArray
from pallas_kernels.matmul_epilogue import Activation, epilogue, width_out
from pallas_kernels.operands import check_operands
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.sm90.common import split_k
from pallas_kernels.sm90.matmul import launch
from pallas_kernels.sm90.matmul.config import choose
from pallas_kernels.split_k import SplitKPartials, reduced


def matmul(
    x: ScaledArray | Float[Array, "*rows K"],
    weight: QuantizedTensor,
    *,
    bias: Float[Array, " N"] | None = None,
    activation: Activation = "none",
    residual: Float[Array, "*rows N_out"] | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: dispatch.Implementation = "auto",
) -> Float[Array, "*rows N_out"]:
    """Multiply rows by a quantized weight.

    Args:
        x: FP8 rows with per-token scales (``formats.quantize_fp8``), or float rows, which are
            multiplied as they are (W4A16).
        weight: [N, K].
        bias: added before the activation; [N].
        activation: "none", or of a gate: "silu_mul" (SiLU(gate) * up), "gelu_tanh_mul" (GELU's tanh
            approximation) or "clamped_silu_mul" (gpt-oss's, see ``matmul_epilogue``). For these ``weight``
            holds gate and up rows interleaved (``layouts.interleave_gate_up``), and N_out = N / 2.
        residual: added last, in float32.
        out_dtype: dtype of the result; sums are float32 throughout.
        implementation: see ``dispatch``.

    Returns:
        [*rows, N_out]; N_out is N, or N / 2 where a gate is activated.

    Raises:
        ValueError: if shapes or dtypes do not fit together.
        NotImplementedError: if ``implementation`` names a kernel that cannot run this.
    """
    y = unreduced_matmul(
        x,
        weight,
        bias=bias,
        activation=activation,
        residual=residual,
        out_dtype=out_dtype,
        implementation=implementation,
    )
    return reduced(y)


def unreduced_matmul(
    x: ScaledArray | Float[Array, "*rows K"],
    weight: QuantizedTensor,
    *,
    bias: Float[Array, " N"] | None = None,
    activation: Activation = "none",
    residual: Float[Array, "*rows N_out"] | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: dispatch.Implementation = "auto",
) -> Float[Array, "*rows N_out"] | SplitKPartials:
    """``matmul``, or where its kernel splits K the partials, if the kernels that read them can reduce them.

    Arguments and errors are those of ``matmul``.
    """
    _validate(x, weight, bias, activation, residual)
    unsupported = _unsupported(x, weight, bias, activation, residual, out_dtype)
    if dispatch.resolve("matmul", implementation, unsupported) == "mosaic_gpu":
        y = _matmul_sm90(x, weight, bias, activation, residual)
        return reduced(y) if isinstance(y, SplitKPartials) and split_k.unsupported(y) else y
    return matmul_reference(x, weight, bias=bias, activation=activation, residual=residual, out_dtype=out_dtype)


def _unsupported(
    x: ScaledArray | Array,
    weight: QuantizedTensor,
    bias: Array | None,
    activation: Activation,
    residual: Array | None,
    out_dtype: jax.typing.DTypeLike,
) -> str | None:
    """Why the Hopper kernel cannot run this, or None."""
    values = x.values if isinstance(x, ScaledArray) else x
    if activation == "clamped_silu_mul":
        return f"the kernel's epilogue has no {activation}"
    if weight.format == "fp8":
        return "the weight is FP8, which XLA multiplies at full speed"
    assert weight.group_scale is not None
    if weight.group_scale.dtype != formats.E4M3 and not formats.is_e4m3(weight.format):
        return f"with bf16 scales codes are multiplied as E4M3 numbers, which {weight.format}'s magnitudes are not"
    if values.dtype not in (formats.E4M3, jnp.bfloat16):
        return f"x has dtype {values.dtype}, not {jnp.dtype(formats.E4M3)} or bfloat16"
    if out_dtype != jnp.bfloat16:
        return f"out_dtype is {jnp.dtype(out_dtype)}, not bfloat16"
    if residual is not None and residual.dtype != jnp.bfloat16:
        return f"the residual has dtype {residual.dtype}, not bfloat16"
    if isinstance(x, ScaledArray) and x.scale is not None and x.scale.dtype != jnp.float32:
        return f"the scales of x are {x.scale.dtype}, not float32"
    if bias is not None and bias.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the bias has dtype {bias.dtype}, not float32 or bfloat16"
    if values.size == 0 or weight.shape[0] == 0:
        return "x or the weight is empty"
    return None


def _matmul_sm90(
    x: ScaledArray | Array,
    weight: QuantizedTensor,
    bias: Array | None,
    activation: Activation,
    residual: Array | None,
) -> Array | SplitKPartials:
    values, x_scale = x if isinstance(x, ScaledArray) else (x, None)
    assert weight.group_scale is not None
    assert weight.format != "fp8"
    n, k = weight.shape
    padded_k = weight.values.shape[1] * layouts.TILE_K
    rows = values.shape[:-1]
    flat = values.reshape(-1, k)
    if padded_k != k:
        flat = jnp.pad(flat, ((0, 0), (0, padded_k - k)))
    config = choose(
        flat.shape[0],
        n,
        padded_k,
        "e4m3" if values.dtype == formats.E4M3 else "bf16",
        weight.group_scale.dtype == formats.E4M3,
        layouts.TILE_K // weight.group_size,
        may_split=split_k.can_reduce(x_scale, activation),
    )
    y = launch.matmul(
        flat,
        weight.values,
        weight.group_scale,
        weight.channel_scale,
        n=n,
        config=config,
        x_scale=None if x_scale is None else x_scale.reshape(-1),
        bias=bias,
        residual=None if residual is None else residual.reshape(-1, residual.shape[-1]),
        activation=activation,
        codebook=weight.format,
    )
    return dataclasses.replace(y, rows=rows) if isinstance(y, SplitKPartials) else y.reshape(*rows, y.shape[-1])


def matmul_reference(
    x: ScaledArray | Float[Array, "*rows K"],
    weight: QuantizedTensor,
    *,
    bias: Float[Array, " N"] | None = None,
    activation: Activation = "none",
    residual: Float[Array, "*rows N_out"] | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Float[Array, "*rows N_out"]:
    """The op in ``jax.numpy``: the oracle of the kernels' tests and the path without a Hopper GPU."""
    values, x_scale = x if isinstance(x, ScaledArray) else (x, None)
    if weight.format == "fp8" and values.dtype == formats.E4M3:
        # As FP8, so that tensor cores that have it multiply it so; the sums are float32 either way.
        y = jnp.einsum("...k,nk->...n", values, weight.values, preferred_element_type=jnp.float32)
    else:
        # A GPU multiplies float32 operands as TF32 by default: exact for FP8 and bf16 rows, not for these.
        precision = "highest" if values.dtype == jnp.float32 else None
        y = jnp.einsum("...k,nk->...n", values.astype(jnp.float32), weight.unscaled(), precision=precision)
    y = y * jnp.broadcast_to(weight.channel_scale[: weight.shape[0]], y.shape)
    if x_scale is not None:
        y = y * x_scale
    return epilogue(y, bias, activation, residual).astype(out_dtype)


def _validate(
    x: ScaledArray | Array, weight: QuantizedTensor, bias: Array | None, activation: Activation, residual: Array | None
) -> None:
    check_operands(ScaledArray | Array, x=x)
    check_operands(QuantizedTensor, weight=weight)
    check_operands(Array | None, bias=bias, residual=residual)
    n, k = weight.shape
    values = x.values if isinstance(x, ScaledArray) else x
    if values.shape[-1] != k:
        raise ValueError(f"x has shape {values.shape} and the weight {weight.shape}; expected x [..., {k}]")
    if isinstance(x, ScaledArray):
        if values.dtype != formats.E4M3 or x.scale is None:
            raise ValueError(f"scaled x has dtype {values.dtype}; expected {jnp.dtype(formats.E4M3)} with a scale")
        if x.scale.shape != (*values.shape[:-1], 1):
            raise ValueError(f"x scale has shape {x.scale.shape}; expected {(*values.shape[:-1], 1)}, one per token")
    elif values.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"x has dtype {values.dtype}; expected a ScaledArray, bfloat16, float16 or float32")
    if activation not in get_args(Activation):
        raise ValueError(f"activation is {activation!r}; expected one of {get_args(Activation)}")
    if activation != "none" and n % (2 * layouts.INTERLEAVE):
        raise ValueError(
            f"weight has shape {weight.shape}; {activation} expects N to be a multiple of {2 * layouts.INTERLEAVE}"
        )
    n_out = width_out(n, activation)
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias has shape {bias.shape}; expected {(n,)}")
    if residual is not None and residual.shape != (*values.shape[:-1], n_out):
        raise ValueError(f"residual has shape {residual.shape}; expected {(*values.shape[:-1], n_out)}")
