"""What a decoder layer does before and after attention, for a token or two: a kernel each, on Hopper.

    norm_matmul:  y = RMSNorm(x) W^T
    output_mlp:   x = residual + attention O^T,   then x + (SiLU(g) * u) D^T with (g, u) = RMSNorm(x) GU^T

They compute what ``sum_norm_quantize``, ``matmul`` and ``quantize_rows`` do one after the other, with
the same roundings, and are worth it where a matmul has so few tokens that it waits for nothing but
its weights: inside one kernel the next matmul's weights are already on their way. There is no
other implementation; where ``unsupported`` says why, call those ops.
"""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.formats import ScaledArray
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.sm90.chain import launch
from pallas_kernels.split_sum import SplitSum


def runs(
    rows: int,
    *weights: QuantizedTensor,
    implementation: dispatch.Implementation = "auto",
) -> bool:
    """Whether both chains can run a layer with these weights for so many rows, and should.

    Args:
        rows: tokens.
        weights: qkv [N, D], o_proj [D, K], gate_up [2 I, D] and down [D, I].
        implementation: see ``dispatch``; a chain is one of the ways to run a kernel, so that none is
            no reason to fall back to XLA.
    """
    if launch.unsupported(rows, *weights):
        return False
    return dispatch.resolve("matmul_chain", implementation, None) == "mosaic_gpu"


def norm_matmul(
    x: Float[Array, "*rows D"] | SplitSum, norm: Float[Array, " D"], weight: QuantizedTensor, eps: float
) -> tuple[SplitSum, Float[Array, "*rows D"], Int[Array, "1"]]:
    """RMSNorm, FP8 and a matmul.

    Args:
        x: bfloat16, or a matmul's parts and a residual of that.
        norm: the norm's weight, float32.
        weight: [N, D].
        eps: of the norm.

    Returns:
        The product, in parts; x, added up if it was in parts; and a barrier for one call of ``output_mlp``.
    """
    return launch.norm_matmul(x, norm, weight, eps=eps)


def output_mlp(
    attention: ScaledArray,
    residual: Float[Array, "*rows D"],
    o_proj: QuantizedTensor,
    norm: Float[Array, " D"],
    gate_up: QuantizedTensor,
    down: QuantizedTensor,
    eps: float,
    barrier: Int[Array, "1"],
) -> SplitSum:
    """From a layer's attention to its output.

    Args:
        attention: FP8 rows with per-token scales.
        residual: bfloat16, the layer's input.
        o_proj: [D, K].
        norm: weight of the norm after attention, float32.
        gate_up: [2 I, D], interleaved (``layouts.interleave_gate_up``).
        down: [D, I].
        eps: of the norm.
        barrier: from ``norm_matmul``. The kernel uses it up: a barrier serves one call.

    Returns:
        The layer's output in parts, the stream after attention being its residual.
    """
    return launch.output_mlp(attention, residual, o_proj, norm, gate_up, down, barrier, eps=eps)
