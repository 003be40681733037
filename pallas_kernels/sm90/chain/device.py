"""Pieces of the chain's device code: the weights' ring, outputs of whole tiles, barriers of a block and of the grid."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels import layouts
from pallas_kernels.matmul_epilogue import Activation
from pallas_kernels.sm90.chain.schedule import AHEAD, CHUNK, THREADS, TILE_BYTES, TILE_M, WARPGROUPS, Link
from pallas_kernels.sm90.common import sync
from pallas_kernels.sm90.common.memory import address, offset, store, wide
from pallas_kernels.sm90.common.ptx import (
    SCALAR,
    WARPGROUP,
    asm,
    const,
    element,
    f32,
    fragment_position,
    i32,
    inlined,
    raw_array,
    shared_address,
    thread,
    to_float,
)
from pallas_kernels.sm90.matmul import epilogue

_SUM = plgpu.Layout.WG_STRIDED((layouts.TILE_N * TILE_M,), vec_size=1)


class Ring(NamedTuple):
    """Chunks of weights in shared memory, ``AHEAD`` for each warpgroup."""

    words: Any  # int32 [WARPGROUPS, AHEAD, CHUNK, 4, 256]
    scales: Any  # uint8 [WARPGROUPS, AHEAD, groups of a chunk, 64]
    full: Any  # raw mbarriers [WARPGROUPS * AHEAD, 2]
    free: Any  # the same


def feed(links: tuple[Link, ...], words: Sequence[Any], scales: Sequence[Any], ring: Ring, block: jax.Array) -> None:
    """Copy the weights of all links into the ring, by one warp for each computing warpgroup.

    Where ``waits_for_input`` says so, a link's are not copied before its input's loads have been started
    (``emit_loads_started``).

    Args:
        links: of the chain.
        words: of each link, int32 [tiles_n, tiles_k, 4, 256] in GMEM.
        scales: of each link, uint8 [G, N] in GMEM.
        ring: where they go.
        block: this thread block.
    """
    count = len(links)

    @inlined(arg_types=(*([plgpu.RefType()] * (2 * count + len(ring))), SCALAR))
    def inline(_: Any, *arguments: Any) -> None:
        *memory, block = arguments
        words, scales, ring = memory[:count], memory[count : 2 * count], Ring(*memory[2 * count :])
        wg, lane = arith.shrui(thread(), const(5)), arith.andi(thread(), const(31))
        q = const(0)
        for link, source, group_scale in zip(links, words, scales, strict=True):
            if link.waits_for_input:
                emit_loads_started()
            q = _feed_link(link, source, group_scale, ring, block.registers.item(), wg, lane, q)

    inline(*words, *scales, *ring, block)


def _feed_link(
    link: Link,
    words: ir.Value,
    group_scale: ir.Value,
    ring: Ring,
    block: ir.Value,
    wg: ir.Value,
    lane: ir.Value,
    q: ir.Value,
) -> ir.Value:
    """A warpgroup's chunks of a link, of which the first is its ``q``-th; the number of the next."""
    first = arith.minui(arith.muli(block, const(link.per_block)), const(link.total))
    end = arith.minui(arith.addi(first, const(link.per_block)), const(link.total))
    loop = scf.ForOp(arith.addi(first, wg), end, const(WARPGROUPS), [q])
    with ir.InsertionPoint(loop.body):
        index, (q,) = loop.induction_variable, loop.inner_iter_args
        slot = arith.addi(arith.muli(wg, const(AHEAD)), arith.remui(q, const(AHEAD)))
        turn = arith.andi(arith.divui(q, const(AHEAD)), const(1))
        sync.emit_wait(ring.free, slot, arith.xori(turn, const(1)))
        with utils.when(_equal(lane, const(0))):
            _copy_chunk(link, words, group_scale, ring, slot, index)
        scf.yield_([arith.addi(q, const(1))])
    return loop.result


def _copy_chunk(
    link: Link, words: ir.Value, group_scale: ir.Value, ring: Ring, slot: ir.Value, index: ir.Value
) -> None:
    """Start to copy a link's ``index``-th chunk to a slot of the ring."""
    barrier = arith.addi(shared_address(ring.full), arith.muli(slot, const(8)))
    to_words = arith.addi(shared_address(ring.words), arith.muli(slot, const(CHUNK * TILE_BYTES)))
    groups = ir.MemRefType(ring.scales.type).shape[2]
    to_scales = arith.addi(shared_address(ring.scales), arith.muli(slot, const(groups * layouts.TILE_N)))
    n_tile, chunk = arith.divui(index, const(link.chunks)), arith.remui(index, const(link.chunks))
    tile = arith.addi(arith.muli(n_tile, const(link.tiles_k)), arith.muli(chunk, const(CHUNK)))
    left = arith.subi(const(link.tiles_k), arith.muli(chunk, const(CHUNK)))
    size = arith.muli(arith.minui(left, const(CHUNK)), const(TILE_BYTES))
    count = CHUNK * link.groups
    asm(
        [],
        [barrier, arith.addi(size, const(count * layouts.TILE_N))],
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;",
        volatile=True,
    )
    _copy_bulk(to_words, offset(address(words), tile, TILE_BYTES), size, barrier)
    rows, columns = ir.MemRefType(group_scale.type).shape
    start = arith.addi(address(group_scale), wide(arith.muli(n_tile, const(layouts.TILE_N))))
    for i in range(count):
        # Beyond the last group its scales come again, to multiply zeros.
        group = arith.minui(arith.addi(arith.muli(chunk, const(count)), const(i)), const(rows - 1))
        target = arith.addi(to_scales, const(i * layouts.TILE_N))
        _copy_bulk(target, offset(start, group, columns), const(layouts.TILE_N), barrier)


def _copy_bulk(target: ir.Value, source: ir.Value, size: ir.Value, barrier: ir.Value) -> None:
    code = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    asm([], [target, source, size, barrier], code, volatile=True)


def take(ring: Ring, wg: jax.Array, slot: jax.Array, groups: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """A chunk that has arrived, in registers.

    Returns:
        For each of its tiles what ``weights.operand`` wants, and for each four of its ``groups`` what
        ``weights.build_tables`` wants.
    """
    eight = plgpu.Layout.WG_STRIDED((8 * WARPGROUP,), vec_size=1)
    two = plgpu.Layout.WG_STRIDED((2 * WARPGROUP,), vec_size=1)

    def words(t: int) -> jax.Array:
        @inlined(
            arg_types=(plgpu.RefType(), SCALAR),
            return_type=plgpu.ShapeDtypeStruct((8 * WARPGROUP,), jnp.int32, layout=eight),
        )
        def inline(_: Any, ring: ir.Value, slot: Any) -> mgpu.FragmentedArray:
            own = arith.addi(shared_address(ring), arith.muli(slot.registers.item(), const(CHUNK * TILE_BYTES)))
            own = arith.addi(own, arith.muli(thread(), const(16)))
            code = f"""ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$8 + {t * TILE_BYTES}];
                ld.shared.v4.b32 {{$4, $5, $6, $7}}, [$8 + {t * TILE_BYTES + 2048}];"""
            constraints = ",".join(["=&r"] * 8 + ["r"])
            return raw_array(asm([i32()] * 8, [own], code, constraints, volatile=True), eight)

        return inline(ring.words.at[wg], slot)

    def scales(first: int) -> jax.Array:
        @inlined(
            arg_types=(plgpu.RefType(), SCALAR),
            return_type=plgpu.ShapeDtypeStruct((2 * WARPGROUP,), jnp.int32, layout=two),
        )
        def inline(_: Any, ring: ir.Value, slot: Any) -> mgpu.FragmentedArray:
            stored = ir.MemRefType(ring.type).shape[1]
            row, lane4, _warp = fragment_position()
            group = arith.addi(arith.muli(slot.registers.item(), const(stored)), arith.addi(lane4, const(first)))
            own = arith.addi(shared_address(ring), arith.addi(arith.muli(group, const(layouts.TILE_N)), row))
            code = "ld.shared.u8 $0, [$2];\nld.shared.u8 $1, [$2 + 8];"
            return raw_array(asm([i32(), i32()], [own], code, "=&r,=&r,r", volatile=True), two)

        return inline(ring.scales.at[wg], slot)

    @inlined()
    def meet(_: Any) -> None:
        # One lane will say for all that the slot has been read.
        asm([], [], "bar.warp.sync 0xffffffff;", volatile=True)

    sets = [scales(first) for first in range(0, groups, 4)]
    packed = [words(t) for t in range(CHUNK)]
    meet()
    return packed, sets


def emit_loads_started() -> None:
    """The computing warpgroups have started an input's loads; the feeding one has nothing left to copy before it."""
    asm([], [], f"bar.sync 2, {THREADS + WARPGROUP};", volatile=True)


def barrier() -> None:
    """The threads of the computing warpgroups meet."""
    inlined()(lambda _: emit_barrier())()


def emit_barrier() -> None:
    """``barrier``, in device code."""
    asm([], [], f"bar.sync 1, {THREADS};", volatile=True)


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
    """activation(gate) * up of a whole tile to bf16 rows, and what it adds to their absmax.

    Args:
        total: raw float32 sums [64 * TILE_M].
        channels: ``channel_scale`` and maybe a ``bias`` of ``bias_bits`` (16 or 32) a number, from
            ``epilogue.load_rows``.
        bias_bits: 0 without one.
        tokens_ref: the rows' scales, float32 (as int32) [TILE_M] in SMEM.
        absmax_ref: bits of float32 (as int32) [TILE_M] in SMEM; only finite numbers count.
        hidden_ref: bf16 [M, N / 2] in GMEM.
        tile: which.
        activation: of the gate.
    """
    refs = tokens_ref, absmax_ref, hidden_ref
    rows = list(channels.values())
    arg_types = (_SUM, *([plgpu.Layout.WGMMA.reduce(1)] * len(rows)), *([plgpu.RefType()] * 3), SCALAR)

    @inlined(arg_types=arg_types)
    def inline(_: Any, total: Any, *arguments: Any) -> None:
        by_channel = dict(zip(channels, arguments, strict=False))
        tokens, absmax, hidden, tile = arguments[len(rows) :]
        m, n_out = ir.MemRefType(hidden.type).shape
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
            value = arith.mulf(epilogue.activated(gate, activation), up)
            (bits,) = asm(
                [i32()],
                [value],
                "{\n.reg .b16 h;\ncvt.rn.bf16.f32 h, $1;\nmov.b32 $0, {h, h};\n}",
                volatile=False,
            )
            token = arith.addi(arith.muli(lane4, const(2)), const(i))
            inside = arith.cmpi(arith.CmpIPredicate.ult, token, const(m))
            with utils.when(inside):
                place = offset(address(hidden), arith.addi(arith.muli(token, const(n_out)), column), 2)
                code = "{\n.reg .b16 h, g;\nmov.b32 {h, g}, $1;\nst.global.b16 [$0], h;\n}"
                asm([], [place, bits], code, volatile=True)
            magnitude = arith.shli(arith.andi(bits, const(0x7FFF)), const(16))
            finite = arith.cmpi(arith.CmpIPredicate.ult, magnitude, const(0x7F800000))
            magnitude = arith.select(finite, magnitude, const(0))
            for distance in (4, 8, 16):
                magnitude = arith.maxui(magnitude, utils.shfl_bfly(magnitude, distance))
            with utils.when(arith.cmpi(arith.CmpIPredicate.ult, lane, const(4))):
                place = arith.addi(shared_address(absmax), arith.muli(token, const(4)))
                asm([], [place, magnitude], "red.shared.max.u32 [$0], $1;", volatile=True)

    inline(total, *rows, *refs, tile)


def store_zeros(parts_ref: Any, part: jax.Array, tile: jax.Array) -> None:
    """Zeros for a tile in part ``part`` of float32 [parts, M, N] in GMEM, by one warpgroup."""

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


def clear(absmax_ref: Any) -> None:
    """Zeros to int32 [TILE_M] in SMEM."""

    @inlined(arg_types=(plgpu.RefType(),))
    def inline(_: Any, absmax: ir.Value) -> None:
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, utils.thread_idx(), const(TILE_M))):
            place = arith.addi(shared_address(absmax), arith.muli(utils.thread_idx(), const(4)))
            asm([], [place], "st.shared.b32 [$0], 0;", volatile=True)

    inline(absmax_ref)


def publish(absmax_ref: Any, blocks_ref: Any, block: jax.Array) -> None:
    """Once all threads have come here, write int32 [TILE_M] in SMEM to row ``block`` of [blocks, TILE_M] in GMEM."""

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


def init_state(state_ref: Any, block: jax.Array) -> None:
    """Make the state of ``grid_barrier`` for a later kernel."""

    @inlined(arg_types=(plgpu.RefType(), SCALAR))
    def inline(_: Any, state: ir.Value, block: Any) -> None:
        index = arith.addi(arith.muli(block.registers.item(), const(THREADS)), utils.thread_idx())
        with utils.when(arith.cmpi(arith.CmpIPredicate.eq, index, const(0))):
            asm([], [address(state)], "st.global.b32 [$0], 0;", volatile=True)

    inline(state_ref, block)


def grid_barrier(state_ref: Any, block: jax.Array, blocks: int, number: int) -> None:
    """All threads of all ``blocks`` blocks meet; writes to memory before it are seen after it.

    Blocks count in the low bits of ``state_ref`` (int32 [1] in GMEM, from ``init_state``). The first adds
    what makes them zero again and flips the highest, for which everybody waits. ``number`` counts a
    kernel's barriers from 0. All blocks must be running at once.
    """
    still_waiting = "lt" if number % 2 else "ge"

    @inlined(arg_types=(plgpu.RefType(), SCALAR))
    def inline(_: Any, state: ir.Value, block: Any) -> None:
        emit_barrier()
        first = arith.cmpi(arith.CmpIPredicate.eq, block.registers.item(), const(0))
        arrival = arith.select(first, const((1 << 31) - (blocks - 1)), const(1))
        asm(
            [],
            [address(state), arrival, utils.thread_idx()],
            f"""{{
            .reg .pred p;
            .reg .b32 now;
            setp.ne.u32 p, $2, 0;
            @p bra done;
            red.release.gpu.global.add.u32 [$0], $1;
            wait:
            ld.acquire.gpu.global.u32 now, [$0];
            setp.{still_waiting}.s32 p, now, 0;
            @p bra wait;
            done:
            }}""",
            volatile=True,
        )
        emit_barrier()

    inline(state_ref, block)


def fence_operand() -> None:
    """Make what this thread has written to shared memory visible to WGMMA, then meet the block's threads."""

    @inlined()
    def inline(_: Any) -> None:
        asm([], [], "fence.proxy.async.shared::cta;", volatile=True)
        emit_barrier()

    inline()


def _equal(x: ir.Value, y: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, x, y)
