"""The chain kernel's epilogue: what becomes of a tile's sums that is not left as split-K partials."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import layouts
from pallas_kernels.matmul_epilogue import Activation
from pallas_kernels.sm90.chain.barriers import emit_barrier
from pallas_kernels.sm90.chain.schedule import TILE_M
from pallas_kernels.sm90.common.memory import address, offset, store, wide
from pallas_kernels.sm90.common.ptx import (
    SCALAR,
    asm,
    const,
    element,
    f32,
    fragment_position,
    i32,
    inlined,
    shared_address,
    thread,
    to_float,
)
from pallas_kernels.sm90.matmul.epilogue import activated

_SUM = plgpu.Layout.WG_STRIDED((layouts.TILE_N * TILE_M,), vec_size=1)


def store_hidden(
    total: jax.Array,
    channels: dict[str, jax.Array],
    bias_bits: int,
    tokens_ref: Any,
    absmax_ref: Any,
    hidden_ref: Any,
    tile: jax.Array,
    activation: Activation,
) -> None:
    """Store activation(gate) * up of a tile as bf16 rows, and raise their absmax.

    Args:
        total: raw float32 sums [64 * TILE_M].
        channels: ``channel_scale`` and perhaps a ``bias``, from ``sm90.matmul.epilogue.load_rows``.
        bias_bits: of a number of the bias, 16 or 32; 0 without one.
        tokens_ref: the rows' scales, float32 (as int32) [TILE_M] in SMEM.
        absmax_ref: bits of float32 (as int32) [TILE_M] in SMEM; only finite numbers count.
        hidden_ref: bf16 [M, N / 2] in GMEM.
        tile: index among the tiles of 64 output channels.
        activation: of the gate.
    """
    refs = tokens_ref, absmax_ref, hidden_ref
    rows = list(channels.values())
    arg_types = (_SUM, *([plgpu.Layout.WGMMA.reduce(1)] * len(rows)), *([plgpu.RefType()] * 3), SCALAR)

    @inlined(arg_types=arg_types)
    def inline(_: Any, total: Any, *arguments: Any) -> None:
        by_channel = dict(zip(channels, arguments, strict=False))
        tokens, absmax, hidden, tile = arguments[len(rows) :]
        _position, lane4, warp = fragment_position()
        scales = [to_float(element(v, 0), 32) for v in by_channel["channel_scale"].registers.flat]
        biases = []
        if bias_bits:
            biases = [to_float(element(v, 0), bias_bits) for v in by_channel["bias"].registers.flat]
        sums = [element(v, 0) for v in total.registers]  # [r][token of two]
        own = arith.addi(shared_address(tokens), arith.muli(lane4, const(8)))
        by_token = asm([f32(), f32()], [own], "ld.shared.v2.f32 {$0, $1}, [$2];", volatile=True)
        lane = arith.andi(thread(), const(31))
        column = arith.addi(arith.muli(warp, const(8)), arith.shrui(lane, const(2)))
        column = arith.addi(arith.muli(tile.registers.item(), const(layouts.TILE_N // 2)), column)
        for i in range(2):
            products = [arith.mulf(arith.mulf(sums[2 * r + i], scales[r]), by_token[i]) for r in range(2)]
            gate, up = (arith.addf(*pair) for pair in zip(products, biases, strict=True)) if biases else products
            value = arith.mulf(activated(gate, activation), up)
            code = "{\n.reg .b16 h;\ncvt.rn.bf16.f32 h, $1;\nmov.b32 $0, {h, h};\n}"
            (bits,) = asm([i32()], [value], code, volatile=False)
            token = arith.addi(arith.muli(lane4, const(2)), const(i))
            _store_bf16(hidden, token, column, bits)
            _raise_absmax(absmax, token, lane, bits)

    inline(total, *rows, *refs, tile)


def _store_bf16(hidden: ir.Value, token: ir.Value, column: ir.Value, bits: ir.Value) -> None:
    """Store the bf16 in the low half of ``bits`` to hidden[token, column], if there is such a token."""
    m, n_out = ir.MemRefType(hidden.type).shape
    inside = arith.cmpi(arith.CmpIPredicate.ult, token, const(m))
    with utils.when(inside):
        place = offset(address(hidden), arith.addi(arith.muli(token, const(n_out)), column), 2)
        code = "{\n.reg .b16 h, g;\nmov.b32 {h, g}, $1;\nst.global.b16 [$0], h;\n}"
        asm([], [place, bits], code, volatile=True)


def _raise_absmax(absmax: ir.Value, token: ir.Value, lane: ir.Value, bits: ir.Value) -> None:
    """Raise a token's absmax to the magnitudes of its bf16 ``bits``, one in each of eight lanes; only finite ones."""
    magnitude = arith.shli(arith.andi(bits, const(0x7FFF)), const(16))
    finite = arith.cmpi(arith.CmpIPredicate.ult, magnitude, const(0x7F800000))
    magnitude = arith.select(finite, magnitude, const(0))
    for distance in (4, 8, 16):
        magnitude = arith.maxui(magnitude, utils.shfl_bfly(magnitude, distance))
    with utils.when(arith.cmpi(arith.CmpIPredicate.ult, lane, const(4))):
        place = arith.addi(shared_address(absmax), arith.muli(token, const(4)))
        asm([], [place, magnitude], "red.shared.max.u32 [$0], $1;", volatile=True)


def store_zeros(parts_ref: Any, part: jax.Array, tile: jax.Array) -> None:
    """Store zeros for a tile in part ``part`` of float32 [parts, M, N] in GMEM, by one warpgroup."""

    @inlined(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
    def inline(_: Any, parts: ir.Value, part: Any, tile: Any) -> None:
        _parts, m, n = ir.MemRefType(parts.type).shape
        channel = arith.addi(arith.muli(tile.registers.item(), const(layouts.TILE_N)), thread())
        start = arith.addi(arith.muli(part.registers.item(), const(m * n)), channel)
        place = offset(address(parts), start, 4)
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread(), const(layouts.TILE_N))):
            for token in range(m):
                asm([], [place], f"st.global.b32 [$0 + {4 * token * n}], 0;", volatile=True)

    inline(parts_ref, part, tile)


def clear_absmax(absmax_ref: Any) -> None:
    """Store zeros to int32 [TILE_M] in SMEM."""

    @inlined(arg_types=(plgpu.RefType(),))
    def inline(_: Any, absmax: ir.Value) -> None:
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, utils.thread_idx(), const(TILE_M))):
            place = arith.addi(shared_address(absmax), arith.muli(utils.thread_idx(), const(4)))
            asm([], [place], "st.shared.b32 [$0], 0;", volatile=True)

    inline(absmax_ref)


def publish_absmax(absmax_ref: Any, blocks_ref: Any, block: jax.Array) -> None:
    """Once all consumers are here, copy int32 [TILE_M] in SMEM to row ``block`` of [blocks, TILE_M] in GMEM."""

    @inlined(arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR))
    def inline(_: Any, absmax: ir.Value, blocks: ir.Value, block: Any) -> None:
        emit_barrier()
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, utils.thread_idx(), const(TILE_M))):
            own = arith.muli(utils.thread_idx(), const(4))
            place = arith.addi(shared_address(absmax), own)
            (bits,) = asm([i32()], [place], "ld.shared.b32 $0, [$1];", volatile=True)
            target = arith.addi(address(blocks, block.registers.item(), 4 * TILE_M), wide(own))
            store(target, [bits])

    inline(absmax_ref, blocks_ref, block)
