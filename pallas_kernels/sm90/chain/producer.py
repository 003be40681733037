"""The producer of the chain kernel: packed weights and group scales, copied into stages of shared memory.

Each of the producer's warps copies for one of the consumers, which has ``STAGES`` stages of its own.
"""

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
from pallas_kernels.sm90.chain.barriers import emit_loads_started
from pallas_kernels.sm90.chain.schedule import CHUNK, STAGES, TILE_BYTES, WARPGROUPS, Link
from pallas_kernels.sm90.common import sync
from pallas_kernels.sm90.common.memory import address, offset, wide
from pallas_kernels.sm90.common.ptx import (
    SCALAR,
    WARPGROUP,
    asm,
    const,
    fragment_position,
    i32,
    inlined,
    raw_array,
    shared_address,
    thread,
)


class Stages(NamedTuple):
    """Chunks of weights in shared memory, ``STAGES`` for each consumer."""

    words: Any  # int32 [WARPGROUPS, STAGES, CHUNK, 4, 256]
    scales: Any  # uint8 [WARPGROUPS, STAGES, groups of a chunk, 64]
    full: Any  # raw mbarriers [WARPGROUPS * STAGES, 2]: a chunk has been copied
    free: Any  # the same: a chunk has been read


def produce(
    links: tuple[Link, ...], words: Sequence[Any], scales: Sequence[Any], stages: Stages, block: jax.Array
) -> None:
    """Copy a block's weights of all links, as stages become free; one warp copies for each consumer.

    A link's weights are copied under the link before, but where ``waits_for_input`` says so only after the loads of
    its input (``emit_loads_started``).

    Args:
        links: of the chain.
        words: of each link, int32 [tiles_n, tiles_k, 4, 256] in GMEM.
        scales: of each link, uint8 [G, N] in GMEM.
        stages: where they are copied to.
        block: index of this thread block.
    """
    count = len(links)

    @inlined(arg_types=(*([plgpu.RefType()] * (2 * count + len(stages))), SCALAR))
    def inline(_: Any, *arguments: Any) -> None:
        *memory, block = arguments
        words, scales, stages = memory[:count], memory[count : 2 * count], Stages(*memory[2 * count :])
        wg, lane = arith.shrui(thread(), const(5)), arith.andi(thread(), const(31))
        q = const(0)
        for link, source, group_scale in zip(links, words, scales, strict=True):
            if link.waits_for_input:
                emit_loads_started()
            q = _produce_link(link, source, group_scale, stages, block.registers.item(), wg, lane, q)

    inline(*words, *scales, *stages, block)


def _produce_link(
    link: Link,
    words: ir.Value,
    group_scale: ir.Value,
    stages: Stages,
    block: ir.Value,
    wg: ir.Value,
    lane: ir.Value,
    q: ir.Value,
) -> ir.Value:
    """Copy a consumer's chunks of a link, the first of which is its ``q``-th of all; returns the next one's number."""
    first = arith.minui(arith.muli(block, const(link.per_block)), const(link.total))
    end = arith.minui(arith.addi(first, const(link.per_block)), const(link.total))
    loop = scf.ForOp(arith.addi(first, wg), end, const(WARPGROUPS), [q])
    with ir.InsertionPoint(loop.body):
        index, (q,) = loop.induction_variable, loop.inner_iter_args
        slot = arith.addi(arith.muli(wg, const(STAGES)), arith.remui(q, const(STAGES)))
        turn = arith.andi(arith.divui(q, const(STAGES)), const(1))
        sync.emit_wait(stages.free, slot, arith.xori(turn, const(1)))
        with utils.when(arith.cmpi(arith.CmpIPredicate.eq, lane, const(0))):
            _copy_chunk(link, words, group_scale, stages, slot, index)
        scf.yield_([arith.addi(q, const(1))])
    return loop.result


def _copy_chunk(
    link: Link, words: ir.Value, group_scale: ir.Value, stages: Stages, slot: ir.Value, index: ir.Value
) -> None:
    """Start to copy a link's ``index``-th chunk to a slot of the stages."""
    barrier = arith.addi(shared_address(stages.full), arith.muli(slot, const(8)))
    to_words = arith.addi(shared_address(stages.words), arith.muli(slot, const(CHUNK * TILE_BYTES)))
    groups = ir.MemRefType(stages.scales.type).shape[2]
    to_scales = arith.addi(shared_address(stages.scales), arith.muli(slot, const(groups * layouts.TILE_N)))
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
        # Past the last group its scales are copied again, to be multiplied by x's zeros.
        group = arith.minui(arith.addi(arith.muli(chunk, const(count)), const(i)), const(rows - 1))
        target = arith.addi(to_scales, const(i * layouts.TILE_N))
        _copy_bulk(target, offset(start, group, columns), const(layouts.TILE_N), barrier)


def _copy_bulk(target: ir.Value, source: ir.Value, size: ir.Value, barrier: ir.Value) -> None:
    code = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    asm([], [target, source, size, barrier], code, volatile=True)


def take(stages: Stages, wg: jax.Array, slot: jax.Array, groups: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """Read a chunk that has been copied into registers.

    Returns:
        For each of its tiles the words for ``weights.operand``, and for each four of its ``groups`` the scales for
        ``weights.build_tables``.
    """
    eight = plgpu.Layout.WG_STRIDED((8 * WARPGROUP,), vec_size=1)
    two = plgpu.Layout.WG_STRIDED((2 * WARPGROUP,), vec_size=1)

    def words(t: int) -> jax.Array:
        @inlined(
            arg_types=(plgpu.RefType(), SCALAR),
            return_type=plgpu.ShapeDtypeStruct((8 * WARPGROUP,), jnp.int32, layout=eight),
        )
        def inline(_: Any, ref: ir.Value, slot: Any) -> mgpu.FragmentedArray:
            own = arith.addi(shared_address(ref), arith.muli(slot.registers.item(), const(CHUNK * TILE_BYTES)))
            own = arith.addi(own, arith.muli(thread(), const(16)))
            code = f"""ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$8 + {t * TILE_BYTES}];
                ld.shared.v4.b32 {{$4, $5, $6, $7}}, [$8 + {t * TILE_BYTES + 2048}];"""
            constraints = ",".join(["=&r"] * 8 + ["r"])
            return raw_array(asm([i32()] * 8, [own], code, constraints, volatile=True), eight)

        return inline(stages.words.at[wg], slot)

    def scales(first: int) -> jax.Array:
        @inlined(
            arg_types=(plgpu.RefType(), SCALAR),
            return_type=plgpu.ShapeDtypeStruct((2 * WARPGROUP,), jnp.int32, layout=two),
        )
        def inline(_: Any, ref: ir.Value, slot: Any) -> mgpu.FragmentedArray:
            stored = ir.MemRefType(ref.type).shape[1]
            row, lane4, _warp = fragment_position()
            group = arith.addi(arith.muli(slot.registers.item(), const(stored)), arith.addi(lane4, const(first)))
            own = arith.addi(shared_address(ref), arith.addi(arith.muli(group, const(layouts.TILE_N)), row))
            code = "ld.shared.u8 $0, [$2];\nld.shared.u8 $1, [$2 + 8];"
            return raw_array(asm([i32(), i32()], [own], code, "=&r,=&r,r", volatile=True), two)

        return inline(stages.scales.at[wg], slot)

    @inlined()
    def sync_warp(_: Any) -> None:
        # One lane will arrive on the barrier for all of its warp.
        asm([], [], "bar.warp.sync 0xffffffff;", volatile=True)

    sets = [scales(first) for first in range(0, groups, 4)]
    packed = [words(t) for t in range(CHUNK)]
    sync_warp()
    return packed, sets
