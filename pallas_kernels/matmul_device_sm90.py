"""Device code of the Hopper matmul that Pallas has no operation for, as inlined Mosaic GPU and PTX.

Register fragments follow PTX's ``wgmma``: thread ``t = 32 * warp + lane`` of a warpgroup holds, of
a 64 x M accumulator, rows ``n = 16 * warp + 8 * r + lane // 4`` (r = 0, 1) and columns
``m = 8 * j + 2 * (lane % 4) + (0, 1)``. Rows are output channels and columns are tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, vector

from pallas_kernels import formats, layouts
from pallas_kernels.matmul_config_sm90 import Values

WARPGROUP = 128
ROWS = plgpu.Layout.WGMMA.reduce(1)
SCALAR = plgpu.Layout.WG_SPLAT(())
# Codes 0..7 as E4M3, one a byte: the table of a weight whose group scales are applied elsewhere.
_UNIT_TABLE = 0x44403800, 0x4E4C4A48


def _inlined(*, arg_types: tuple[Any, ...] = (), return_type: Any = None) -> Callable[..., Callable[..., Any]]:
    """``plgpu.inline_mgpu``; the decorated function takes other types than it is called with."""
    return plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _const(value: int) -> ir.Value:
    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), value - (1 << 32) if value >= 1 << 31 else value))


def _thread() -> ir.Value:
    return arith.andi(utils.thread_idx(), _const(WARPGROUP - 1))


def _fragment_position() -> tuple[ir.Value, ir.Value, ir.Value]:
    """(row n of r = 0, lane // 4 and warp folded; lane % 4; warp) of this thread."""
    thread = _thread()
    warp = arith.shrui(thread, _const(5))
    lane = arith.andi(thread, _const(31))
    row = arith.addi(arith.muli(warp, _const(16)), arith.shrui(lane, _const(2)))
    return row, arith.andi(lane, _const(3)), warp


def _asm(results: list[ir.Type], args: list[ir.Value], code: str, constraints: str, *, volatile: bool) -> list[Any]:
    """Inline PTX; one value for each of ``results``."""
    if not results:
        llvm.inline_asm(ir.Type.parse("!llvm.void"), args, code, constraints, has_side_effects=volatile)
        return []
    if len(results) == 1:
        return [llvm.inline_asm(results[0], args, code, constraints, has_side_effects=volatile)]
    struct_type = llvm.StructType.get_literal(results)
    struct: Any = llvm.inline_asm(struct_type, args, code, constraints, has_side_effects=volatile)
    return [llvm.extractvalue(ty, struct, [i]) for i, ty in enumerate(results)]


def _load(ref: ir.Value, index: ir.Value, element: ir.Type, load: ir.Type) -> ir.Value:
    """``load`` read from ``ref``'s memory at ``index``, counted in ``element``."""
    return llvm.load(load, utils.getelementptr(utils.memref_ptr(ref), [index], element))


def _element(vec: ir.Value, i: int) -> ir.Value:
    return vector.extract(vec, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def _shared_address(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(_i32(), utils.memref_ptr(ref))


# --- weights ------------------------------------------------------------------------------------------


def _table(sigma: ir.Value) -> tuple[ir.Value, ir.Value]:
    """fp8(i * sigma) for i = 0..3 and 4..7, one a byte, from an E4M3 sigma (in 32 bits).

    The products are exact in float16 (7 significant bits, 2^-9 to 448), so each is rounded once.
    """
    low, high = _asm(
        [_i32(), _i32()],
        [sigma],
        """{
        .reg .b16 s, c23, c45, c67, low;
        .reg .b32 twice, f, i, p;
        mul.lo.u32 twice, $2, 257;
        cvt.u16.u32 s, twice;
        cvt.rn.f16x2.e4m3x2 f, s;
        mov.b32 i, 0x42004000;
        mul.rn.f16x2 p, f, i;
        cvt.rn.satfinite.e4m3x2.f16x2 c23, p;
        mov.b32 i, 0x45004400;
        mul.rn.f16x2 p, f, i;
        cvt.rn.satfinite.e4m3x2.f16x2 c45, p;
        mov.b32 i, 0x47004600;
        mul.rn.f16x2 p, f, i;
        cvt.rn.satfinite.e4m3x2.f16x2 c67, p;
        shl.b16 low, s, 8;
        mov.b32 $0, {low, c23};
        mov.b32 $1, {c45, c67};
        }""",
        "=r,=r,r",
        volatile=False,
    )
    return low, high


def _look_up(word: ir.Value, table: tuple[ir.Value, ir.Value]) -> list[ir.Value]:
    """The four E4M3 values of each half of a packed word (see ``layouts``)."""
    select = arith.andi(word, _const(0x77777777))
    values = []
    for selector, signs in ((select, word), (arith.shrui(select, _const(16)), arith.shli(word, _const(4)))):
        code = "prmt.b32 $0, $1, $2, $3;"
        (magnitude,) = _asm([_i32()], [*table, selector], code, "=r,r,r,r", volatile=False)
        values.append(arith.ori(magnitude, arith.andi(signs, _const(0x80808080))))
    return values


def _to_bf16(word: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Four E4M3 bytes as two pairs of bf16.

    A byte's exponent and mantissa, moved to where bf16 has them, are 2^-120 of its value (E4M3's
    subnormals become bf16's), so one exact product finishes the conversion.
    """
    pairs = []
    for selector in (0x1404, 0x3424):
        (spread,) = _asm([_i32()], [word, _const(0)], f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", volatile=False)
        magnitude = arith.andi(arith.shrui(spread, _const(4)), _const(0x07F007F0))
        bits = arith.ori(magnitude, arith.andi(spread, _const(0x80008000)))
        (pair,) = _asm([_i32()], [bits, _const(0x7B807B80)], "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", volatile=False)
        pairs.append(pair)
    return pairs[0], pairs[1]


def load_weights(words_ref: Any, scale_ref: Any | None, shared: tuple[jax.Array, int] | None = None) -> jax.Array:
    """One packed 64 x 128 weight tile and its tables in registers, for ``operand``.

    Args:
        words_ref: int32 [4, 256] in SMEM: the tile in fragment order.
        scale_ref: E4M3 group scales [groups, 64] in SMEM to multiply by; None: codes as they are.
        shared: (``share_tables(...)``, index of this tile's first group) instead of building the
            tables from ``scale_ref``, which then only tells the number of groups.

    Returns:
        int32, opaque: eight packed words a thread, then four table words for each group.
    """
    groups = 0 if scale_ref is None else scale_ref.shape[0]
    use_scales = scale_ref is not None and shared is None
    args = (words_ref, *((scale_ref,) if use_scales else ()), *((shared[0],) if shared else ()))
    types = (plgpu.RefType(), *((plgpu.RefType(),) if use_scales else ()), *((_SHARED,) if shared else ()))
    length = WARPGROUP * (8 + 4 * groups)
    layout = plgpu.Layout.WG_STRIDED((length,), vec_size=1)

    @_inlined(arg_types=types, return_type=plgpu.ShapeDtypeStruct((length,), jnp.int32, layout=layout))
    def inline(_: Any, words: ir.Value, *scales: Any) -> mgpu.FragmentedArray:
        quad = ir.VectorType.get((4,), _i32())
        loads = [_load(words, arith.addi(_thread(), _const(WARPGROUP * i)), quad, quad) for i in range(2)]
        tables: list[list[tuple[ir.Value, ir.Value]]] = []
        if shared is not None:
            built = [llvm.extractelement(v, _const(0)) for v in scales[0].registers]
            tables = [_from_lane(built, shared[1] + i) for i in range(groups)]
        elif use_scales:
            row, _lane, _warp = _fragment_position()
            tables = [_row_tables(scales[0], _const(i), row) for i in range(groups)]
        packed = [llvm.extractelement(loads[i], _const(j)) for i in range(2) for j in range(4)]
        return _raw_array(packed + [word for rows in tables for table in rows for word in table], layout)

    return inline(*args)


_SHARED = plgpu.Layout.WG_STRIDED((4 * WARPGROUP,), vec_size=1)


def share_tables(scale_ref: Any) -> jax.Array:
    """The tables of four groups, scale_ref E4M3 [4, 64] in SMEM, for ``load_weights``'s ``shared``.

    The four threads that hold the same rows build one group's tables each, instead of all four.
    """

    @_inlined(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((4 * WARPGROUP,), jnp.int32, layout=_SHARED)
    )
    def inline(_: Any, scales: ir.Value) -> mgpu.FragmentedArray:
        row, lane4, _warp = _fragment_position()
        return _raw_array([word for table in _row_tables(scales, lane4, row) for word in table], _SHARED)

    return inline(scale_ref)


def _row_tables(scales: ir.Value, group: ir.Value, row: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """Tables of one group for rows r = 0, 1, from E4M3 scales [groups, 64]."""
    i8 = ir.IntegerType.get_signless(8)
    strides, _ = ir.MemRefType(scales.type).get_strides_and_offset()
    index = arith.addi(row, arith.muli(group, _const(strides[0])))
    return [_table(arith.extui(_i32(), _load(scales, arith.addi(index, _const(8 * r)), i8, i8))) for r in range(2)]


def _from_lane(built: Sequence[ir.Value], lane4: int) -> list[tuple[ir.Value, ir.Value]]:
    """The tables of the ``lane4``-th thread of each four."""
    code = f"shfl.sync.idx.b32 $0, $1, {lane4}, 0x1c1f, 0xffffffff;"
    words = [_asm([_i32()], [word], code, "=r,r", volatile=True)[0] for word in built]
    return [(words[0], words[1]), (words[2], words[3])]


def _raw_array(words: list[ir.Value], layout: Any) -> mgpu.FragmentedArray:
    one_word = ir.VectorType.get((1,), _i32())
    registers = np.array([vector.broadcast(one_word, word) for word in words], object)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=True)


def operand(raw: jax.Array, values: Values, part: slice) -> jax.Array:
    """Columns ``part`` (multiples of 64) of a tile from ``load_weights`` as WGMMA's A: [64, columns].

    For "bf16" the columns of each 16 are in the order of ``interleave_columns``.
    """
    layout = plgpu.Layout.WGMMA_8BIT if values == "e4m3" else plgpu.Layout.WGMMA
    dtype = formats.E4M3 if values == "e4m3" else jnp.bfloat16
    shape = layouts.TILE_N, part.stop - part.start
    raw_layout = plgpu.Layout.WG_STRIDED(raw.shape, vec_size=1)

    @_inlined(arg_types=(raw_layout,), return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout))
    def inline(_: Any, raw: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        words = [llvm.extractelement(v, _const(0)) for v in raw.registers]
        packed, table_words = words[:8], words[8:]
        if not table_words:
            table_words = [_const(word) for word in _UNIT_TABLE] * 2
        # [group][r]; with one group, both halves of the columns have it.
        tables = [table_words[i : i + 4] for i in range(0, len(table_words), 4)]
        vector_type = ir.VectorType.get((4 if values == "e4m3" else 2,), utils.dtype_to_ir_type(jnp.dtype(dtype)))
        one_word = ir.VectorType.get((1,), _i32())
        registers = []
        for i, j in np.ndindex(2, 2):
            if not part.start <= 64 * i < part.stop:
                continue
            table = tables[i % len(tables)]
            rows = [_look_up(packed[4 * i + 2 * j + r], (table[2 * r], table[2 * r + 1])) for r in range(2)]
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

    return inline(raw)


def interleave_columns(x: jax.Array) -> jax.Array:
    """x [M, K] with its columns in the order in which ``operand(values="bf16")`` has them.

    A thread owns four consecutive inputs of each 16; PTX's 16-bit A fragment wants two at 2t and
    two at 2t + 8. Both operands may share any order of K, so x moves instead of the weights.
    """
    blocks = x.reshape(*x.shape[:-1], -1, 4, 2, 2)
    return jnp.swapaxes(blocks, -3, -2).reshape(x.shape)


# --- scales -----------------------------------------------------------------------------------------------


def _load_float(ref: ir.Value, index: ir.Value) -> ir.Value:
    """ref[index] in float32; float32 or bfloat16, in GMEM or SMEM."""
    f32 = ir.F32Type.get()
    element = ir.MemRefType(ref.type).element_type
    if element == f32:
        return _load(ref, index, f32, f32)
    i16 = ir.IntegerType.get_signless(16)
    bits = arith.extui(_i32(), _load(ref, index, i16, i16))
    return arith.bitcast(f32, arith.shli(bits, _const(16)))


def load_rows(ref: Any, start: jax.Array) -> jax.Array:
    """float32 [64]: ref[start : start + 64] of a vector in GMEM, as each thread needs it for its rows.

    Past its end the last element is read, for rows that are never stored.
    """

    @_inlined(
        arg_types=(plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=ROWS),
    )
    def inline(_: Any, source: ir.Value, first: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        (size,) = ir.MemRefType(source.type).shape
        row, _lane, _warp = _fragment_position()
        return _row_values(
            lambda r: _load_float(
                source,
                arith.minsi(arith.addi(first.registers.item(), arith.addi(row, _const(8 * r))), _const(size - 1)),
            )
        )

    return inline(ref, start)


def load_group_scale(ref: Any) -> jax.Array:
    """float32 [64] from bf16 group scales [64] in SMEM."""

    @_inlined(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=ROWS))
    def inline(_: Any, source: ir.Value) -> mgpu.FragmentedArray:
        row, _lane, _warp = _fragment_position()
        return _row_values(lambda r: _load_float(source, arith.addi(row, _const(8 * r))))

    return inline(ref)


def _row_values(load: Callable[[int], ir.Value]) -> mgpu.FragmentedArray:
    layout = ROWS.to_mgpu()
    one = ir.VectorType.get((1,), ir.F32Type.get())
    registers = np.array([vector.broadcast(one, load(r)) for r in range(2)], object)
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape((64,))), _layout=layout, _is_signed=None
    )


def token_slots(tile_m: int) -> int:
    """Length of the vector in which a warpgroup holds the scales of ``tile_m`` tokens."""
    return WARPGROUP if tile_m <= WARPGROUP else 2 * WARPGROUP


def load_tokens(ref: Any, start: jax.Array, tile_m: int) -> jax.Array:
    """float32 [token_slots(tile_m)] from ref[start:] in GMEM, spread over the warpgroup's threads."""
    slots = token_slots(tile_m)
    layout = plgpu.Layout.WG_STRIDED((slots,), vec_size=1)

    @_inlined(
        arg_types=(plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct((slots,), jnp.float32, layout=layout),
    )
    def inline(_: Any, source: ir.Value, first: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        (size,) = ir.MemRefType(source.type).shape
        one = ir.VectorType.get((1,), ir.F32Type.get())
        registers = []
        for i in range(slots // WARPGROUP):
            index = arith.addi(first.registers.item(), arith.addi(_thread(), _const(WARPGROUP * i)))
            value = _load_float(source, arith.minsi(index, _const(size - 1)))
            registers.append(vector.broadcast(one, value))
        return mgpu.FragmentedArray(_registers=np.array(registers, object), _layout=layout.to_mgpu(), _is_signed=None)

    return inline(ref, start)


# --- promotion -----------------------------------------------------------------------------------------
#
# The float32 sum next to WGMMA's accumulator is kept as raw scalars: as an array of accumulator
# layout it would be pairs, for which the compiler wants aligned registers and spills.


def _sum_layout(tile_m: int) -> Any:
    return plgpu.Layout.WG_STRIDED((layouts.TILE_N * tile_m,), vec_size=1)


def zero_sum(tile_m: int) -> jax.Array:
    """A raw float32 sum for a 64 x tile_m tile."""
    return plgpu.layout_cast(jnp.zeros((layouts.TILE_N * tile_m,), jnp.float32), _sum_layout(tile_m))


def add_to_sum(total: jax.Array, acc: jax.Array, scale: jax.Array | None) -> jax.Array:
    """total + acc * scale (float32 [64], one a row; None: 1)."""
    layout = _sum_layout(acc.shape[1])
    arrays = [(total, layout), (acc, plgpu.Layout.WGMMA)]
    arrays += [] if scale is None else [(scale, ROWS)]
    args, types = zip(*arrays, strict=True)

    @_inlined(arg_types=types, return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, layout=layout))
    def inline(_: Any, total: mgpu.FragmentedArray, acc: mgpu.FragmentedArray, *scales: Any) -> Any:
        f32 = ir.F32Type.get()
        factors = [_element(v, 0) for v in scales[0].registers.flat] if scales else None
        one = ir.VectorType.get((1,), f32)
        summed = []
        for i, old in enumerate(total.registers):
            pair, column = divmod(i, 2)
            value = _element(acc.registers.flat[pair], column)
            if factors is None:
                value = arith.addf(_element(old, 0), value)
            else:
                value = math.fma(value, factors[pair % 2], _element(old, 0))
            summed.append(vector.broadcast(one, value))
        return mgpu.FragmentedArray(_registers=np.array(summed, object), _layout=layout.to_mgpu(), _is_signed=None)

    return inline(*args)


def sum_to_accumulator(total: jax.Array) -> jax.Array:
    """A raw sum as float32 [64, tile_m] in the accumulator's layout."""
    tile_m = total.shape[0] // layouts.TILE_N

    @_inlined(
        arg_types=(_sum_layout(tile_m),),
        return_type=plgpu.ShapeDtypeStruct((layouts.TILE_N, tile_m), jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def inline(_: Any, total: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        layout = plgpu.Layout.WGMMA.to_mgpu()
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        values = [_element(v, 0) for v in total.registers]
        pairs = [vector.from_elements(pair, values[i : i + 2]) for i in range(0, len(values), 2)]
        return mgpu.FragmentedArray(
            _registers=np.array(pairs, object).reshape(layout.registers_shape((layouts.TILE_N, tile_m))),
            _layout=layout,
            _is_signed=None,
        )

    return inline(total)


# --- epilogue ------------------------------------------------------------------------------------------------


def _silu(x: ir.Value) -> ir.Value:
    """x / (1 + exp(-x)); exp2 and the reciprocal are PTX's approximations (2 ulp of float32)."""
    f32 = ir.F32Type.get()
    (result,) = _asm(
        [f32],
        [x],
        """{
        .reg .f32 e;
        mul.f32 e, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 e, e;
        add.f32 e, e, 0f3F800000;
        rcp.approx.ftz.f32 e, e;
        mul.f32 $0, $1, e;
        }""",
        "=f,f",
        volatile=False,
    )
    return result


def store_outputs(
    acc: jax.Array,
    channel_scale: jax.Array,
    bias: jax.Array | None,
    token_scale_ref: Any | None,
    out_ref: Any,
    *,
    silu_mul: bool,
    add_residual: bool,
) -> None:
    """Finish a 64 x tokens accumulator and write it, transposed, to SMEM.

    Args:
        acc: float32 [64, tokens].
        channel_scale: float32 [64], multiplied; bias: float32 [64], added.
        token_scale_ref: float32 [tokens] in SMEM, multiplied before the bias.
        out_ref: bf16 [tokens, 64] (or [tokens, 32] for ``silu_mul``) in SMEM, swizzled over a row.
        silu_mul: rows n and n + 8 of each 16 are a gate and its up.
        add_residual: ``out_ref`` holds the residual; add it in float32.
    """
    tokens = acc.shape[1]
    rows = out_ref.shape[1]
    swizzle = 2 * rows
    transforms = (plgpu.SwizzleTransform(swizzle),)
    arrays = [(acc, plgpu.Layout.WGMMA), (channel_scale, ROWS)]
    arrays += [] if bias is None else [(bias, ROWS)]
    refs = [(out_ref, plgpu.RefType(transforms))]
    refs += [] if token_scale_ref is None else [(token_scale_ref, plgpu.RefType())]
    args, types = zip(*arrays, *refs, strict=True)

    @_inlined(arg_types=types)
    def inline(_: Any, acc: mgpu.FragmentedArray, channel: mgpu.FragmentedArray, *rest: Any) -> None:
        f32 = ir.F32Type.get()
        bias_rows = rest[0] if bias is not None else None
        out, *tokens_in = rest[1:] if bias is not None else rest
        _row, lane4, warp = _fragment_position()
        lane = arith.andi(_thread(), _const(31))
        values = acc.registers.reshape(tokens // 8, 2)
        pair = ir.VectorType.get((2,), f32)
        scales = [_element(v, 0) for v in channel.registers.flat]
        biases = None if bias_rows is None else [_element(v, 0) for v in bias_rows.registers.flat]

        def finished(j: int) -> list[list[ir.Value]]:
            """[r][two tokens] after scales, bias and activation; one r for silu_mul."""
            by_token = None
            if tokens_in:
                by_token = _load(tokens_in[0], arith.addi(lane4, _const(4 * j)), pair, pair)
            result = []
            for r in range(2):
                row_values = []
                for i in range(2):
                    value = arith.mulf(_element(values[j, r], i), scales[r])
                    if by_token is not None:
                        value = arith.mulf(value, _element(by_token, i))
                    if biases is not None:
                        value = arith.addf(value, biases[r])
                    row_values.append(value)
                result.append(row_values)
            if silu_mul:
                return [[arith.mulf(_silu(g), u) for g, u in zip(*result, strict=True)]]
            return result

        blocks = [(j, block) for j in range(tokens // 8) for block in range(1 if silu_mul else 2)]
        width = min(4, len(blocks))
        per_j = 1 if silu_mul else 2
        # Lane l gives the address of row l % 8 of matrix l // 8. Adding 8 tokens leaves the bits
        # that the swizzle reads alone, so one address with constant offsets serves them all.
        matrix = arith.shrui(lane, _const(3))
        token = arith.addi(arith.andi(lane, _const(7)), arith.shli(arith.divui(matrix, _const(per_j)), _const(3)))
        chunk = arith.addi(arith.muli(warp, _const(per_j)), arith.remui(matrix, _const(per_j)))
        offset = arith.addi(arith.muli(token, _const(swizzle)), arith.shli(chunk, _const(4)))
        flip = arith.andi(arith.shrui(offset, _const(7)), _const(swizzle // 16 - 1))
        address = arith.addi(_shared_address(out), arith.xori(offset, arith.shli(flip, _const(4))))
        suffix = f"sync.aligned.m8n8.x{width}.trans.shared.b16"
        for start in range(0, len(blocks), width):
            group = blocks[start : start + width]
            byte = group[0][0] * 8 * swizzle
            added: list[ir.Value | None] = [None] * width
            if add_residual:
                outputs = ", ".join(f"${i}" for i in range(width))
                added = list(
                    _asm(
                        [_i32()] * width,
                        [address],
                        f"ldmatrix.{suffix} {{{outputs}}}, [${width} + {byte}];",
                        ",".join(["=r"] * width + ["r"]),
                        volatile=True,
                    )
                )
            done = {j: finished(j) for j, _ in group}
            packed = []
            for (j, block), residual in zip(group, added, strict=True):
                low, high = done[j][block]
                if residual is not None:
                    bits = arith.shli(residual, _const(16)), arith.andi(residual, _const(0xFFFF0000))
                    low, high = (arith.addf(v, arith.bitcast(f32, b)) for v, b in zip((low, high), bits, strict=True))
                packed += _asm([_i32()], [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", volatile=False)
            inputs = ", ".join(f"${i + 1}" for i in range(width))
            _asm(
                [],
                [address, *packed],
                f"stmatrix.{suffix} [$0 + {byte}], {{{inputs}}};",
                ",".join(["r"] * (width + 1)),
                volatile=True,
            )

    inline(*args)


# --- barriers ---------------------------------------------------------------------------------------------------
#
# "Slot free" barriers are raw mbarriers: one arrival a warp instead of Pallas' one a thread, and in
# a cluster every warp speaks for itself, so no warp's reads can be overtaken by another's arrival.


def init_barriers(ref: Any, arrivals: int, *, cluster: bool) -> None:
    """Make mbarriers of ref, int32 [count, 2] in SMEM; all threads of the CTA (or cluster) call this."""

    @_inlined(arg_types=(plgpu.RefType(),))
    def inline(_: Any, barriers: ir.Value) -> None:
        count, _ = ir.MemRefType(barriers.type).shape
        code = "".join(f"@p mbarrier.init.shared::cta.b64 [$0 + {8 * i}], {arrivals};\n" for i in range(count))
        sync = (
            "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
            if cluster
            else "bar.sync 0;"
        )
        _asm(
            [],
            [_shared_address(barriers), utils.thread_idx()],
            f"{{\n.reg .pred p;\nsetp.eq.u32 p, $1, 0;\n{code}fence.mbarrier_init.release.cluster;\n{sync}\n}}",
            "r,r",
            volatile=True,
        )

    inline(ref)


def arrive(ref: Any, slot: jax.Array, *, cluster_size: int) -> None:
    """One arrival a warp on ref[slot], in every CTA of the cluster."""

    @_inlined(arg_types=(plgpu.RefType(), SCALAR))
    def inline(_: Any, barriers: ir.Value, index: mgpu.FragmentedArray) -> None:
        address = arith.addi(_shared_address(barriers), arith.muli(index.registers.item(), _const(8)))
        lane = arith.andi(utils.thread_idx(), _const(31))
        if cluster_size == 1:
            code = "@p mbarrier.arrive.release.cta.shared::cta.b64 _, [$0];"
        else:
            # No qualifiers: a release for the cluster would be a fence of all memory, and what this
            # orders are reads whose values have arrived.
            code = "mapa.shared::cluster.u32 a, $0, $1;\n@p mbarrier.arrive.shared::cluster.b64 _, [a];"
        _asm(
            [],
            [address, lane],
            f"{{\n.reg .pred p;\n.reg .b32 a;\nsetp.lt.u32 p, $1, {cluster_size};\n{code}\n}}",
            "r,r",
            volatile=True,
        )

    inline(ref, slot)


def wait(ref: Any, slot: jax.Array, parity: jax.Array) -> None:
    """Wait until the phase of ref[slot] with this parity (0 or 1) has completed."""

    @_inlined(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
    def inline(_: Any, barriers: ir.Value, index: mgpu.FragmentedArray, phase: mgpu.FragmentedArray) -> None:
        address = arith.addi(_shared_address(barriers), arith.muli(index.registers.item(), _const(8)))
        _asm(
            [],
            [address, phase.registers.item()],
            "{\n.reg .pred p;\nretry:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1, 10000000;\n"
            "@p bra.uni done;\nbra.uni retry;\ndone:\n}",
            "r,r",
            volatile=True,
        )

    inline(ref, slot, parity)


def sleep(nanoseconds: int) -> None:
    """Pause the calling warps for about this long."""

    @_inlined()
    def inline(_: Any) -> None:
        _asm([], [], f"nanosleep.u32 {nanoseconds};", "", volatile=True)

    inline()


# --- split K --------------------------------------------------------------------------------------------------------


def cluster_barrier() -> None:
    """All running threads of the cluster meet; writes to SMEM before it are seen after it."""

    @_inlined()
    def inline(_: Any) -> None:
        code = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
        _asm([], [], code, "", volatile=True)

    inline()


def send_partial(acc: jax.Array, ring_ref: Any) -> None:
    """Write acc to ring_ref, int32 [64 * tokens] in SMEM, of the cluster's first CTA."""

    @_inlined(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def inline(_: Any, acc: mgpu.FragmentedArray, ring: ir.Value) -> None:
        address = arith.addi(_shared_address(ring), arith.muli(_thread(), _const(16)))
        (remote,) = _asm(
            [_i32()], [address, _const(0)], "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", volatile=False
        )
        for j, registers in enumerate(acc.registers.reshape(-1, 2)):
            floats = [_element(v, i) for v in registers for i in range(2)]
            code = f"st.shared::cluster.v4.f32 [$0 + {16 * WARPGROUP * j}], {{$1, $2, $3, $4}};"
            _asm([], [remote, *floats], code, "r,f,f,f,f", volatile=True)

    inline(acc, ring_ref)


def add_partial(acc: jax.Array, ring_ref: Any) -> jax.Array:
    """acc plus what a CTA of the cluster has put into this CTA's ring_ref."""

    @_inlined(
        arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def inline(_: Any, acc: mgpu.FragmentedArray, ring: ir.Value) -> mgpu.FragmentedArray:
        quad = ir.VectorType.get((4,), ir.F32Type.get())
        summed = np.empty((acc.shape[1] // 8, 2), object)
        for j, registers in enumerate(acc.registers.reshape(-1, 2)):
            partial = _load(ring, arith.addi(_thread(), _const(WARPGROUP * j)), quad, quad)
            for r in range(2):
                half = vector.extract_strided_slice(
                    ir.VectorType.get((2,), ir.F32Type.get()), partial, [2 * r], [2], [1]
                )
                summed[j, r] = arith.addf(registers[r], half)
        return mgpu.FragmentedArray(_registers=summed.reshape(acc.registers.shape), _layout=acc.layout, _is_signed=None)

    return inline(acc, ring_ref)
