"""Launching a chain: from a decoder layer's arrays to the kernel's operands, and from its results to partials."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, formats, layouts
from pallas_kernels.formats import ScaledArray
from pallas_kernels.matmul_epilogue import Activation
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.sm90.chain import kernel, schedule
from pallas_kernels.sm90.chain.schedule import Link, Source
from pallas_kernels.sm90.common import split_k
from pallas_kernels.sm90.common.hardware import NUM_SMS
from pallas_kernels.split_k import SplitKPartials

# Largest M for chains. Every block makes all rows of an input for itself; more rows are made faster once for all
# blocks, by kernels of their own.
MAX_ROWS = 4
# The inputs of each chain's links.
NORM_MATMUL: tuple[Source, ...] = ("norm",)
OUTPUT_MLP: tuple[Source, ...] = ("rows", "norm", "hidden")


def _links_of(
    weights: Sequence[QuantizedTensor], sources: Sequence[Source], activation: Activation
) -> tuple[Link, ...]:
    """The links that multiply by some 4-bit weights; gate and up are in the one before "hidden"."""
    links = []
    for weight, source, following in zip(weights, sources, (*sources[1:], None), strict=True):
        assert weight.format != "fp8"
        groups = layouts.TILE_K // weight.group_size
        gate = activation if following == "hidden" else "none"
        links.append(Link(*weight.shape, groups, source, gate, weight.format))
    return tuple(links)


def unsupported(rows: int, weights: Sequence[QuantizedTensor], sources: Sequence[Source]) -> str | None:
    """Why the kernel cannot run a chain for so many rows on this device, or None."""
    if not 1 <= rows <= MAX_ROWS:
        return f"there are {rows} rows, not 1 to {MAX_ROWS}"
    for weight in weights:
        if weight.format == "fp8":
            return "a weight is FP8"
        assert weight.group_scale is not None
        if weight.group_scale.dtype != formats.E4M3:
            return f"group scales are {weight.group_scale.dtype}, not {jnp.dtype(formats.E4M3)}"
        if layouts.padded_shape(*weight.shape) != weight.shape:
            return f"a weight has shape {weight.shape}, not whole tiles of {layouts.TILE_N} x {layouts.TILE_K}"
    return schedule.unsupported(_links_of(weights, sources, "silu_mul")) or _unsupported_device()


def _unsupported_device() -> str | None:
    """Whether all blocks can run at once."""
    device = dispatch.default_device()
    count = device.core_count if device.platform == "gpu" else NUM_SMS
    return None if count >= NUM_SMS else f"the device has {count} multiprocessors, not {NUM_SMS}"


# Jitted so that equal calls of a program share one lowering.
@functools.partial(jax.jit, static_argnames="eps")
def norm_matmul(
    x: Float[Array, "*rows D"] | SplitKPartials,
    norm: Float[Array, " D"],
    weight: QuantizedTensor,
    bias: Float[Array, " N"] | None,
    eps: float,
) -> tuple[SplitKPartials, Float[Array, "*rows D"], Int[Array, "1"]]:
    """RMSNorm, FP8 and a matmul.

    Args:
        x: bfloat16, or split-K partials with a bfloat16 residual.
        norm: the norm's weight, float32.
        weight: [N, D].
        bias: float32 or bfloat16, or None.
        eps: of the norm.

    Returns:
        The product, as split-K partials; x in bfloat16; and the state of a barrier for one call of ``output_mlp``.
    """
    shape = (*x.rows, x.n) if isinstance(x, SplitKPartials) else x.shape
    results = _run((weight,), NORM_MATMUL, {0: norm}, eps, _norm_source(x), math.prod(shape[:-1]))
    y = _partials_of(results, 0, weight, bias, None, shape[:-1])
    return y, results["x0"].reshape(shape) if isinstance(x, SplitKPartials) else x, results["state"]


@functools.partial(jax.jit, static_argnames=("eps", "activation"))
def output_mlp(
    attention: ScaledArray,
    residual: Float[Array, "*rows D"],
    weights: Sequence[QuantizedTensor],
    biases: Sequence[Array | None],
    norm: Float[Array, " D"],
    barrier: Int[Array, "1"],
    eps: float,
    activation: Activation,
) -> SplitKPartials:
    """From a layer's attention to its output.

    Args:
        attention: FP8 rows [*rows, K] with per-token scales.
        residual: bfloat16, the layer's input.
        weights: o_proj [D, K], gate_up [2 I, D], interleaved (``layouts.interleave_gate_up``), and down [D, I].
        biases: of these, float32 or bfloat16, or None.
        norm: weight of the norm after attention, float32.
        barrier: from ``norm_matmul``; good for one call.
        eps: of the norm.
        activation: of the gate.

    Returns:
        The layer's output, as split-K partials; their residual is the stream after attention.
    """
    rows, width = residual.shape[:-1], residual.shape[-1]
    m = math.prod(rows)
    assert attention.scale is not None
    source = {
        "x": attention.values.reshape(m, -1),
        "x_scale": attention.scale.reshape(m),
        "residual": residual.reshape(m, width),
        "state": barrier,
    }
    *inner, last = biases
    results = _run(weights, OUTPUT_MLP, {1: norm}, eps, source, m, activation, dict(enumerate(inner)))
    return _partials_of(results, 2, weights[2], last, results["x1"], rows)


def _run(
    weights: Sequence[QuantizedTensor],
    sources: Sequence[Source],
    norms: dict[int, Float[Array, " D"]],
    eps: float,
    source: dict[str, Array],
    m: int,
    activation: Activation = "none",
    biases: Mapping[int, Array | None] | None = None,
) -> dict[str, Array]:
    """Launch the kernel; results by the names of ``kernel.outputs``.

    Args:
        weights: of the chain.
        sources: the links' inputs.
        norms: norm weights by link.
        eps: of the norms.
        source: operands of the first link and the first norm, by the names of ``kernel.kernel``.
        m: tokens.
        activation: of the gate.
        biases: by link, but not of the last.
    """
    links = _links_of(weights, sources, activation)
    operands: dict[str, Any] = dict(source)
    for i, weight in enumerate(weights):
        assert weight.group_scale is not None
        words = lax.bitcast_convert_type(weight.values, jnp.int32)
        operands[f"words{i}"] = words.reshape(*words.shape[:2], 4, 256)
        operands[f"group_scale{i}"] = lax.bitcast_convert_type(weight.group_scale, jnp.uint8)
        operands[f"channel_scale{i}"] = weight.channel_scale
    operands |= {f"weight{i}": weight for i, weight in norms.items()}
    operands |= {f"bias{i}": bias for i, bias in (biases or {}).items() if bias is not None}
    names = kernel.outputs(links, m, has_parts="parts" in operands)
    results = kernel.kernel(links, m, eps, tuple(operands))(*operands.values())
    return dict(zip(names, results, strict=True))


def _norm_source(x: Float[Array, "*rows D"] | SplitKPartials) -> dict[str, Array]:
    """Operands of a norm at the chain's start."""
    if not isinstance(x, SplitKPartials):
        return {"residual": x.reshape(-1, x.shape[-1])}
    assert x.residual is not None
    parts = split_k.operands(x)
    return {
        "residual": x.residual.reshape(-1, x.n),
        "parts": parts.pop("parts"),
        **{f"parts_{name}": operand for name, operand in parts.items()},
    }


def _partials_of(
    results: dict[str, Array],
    i: int,
    weight: QuantizedTensor,
    bias: Array | None,
    residual: Array | None,
    rows: tuple[int, ...],
) -> SplitKPartials:
    """The output of link i, plus ``bias`` and ``residual``."""
    parts, x_scale = results[f"parts{i}"], results[f"scale{i}"]
    return SplitKPartials(parts, weight.channel_scale, x_scale, bias, residual, rows, weight.shape[0], "none")
