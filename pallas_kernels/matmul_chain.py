"""What a decoder layer does before and after attention, for a token or two: a kernel each, on Hopper.

    norm_matmul:  y = RMSNorm(x) W^T
    output_mlp:   x = residual + attention O^T,   then x + (activation(g) * u) D^T with (g, u) = RMSNorm(x) GU^T

They compute what ``sum_norm_quantize``, ``matmul`` and ``quantize_rows`` do one after the other, with
the same roundings, and are worth it where a matmul has so few tokens that it waits for nothing but
its weights: inside one kernel the next matmul's weights are already on their way. There is no
other implementation; where ``unsupported`` says why, call those ops.
"""

import functools
import math

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.formats import ScaledArray
from pallas_kernels.matmul_epilogue import Activation
from pallas_kernels.operands import check_operands
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.sm90.chain import launch
from pallas_kernels.split_sum import SplitSum


def unsupported(
    rows: int, qkv: QuantizedTensor, o_proj: QuantizedTensor, gate_up: QuantizedTensor, down: QuantizedTensor
) -> str | None:
    """Why the chains cannot run a layer with these weights for so many rows, or None.

    Args:
        rows: tokens.
        qkv: [N, D].
        o_proj: [D, K].
        gate_up: [2 I, D], interleaved (``layouts.interleave_gate_up``).
        down: [D, I].
    """
    tail = o_proj, gate_up, down
    return launch.unsupported(rows, (qkv,), launch.NORM_MATMUL) or launch.unsupported(rows, tail, launch.OUTPUT_MLP)


def runs(rows: int, *weights: QuantizedTensor, implementation: dispatch.Implementation = "auto") -> bool:
    """Whether both chains can run a layer, and should.

    Args:
        rows: tokens.
        weights: as in ``unsupported``.
        implementation: see ``dispatch``; a chain is one of the ways to run a kernel, so that none is
            no reason to fall back to XLA.
    """
    return (
        unsupported(rows, *weights) is None and dispatch.resolve("matmul_chain", implementation, None) == "mosaic_gpu"
    )


@functools.partial(jax.jit, static_argnames="eps")
def norm_matmul(
    x: Float[Array, "*rows D"] | SplitSum,
    norm: Float[Array, " D"],
    weight: QuantizedTensor,
    eps: float,
    bias: Float[Array, " N"] | None = None,
) -> tuple[SplitSum, Float[Array, "*rows D"], Int[Array, "1"]]:
    """RMSNorm, FP8 and a matmul.

    Args:
        x: bfloat16, or a matmul's parts and a residual of that.
        norm: the norm's weight, float32.
        weight: [N, D].
        eps: of the norm.
        bias: added to the product, or None.

    Returns:
        The product, in parts; x, added up if it was in parts; and a barrier for one call of ``output_mlp``.

    Raises:
        ValueError: if the widths do not fit together.
        NotImplementedError: if the kernel cannot run this.
    """
    check_operands(Array | SplitSum, x=x)
    check_operands(Array, norm=norm)
    check_operands(QuantizedTensor, weight=weight)
    shape = (*x.rows, x.n) if isinstance(x, SplitSum) else x.shape
    if not shape[-1:] == norm.shape == weight.shape[1:]:
        raise ValueError(
            f"x has shape {shape}, the norm {norm.shape}, the weight {weight.shape}; expected equal widths"
        )
    m = _check(shape, (weight,), launch.NORM_MATMUL)
    results = launch.run((weight,), launch.NORM_MATMUL, {0: norm}, eps, launch.norm_source(x), m)
    y = launch.left_in_parts(results, 0, weight, bias, None, shape[:-1])
    return y, results["x0"].reshape(shape) if isinstance(x, SplitSum) else x, results["state"]


@functools.partial(jax.jit, static_argnames=("eps", "activation"))
def output_mlp(
    attention: ScaledArray,
    residual: Float[Array, "*rows D"],
    o_proj: QuantizedTensor,
    norm: Float[Array, " D"],
    gate_up: QuantizedTensor,
    down: QuantizedTensor,
    eps: float,
    barrier: Int[Array, "1"],
    activation: Activation = "silu_mul",
    biases: tuple[Array | None, Array | None, Array | None] = (None, None, None),
) -> SplitSum:
    """From a layer's attention to its output.

    Args:
        attention: FP8 rows [*rows, K] with per-token scales.
        residual: bfloat16, the layer's input.
        o_proj: [D, K].
        norm: weight of the norm after attention, float32.
        gate_up: [2 I, D], interleaved (``layouts.interleave_gate_up``).
        down: [D, I].
        eps: of the norm.
        barrier: from ``norm_matmul``. The kernel uses it up: a barrier serves one call.
        activation: of the gate.
        biases: of o_proj, gate_up and down.

    Returns:
        The layer's output in parts, the stream after attention being its residual.

    Raises:
        ValueError: if the widths do not fit together.
        NotImplementedError: if the kernel cannot run this.
    """
    check_operands(ScaledArray, attention=attention)
    check_operands(Array, residual=residual, norm=norm, barrier=barrier)
    check_operands(QuantizedTensor, o_proj=o_proj, gate_up=gate_up, down=down)
    weights, width = (o_proj, gate_up, down), residual.shape[-1]
    expected = (width, attention.values.shape[-1]), (2 * down.shape[1], width), (width, down.shape[1])
    if tuple(weight.shape for weight in weights) != expected or norm.shape != (width,):
        raise ValueError(
            f"the weights have shapes {[weight.shape for weight in weights]} and the norm {norm.shape}; "
            f"expected {list(expected)} and {(width,)}"
        )
    m = _check(residual.shape, weights, launch.OUTPUT_MLP)
    assert attention.scale is not None
    source = {
        "x": attention.values.reshape(m, -1),
        "x_scale": attention.scale.reshape(m),
        "residual": residual.reshape(m, width),
        "state": barrier,
    }
    *inner, last = biases
    results = launch.run(weights, launch.OUTPUT_MLP, {1: norm}, eps, source, m, activation, dict(enumerate(inner)))
    return launch.left_in_parts(results, 2, down, last, results["x1"], residual.shape[:-1])


def _check(shape: tuple[int, ...], weights: tuple[QuantizedTensor, ...], sources: tuple[launch.Source, ...]) -> int:
    """The number of rows, which the kernel can run."""
    m = math.prod(shape[:-1])
    dispatch.resolve("matmul_chain", "mosaic_gpu", launch.unsupported(m, weights, sources))
    return m
