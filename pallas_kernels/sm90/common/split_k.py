"""Reducing split-K partials in the kernel that reads them (``pallas_kernels.split_k``)."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxtyping import Array

from pallas_kernels.matmul_epilogue import Activation
from pallas_kernels.sm90.common.memory import address, load, load_floats, offset, pack, unpack
from pallas_kernels.sm90.common.ptx import f32, i32
from pallas_kernels.split_k import SplitKPartials

EIGHT = 8  # channels that a thread reduces at once


def can_reduce(x_scale: Array | None, activation: Activation) -> bool:
    """Whether the kernels that reduce partials can apply such an epilogue."""
    return x_scale is not None and activation == "none"


def unsupported(y: SplitKPartials) -> str | None:
    """Why a kernel cannot reduce these, or None."""
    if not can_reduce(y.x_scale, y.activation):
        return "the partials are not of FP8 rows, or have an activation"
    if y.bias is not None and y.bias.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the bias has dtype {y.bias.dtype}, not float32 or bfloat16"
    return None


def operands(y: SplitKPartials) -> dict[str, Array]:
    """What :func:`reduce` reads: float32 parts [P, M, N], channel_scale [N], x_scale [M] and maybe a bias [n]."""
    assert y.x_scale is not None
    bias = {} if y.bias is None else {"bias": y.bias}
    return {"parts": y.parts, "channel_scale": y.channel_scale, "x_scale": y.x_scale, **bias}


def reduce(refs: Mapping[str, ir.Value], row: ir.Value, index: ir.Value, count: int) -> list[ir.Value]:
    """The ``index``-th ``count`` (four or eight) of a row's sums, times both scales and plus the bias, in float32.

    Each step is rounded as in ``SplitKPartials.reduce``. All loads come before the first sum.
    """
    return _load_partials(refs, row, index, count)()


def load_row(
    refs: Mapping[str, ir.Value], row: ir.Value, index: ir.Value, count: int = EIGHT, *, written: bool = False
) -> Callable[[], list[ir.Value]]:
    """Load the ``index``-th ``count`` of a row's bf16 residual, and of its partials where there are ``parts``.

    Returns:
        A function that emits the rest: the sums plus the residual, as words of two bf16. Loads that come before it
        overlap with these.

    ``written``: whether this kernel itself writes what is read, so that the loads must be coherent.
    """
    _, width = ir.MemRefType(refs["residual"].type).shape
    start = offset(address(refs["residual"], row, 2 * width), index, 2 * count)
    words = load(start, i32(), count // 2, written=written)
    if "parts" not in refs:
        return lambda: words
    sums = _load_partials(refs, row, index, count, written=written)
    return lambda: pack([arith.addf(*pair) for pair in zip(sums(), unpack(words), strict=True)])


def _load_partials(
    refs: Mapping[str, ir.Value], row: ir.Value, index: ir.Value, count: int, *, written: bool = False
) -> Callable[[], list[ir.Value]]:
    """The loads of ``reduce``; what is returned emits the arithmetic."""
    parts, rows, columns = ir.MemRefType(refs["parts"].type).shape
    first = offset(address(refs["parts"], row, 4 * columns), index, 4 * count)
    loaded = [load_floats(first, count, 4 * rows * columns * part, written=written) for part in range(parts)]
    channel_scale = load_floats(offset(address(refs["channel_scale"]), index, 4 * count), count)
    (x_scale,) = load(address(refs["x_scale"], row, 4), f32(), 1, written=written)
    bias = _load_bias(refs["bias"], index, count) if "bias" in refs else None

    def scaled_sums() -> list[ir.Value]:
        sums: list[ir.Value] = loaded[0]
        for more in loaded[1:]:
            sums = [arith.addf(*pair) for pair in zip(sums, more, strict=True)]
        sums = [arith.mulf(arith.mulf(*pair), x_scale) for pair in zip(sums, channel_scale, strict=True)]
        if bias is not None:
            sums = [arith.addf(*pair) for pair in zip(sums, bias(), strict=True)]
        return sums

    return scaled_sums


def _load_bias(bias: ir.Value, index: ir.Value, count: int) -> Callable[[], list[ir.Value]]:
    """Load the ``index``-th ``count`` numbers of a float32 or bf16 ``bias``; what is returned converts them."""
    size = utils.bitwidth(ir.MemRefType(bias.type).element_type) // 8
    start = offset(address(bias), index, size * count)
    if size == 4:
        numbers: list[ir.Value] = load_floats(start, count)
        return lambda: numbers
    words = load(start, i32(), count // 2)
    return lambda: unpack(words)
