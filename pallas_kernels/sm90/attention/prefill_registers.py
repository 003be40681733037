"""Register-level pieces of the prefill kernel: P as an operand, and the preparation of the cache.

Tokens of V^T, of P's columns and of the columns' numbers stand in one order, in which a thread's
part of the scores, once cast, is its part of P as WGMMA's A operand (:func:`permute_tokens`).
"""

import functools

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector
from jaxtyping import Array

from pallas_kernels.sm90.attention.registers import (
    codes_to_e4m3,
    fragments,
    load_words,
    thread_position,
    transpose_bytes,
)
from pallas_kernels.sm90.common.ptx import asm, const, f32, number, to_e4m3
from pallas_kernels.sm90.common.ptx import element as element_of

PREPARED_TOKENS = 128  # of a block of the preparation, one a thread
# Rows of the columns' numbers; the last is one or the other.
KEY_SCALE, LOG_VALUE_SCALE, INVERSE_VALUE_SCALE, UNIT = 0, 1, 2, 2
# Columns of P.V that hold the softmax's sums, and how much finer each is than the one before.
SUM_COLUMNS, SUM_STEP = 8, 8.0
# log2 of how far a value's scale may lie below the largest of its block. Below, its part of the sums is cut, as its
# probability is 0 in E4M3 unless the score makes up for it; in a finer unit the other values' parts would vanish.
_SCALE_RANGE = 24


def zeros(_: mgpu.LaunchContext, *, shape: tuple[int, int]) -> mgpu.FragmentedArray:
    """float32 zeros as the start of an accumulator, made where this is called.

    A constant LLVM makes anew in front of each product, in the accumulator's own first register. ptxas does not see
    through that, and writes all the zeros out; it does see through this one, and uses the product's own zero.
    """
    zero = asm([f32()], [], "mov.b32 $0, 0;", "=f", volatile=False)[0]
    return mgpu.FragmentedArray.splat(zero, shape, plgpu.Layout.WGMMA.to_mgpu())


def start_product(
    _: mgpu.LaunchContext,
    a: mgpu.FragmentedArray | ir.Value,
    b: ir.Value,
    initial: mgpu.FragmentedArray,
    *,
    in_flight: bool = False,
) -> mgpu.FragmentedArray:
    """``initial`` + a b^T, which must not be read before :func:`finish_product`; ``b`` (and ``a``) in WGMMA's order.

    ``in_flight`` says that ``initial`` is such a product itself.
    """
    swizzle = ir.MemRefType(b.type).shape[-1]
    product = mgpu.wgmma(
        mgpu.WGMMAAccumulator.from_registers(initial, sync=not in_flight),
        a,
        mgpu.memref_transpose(b, (1, 0, 3, 2)),
        swizzle=swizzle,
    )
    nvvm.wgmma_commit_group_sync_aligned()
    return product.value


def finish_product(_: mgpu.LaunchContext, product: mgpu.FragmentedArray, *, later: int) -> mgpu.FragmentedArray:
    """The product, once at most ``later`` products that were started later still run."""
    nvvm.wgmma_wait_group_sync_aligned(later)
    return mgpu.optimization_barrier(product)


def split_columns(
    _: mgpu.LaunchContext, x: mgpu.FragmentedArray, *, column: int
) -> tuple[mgpu.FragmentedArray, mgpu.FragmentedArray]:
    """The columns in front of ``column`` and those from there on."""
    return x[:, :column], x[:, column:]


def permute_tokens(v: Array) -> Array:
    """Tokens of [..., S] (S a multiple of 16) in the order of :func:`probabilities_to_operand`."""
    tokens = v.shape[-1]
    v = v.reshape(*v.shape[:-1], tokens // 16, 2, 4, 2)  # [i, q, e]
    return jnp.stack([v[..., 0, :, :], v[..., 1, :, :]], axis=-2).reshape(*v.shape[:-4], tokens)


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
        tiles[m, column, h] = to_e4m3([element_of(pairs[i], e) for i in range(2) for e in range(2)])
    # Otherwise LLVM moves the casts behind a wait that follows, away from the exponentials.
    return mgpu.optimization_barrier(fragments(tiles, (rows, tokens)))


def load_columns(_: mgpu.LaunchContext, numbers: ir.Value) -> mgpu.FragmentedArray:
    """float32 [tokens] in shared memory, in :func:`permute_tokens`' order, -> one for each column of P."""
    (tokens,) = ir.MemRefType(numbers.type).shape
    base = utils.memref_ptr(numbers)
    offset = arith.muli(thread_position()[2], const(16))
    f32 = ir.F32Type.get()
    registers = np.empty((tokens // 8,), dtype=object)
    for block in range(tokens // 16):
        words = load_words(base, arith.addi(offset, const(64 * block)), 4)
        values = [utils.bitcast(word, f32) for word in words]
        for i in range(2):
            registers[2 * block + i] = vector.from_elements(ir.VectorType.get((2,), f32), values[2 * i : 2 * i + 2])
    layout = mgpu.WGMMA_COL_LAYOUT
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape((tokens,))), _layout=layout, _is_signed=None
    )


def load_rows(
    _: mgpu.LaunchContext, first: mgpu.FragmentedArray, head: mgpu.FragmentedArray, scales: ir.Value
) -> mgpu.FragmentedArray:
    """Column ``head`` of float32 [T, heads], rows ``first`` ... as one number a row; past the end the last."""
    length, heads = ir.MemRefType(scales.type).shape
    warp, g = thread_position()[:2]
    f32 = ir.F32Type.get()
    layout = plgpu.Layout.WGMMA.reduce(1).to_mgpu()
    one = ir.VectorType.get((1,), f32)
    registers = []
    for h in range(2):
        row = arith.addi(arith.addi(arith.muli(warp, const(16)), g), const(8 * h))
        row = arith.minsi(arith.addi(row, first.registers.item()), const(length - 1))
        index = arith.addi(arith.muli(row, const(heads)), head.registers.item())
        value = llvm.load(f32, utils.getelementptr(utils.memref_ptr(scales), [index], f32))
        registers.append(vector.broadcast(one, value))
    shape = layout.registers_shape((64,))
    return mgpu.FragmentedArray(_registers=np.array(registers, object).reshape(shape), _layout=layout, _is_signed=None)


def prepare_columns(
    _: mgpu.LaunchContext,
    first: mgpu.FragmentedArray,
    length: mgpu.FragmentedArray,
    k_scale: ir.Value,
    v_scale: ir.Value,
    columns: ir.Value,
    values: ir.Value,
    *,
    sum_columns: bool,
) -> None:
    """Of ``PREPARED_TOKENS`` tokens from ``first`` on: the numbers of ``columns``, float32 [3, S'].

    They are the key's scale, log2 of the value's and one over it; 1, 0 and 1 from ``length`` on, where a cache may
    hold anything. With ``sum_columns``, one over the value's scale goes to the last rows of ``values`` instead, and
    its unit to ``columns`` (:func:`_store_sum_columns`).
    """
    slots, padded = ir.MemRefType(k_scale.type).shape[0], ir.MemRefType(columns.type).shape[1]
    i16, i32, f32 = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(32), ir.F32Type.get()
    position = arith.remui(utils.thread_idx(), const(PREPARED_TOKENS))

    def scale(ref: ir.Value, token: ir.Value) -> ir.Value:
        token = arith.addi(token, first.registers.item())
        valid = arith.cmpi(arith.CmpIPredicate.slt, token, length.registers.item())
        row = arith.minsi(token, const(slots - 1))
        loaded = llvm.load(i16, utils.getelementptr(utils.memref_ptr(ref), [row], i16))
        bits = arith.shli(arith.extui(i32, loaded), const(16))
        return arith.select(valid, utils.bitcast(bits, f32), number(1.0))

    # Position 16 b + 4 q + 2 i + e holds token 16 b + 8 i + 2 q + e.
    block_and_e, i, q = (arith.andi(position, const(mask)) for mask in (0xFFFFFFF1, 2, 12))
    token = arith.ori(block_and_e, arith.ori(arith.shli(i, const(2)), arith.shrui(q, const(1))))
    column = arith.addi(position, first.registers.item())
    value = scale(v_scale, token)
    last = arith.divf(number(1.0), value)
    if sum_columns:
        # Each warp reads the whole block's scales.
        lane = arith.andi(position, const(31))
        scales = [scale(v_scale, arith.addi(lane, const(32 * i))) for i in range(PREPARED_TOKENS // 32)]
        last = _store_sum_columns(values, column, last, scales)
    for which, numbers in ((KEY_SCALE, scale(k_scale, token)), (LOG_VALUE_SCALE, _log2(value)), (UNIT, last)):
        index = arith.addi(column, const(which * padded))
        llvm.store(numbers, utils.getelementptr(utils.memref_ptr(columns), [index], f32))


def _store_sum_columns(values: ir.Value, column: ir.Value, x: ir.Value, scales: list[ir.Value]) -> ir.Value:
    """Positive ``x`` to ``column`` of the last ``SUM_COLUMNS`` rows of E4M3 ``values`` [H', S'], in the unit returned.

    Row i holds a part of x in units of ``SUM_STEP`` ** -i times that one, which is a power of two; their sum is x. A
    warp's ``scales`` are a block's, of which x is one's inverse.
    """
    i8, i32, f32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32), ir.F32Type.get()
    rows, padded = ir.MemRefType(values.type).shape
    # Positive numbers are in the order of their bits.
    bits = [utils.bitcast(scale, i32) for scale in scales]
    least = utils.bitcast(_warp_reduce("min", functools.reduce(arith.minui, bits)), f32)
    most = utils.bitcast(_warp_reduce("max", functools.reduce(arith.maxui, bits)), f32)
    least = arith.maximumf(least, arith.mulf(most, number(2.0**-_SCALE_RANGE)))
    # The block's largest x is 128 to 256 of its units.
    power = arith.andi(utils.bitcast(arith.divf(number(1.0), least), i32), const(0x7F800000))
    inverse_power = utils.bitcast(arith.subi(const(0x7F000000), power), f32)
    rest = arith.minimumf(arith.mulf(arith.mulf(x, number(128.0)), inverse_power), number(256.0))
    for i in range(SUM_COLUMNS):
        # Cut to E4M3's mantissa, so that it is exact there; below E4M3's normal numbers the next row takes it.
        part = utils.bitcast(arith.andi(utils.bitcast(rest, i32), const(0xFFF00000)), f32)
        part = arith.select(arith.cmpf(arith.CmpFPredicate.OGT, rest, number(2.0**-6)), part, number(0.0))
        index = arith.addi(column, const((rows - SUM_COLUMNS + i) * padded))
        byte = arith.trunci(i8, to_e4m3([part] * 4))
        llvm.store(byte, utils.getelementptr(utils.memref_ptr(values), [index], i8))
        rest = arith.mulf(arith.subf(rest, part), number(SUM_STEP))
    return arith.mulf(utils.bitcast(power, f32), number(1 / 128))


def prepare_keys(_: mgpu.LaunchContext, first: mgpu.FragmentedArray, packed: ir.Value, keys: ir.Value) -> None:
    """INT4 codes [S, H/2] of ``PREPARED_TOKENS`` tokens -> E4M3 [S', H] of ``CODE_UNIT`` times the codes, exactly."""
    slots, stored = ir.MemRefType(packed.type).shape
    thread = arith.remui(utils.thread_idx(), const(PREPARED_TOKENS))
    chunks = stored // 16
    source, target = utils.memref_ptr(packed), utils.memref_ptr(keys)
    for i in range(chunks):
        unit = arith.addi(thread, const(i * PREPARED_TOKENS))
        token = arith.addi(arith.divui(unit, const(chunks)), first.registers.item())
        column = arith.muli(arith.remui(unit, const(chunks)), const(16))
        row = arith.minsi(token, const(slots - 1))
        words = load_words(source, arith.addi(arith.muli(row, const(stored)), column), 4)
        converted = [codes_to_e4m3(word) for word in words]
        offset = arith.addi(arith.muli(token, const(2 * stored)), column)
        for half in range(2):
            _store_words(target, arith.addi(offset, const(half * stored)), [pair[half] for pair in converted])


def prepare_values(_: mgpu.LaunchContext, first: mgpu.FragmentedArray, packed: ir.Value, values: ir.Value) -> None:
    """The same codes -> E4M3 V^T [H, S'], tokens in :func:`permute_tokens`' order."""
    slots, stored = ir.MemRefType(packed.type).shape
    padded = ir.MemRefType(values.type).shape[1]
    thread = arith.remui(utils.thread_idx(), const(PREPARED_TOKENS))
    block = arith.muli(arith.remui(thread, const(PREPARED_TOKENS // 16)), const(16))
    token = arith.addi(block, first.registers.item())
    source, target = utils.memref_ptr(packed), utils.memref_ptr(values)
    word_columns = stored // 4
    for i in range(-(-word_columns // 16)):
        # Where a row has fewer words than 16, two threads do the same.
        column = arith.addi(arith.divui(thread, const(8)), const(16 * i))
        byte = arith.muli(arith.remui(column, const(word_columns)), const(4))

        def load(t: int, byte: ir.Value = byte) -> ir.Value:
            row = arith.minsi(arith.addi(token, const(t)), const(slots - 1))
            return load_words(source, arith.addi(arith.muli(row, const(stored)), byte), 1)[0]

        channels: dict[tuple[int, int], list[ir.Value]] = {(b, n): [] for b in range(4) for n in range(2)}
        for q in range(4):
            loaded = [load(t) for t in (2 * q, 2 * q + 1, 2 * q + 8, 2 * q + 9)]
            for b, word in enumerate(transpose_bytes(loaded, 4)):
                for n, codes in enumerate(codes_to_e4m3(word)):
                    channels[b, n].append(codes)
        for (b, n), words in channels.items():
            channel = arith.addi(byte, const(b + n * stored))
            _store_words(target, arith.addi(arith.muli(channel, const(padded)), token), words)


def _store_words(base: ir.Value, offset: ir.Value, words: list[ir.Value]) -> None:
    """Four words to 16 consecutive bytes."""
    quad = vector.from_elements(ir.VectorType.get((4,), ir.IntegerType.get_signless(32)), words)
    llvm.store(quad, utils.getelementptr(base, [offset], ir.IntegerType.get_signless(8)), alignment=16)


def _warp_reduce(operation: str, x: ir.Value) -> ir.Value:
    """The least ("min") or the greatest ("max") of a warp's unsigned words."""
    return asm([x.type], [x], f"redux.sync.{operation}.u32 $0, $1, 0xffffffff;", "=r,r", volatile=True)[0]


def _log2(x: ir.Value) -> ir.Value:
    result = llvm.inline_asm(ir.F32Type.get(), [x], "lg2.approx.f32 $0, $1;", "=f,f")
    assert isinstance(result, ir.Value)
    return result
