"""A warp's work: load a group of heads, norm, rotate, scale, quantize, store; ``registers`` has the arithmetic."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels import formats
from pallas_kernels.sm90.common import memory, split_k
from pallas_kernels.sm90.common.ptx import (
    SCALAR,
    absmax_scale,
    const,
    f32,
    i32,
    inlined,
    number,
    to_e4m3,
)
from pallas_kernels.sm90.common.reduction import inverse_rms
from pallas_kernels.sm90.rope_quantize import registers as emit
from pallas_kernels.sm90.rope_quantize.config import Problem

CACHE = ("key", "key_scale", "value", "value_scale")
PARAMETERS = ("post_rope_scale", "key_offset")  # one number a channel; either may be absent
NORM = "norm"  # likewise: "query_norm" or "key_norm", by what the row is


@dataclasses.dataclass(frozen=True)
class Token:
    """The token of a warp: where it is, and the lane's part of its cos and sin."""

    index: ir.Value  # among all sequences' tokens
    sequence: ir.Value
    slot: ir.Value  # in the cache
    stored: ir.Value  # i1: its keys and values are written
    cos: list[ir.Value]
    sin: list[ir.Value]
    query_factor: ir.Value | None


class Group(NamedTuple):
    """The heads of a group: which this lane's row is, and of what kind they are."""

    is_query: ir.Value  # i1, the same for all lanes of a warp
    is_key: ir.Value  # i1, likewise
    head: ir.Value  # among the queries, keys or values
    packed_head: ir.Value  # among all heads of a token
    kv_head: ir.Value  # the head's own, or the one that a query reads
    exists: ir.Value  # i1; a group may have more rows than there are heads


ByChannel = Callable[[str], emit.Row]  # the lane's part of one of PARAMETERS, or of NORM


def run(refs: dict[str, Any], block: Any, problem: Problem, groups: int, warps: int) -> None:
    """A thread block of ``warps`` warps; each takes up to ``groups`` groups of one token."""

    @inlined(arg_types=(SCALAR, *(plgpu.RefType() for _ in refs)))
    def inline(_: Any, block: Any, *values: ir.Value) -> None:
        warp = arith.addi(arith.muli(block.registers.item(), const(warps)), utils.warp_idx())
        _Warp(problem, dict(zip(refs, values, strict=True))).run(warp, groups)

    inline(block, *refs.values())


class _Warp:
    """Emits the code of one warp, which takes a token and up to ``groups`` of its groups of heads."""

    def __init__(self, problem: Problem, refs: dict[str, ir.Value]) -> None:
        self.problem, self.refs = problem, refs
        lane = arith.andi(utils.thread_idx(), const(31))
        self.row, self.part = arith.divui(lane, const(problem.lanes)), arith.remui(lane, const(problem.lanes))

    def run(self, warp: ir.Value, groups: int) -> None:
        problem = self.problem
        parts = pl.cdiv(problem.groups, groups)
        index = arith.divui(warp, const(parts))
        with emit.when(emit.less(index, const(problem.tokens))):
            first = arith.muli(arith.remui(warp, const(parts)), const(groups))
            group = self.group(first)
            words = self.load(index, group)
            if groups == 1:
                # All loads before anything that waits for one.
                names = [name for name in PARAMETERS if name in self.refs] + [NORM] * (problem.norm is not None)
                held = {name: self.by_channel(group, name) for name in names}
                self.process(self.token(index), group, emit.unpacked(words), held.__getitem__)
                return
            token = self.token(index)
            end = arith.minui(arith.addi(first, const(groups)), const(problem.groups))
            last = arith.subi(end, const(1))
            loop = scf.ForOp(first, end, const(1), words)
            with ir.InsertionPoint(loop.body):
                following = arith.minui(arith.addi(loop.induction_variable, const(1)), last)
                # Unpacked before the next words are loaded, which then take the same registers:
                # a move to others would wait for the load.
                row = emit.unpacked(loop.inner_iter_args)
                ahead = self.load(index, self.group(following))
                group = self.group(loop.induction_variable)
                self.process(token, group, row, functools.partial(self.by_channel, group))
                scf.yield_(ahead)

    def token(self, index: ir.Value) -> Token:
        problem = self.problem
        sequence = arith.divui(index, const(problem.length))
        offset = arith.remui(index, const(problem.length))
        start, length = (memory.load(self.address(name, sequence, 4), i32(), 1)[0] for name in ("start", "lengths"))
        slot = arith.addi(start, offset)
        # A negative slot is a large unsigned number.
        stored = arith.andi(
            arith.cmpi(arith.CmpIPredicate.slt, offset, length), emit.less(slot, const(problem.capacity))
        )
        cos, sin = (self.floats(name, index, problem.head_dim // 2, 0) for name in ("cos", "sin"))
        factor = None
        if "query_factor" in self.refs:
            [factor] = memory.load(self.address("query_factor", index, 4), f32(), 1)
        return Token(index, sequence, slot, stored, cos, sin, factor)

    def group(self, index: ir.Value) -> Group:
        problem = self.problem
        queries, keys = problem.query_groups, problem.query_groups + problem.kv_groups
        is_query, below_values = emit.less(index, const(queries)), emit.less(index, const(keys))
        before = arith.select(is_query, const(0), arith.select(below_values, const(queries), const(keys)))
        heads = arith.select(is_query, const(problem.heads), const(problem.kv_heads))
        head = arith.addi(arith.muli(arith.subi(index, before), const(problem.rows)), self.row)
        exists = emit.less(head, heads)
        head = arith.minui(head, arith.subi(heads, const(1)))
        first = arith.select(
            is_query,
            const(0),
            arith.select(below_values, const(problem.heads), const(problem.heads + problem.kv_heads)),
        )
        is_key = arith.andi(below_values, arith.xori(is_query, emit.true()))
        kv_head = arith.select(is_query, arith.divui(head, const(problem.heads // problem.kv_heads)), head)
        return Group(is_query, is_key, head, arith.addi(first, head), kv_head, exists)

    def address(self, name: str, row: ir.Value, row_bytes: int, lane_bytes: int = 0, offset: int = 0) -> ir.Value:
        """Where a lane's part of a row begins: byte ``offset`` + lane * ``lane_bytes``, as a 64-bit integer."""
        lane = arith.addi(arith.muli(self.part, const(lane_bytes)), const(offset))
        return arith.addi(memory.address(self.refs[name], row, row_bytes), memory.wide(lane))

    def load(self, token: ir.Value, group: Group) -> list[ir.Value]:
        """The lane's bf16 pairs: words of the first half, and of the second."""
        if "parts" in self.refs:
            return self.add_up(token, group)
        problem = self.problem
        heads, size = problem.heads + 2 * problem.kv_heads, 2 * problem.head_dim
        row = arith.addi(arith.muli(token, const(heads)), group.packed_head)
        return [
            word
            for offset in (0, size // 2)
            for word in memory.load(
                self.address("packed", row, size, 2 * problem.pairs, offset), i32(), problem.pairs // 2
            )
        ]

    def add_up(self, token: ir.Value, group: Group) -> list[ir.Value]:
        """The same, summed from parts."""
        halves = arith.muli(group.packed_head, const(2))
        places = [
            arith.addi(arith.muli(arith.addi(halves, const(half)), const(self.problem.lanes)), self.part)
            for half in (0, 1)
        ]
        sums = [split_k.reduce(self.refs, token, place, self.problem.pairs) for place in places]
        return [word for half in sums for word in memory.pack(half)]

    def floats(self, name: str, row: ir.Value, columns: int, first: int) -> list[ir.Value]:
        """The lane's pairs of the float32 columns from ``first`` on."""
        pairs = self.problem.pairs
        return memory.load_floats(self.address(name, row, 4 * columns, 4 * pairs, 4 * first), pairs)

    def by_channel(self, group: Group, name: str) -> emit.Row:
        """The lane's part of a [kv_heads, H] parameter, or of the norm's weight for the group's heads."""
        head_dim = self.problem.head_dim
        halves = (0, head_dim // 2)
        if name == NORM:
            return emit.Row(*(self.norm_weight(group, first) for first in halves))
        return emit.Row(*(self.floats(name, group.kv_head, head_dim, first) for first in halves))

    def norm_weight(self, group: Group, first: int) -> list[ir.Value]:
        """The lane's pairs from column ``first`` on; of values' heads, which have no norm, any."""
        pairs, row_bytes = self.problem.pairs, 4 * self.problem.head_dim
        query, key = (
            self.address(name, head, row_bytes, 4 * pairs, 4 * first)
            for name, head in (("query_norm", group.head), ("key_norm", group.kv_head))
        )
        return memory.load_floats(arith.select(group.is_query, query, key), pairs)

    def process(self, token: Token, group: Group, row: emit.Row, by_channel: ByChannel) -> None:
        pairs = self.problem.pairs

        def query() -> Sequence[ir.Value]:
            self.store_query(token, group, self.rotated_query(token, row, by_channel))
            return ()

        def key_or_value() -> Sequence[ir.Value]:
            with emit.when(token.stored):
                elements = emit.choose(
                    group.is_key,
                    lambda: self.rotated_key(token, row, by_channel).elements,
                    lambda: row.elements,
                    2 * pairs,
                )
                self.store_codes(token, group, emit.Row(elements[:pairs], elements[pairs:]))
            return ()

        emit.choose(group.is_query, query, key_or_value)

    def rotate(self, token: Token, row: emit.Row) -> emit.Row:
        """RoPE, with the multiplications fused that XLA fuses."""
        low, high = [], []
        for first, second, cos, sin in zip(*row, token.cos, token.sin, strict=True):
            low.append(emit.fma(first, cos, arith.negf(arith.mulf(second, sin))))
            high.append(emit.fma(second, cos, arith.mulf(first, sin)))
        return emit.Row(low, high)

    def normalize(self, row: emit.Row, by_channel: ByChannel) -> emit.Row:
        problem, norm = self.problem, self.problem.norm
        assert norm is not None
        inverse = inverse_rms(emit.sum_of_squares(row, problem.lanes), norm.width, norm.eps)
        return row.map(lambda x, weight: arith.mulf(arith.mulf(x, inverse), weight), by_channel(NORM))

    def turn(self, token: Token, row: emit.Row, by_channel: ByChannel) -> emit.Row:
        """RoPE, with the norm before or behind it."""
        norm = self.problem.norm
        if norm is None:
            return self.rotate(token, row)
        if norm.after_rope:
            return self.normalize(self.rotate(token, row), by_channel)
        return self.rotate(token, self.normalize(row, by_channel))

    def rotated_query(self, token: Token, row: emit.Row, by_channel: ByChannel) -> emit.Row:
        row = self.turn(token, row, by_channel)
        if "post_rope_scale" not in self.refs:
            return row
        return row.map(arith.mulf, emit.reciprocals(by_channel("post_rope_scale")))

    def rotated_key(self, token: Token, row: emit.Row, by_channel: ByChannel) -> emit.Row:
        row = self.turn(token, row, by_channel)
        scale = by_channel("post_rope_scale") if "post_rope_scale" in self.refs else None
        offset = by_channel("key_offset").map(arith.negf) if "key_offset" in self.refs else None
        if scale is not None and offset is not None:
            return row.map(emit.fma, scale, offset)
        if scale is not None:
            return row.map(arith.mulf, scale)
        return row if offset is None else row.map(arith.addf, offset)

    def store_query(self, token: Token, group: Group, row: emit.Row) -> None:
        problem = self.problem
        scale = absmax_scale(emit.finite_absmax(row, problem.lanes), number(1.0 / formats.E4M3_MAX))
        row = emit.quotients(row, scale)
        index = arith.addi(arith.muli(token.index, const(problem.heads)), group.head)
        for offset, half in zip((0, problem.head_dim // 2), row, strict=True):
            words = [to_e4m3(half[i : i + 4]) for i in range(0, problem.pairs, 4)]
            emit.store(self.address("query", index, problem.head_dim, problem.pairs, offset), words, group.exists)
        if token.query_factor is not None:
            scale = arith.mulf(scale, token.query_factor)
        self.store_scale("query_scale", index, 4, arith.bitcast(i32(), scale), group)

    def store_codes(self, token: Token, group: Group, row: emit.Row) -> None:
        problem = self.problem
        key_factor, value_factor = (
            number(float(np.float32(clip) * np.float32(1.0 / formats.INT4_MAX)))
            for clip in (problem.key_clip, problem.value_clip)
        )
        factor = arith.select(group.is_key, key_factor, value_factor)
        rounded = emit.to_bf16(absmax_scale(emit.finite_absmax(row, problem.lanes), factor))
        scale = emit.from_bf16(rounded)
        row = emit.quotients(row, scale)
        if problem.unbiased_keys:
            [scale] = emit.choose(
                group.is_key,
                lambda: [arith.mulf(scale, emit.energy_over_kept(row, problem.lanes))],
                lambda: [scale],
                1,
            )
            rounded = emit.to_bf16(scale)
        words = [emit.to_int4(row.low[i : i + 4], row.high[i : i + 4]) for i in range(0, problem.pairs, 4)]
        sequence = arith.addi(arith.muli(token.sequence, const(problem.kv_heads)), group.head)
        capacity = arith.constant(ir.IntegerType.get_signless(64), problem.capacity)
        index = arith.addi(arith.muli(memory.wide(sequence), capacity), memory.wide(token.slot))
        # Two stores for whichever of the two arrays it is, so that the rest is not written twice.
        is_value = arith.xori(group.is_key, emit.true())
        for name, wanted in (("key", group.is_key), ("value", is_value)):
            this = group._replace(exists=arith.andi(group.exists, wanted))
            emit.store(self.address(name, index, problem.head_dim // 2, problem.pairs), words, this.exists)
            self.store_scale(f"{name}_scale", index, 2, rounded, this)

    def store_scale(self, name: str, row: ir.Value, size: int, word: ir.Value, group: Group) -> None:
        first = arith.cmpi(arith.CmpIPredicate.eq, self.part, const(0))
        emit.store(self.address(name, row, size), [word], arith.andi(group.exists, first), bits=8 * size)
