"""Weights on their way into the L2 cache before the kernel may read them (``early_start``)."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.sm90 import memory
from pallas_kernels.sm90.inline import SCALAR, asm, const, i32, inlined, thread

TILES = 8  # packed tiles (4 KB) of each warpgroup: 17 MB on the whole device, what 4 us can bring
_TILE_BYTES = 4096


def prefetch_tiles(source_ref: Any, tile: jax.Array, count: jax.Array) -> None:
    """Ask for consecutive packed tiles to be brought into the L2 cache.

    Args:
        source_ref: int32, 1024 a tile, in GMEM.
        tile: the first.
        count: how many; none if it is not positive.
    """

    @inlined(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
    def inline(_: Any, source: ir.Value, tile: Any, count: Any) -> None:
        start = memory.offset(memory.address(source), tile.registers.item(), _TILE_BYTES)
        # By one thread; the others ask for nothing.
        first = arith.cmpi(arith.CmpIPredicate.eq, thread(), const(0))
        size = arith.muli(arith.select(first, count.registers.item(), const(0)), const(_TILE_BYTES))
        code = "{ .reg .pred p; setp.gt.s32 p, $1, 0; @p cp.async.bulk.prefetch.L2.global [$0], $1; }"
        asm([], [start, size], code, "l,r", volatile=True)

    inline(source_ref, tile, count)


def prefetch_group_scales(scale_ref: Any, group: jax.Array, count: int, channel: jax.Array) -> None:
    """The same for the scales of 64 channels from ``channel`` on: ``count`` groups, at most 128, from ``group`` on.

    Args:
        scale_ref: [G, N] in GMEM, of one or two bytes; groups past the end are left out.
        group: the first.
        count: how many.
        channel: the first.
    """

    @inlined(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
    def inline(_: Any, scales: ir.Value, group: Any, channel: Any) -> None:
        (groups, channels), size = ir.MemRefType(scales.type).shape, scale_ref.dtype.itemsize
        row = arith.addi(group.registers.item(), thread())
        start = memory.offset(memory.address(scales, row, channels * size), channel.registers.item(), size)
        within = arith.andi(
            arith.cmpi(arith.CmpIPredicate.ult, thread(), const(count)),
            arith.cmpi(arith.CmpIPredicate.ult, row, const(groups)),
        )
        code = "{ .reg .pred p; setp.ne.u32 p, $1, 0; @p prefetch.global.L2 [$0]; }"
        asm([], [start, arith.extui(i32(), within)], code, "l,r", volatile=True)

    inline(scale_ref, group, channel)
