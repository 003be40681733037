"""Register-level pieces of the prefill kernel: softmax, sums and the preparation of the cache.

Tokens of V^T, of P's columns and of the columns' numbers stand in one order, in which a thread's
part of the scores, once cast, is its part of P as WGMMA's A operand (:func:`permute_tokens`).

A value's scale is m 2^e with 1 <= m < 2. The power of two goes into V's E4M3 codes, exactly; m goes
into P before its cast, as a logarithm added to the score. V^T has eight more rows, of which the first
three add up to ``TOTAL_UNIT`` / m: P times them is the softmax's denominator, from the rounded P.
"""

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector
from jaxtyping import Array

from pallas_kernels.attention_registers_sm90 import (
    _codes_to_e4m3,
    _element,
    _f32,
    _fragments,
    _i32,
    _load_words,
    _thread,
    _to_e4m3_word,
    _transpose_bytes,
)

TOTAL_ROWS = 8  # rows of V^T beyond head_dim: WGMMA's N is a multiple of 8
TOTAL_UNIT = 16.0
# log2 of the E4M3 code for a value of the largest exponent, over its INT4 code.
VALUE_EXPONENT = 6
_PREPARED_TOKENS = 128  # of a block of the preparation
_THREADS = 128


def permute_tokens(v: Array) -> Array:
    """Tokens of [..., S] (S a multiple of 16) in the order of :func:`probabilities_to_operand`."""
    tokens = v.shape[-1]
    v = v.reshape(*v.shape[:-1], tokens // 16, 2, 4, 2)  # [i, q, e]
    return jnp.stack([v[..., 0, :, :], v[..., 1, :, :]], axis=-2).reshape(*v.shape[:-4], tokens)


# --- softmax --------------------------------------------------------------------------------------


def probabilities_to_operand(_: mgpu.LaunchContext, p: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """P [rows, tokens] float32 (WGMMA layout) -> E4M3 A operand, each thread keeping what it holds.

    Of every 16 columns a thread holds 2 q + e and 8 + 2 q + e (e 0, 1); they become columns
    4 q ... 4 q + 3 of the operand: :func:`permute_tokens` gives V's tokens that order.
    """
    rows, tokens = p.shape
    registers = p.registers.reshape(rows // 64, tokens // 16, 2, 2)
    tiles = np.empty((rows // 64, tokens // 16, 2), dtype=object)
    for m, column, h in np.ndindex(tiles.shape):
        pairs = registers[m, column, :, h]
        tiles[m, column, h] = _to_e4m3_word([_element(pairs[i], e) for i in range(2) for e in range(2)])
    return _fragments(tiles, (rows, tokens))


def load_columns(_: mgpu.LaunchContext, numbers: ir.Value) -> mgpu.FragmentedArray:
    """float32 [tokens] in shared memory, in :func:`permute_tokens`' order, -> one for each column of P."""
    (tokens,) = ir.MemRefType(numbers.type).shape
    base = utils.memref_ptr(numbers)
    offset = arith.muli(_thread()[2], _i32(16))
    f32 = ir.F32Type.get()
    registers = np.empty((tokens // 8,), dtype=object)
    for block in range(tokens // 16):
        words = _load_words(base, arith.addi(offset, _i32(64 * block)), 4)
        values = [utils.bitcast(word, f32) for word in words]
        for i in range(2):
            registers[2 * block + i] = vector.from_elements(ir.VectorType.get((2,), f32), values[2 * i : 2 * i + 2])
    layout = mgpu.WGMMA_COL_LAYOUT
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape((tokens,))), _layout=layout, _is_signed=None
    )


def row_maxima(_: mgpu.LaunchContext, peak: mgpu.FragmentedArray, scores: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """max(peak, scores over their columns), four chains a row: a single one would wait for itself."""
    by_row = scores.registers.reshape(-1, 2)
    result = peak.registers.copy()
    for index, h in zip(np.ndindex(result.shape), range(2), strict=True):
        elements = [_element(pair, e) for pair in by_row[:, h] for e in range(2)]
        chains = elements[:4]
        for i, element in enumerate(elements[4:]):
            chains[i % 4] = _maximum(chains[i % 4], element)
        highest = _maximum(_maximum(chains[0], chains[1]), _maximum(chains[2], chains[3]))
        for distance in (1, 2):
            highest = _maximum(highest, utils.shfl_bfly(highest, distance))
        held = _element(result[index], 0)
        result[index] = vector.broadcast(result[index].type, _maximum(held, highest))
    return mgpu.FragmentedArray(_registers=result, _layout=peak.layout, _is_signed=None)


def start_product(
    _: mgpu.LaunchContext, out: mgpu.FragmentedArray, p: mgpu.FragmentedArray, values: ir.Value, *, swizzle: int
) -> mgpu.FragmentedArray:
    """out + P V, which the tensor cores are still adding up: only for :func:`finish_product`.

    ``values`` is V^T in shared memory, [rows / 8, tokens / swizzle, 8, swizzle].
    """
    acc = mgpu.WGMMAAccumulator.from_registers(out)
    acc = mgpu.wgmma(acc, p, utils.memref_transpose(values, (1, 0, 3, 2)), swizzle=swizzle)
    nvvm.wgmma_commit_group_sync_aligned()
    return acc.value


def finish_product(_: mgpu.LaunchContext, out: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """What :func:`start_product` began, when all of the warpgroup's products are done."""
    nvvm.wgmma_wait_group_sync_aligned(0)
    return mgpu.optimization_barrier(out)


_TURN_BARRIER = 8  # hardware barriers from here on; Mosaic takes the first ones


def wait_for_turn(_: mgpu.LaunchContext, warpgroup: mgpu.FragmentedArray) -> None:
    """Until the other of two warpgroups has ended its turn."""
    own = arith.addi(warpgroup.registers.item(), _i32(_TURN_BARRIER))
    _asm([], [own], f"bar.sync $0, {2 * _THREADS};", "r")


def end_turn(_: mgpu.LaunchContext, warpgroup: mgpu.FragmentedArray) -> None:
    """Let the other of two warpgroups have its turn."""
    other = arith.subi(_i32(_TURN_BARRIER + 1), warpgroup.registers.item())
    _asm([], [other], f"bar.arrive $0, {2 * _THREADS};", "r")


def rescale(_: mgpu.LaunchContext, out: mgpu.FragmentedArray, decay: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """out times its rows' decay; a warp all of whose decays are 1 skips it."""
    factors = _row_numbers(decay)
    (grown,) = _asm(
        [_type_i32()],
        factors,
        "{\n.reg .pred p, q;\nsetp.neu.f32 p, $1, 0f3F800000;\nsetp.neu.or.f32 p, $2, 0f3F800000, p;\n"
        "vote.sync.any.pred q, p, 0xffffffff;\nselp.b32 $0, 1, 0, q;\n}",
        "=r,f,f",
    )
    taken = arith.cmpi(arith.CmpIPredicate.ne, grown, _i32(0))
    return _where(taken, out, lambda registers: _by_rows(registers, factors, arith.mulf))


def settle(
    _: mgpu.LaunchContext,
    out: mgpu.FragmentedArray,
    weight: mgpu.FragmentedArray,
    now: mgpu.FragmentedArray,
    total: ir.Value,
) -> mgpu.FragmentedArray:
    """If ``now`` is not 0: the sum in shared memory becomes itself times ``weight`` plus out, out becomes 0."""

    def add(registers: list[ir.Value]) -> list[ir.Value]:
        _store_sum(total, _sum(total, registers, _row_numbers(weight)))
        # A constant would become a select of every register, taken or not.
        return _asm([ir.F32Type.get()], [], "mov.f32 $0, 0f00000000;", "=f") * len(registers)

    flag = now.registers.item()
    taken = arith.cmpi(arith.CmpIPredicate.ne, flag, _i32(0))
    return _where(taken, out, add)


def clear_sum(_: mgpu.LaunchContext, total: ir.Value) -> None:
    """The sum of :func:`settle` before the first."""
    f32 = ir.F32Type.get()
    zero = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
    _store_sum(total, [zero] * (ir.MemRefType(total.type).shape[0] // _THREADS))


def finish(
    _: mgpu.LaunchContext,
    parts: tuple[mgpu.FragmentedArray, ...],
    weight: mgpu.FragmentedArray,
    highest_scale: mgpu.FragmentedArray,
    totals: tuple[ir.Value, ...],
) -> mgpu.FragmentedArray:
    """The normalized output [rows, H] of the parts of P [V, totals]; rows without weight get 0."""
    weights = _row_numbers(weight)
    summed = []
    for part, total in zip(parts, totals, strict=True):
        summed += _sum(total, _elements(part), weights)
    *out, a, b, c, d = summed
    bits = arith.andi(utils.bitcast(highest_scale.registers.item(), _type_i32()), _i32(0x7F800000))
    unit = arith.mulf(utils.bitcast(bits, ir.F32Type.get()), _f32(TOTAL_UNIT * 2.0**-VALUE_EXPONENT))
    factors = []
    for denominator in (arith.addf(a, b), arith.addf(c, d)):
        for distance in (1, 2):
            denominator = arith.addf(denominator, utils.shfl_bfly(denominator, distance))
        positive = arith.cmpf(arith.CmpFPredicate.OGT, denominator, _f32(0.0))
        factors.append(arith.select(positive, arith.divf(unit, denominator), _f32(0.0)))
    out = _by_rows(out, factors, arith.mulf)
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    registers = np.array([vector.from_elements(pair, out[i : i + 2]) for i in range(0, len(out), 2)], object)
    shape = (64, 4 * len(out) // 2)
    layout = parts[0].layout
    return mgpu.FragmentedArray(
        _registers=registers.reshape(-1, 2).reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
    )


def load_rows(
    _: mgpu.LaunchContext, first: mgpu.FragmentedArray, head: mgpu.FragmentedArray, scales: ir.Value
) -> mgpu.FragmentedArray:
    """Column ``head`` of float32 [T, heads], rows ``first`` ... as one number a row; past the end the last."""
    length, heads = ir.MemRefType(scales.type).shape
    warp, g, _ = _thread()
    f32 = ir.F32Type.get()
    layout = plgpu.Layout.WGMMA.reduce(1).to_mgpu()
    one = ir.VectorType.get((1,), f32)
    registers = []
    for h in range(2):
        row = arith.addi(arith.addi(arith.muli(warp, _i32(16)), g), _i32(8 * h))
        row = arith.minsi(arith.addi(row, first.registers.item()), _i32(length - 1))
        index = arith.addi(arith.muli(row, _i32(heads)), head.registers.item())
        value = llvm.load(f32, utils.getelementptr(utils.memref_ptr(scales), [index], f32))
        registers.append(vector.broadcast(one, value))
    shape = layout.registers_shape((64,))
    return mgpu.FragmentedArray(_registers=np.array(registers, object).reshape(shape), _layout=layout, _is_signed=None)


# --- preparation of the cache ---------------------------------------------------------------------


def prepare_columns(
    _: mgpu.LaunchContext,
    first: mgpu.FragmentedArray,
    length: mgpu.FragmentedArray,
    highest_scale: mgpu.FragmentedArray,
    k_scale: ir.Value,
    v_scale: ir.Value,
    columns: ir.Value,
    values: ir.Value,
    units: ir.Value,
) -> None:
    """Of 128 tokens: the columns' two numbers, V^T's rows of 1 / m, and 2^e as float16 in shared memory.

    ``columns`` is [2, S'] float32: the key's scale and log2 m; ``values`` is [tiles, H + 8, tokens].
    """
    (slots,) = ir.MemRefType(k_scale.type).shape
    _, rows, tile_tokens = ir.MemRefType(values.type).shape
    _, padded = ir.MemRefType(columns.type).shape
    i8, i16, f32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(16), ir.F32Type.get()
    position = arith.remui(utils.thread_idx(), _i32(_THREADS))
    # Position 16 b + 4 q + 2 i + e holds token 16 b + 8 i + 2 q + e.
    token = arith.ori(
        arith.andi(position, _i32(~0xE & 0xFFFFFFFF)),
        arith.ori(
            arith.shli(arith.andi(position, _i32(2)), _i32(2)),
            arith.shrui(arith.andi(position, _i32(12)), _i32(1)),
        ),
    )
    first_value = first.registers.item()
    token = arith.addi(token, first_value)
    where = arith.addi(position, first_value)
    valid = arith.cmpi(arith.CmpIPredicate.slt, token, length.registers.item())
    row = arith.minsi(token, _i32(slots - 1))

    def scale_bits(ref: ir.Value) -> ir.Value:
        loaded = llvm.load(i16, utils.getelementptr(utils.memref_ptr(ref), [row], i16))
        bits = arith.shli(arith.extui(_type_i32(), loaded), _i32(16))
        return arith.select(valid, bits, _i32(0x3F800000))

    bits = scale_bits(v_scale)
    mantissa = utils.bitcast(arith.ori(arith.andi(bits, _i32(0x007FFFFF)), _i32(0x3F800000)), f32)
    highest = arith.shrui(utils.bitcast(highest_scale.registers.item(), _type_i32()), _i32(23))
    exponent = arith.subi(arith.shrui(bits, _i32(23)), highest)
    # float16 of 2^(15 + exponent), from 2^15 down to 0.
    field = arith.maxsi(arith.addi(arith.minsi(exponent, _i32(0)), _i32(30)), _i32(0))
    unit = arith.trunci(i16, arith.shli(field, _i32(10)))
    llvm.store(unit, utils.getelementptr(utils.memref_ptr(units), [position], i16))

    logarithm, code = _logarithm_and_reciprocal(mantissa)
    for i, number in enumerate((utils.bitcast(scale_bits(k_scale), f32), logarithm)):
        index = arith.addi(where, _i32(i * padded))
        llvm.store(number, utils.getelementptr(utils.memref_ptr(columns), [index], f32))
    for i in range(TOTAL_ROWS):
        index = _value_offset(where, _i32(rows - TOTAL_ROWS + i), rows, tile_tokens)
        byte = arith.trunci(i8, arith.shrui(code, _i32(8 * i)) if i < 4 else _i32(0))
        llvm.store(byte, utils.getelementptr(utils.memref_ptr(values), [index], i8))


def prepare_keys(_: mgpu.LaunchContext, first: mgpu.FragmentedArray, packed: ir.Value, keys: ir.Value) -> None:
    """INT4 codes [S, H/2] of 128 tokens -> E4M3 [S', H] of ``CODE_UNIT`` times the codes, exactly."""
    slots, stored = ir.MemRefType(packed.type).shape
    thread = arith.remui(utils.thread_idx(), _i32(_THREADS))
    chunks = stored // 16
    source, target = utils.memref_ptr(packed), utils.memref_ptr(keys)
    for i in range(_PREPARED_TOKENS * chunks // _THREADS):
        unit = arith.addi(thread, _i32(i * _THREADS))
        token = arith.addi(arith.divui(unit, _i32(chunks)), first.registers.item())
        column = arith.muli(arith.remui(unit, _i32(chunks)), _i32(16))
        row = arith.minsi(token, _i32(slots - 1))
        words = _load_words(source, arith.addi(arith.muli(row, _i32(stored)), column), 4)
        converted = [_codes_to_e4m3(word) for word in words]
        offset = arith.addi(arith.muli(token, _i32(2 * stored)), column)
        for nibble in range(2):
            _store_words(target, arith.addi(offset, _i32(nibble * stored)), [pair[nibble] for pair in converted])


def prepare_values(
    _: mgpu.LaunchContext, first: mgpu.FragmentedArray, packed: ir.Value, units: ir.Value, values: ir.Value
) -> None:
    """INT4 codes [S, H/2] of 128 tokens -> E4M3 V^T [tiles, H + 8, tokens], codes times 2^e; not the last 8 rows."""
    slots, stored = ir.MemRefType(packed.type).shape
    _, rows, tile_tokens = ir.MemRefType(values.type).shape
    thread = arith.remui(utils.thread_idx(), _i32(_THREADS))
    block = arith.muli(arith.remui(thread, _i32(_PREPARED_TOKENS // 16)), _i32(16))
    token = arith.addi(block, first.registers.item())
    source, target = utils.memref_ptr(packed), utils.memref_ptr(values)
    scales = _load_words(utils.memref_ptr(units), arith.muli(block, _i32(2)), 8)
    word_columns = stored // 4
    for i in range(-(-word_columns // 16)):
        # Where a row has fewer words than 16, two threads do the same.
        column = arith.addi(arith.divui(thread, _i32(8)), _i32(16 * i))
        byte = arith.muli(arith.remui(column, _i32(word_columns)), _i32(4))

        def load(t: int, byte: ir.Value = byte) -> ir.Value:
            row = arith.minsi(arith.addi(token, _i32(t)), _i32(slots - 1))
            return _load_words(source, arith.addi(arith.muli(row, _i32(stored)), byte), 1)[0]

        channels: dict[tuple[int, int], list[ir.Value]] = {(b, n): [] for b in range(4) for n in range(2)}
        for q in range(4):
            loaded = [load(t) for t in (2 * q, 2 * q + 1, 2 * q + 8, 2 * q + 9)]
            for b, word in enumerate(_transpose_bytes(loaded, 4)):
                for n, codes in enumerate(_codes_to_e4m3(word)):
                    channels[b, n].append(_scale_e4m3(codes, scales[2 * q], scales[2 * q + 1]))
        for (b, n), words in channels.items():
            channel = arith.addi(byte, _i32(b + n * stored))
            _store_words(target, _value_offset(token, channel, rows, tile_tokens), words)


def _value_offset(token: ir.Value, channel: ir.Value, rows: int, tokens: int) -> ir.Value:
    """Where V^T of [tiles, rows, tokens] holds a channel of a token."""
    tile, within = arith.divui(token, _i32(tokens)), arith.remui(token, _i32(tokens))
    row = arith.addi(arith.muli(tile, _i32(rows)), channel)
    return arith.addi(arith.muli(row, _i32(tokens)), within)


# --- pieces ---------------------------------------------------------------------------------------


def _elements(matrix: mgpu.FragmentedArray) -> list[ir.Value]:
    """A thread's numbers of a WGMMA matrix with 64 rows: by columns of 8, then by row, then by column."""
    return [_element(pair, e) for pair in matrix.registers.reshape(-1) for e in range(2)]


def _row_numbers(rows: mgpu.FragmentedArray) -> list[ir.Value]:
    return [_element(register, 0) for register in rows.registers.reshape(-1)]


def _by_rows(numbers: list[ir.Value], factors: list[ir.Value], operation: Any) -> list[ir.Value]:
    return [operation(number, factors[i // 2 % 2]) for i, number in enumerate(numbers)]


def _where(taken: ir.Value, matrix: mgpu.FragmentedArray, change: Any) -> mgpu.FragmentedArray:
    """``matrix`` with its numbers changed if ``taken``, which is the same for all threads of a warp."""
    numbers = _elements(matrix)
    branch = scf.IfOp(taken, [number.type for number in numbers], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.YieldOp(change(numbers))
    with ir.InsertionPoint(branch.else_block):
        scf.YieldOp(numbers)
    results = list(branch.results)
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    registers = np.array([vector.from_elements(pair, results[i : i + 2]) for i in range(0, len(results), 2)], object)
    return mgpu.FragmentedArray(
        _registers=registers.reshape(matrix.registers.shape), _layout=matrix.layout, _is_signed=None
    )


def _sum(total: ir.Value, numbers: list[ir.Value], weights: list[ir.Value]) -> list[ir.Value]:
    """numbers plus what this thread has in shared memory times its rows' weights."""
    held = [utils.bitcast(word, ir.F32Type.get()) for word in _own_words(total, len(numbers))]
    return [arith.addf(x, y) for x, y in zip(_by_rows(held, weights, arith.mulf), numbers, strict=True)]


def _own_offset() -> ir.Value:
    return arith.muli(arith.remui(utils.thread_idx(), _i32(_THREADS)), _i32(16))


def _own_words(total: ir.Value, count: int) -> list[ir.Value]:
    """This thread's words of shared memory: four of every 4 x 128."""
    base, offset = utils.memref_ptr(total), _own_offset()
    loads = [_load_words(base, arith.addi(offset, _i32(16 * _THREADS * i)), 4) for i in range(count // 4)]
    return [word for words in loads for word in words]


def _store_sum(total: ir.Value, numbers: list[ir.Value]) -> None:
    base, offset = utils.memref_ptr(total), _own_offset()
    for i in range(0, len(numbers), 4):
        words = [utils.bitcast(number, _type_i32()) for number in numbers[i : i + 4]]
        _store_words(base, arith.addi(offset, _i32(4 * _THREADS * i)), words)


def _store_words(base: ir.Value, offset: ir.Value, words: list[ir.Value]) -> None:
    """Four words to 16 consecutive bytes."""
    quad = vector.from_elements(ir.VectorType.get((4,), _type_i32()), words)
    llvm.store(quad, utils.getelementptr(base, [offset], ir.IntegerType.get_signless(8)), alignment=16)


def _maximum(a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.maximumf(a, b)


def _scale_e4m3(word: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    """Four E4M3 numbers, each times its float16 of the two pairs."""
    assembly = """{
        .reg .b16 a, b;
        .reg .b32 x, y;
        mov.b32 {a, b}, $1;
        cvt.rn.f16x2.e4m3x2 x, a;
        cvt.rn.f16x2.e4m3x2 y, b;
        mul.rn.f16x2 x, x, $2;
        mul.rn.f16x2 y, y, $3;
        cvt.rn.satfinite.e4m3x2.f16x2 a, x;
        cvt.rn.satfinite.e4m3x2.f16x2 b, y;
        mov.b32 $0, {a, b};
    }"""
    return _asm([_type_i32()], [word, low, high], assembly, "=r,r,r,r")[0]


def _logarithm_and_reciprocal(mantissa: ir.Value) -> tuple[ir.Value, ir.Value]:
    """log2 of a number in [1, 2), and a word of E4M3 bytes whose first three add up to TOTAL_UNIT over it."""
    assembly = """{
        .reg .f32 x, y;
        .reg .f16 h;
        .reg .b16 a, b, c, z;
        .reg .b32 w;
        lg2.approx.f32 $0, $2;
        rcp.rn.f32 x, $2;
        mul.f32 x, x, $3;
        mov.b16 z, 0;
        mov.f32 y, 0f00000000;
        cvt.rn.satfinite.e4m3x2.f32 a, y, x;
        cvt.rn.f16x2.e4m3x2 w, a;
        mov.b32 {h, z}, w;
        cvt.f32.f16 y, h;
        sub.f32 x, x, y;
        mov.f32 y, 0f00000000;
        cvt.rn.satfinite.e4m3x2.f32 b, y, x;
        cvt.rn.f16x2.e4m3x2 w, b;
        mov.b32 {h, z}, w;
        cvt.f32.f16 y, h;
        sub.f32 x, x, y;
        mov.f32 y, 0f00000000;
        cvt.rn.satfinite.e4m3x2.f32 c, y, x;
        shl.b16 b, b, 8;
        or.b16 a, a, b;
        mov.b32 $1, {a, c};
    }"""
    logarithm, code = _asm([ir.F32Type.get(), _type_i32()], [mantissa, _f32(TOTAL_UNIT)], assembly, "=&f,=r,f,f")
    return logarithm, code


def _asm(results: list[ir.Type], args: list[ir.Value], code: str, constraints: str) -> list[Any]:
    """Inline PTX; one value for each of ``results``."""
    if not results:
        llvm.inline_asm(ir.Type.parse("!llvm.void"), args, code, constraints, has_side_effects=True)
        return []
    if len(results) == 1:
        return [llvm.inline_asm(results[0], args, code, constraints, has_side_effects=True)]
    struct_type = llvm.StructType.get_literal(results)
    struct: Any = llvm.inline_asm(struct_type, args, code, constraints, has_side_effects=True)
    return [llvm.extractvalue(result, struct, [i]) for i, result in enumerate(results)]


def _type_i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)
