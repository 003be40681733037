"""Adding up, in a kernel that reads a row, what a matmul left in parts (``pallas_kernels.split_sum``)."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxtyping import Array

from pallas_kernels.matmul_epilogue import Activation
from pallas_kernels.sm90.common.memory import address, load, load_floats, offset, pack, unpack
from pallas_kernels.sm90.common.ptx import f32, i32
from pallas_kernels.split_sum import SplitSum

EIGHT = 8  # channels that a thread adds up at once


def adds_up(x_scale: Array | None, activation: Activation) -> bool:
    """Whether a kernel can add up the parts of a product with these."""
    return x_scale is not None and activation == "none"


def unsupported(total: SplitSum) -> str | None:
    """Why a kernel cannot add this up, or None."""
    if not adds_up(total.x_scale, total.activation):
        return "the sum is not of FP8 rows, or has an activation"
    if total.bias is not None and total.bias.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the bias has dtype {total.bias.dtype}, not float32 or bfloat16"
    return None


def operands(total: SplitSum) -> dict[str, Array]:
    """What :func:`add_up` reads: float32 parts [P, M, N], channel_scale [N], x_scale [M] and maybe a bias [n]."""
    assert total.x_scale is not None
    bias = {} if total.bias is None else {"bias": total.bias}
    return {"parts": total.parts, "channel_scale": total.channel_scale, "x_scale": total.x_scale, **bias}


def add_up(refs: Mapping[str, ir.Value], row: ir.Value, index: ir.Value, count: int) -> list[ir.Value]:
    """The ``index``-th ``count`` (four or eight) of a row's sums, times both scales and plus the bias, in float32.

    Each step is rounded as in ``SplitSum.finish``. All loads come before the first sum.
    """
    return _start_sums(refs, row, index, count)()


def start_row(
    refs: Mapping[str, ir.Value], row: ir.Value, index: ir.Value, count: int = EIGHT, *, written: bool = False
) -> Callable[[], list[ir.Value]]:
    """Start to load the ``index``-th ``count`` of a row's bf16 residual, and of its sums where there are ``parts``.

    The rest of it makes words of bf16 of their sum. ``written``: whether this kernel writes what is read.
    """
    _, width = ir.MemRefType(refs["residual"].type).shape
    start = offset(address(refs["residual"], row, 2 * width), index, 2 * count)
    words = load(start, i32(), count // 2, written=written)
    if "parts" not in refs:
        return lambda: words
    sums = _start_sums(refs, row, index, count, written=written)
    return lambda: pack([arith.addf(*pair) for pair in zip(sums(), unpack(words), strict=True)])


def _start_sums(
    refs: Mapping[str, ir.Value], row: ir.Value, index: ir.Value, count: int, *, written: bool = False
) -> Callable[[], list[ir.Value]]:
    """The loads of ``add_up``, and the rest of it."""
    parts, rows, columns = ir.MemRefType(refs["parts"].type).shape
    first = offset(address(refs["parts"], row, 4 * columns), index, 4 * count)
    loaded = [load_floats(first, count, 4 * rows * columns * part, written=written) for part in range(parts)]
    channel_scale = load_floats(offset(address(refs["channel_scale"]), index, 4 * count), count)
    (x_scale,) = load(address(refs["x_scale"], row, 4), f32(), 1, written=written)
    bias = _start_bias(refs["bias"], index, count) if "bias" in refs else None

    def finish() -> list[ir.Value]:
        sums: list[ir.Value] = loaded[0]
        for more in loaded[1:]:
            sums = [arith.addf(*pair) for pair in zip(sums, more, strict=True)]
        sums = [arith.mulf(arith.mulf(*pair), x_scale) for pair in zip(sums, channel_scale, strict=True)]
        if bias is not None:
            sums = [arith.addf(*pair) for pair in zip(sums, bias(), strict=True)]
        return sums

    return finish


def _start_bias(bias: ir.Value, index: ir.Value, count: int) -> Callable[[], list[ir.Value]]:
    """Load the ``index``-th ``count`` numbers of a float32 or bf16 ``bias``; what is returned awaits them."""
    size = utils.bitwidth(ir.MemRefType(bias.type).element_type) // 8
    start = offset(address(bias), index, size * count)
    if size == 4:
        numbers: list[ir.Value] = load_floats(start, count)
        return lambda: numbers
    words = load(start, i32(), count // 2)
    return lambda: unpack(words)
