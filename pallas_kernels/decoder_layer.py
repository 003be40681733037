"""What a decoder layer does before attention, and what after it: an op each.

    before_attention:  q, k, v = norm(x) W_qkv^T
    after_attention:   x = x + attention W_o^T
                       x = x + (activation(g) * u) W_down^T   with   g, u = norm(x) W_gate_up^T

Biases are optional, and so is each of four norms (``LayerWeights``): before attention and the MLP (Llama), after
them (OLMo 2), or both (Gemma 2). Cohere's block is parallel: both branches begin with the same norm(x).

How many kernels do it is decided here. By default matmuls, norms and quantization are ops of their own
(``matmul``, ``row_quantize``), each of which may reduce the split-K partials of the one before. One to four tokens on
Hopper take two kernels (``sm90.chain``): with so few, a matmul waits for nothing but its weights, and inside one
kernel the next matmul's are copied meanwhile. The numbers are the same but for the order of sums.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch, layouts
from pallas_kernels.formats import ScaledArray
from pallas_kernels.matmul_epilogue import Activation
from pallas_kernels.norm import Norm
from pallas_kernels.projection import Projection, project
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.residual_stream import ResidualStream
from pallas_kernels.row_quantize import post_norm_quantize, quantize_rows, sum_norm_quantize
from pallas_kernels.sm90.chain import launch
from pallas_kernels.sm90.common import split_k
from pallas_kernels.split_k import SplitKPartials, reduced

Tap = Callable[[str, Array], None]
logger = logging.getLogger(__name__)
MLP = Callable[[Array, Array], Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "qkv",
        "o_proj",
        "gate_up",
        "down",
        "input_norm",
        "attention_output_norm",
        "mlp_norm",
        "mlp_output_norm",
    ),
    meta_fields=("activation", "parallel"),
)
@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """A decoder layer but for attention itself. D is the hidden and I the intermediate size.

    Attributes:
        qkv: [N, D], queries, keys and values of all heads.
        o_proj: [D, K].
        gate_up: [2 I', D], interleaved (``layouts.interleave_gate_up``), or None of an MLP that the caller computes.
        down: [D, I], or None likewise.
        input_norm: of attention's input [D], or None.
        attention_output_norm: of o_proj's output [D], or None.
        mlp_norm: of the MLP's input [D], or None.
        mlp_output_norm: of down's output [D], or None.
        activation: of the gate.
        parallel: whether the MLP begins with ``input_norm``'s rows too, and has no norm of its own.
    """

    qkv: Projection
    o_proj: Projection
    gate_up: Projection | None = None
    down: Projection | None = None
    input_norm: Norm | None = None
    attention_output_norm: Norm | None = None
    mlp_norm: Norm | None = None
    mlp_output_norm: Norm | None = None
    activation: Activation = "silu_mul"
    parallel: bool = False


def before_attention(
    x: ResidualStream,
    weights: LayerWeights,
    *,
    decoding: bool = True,
    implementation: dispatch.Implementation = "auto",
    tap: Tap | None = None,
) -> tuple[Float[Array, "*rows N"] | SplitKPartials, ResidualStream]:
    """Queries, keys and values of a layer's input.

    Args:
        x: [*rows, D].
        weights: of the layer.
        decoding: whether the tokens continue sequences. Only then may a few rows take the two kernels of a chain.
        implementation: of all kernels that it takes, see ``dispatch``. Where the chain's cannot run, those of the
            single ops do.
        tap: called with "qkv_input" and what ``weights.qkv`` multiplies, unless that exists only in FP8. Changes
            nothing else.

    Returns:
        The product in x's dtype, perhaps as split-K partials; and x, for one call of ``after_attention``.

    Raises:
        ValueError: if the widths do not fit together.
        NotImplementedError: if ``implementation`` names a kernel that cannot run this.
    """
    _validate(x, weights)
    why_not = unsupported(x, weights) if decoding else None
    if why_not is not None and implementation == "auto" and dispatch.compute_capability() == (9, 0):
        _log_single_ops(why_not)
    if decoding and why_not is None and dispatch.resolve("decoder_layer", implementation, None) == "mosaic_gpu":
        assert weights.input_norm is not None
        norm, (qkv,) = weights.input_norm, _quantized(weights.qkv)
        packed, value, barrier = launch.norm_matmul(x.value, norm.weight, qkv, weights.qkv.bias, norm.eps)
        return packed, ResidualStream(value, barrier=barrier)
    # Rows that the MLP begins with as well are in FP8 only if both take that.
    shared = weights.parallel and not (weights.gate_up is not None and weights.gate_up.takes_fp8)
    reader = None if shared else weights.qkv
    rows, value = _rows_for(reader, x, weights.input_norm, implementation, "qkv_input", tap)
    packed = project(rows, weights.qkv, out_dtype=x.dtype, implementation=implementation)
    return packed, ResidualStream(value, normalized=rows if weights.parallel else None)


def after_attention(
    attention: ScaledArray | Float[Array, "*rows K"],
    x: ResidualStream,
    weights: LayerWeights,
    mlp: MLP | None = None,
    *,
    implementation: dispatch.Implementation = "auto",
    tap: Tap | None = None,
) -> ResidualStream:
    """From a layer's attention to its output.

    Args:
        attention: what ``weights.o_proj`` multiplies: FP8 rows with per-token scales if it takes those, or floats.
        x: from ``before_attention``.
        weights: of the layer.
        mlp: computes x + its output from normalized float rows and x (a mixture of experts), in place of ``gate_up``
            and ``down``.
        implementation: as in ``before_attention``.
        tap: called with "gate_up_input", and with "down_input" [*rows, I], unless they exist only in FP8. Changes
            nothing else.

    Raises:
        ValueError: if the widths do not fit together.
        NotImplementedError: if ``implementation`` names a kernel that cannot run this.
    """
    _validate(x, weights)
    if x.barrier is None:
        return _after_attention(attention, x, weights, mlp, implementation, tap)
    assert weights.gate_up is not None
    assert weights.down is not None
    if tap is not None:
        # The chain has no values to show, so what the tap sees is computed once more beside it.
        _after_attention(attention, x, weights, mlp, "xla", tap)
    if not isinstance(attention, ScaledArray):
        attention = quantize_rows(attention, implementation=implementation)
    assert weights.mlp_norm is not None
    tail = weights.o_proj, weights.gate_up, weights.down
    biases = tuple(projection.bias for projection in tail)
    norm = weights.mlp_norm
    matrices = _quantized(*tail)
    return ResidualStream(
        launch.output_mlp(
            attention, reduced(x.value), matrices, biases, norm.weight, x.barrier, norm.eps, weights.activation
        )
    )


def unsupported(x: ResidualStream, weights: LayerWeights) -> str | None:
    """Why two kernels cannot do all of this layer's matmuls of these rows, or None."""
    rows = math.prod(x.shape[:-1])
    if not 1 <= rows <= launch.MAX_ROWS:
        return f"there are {rows} rows, not 1 to {launch.MAX_ROWS}"
    if x.dtype != jnp.bfloat16:
        return f"x has dtype {x.dtype}, not bfloat16"
    if weights.gate_up is None or weights.down is None:
        return "the MLP is not one of two matrices"
    before, after = weights.input_norm, weights.mlp_norm
    if before is None or after is None or not before.kind == after.kind == "rms":
        return "attention and the MLP do not both begin with an RMSNorm"
    if x.post_norm or weights.attention_output_norm or weights.mlp_output_norm:
        return "a branch has a norm after it"
    if isinstance(x.value, SplitKPartials) and (x.value.residual is None or split_k.unsupported(x.value)):
        return "x is split-K partials that no kernel reduces"
    projections = weights.qkv, weights.o_proj, weights.gate_up, weights.down
    if not all(projection.takes_fp8 for projection in projections):
        return "a projection does not multiply FP8 rows by a quantized weight"
    for projection in projections:
        if projection.bias is not None and projection.bias.dtype not in (jnp.float32, jnp.bfloat16):
            return f"a bias has dtype {projection.bias.dtype}, not float32 or bfloat16"
    qkv, *tail = _quantized(*projections)
    return launch.unsupported(rows, (qkv,), launch.NORM_MATMUL) or launch.unsupported(rows, tail, launch.OUTPUT_MLP)


@functools.cache
def _log_single_ops(reason: str) -> None:
    logger.info("decoder_layer: kernels for each op, not one for several: %s", reason)


def _after_attention(
    attention: ScaledArray | Array,
    x: ResidualStream,
    weights: LayerWeights,
    mlp: MLP | None,
    implementation: dispatch.Implementation,
    tap: Tap | None,
) -> ResidualStream:
    """``after_attention`` by an op for each step."""
    run = functools.partial(project, out_dtype=x.dtype, implementation=implementation)

    def add(rows: ScaledArray | Array, projection: Projection, residual: Array, norm: Norm | None) -> ResidualStream:
        if norm is None:
            return ResidualStream(run(rows, projection, residual=residual))
        return ResidualStream(run(rows, projection), residual, norm)

    stream = add(attention, weights.o_proj, reduced(x.value), weights.attention_output_norm)
    if weights.parallel:
        assert x.normalized is not None
        rows, residual = x.normalized, stream.finish()
        if tap is not None and not isinstance(rows, ScaledArray):
            tap("gate_up_input", rows)
    else:
        rows, residual = _rows_for(weights.gate_up, stream, weights.mlp_norm, implementation, "gate_up_input", tap)
    if weights.gate_up is None or weights.down is None:
        assert mlp is not None
        assert not isinstance(rows, ScaledArray)
        return ResidualStream(mlp(rows, residual))
    hidden = reduced(run(rows, weights.gate_up, activation=weights.activation))[..., : weights.down.weight.shape[1]]
    if tap is not None:
        tap("down_input", hidden)
    return add(hidden, weights.down, residual, weights.mlp_output_norm)


def _rows_for(
    projection: Projection | None,
    x: ResidualStream,
    norm: Norm | None,
    implementation: dispatch.Implementation,
    name: str,
    tap: Tap | None,
) -> tuple[ScaledArray | Array, Array]:
    """Normalized rows as ``projection`` takes them, floats without one, and x; ``tap`` sees floats under ``name``."""
    takes_fp8 = projection is not None and projection.takes_fp8
    if takes_fp8 and (norm is None or norm.kind == "rms"):
        post = x.post_norm
        if post is not None and (norm is None or norm.eps == post.eps):
            assert x.residual is not None
            weight = None if norm is None else norm.weight
            return post_norm_quantize(x.value, post.weight, x.residual, weight, post.eps, implementation=implementation)
        if post is None and norm is not None and isinstance(x.value, SplitKPartials):
            return sum_norm_quantize(x.value, norm.weight, norm.eps, implementation=implementation)
    whole = x.finish()
    if takes_fp8:
        quantize = quantize_rows if norm is None else norm.quantized
        return quantize(whole, implementation=implementation), whole
    normalized = whole if norm is None else norm(whole)
    if tap is not None:
        tap(name, normalized)
    return normalized, whole


def _quantized(*projections: Projection) -> tuple[QuantizedTensor, ...]:
    """The weights of projections that take FP8."""
    weights = tuple(projection.weight for projection in projections)
    assert all(isinstance(weight, QuantizedTensor) for weight in weights)
    return weights  # pyright: ignore[reportReturnType]


def _validate(x: ResidualStream, weights: LayerWeights) -> None:
    width = x.shape[-1]
    expected = {"qkv": (weights.qkv.weight.shape[0], width), "o_proj": (width, weights.o_proj.weight.shape[1])}
    if (weights.gate_up is None) != (weights.down is None):
        raise ValueError("one of gate_up and down is None; expected both or neither")
    if weights.down is not None:
        inner = weights.down.weight.shape[1]
        expected |= {"gate_up": (layouts.interleaved_rows(inner), width), "down": (width, inner)}
    for name, shape in expected.items():
        found = getattr(weights, name).weight.shape
        if found != shape:
            raise ValueError(f"{name} has shape {found}; expected {shape} for x {x.shape}")
    for name in ("input_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm"):
        norm = getattr(weights, name)
        if norm is not None and norm.weight.shape != (width,):
            raise ValueError(f"{name} has shape {norm.weight.shape}; expected {(width,)}")
    for norm in (weights.attention_output_norm, weights.mlp_output_norm):
        if norm is not None and norm.kind != "rms":
            raise ValueError(f"a norm after a branch is of kind {norm.kind!r}; expected 'rms'")
    if weights.activation == "none":
        raise ValueError("activation is 'none'; expected that of a gate")
    if weights.parallel and weights.mlp_norm is not None:
        raise ValueError("the block is parallel and has an mlp_norm; expected none")
