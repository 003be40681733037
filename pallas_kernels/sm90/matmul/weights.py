"""From packed INT4 codes and group scales to WGMMA's A operand, in registers.

Four nibbles of a packed word select from the eight FP8 magnitudes of their group with one ``prmt``,
and one ``lop3`` puts their signs on; see ``layouts`` for the packing. FireQ (arXiv 2505.20839).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import formats, jax_compat, layouts
from pallas_kernels.sm90.common.ptx import (
    SCALAR,
    WARPGROUP,
    asm,
    clamped_index,
    const,
    fragment_position,
    i32,
    i64,
    inlined,
    load_at,
    load_word,
    raw_array,
    shared_address,
    thread,
)
from pallas_kernels.sm90.matmul.config import Problem, Values


def _unit_table(codebook: formats.Codebook) -> tuple[ir.Value, ir.Value]:
    """The codebook's magnitudes 0..3 and 4..7 as E4M3, one a byte: the table where scales multiply sums instead."""
    low, high = np.asarray(formats.CODEBOOKS[codebook], formats.E4M3).view("<u4")
    return const(int(low)), const(int(high))


def _table(sigma: ir.Value, codebook: formats.Codebook) -> tuple[ir.Value, ir.Value]:
    """fp8(c * sigma) for the codebook's magnitudes 0..3 and 4..7, one a byte, from an E4M3 sigma (in 32 bits).

    The products are exact in float16 (4 bits by 7, 2^-10 to 448), so each is rounded once.
    """
    halves = [int(bits) for bits in np.asarray(formats.CODEBOOKS[codebook], np.float16).view(np.uint16)]

    def products(first: int) -> str:
        return f"""
        mov.b32 c, 0x{halves[first + 1]:04X}{halves[first]:04X};
        mul.rn.f16x2 p, f, c;
        cvt.rn.satfinite.e4m3x2.f16x2 p{first}, p;"""

    # 0 and sigma itself, the products with magnitudes 0 and 1, need no multiplication.
    first = "shl.b16 p0, s, 8;" if formats.CODEBOOKS[codebook][:2] == (0.0, 1.0) else products(0)
    low, high = asm(
        [i32(), i32()],
        [sigma],
        f"""{{
        .reg .b16 s, p0, p2, p4, p6;
        .reg .b32 twice, f, c, p;
        mul.lo.u32 twice, $2, 257;
        cvt.u16.u32 s, twice;
        cvt.rn.f16x2.e4m3x2 f, s;{products(2)}{products(4)}{products(6)}
        {first}
        mov.b32 $0, {{p0, p2}};
        mov.b32 $1, {{p4, p6}};
        }}""",
        volatile=False,
    )
    return low, high


def _look_up(word: ir.Value, table: tuple[ir.Value, ir.Value]) -> list[ir.Value]:
    """The four E4M3 values of each half of a packed word (see ``layouts``)."""
    select = arith.andi(word, const(0x77777777))
    values = []
    for selector, signs in ((select, word), (arith.shrui(select, const(16)), arith.shli(word, const(4)))):
        code = "prmt.b32 $0, $1, $2, $3;"
        (magnitude,) = asm([i32()], [*table, selector], code, volatile=False)
        values.append(arith.ori(magnitude, arith.andi(signs, const(0x80808080))))
    return values


def _to_bf16(word: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Four E4M3 bytes as two pairs of bf16.

    A byte's exponent and mantissa, moved to where bf16 has them, are 2^-120 of its value (E4M3's
    subnormals become bf16's), so one exact product finishes the conversion.
    """
    pairs = []
    for selector in (0x1404, 0x3424):
        (spread,) = asm([i32()], [word, const(0)], f"prmt.b32 $0, $1, $2, {selector};", volatile=False)
        magnitude = arith.andi(arith.shrui(spread, const(4)), const(0x07F007F0))
        bits = arith.ori(magnitude, arith.andi(spread, const(0x80008000)))
        (pair,) = asm([i32()], [bits, const(0x7B807B80)], "mul.rn.bf16x2 $0, $1, $2;", volatile=False)
        pairs.append(pair)
    return pairs[0], pairs[1]


def load_words(words_ref: Any) -> jax.Array:
    """Load a packed 64 x 128 tile, int32 [4, 256] in SMEM in fragment order; int32 [1024], eight words a thread."""
    layout = plgpu.Layout.WG_STRIDED((8 * WARPGROUP,), vec_size=1)

    @inlined(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((8 * WARPGROUP,), jnp.int32, layout=layout),
    )
    def inline(_: Any, words: ir.Value) -> mgpu.FragmentedArray:
        quad = ir.VectorType.get((4,), i32())
        loads = [load_at(words, arith.addi(thread(), const(WARPGROUP * i)), quad, quad) for i in range(2)]
        return raw_array([llvm.extractelement(loads[i], const(j)) for i in range(2) for j in range(4)], layout)

    return inline(words_ref)


def copy_tile(source_ref: Any, tile: jax.Array, slots_ref: Any, slot: jax.Array, wanted: jax.Array) -> None:
    """Each thread starts to copy its part of a packed tile from GMEM, as one group of cp.async.

    Args:
        source_ref: int32, 1024 words a tile.
        tile: index of the tile.
        slots_ref: int32 [slots * 1024] in SMEM, for ``take_tile``.
        slot: index of the slot that it is copied to.
        wanted: whether to copy it; if not, the group is empty.
    """

    @inlined(arg_types=(plgpu.RefType(), SCALAR, plgpu.RefType(), SCALAR, SCALAR))
    def inline(_: Any, source: ir.Value, tile: Any, slots: ir.Value, slot: Any, wanted: Any) -> None:
        quad = ir.VectorType.get((4,), i32())
        index = arith.addi(arith.muli(tile.registers.item(), const(2 * WARPGROUP)), thread())
        pointer = utils.getelementptr(utils.memref_ptr(source), [index], quad)
        asm(
            [],
            [
                _slot_address(slots, slot),
                llvm.ptrtoint(i64(), pointer),
                wanted.registers.item(),
            ],
            """{
            .reg .pred p;
            setp.ne.u32 p, $2, 0;
            @p cp.async.cg.shared.global [$0], [$1], 16;
            @p cp.async.cg.shared.global [$0 + 2048], [$1 + 2048], 16;
            cp.async.commit_group;
            }""",
            volatile=True,
        )

    inline(source_ref, tile, slots_ref, slot, wanted.astype(jnp.int32))


def take_tile(slots_ref: Any, slot: jax.Array, pending: int) -> jax.Array:
    """As ``load_words``, of the tile that ``copy_tile`` has copied into a slot.

    Waits until at most ``pending`` groups of copies are in flight, those that were started last.
    """
    layout = plgpu.Layout.WG_STRIDED((8 * WARPGROUP,), vec_size=1)

    @inlined(
        arg_types=(plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct((8 * WARPGROUP,), jnp.int32, layout=layout),
    )
    def inline(_: Any, slots: ir.Value, slot: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        code = f"""cp.async.wait_group {pending};
            ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$8];
            ld.shared.v4.b32 {{$4, $5, $6, $7}}, [$8 + 2048];"""
        constraints = ",".join(["=&r"] * 8 + ["r"])
        return raw_array(asm([i32()] * 8, [_slot_address(slots, slot)], code, constraints, volatile=True), layout)

    return inline(slots_ref, slot)


def _slot_address(slots: ir.Value, slot: mgpu.FragmentedArray) -> ir.Value:
    """Address of this thread's first 16 bytes of a slot; its other 16 are 2048 bytes further."""
    own = arith.addi(shared_address(slots), arith.muli(thread(), const(16)))
    return arith.addi(own, arith.muli(slot.registers.item(), const(4096)))


# Two and four words a thread: scales, and tables built from them.
_TWO = plgpu.Layout.WG_STRIDED((2 * WARPGROUP,), vec_size=1)
_FOUR = plgpu.Layout.WG_STRIDED((4 * WARPGROUP,), vec_size=1)


def load_four_scales(ref: Any, group: jax.Array, row: jax.Array) -> jax.Array:
    """Load the E4M3 scales of 64 rows from ``row`` on in four groups from ``group`` on; ref [G, N] (as uint8) in GMEM.

    The four threads that have the same rows load one group each. Past the end the last is loaded.

    Returns:
        int32 [256], for ``build_tables``.
    """

    @inlined(
        arg_types=(plgpu.RefType(), SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((2 * WARPGROUP,), jnp.int32, layout=_TWO),
    )
    def inline(_: Any, scales: ir.Value, first: mgpu.FragmentedArray, start: mgpu.FragmentedArray) -> Any:
        position, lane4, _warp = fragment_position()
        group = arith.addi(first.registers.item(), lane4)
        row = arith.addi(start.registers.item(), position)
        indices = [clamped_index(scales, group, arith.addi(row, const(8 * r))) for r in range(2)]
        return raw_array([load_word(scales, index) for index in indices], _TWO)

    return inline(ref, group, row)


def read_four_scales(ref: Any) -> jax.Array:
    """As ``load_four_scales``, of at most four groups; ref E4M3 [groups, 64] (as uint8) in SMEM."""

    @inlined(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((2 * WARPGROUP,), jnp.int32, layout=_TWO),
    )
    def inline(_: Any, scales: ir.Value) -> mgpu.FragmentedArray:
        i8 = ir.IntegerType.get_signless(8)
        groups, _rows = ir.MemRefType(scales.type).shape
        strides, _ = ir.MemRefType(scales.type).get_strides_and_offset()
        row, lane4, _warp = fragment_position()
        index = arith.addi(row, arith.muli(arith.minsi(lane4, const(groups - 1)), const(strides[0])))
        words = [load_at(scales, arith.addi(index, const(8 * r)), i8, i8) for r in range(2)]
        return raw_array([arith.extui(i32(), word) for word in words], _TWO)

    return inline(ref)


def build_tables(scales: jax.Array, codebook: formats.Codebook) -> jax.Array:
    """Build the tables of four groups from their scales, one group's in each of four threads.

    Returns:
        int32 [512], for ``operand``.
    """

    @inlined(
        arg_types=(_TWO,),
        return_type=plgpu.ShapeDtypeStruct((4 * WARPGROUP,), jnp.int32, layout=_FOUR),
    )
    def inline(_: Any, scales: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        sigmas = [llvm.extractelement(v, const(0)) for v in scales.registers]
        return raw_array([word for sigma in sigmas for word in _table(sigma, codebook)], _FOUR)

    return inline(scales)


def _from_lane(tables: mgpu.FragmentedArray, lane4: int) -> list[tuple[ir.Value, ir.Value]]:
    """[r]: the tables of rows r that the ``lane4``-th thread of each four has built."""
    code = f"shfl.sync.idx.b32 $0, $1, {lane4}, 0x1c1f, 0xffffffff;"
    words = [llvm.extractelement(v, const(0)) for v in tables.registers]
    words = [asm([i32()], [word], code, volatile=True)[0] for word in words]
    return [(words[0], words[1]), (words[2], words[3])]


def operand(
    words: jax.Array,
    tables: list[tuple[jax.Array, int]] | None,
    values: Values,
    part: slice,
    codebook: formats.Codebook,
) -> jax.Array:
    """Columns ``part`` (0:64, 64:128 or both) of a packed tile as WGMMA's A: [64, columns].

    Args:
        words: from ``load_words``.
        tables: for each group of the tile's 128 inputs, (``build_tables(...)``, which of the four);
            None: the codebook's magnitudes as they are.
        values: type of the result. For "bf16" the columns of each 16 are in the order of
            ``interleave_columns``.
        part: columns.
        codebook: what codes stand for.
    """
    layout = plgpu.Layout.WGMMA_8BIT if values == "e4m3" else plgpu.Layout.WGMMA
    dtype = formats.E4M3 if values == "e4m3" else jnp.bfloat16
    shape = layouts.TILE_N, part.stop - part.start
    arrays = [] if tables is None else [array for array, _ in tables]

    @inlined(
        arg_types=(plgpu.Layout.WG_STRIDED(words.shape, vec_size=1), *([_FOUR] * len(arrays))),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout),
    )
    def inline(_: Any, words: mgpu.FragmentedArray, *built: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        packed = [llvm.extractelement(v, const(0)) for v in words.registers]
        halves = [i for i in range(2) if part.start <= 64 * i < part.stop]
        if tables is None:
            unit = _unit_table(codebook)
            by_half = {i: [unit, unit] for i in halves}
        else:
            # With one group, both halves of the columns have it.
            groups = [i % len(tables) for i in halves]
            found = {g: _from_lane(built[g], tables[g][1]) for g in dict.fromkeys(groups)}
            by_half = {i: found[g] for i, g in zip(halves, groups, strict=True)}
        vector_type = ir.VectorType.get((4 if values == "e4m3" else 2,), utils.dtype_to_ir_type(jnp.dtype(dtype)))
        one_word = ir.VectorType.get((1,), i32())
        registers = []
        for i in halves:
            for j in range(2):
                rows = [_look_up(packed[4 * i + 2 * j + r], by_half[i][r]) for r in range(2)]
                for half in range(2):
                    if values == "e4m3":
                        registers += [row[half] for row in rows]
                    else:
                        pairs = [_to_bf16(row[half]) for row in rows]
                        registers += [pair[p] for p in range(2) for pair in pairs]
        fragment = layout.to_mgpu()
        typed = [vector.bitcast(vector_type, vector.broadcast(one_word, word)) for word in registers]
        return mgpu.FragmentedArray(
            _registers=np.array(typed, object).reshape(fragment.registers_shape(shape)),
            _layout=fragment,
            _is_signed=None,
        )

    return inline(words, *arrays)


# [tile][group]: a set of four tables, and which of the four.
Tables = list[list[tuple[jax.Array, int]]]


def tables_by_tile(sets: tuple[jax.Array, ...], tiles: int, groups: int) -> Tables:
    """For each of ``tiles`` tiles with ``groups`` groups: where in ``build_tables``'s sets its tables are."""
    return [[(sets[g // 4], g % 4) for g in range(t * groups, (t + 1) * groups)] for t in range(tiles)]


def multiply(
    problem: Problem,
    words: jax.Array,
    tables: list[tuple[jax.Array, int]] | None,
    x_ref: Callable[[int], Any],
    acc_ref: Any,
    half: int | None = None,
) -> None:
    """Dequantize a tile (or half of it) and issue its WGMMAs, without waiting for them.

    Args:
        problem: shapes and types.
        words: from ``load_words``.
        tables: of the tile's groups; None: the codebook's magnitudes as they are.
        x_ref: x_ref(i) is the i-th of ``problem.halves`` parts of x, [tokens, columns] in SMEM.
        acc_ref: the accumulator.
        half: which part; None: all.
    """
    columns = layouts.TILE_K // problem.halves
    for i in range(problem.halves) if half is None else (half,):
        part = slice(i * columns, (i + 1) * columns)
        weight = operand(words, tables, problem.values, part, problem.codebook)
        plgpu.wgmma(acc_ref, weight, jax_compat.transpose_ref(x_ref(i)))


def interleave_columns(x: jax.Array) -> jax.Array:
    """x [M, K] with its columns in the order in which ``operand(values="bf16")`` has them.

    A thread owns four consecutive inputs of each 16; PTX's 16-bit A fragment wants two at 2t and
    two at 2t + 8. Both operands may share any order of K, so x moves instead of the weights.
    """
    blocks = x.reshape(*x.shape[:-1], -1, 4, 2, 2)
    return jnp.swapaxes(blocks, -3, -2).reshape(x.shape)
