"""From a decoder layer's arrays to the chain kernel's operands, and from its results to a ``SplitSum``."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import formats, layouts
from pallas_kernels.formats import ScaledArray
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.sm90 import split_sum
from pallas_kernels.sm90.chain import kernel, schedule
from pallas_kernels.sm90.chain.schedule import Link, Source
from pallas_kernels.sm90.hardware import NUM_SMS
from pallas_kernels.split_sum import SplitSum

MAX_ROWS = 4  # every block makes all rows of an input: more are faster made once, by kernels of their own


def link_of(weight: QuantizedTensor, source: Source, *, silu_mul: bool = False) -> Link:
    """The link that multiplies by a 4-bit weight."""
    assert weight.format != "fp8"
    n, k = weight.shape
    return Link(n, k, layouts.TILE_K // weight.group_size, source, silu_mul, weight.format)


def unsupported(rows: int, *weights: QuantizedTensor) -> str | None:
    """Why the kernel cannot run a layer's chains for so many rows on this device, or None.

    Args:
        rows: tokens.
        weights: qkv, o, gate_up and down.
    """
    if rows > MAX_ROWS:
        return f"there are {rows} rows, not {MAX_ROWS} or fewer"
    for weight in weights:
        if weight.format == "fp8":
            return "a weight is FP8"
        assert weight.group_scale is not None
        if weight.group_scale.dtype != formats.E4M3:
            return f"group scales are {weight.group_scale.dtype}, not {jnp.dtype(formats.E4M3)}"
        if layouts.padded_shape(*weight.shape) != weight.shape:
            return f"a weight has shape {weight.shape}, not whole tiles of {layouts.TILE_N} x {layouts.TILE_K}"
    head, tail = _links(*weights)
    return schedule.unsupported(head) or schedule.unsupported(tail) or _unsupported_device()


def _links(
    qkv: QuantizedTensor, o_proj: QuantizedTensor, gate_up: QuantizedTensor, down: QuantizedTensor
) -> tuple[tuple[Link, ...], tuple[Link, ...]]:
    """The chains before a layer's attention and after it."""
    return (link_of(qkv, "norm"),), _tail(o_proj, gate_up, down)


def _tail(o_proj: QuantizedTensor, gate_up: QuantizedTensor, down: QuantizedTensor) -> tuple[Link, ...]:
    return link_of(o_proj, "rows"), link_of(gate_up, "norm", silu_mul=True), link_of(down, "hidden")


@functools.cache
def _unsupported_device() -> str | None:
    """Whether all blocks can run at once."""
    device = jax.devices()[0]
    count = device.core_count if device.platform == "gpu" else NUM_SMS
    return None if count >= NUM_SMS else f"the device has {count} multiprocessors, not {NUM_SMS}"


def _run(
    links: tuple[Link, ...],
    linear: tuple[QuantizedTensor, ...],
    norms: dict[int, Float[Array, " D"]],
    eps: float,
    source: dict[str, Array],
    m: int,
) -> dict[str, Array]:
    """Launch the kernel; results by the names of ``kernel.outputs``.

    Args:
        links: of the chain.
        linear: their weights.
        norms: norm weights by link.
        eps: of the norms.
        source: what the first link and the first norm read, by the names of ``kernel.kernel``.
        m: tokens.
    """
    operands: dict[str, Any] = dict(source)
    for i, weight in enumerate(linear):
        assert weight.group_scale is not None
        words = lax.bitcast_convert_type(weight.values, jnp.int32)
        operands[f"words{i}"] = words.reshape(*words.shape[:2], 4, 256)
        operands[f"group_scale{i}"] = lax.bitcast_convert_type(weight.group_scale, jnp.uint8)
        operands[f"channel_scale{i}"] = weight.channel_scale
    operands |= {f"weight{i}": weight for i, weight in norms.items()}
    names = kernel.outputs(links, m, has_parts="parts" in operands)
    results = kernel.kernel(links, m, eps, tuple(operands))(*operands.values())
    return dict(zip(names, results, strict=True))


def _norm_source(x: Float[Array, "*rows D"] | SplitSum) -> dict[str, Array]:
    """What a norm at the chain's start reads."""
    if not isinstance(x, SplitSum):
        return {"residual": x.reshape(-1, x.shape[-1])}
    assert x.residual is not None
    parts = split_sum.operands(x)
    return {
        "residual": x.residual.reshape(-1, x.n),
        "parts": parts["parts"],
        "parts_channel_scale": parts["channel_scale"],
        "parts_x_scale": parts["x_scale"],
    }


def _left_in_parts(
    results: dict[str, Array], i: int, weight: QuantizedTensor, residual: Array | None, rows: tuple[int, ...]
) -> SplitSum:
    """The output of link i, plus ``residual``."""
    parts, x_scale = results[f"parts{i}"], results[f"scale{i}"]
    return SplitSum(parts, weight.channel_scale, x_scale, None, residual, rows, weight.shape[0], "none")


@functools.partial(jax.jit, static_argnames="eps")
def norm_matmul(
    x: Float[Array, "*rows D"] | SplitSum, norm: Float[Array, " D"], weight: QuantizedTensor, *, eps: float
) -> tuple[SplitSum, Float[Array, "*rows D"], Int[Array, "1"]]:
    """See ``matmul_chain.norm_matmul``."""
    rows = x.rows if isinstance(x, SplitSum) else x.shape[:-1]
    source = _norm_source(x)
    results = _run((link_of(weight, "norm"),), (weight,), {0: norm}, eps, source, source["residual"].shape[0])
    y = _left_in_parts(results, 0, weight, None, rows)
    return y, results["x0"].reshape(*rows, -1) if isinstance(x, SplitSum) else x, results["state"]


@functools.partial(jax.jit, static_argnames="eps")
def output_mlp(
    attention: ScaledArray,
    residual: Float[Array, "*rows D"],
    o_proj: QuantizedTensor,
    norm: Float[Array, " D"],
    gate_up: QuantizedTensor,
    down: QuantizedTensor,
    barrier: Int[Array, "1"],
    *,
    eps: float,
) -> SplitSum:
    """See ``matmul_chain.output_mlp``."""
    rows = residual.shape[:-1]
    assert attention.scale is not None
    source = {
        "x": attention.values.reshape(-1, o_proj.shape[1]),
        "x_scale": attention.scale.reshape(-1),
        "residual": residual.reshape(-1, residual.shape[-1]),
        "state": barrier,
    }
    results = _run(_tail(o_proj, gate_up, down), (o_proj, gate_up, down), {1: norm}, eps, source, source["x"].shape[0])
    return _left_in_parts(results, 2, down, results["x1"], rows)
