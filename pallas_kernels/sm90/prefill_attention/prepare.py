"""The preparation of a cache for the prefill kernel: one pass that writes what WGMMA wants.

Codes become E4M3, exactly: keys as they lie and values head_dim-major, because FP8 WGMMA takes no transposed operand.
The scales of keys and values stay apart, as numbers of the scores' columns. ``launch`` says what they are for.
"""

import functools

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float, Int

from pallas_kernels import formats
from pallas_kernels.formats import ScaledArray
from pallas_kernels.sm90.attention.registers import codes_to_e4m3, load_words, transpose_bytes
from pallas_kernels.sm90.common.ptx import SCALAR, asm, const, number, to_e4m3
from pallas_kernels.sm90.prefill_attention.config import SUM_COLUMNS, SUM_STEP, Config, default_config

PREPARED_TOKENS = 128  # of a thread block, one a thread
# Rows of the columns' numbers. The last is one over the value's scale, or the unit of the columns of V that hold that.
KEY_SCALE, LOG_VALUE_SCALE, INVERSE_VALUE_SCALE, UNIT = 0, 1, 2, 2
# log2 of how far a value's scale may lie below the largest of its block. Below, its part of the sums is cut, as its
# probability is 0 in E4M3 unless the score makes up for it; in a finer unit the other values' parts would vanish.
_SCALE_RANGE = 24


def prepare(
    key: ScaledArray,
    value: ScaledArray,
    kv_lengths: Int[Array, " B"],
    config: Config | None = None,
    *,
    slots: int | None = None,
) -> tuple[
    Float[Array, "B kv_heads columns H"],
    Float[Array, "B kv_heads H_sums columns"],
    Float[Array, "B kv_heads 3 columns"],
]:
    """The kernel's K, V^T and their columns' numbers, by one pass over the cache's first ``slots`` (None: all).

    ``columns`` is the number of these rounded up to whole tiles, and H_sums is H and the config's
    ``sum_columns``. The columns' numbers are the key's scale, the logarithm of the value's and one
    over it, or where V has columns for that their unit.
    """
    assert key.scale is not None
    assert value.scale is not None
    batch, kv_heads, capacity, stored = key.values.shape
    blocks = pl.cdiv(capacity if slots is None else slots, PREPARED_TOKENS)
    columns = blocks * PREPARED_TOKENS
    sum_columns = (config or default_config(2 * stored)).sum_columns
    return plgpu.kernel(
        _prepare_kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, columns, 2 * stored), formats.E4M3),
            jax.ShapeDtypeStruct((batch, kv_heads, 2 * stored + sum_columns, columns), formats.E4M3),
            jax.ShapeDtypeStruct((batch, kv_heads, 3, columns), jnp.float32),
        ),
        grid=(blocks, kv_heads, batch),
        grid_names=("block", "head", "batch"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="prepare_attention",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(key.values, key.scale[..., 0], value.values, value.scale[..., 0], kv_lengths.astype(jnp.int32))


def _prepare_kernel(
    k_gmem, k_scale_gmem, v_gmem, v_scale_gmem, kv_lengths_gmem, keys_gmem, values_gmem, columns_gmem,
) -> None:  # fmt: skip
    """One block: ``PREPARED_TOKENS`` tokens of one kv head as the prefill kernel's operands."""
    batch, kv_head = lax.axis_index("batch"), lax.axis_index("head")
    first = lax.axis_index("block") * PREPARED_TOKENS
    ref = plgpu.RefType()

    def own(*refs):
        return (x.at[batch, kv_head] for x in refs)

    columns = functools.partial(prepare_columns, sum_columns=values_gmem.shape[2] > keys_gmem.shape[3])
    plgpu.inline_mgpu(arg_types=(SCALAR, SCALAR, *(ref,) * 4))(columns)(
        first, kv_lengths_gmem[batch], *own(k_scale_gmem, v_scale_gmem, columns_gmem, values_gmem)
    )
    codes = plgpu.inline_mgpu(arg_types=(SCALAR, ref, ref))
    codes(prepare_keys)(first, *own(k_gmem, keys_gmem))
    codes(prepare_values)(first, *own(v_gmem, values_gmem))


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
    for i in range(pl.cdiv(word_columns, 16)):
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
