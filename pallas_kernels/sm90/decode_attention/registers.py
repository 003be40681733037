"""The decode kernel's registers: INT4 codes and probabilities as WGMMA operands, queries in and outputs out.

The cache rows are read as they are stored ([tokens, H/2] bytes of elements i and i + H/2). Three
freedoms make this cheap:

* A code turns into an E4M3 number by masks alone (``attention.registers``).
* The order of a contraction index is free if both operands share it. For S^T = K Q^T a thread
  takes whichever channels lie together in the row, and Q's channels are permuted to match
  (:func:`store_queries`). For O^T = V^T P^T a thread of P's accumulator holds, for one query,
  four tokens of every 128; they become four neighbours of the contraction index, one word of P.
* The order of the rows of O^T is free as well: :func:`store_output` undoes it.

Notation below: warp w, lane = 4 * g + q, half h (rows r and r + 8 of a fragment), byte e of a word.
"""

import math
from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from pallas_kernels.sm90.attention.registers import (
    codes_to_e4m3,
    fragments,
    load_words,
    thread_position,
    transpose_bytes,
)
from pallas_kernels.sm90.common.ptx import const, raw_array, to_e4m3
from pallas_kernels.sm90.common.ptx import element as element_of

# Tokens whose probabilities fill whole words of P: 2 (m64 blocks) x 2 (halves) a thread.
TOKEN_BLOCK = 128


def load_queries(
    _: mgpu.LaunchContext,
    first_row: mgpu.FragmentedArray,
    first_head: mgpu.FragmentedArray,
    queries: ir.Value,
    *,
    rows: int,
    group: int,
) -> mgpu.FragmentedArray:
    """Start to load rows of E4M3 queries [T, heads, H]; words of them, for :func:`store_queries`.

    Row r, from ``first_row`` on, is the query of token r // group and head ``first_head`` + r % group;
    past the last token any. Nothing is done to the words here, so that nothing waits for them.
    """
    length, heads, head_dim = ir.MemRefType(queries.type).shape
    words, i32 = head_dim // 4, ir.IntegerType.get_signless(32)
    source, thread = utils.memref_ptr(queries), arith.remui(utils.thread_idx(), const(128))
    loaded = []
    for i in range(rows * words // 128):
        unit = arith.addi(thread, const(128 * i))
        row = arith.addi(arith.divui(unit, const(words)), first_row.registers.item())
        row = arith.minui(row, const(length * group - 1))
        head = arith.addi(arith.remui(row, const(group)), first_head.registers.item())
        index = arith.addi(arith.muli(arith.divui(row, const(group)), const(heads)), head)
        index = arith.addi(arith.muli(index, const(words)), arith.remui(unit, const(words)))
        loaded.append(llvm.load(i32, utils.getelementptr(source, [index], i32)))
    return raw_array(loaded, query_layout(rows, head_dim))


def query_layout(rows: int, head_dim: int) -> Any:
    """Of :func:`load_queries`' words, int32 [rows * H / 4]."""
    return plgpu.Layout.WG_STRIDED((rows * head_dim // 4,), vec_size=1)


def store_queries(
    _: mgpu.LaunchContext,
    first_row: mgpu.FragmentedArray,
    loaded: mgpu.FragmentedArray,
    q_smem: ir.Value,
    *,
    valid_rows: int,
    head_dim: int,
) -> None:
    """What :func:`load_queries` has loaded to shared memory, channels in :func:`load_keys`' order.

    From row ``valid_rows`` on, of which ``first_row`` are before the first, queries are 0. ``q_smem`` is tiled
    (8, 128) with 128-byte swizzle, or (8, 64) with 64-byte swizzle.
    """
    width = ir.MemRefType(q_smem.type).shape[-1]
    words, i8 = head_dim // 4, ir.IntegerType.get_signless(8)
    target, thread = utils.memref_ptr(q_smem), arith.remui(utils.thread_idx(), const(128))
    for i, register in enumerate(loaded.registers.flat):
        unit = arith.addi(thread, const(128 * i))
        row, word = arith.divui(unit, const(words)), arith.remui(unit, const(words))
        valid = arith.addi(row, first_row.registers.item())
        valid = arith.cmpi(arith.CmpIPredicate.ult, valid, const(valid_rows))
        number = arith.select(valid, element_of(register, 0), const(0))
        # Word [half, q, j] of a row becomes word [half, j, q].
        half, j_words = const(words // 2), const(words // 8)
        rest = arith.remui(word, half)
        moved = arith.addi(
            arith.muli(arith.divui(word, half), half),
            arith.addi(arith.muli(arith.remui(rest, j_words), const(4)), arith.divui(rest, j_words)),
        )
        byte = arith.muli(moved, const(4))
        tile, within = arith.divui(byte, const(width)), arith.remui(byte, const(width))
        tile = arith.addi(arith.muli(arith.divui(row, const(8)), const(head_dim // width)), tile)
        row = arith.remui(row, const(8))
        swizzled = row if width == 128 else arith.shrui(row, const(1))
        within = arith.xori(within, arith.muli(swizzled, const(16)))
        offset = arith.addi(arith.addi(arith.muli(tile, const(8 * width)), arith.muli(row, const(width))), within)
        llvm.store(number, utils.getelementptr(target, [offset], i8), alignment=4)


def load_row_numbers(
    _: mgpu.LaunchContext,
    first_row: mgpu.FragmentedArray,
    first_head: mgpu.FragmentedArray,
    numbers: ir.Value,
    *,
    rows: int,
    group: int,
) -> mgpu.FragmentedArray:
    """Those of the float32 ``numbers`` [T, heads] that belong to :func:`load_queries`' rows, the columns of S^T."""
    length, heads = ir.MemRefType(numbers.type).shape
    f32 = ir.F32Type.get()
    registers = np.empty((rows // 8,), dtype=object)
    for tile in range(rows // 8):
        values = []
        for e in range(2):
            row = arith.addi(arith.muli(thread_position()[2], const(2)), const(8 * tile + e))
            row = arith.minui(arith.addi(row, first_row.registers.item()), const(length * group - 1))
            head = arith.addi(arith.remui(row, const(group)), first_head.registers.item())
            index = arith.addi(arith.muli(arith.divui(row, const(group)), const(heads)), head)
            values.append(llvm.load(f32, utils.getelementptr(utils.memref_ptr(numbers), [index], f32)))
        registers[tile] = vector.from_elements(ir.VectorType.get((2,), f32), values)
    layout = mgpu.WGMMA_COL_LAYOUT
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape((rows,))), _layout=layout, _is_signed=None
    )


def store_output(
    _: mgpu.LaunchContext,
    output: mgpu.FragmentedArray,
    first_row: mgpu.FragmentedArray,
    first_head: mgpu.FragmentedArray,
    target: ir.Value,
    *,
    group: int,
) -> None:
    """O^T [H, N], rows in :func:`load_values`' order, to ``target`` [T, heads, H] (float32 or bfloat16).

    Column n is the token and head of row ``first_row`` + n, as in :func:`load_queries`.
    """
    head_dim = output.shape[0]
    length, heads = ir.MemRefType(target.type).shape[:2]
    element = ir.MemRefType(target.type).element_type
    width = head_dim // 64  # channels that lie together in a thread
    registers = output.registers.reshape(width, -1, 2)
    warp, g, q = thread_position()
    channel = arith.muli(arith.addi(arith.muli(warp, const(8)), g), const(width))
    base = utils.memref_ptr(target)
    for tile, e in np.ndindex(registers.shape[1], 2):
        row = arith.addi(arith.muli(q, const(2)), arith.addi(first_row.registers.item(), const(8 * tile + e)))
        head = arith.addi(arith.remui(row, const(group)), first_head.registers.item())
        index = arith.addi(arith.muli(arith.divui(row, const(group)), const(heads)), head)
        index = arith.addi(arith.muli(index, const(head_dim)), channel)
        valid = arith.cmpi(arith.CmpIPredicate.ult, row, const(length * group))
        branch = scf.IfOp(valid)
        with ir.InsertionPoint(branch.then_block):
            for h in range(2):
                values = [element_of(registers[b, tile, h], e) for b in range(width)]
                if element != ir.F32Type.get():
                    values = [arith.truncf(element, value) for value in values]
                pointer = utils.getelementptr(base, [arith.addi(index, const(h * head_dim // 2))], element)
                together = vector.from_elements(ir.VectorType.get((width,), element), values)
                llvm.store(together, pointer, alignment=width * utils.bitwidth(element) // 8)
            scf.YieldOp([])


def store_column_numbers(
    _: mgpu.LaunchContext, numbers: mgpu.FragmentedArray, first_row: mgpu.FragmentedArray, target: ir.Value
) -> None:
    """One number a column -> float32 ``target`` [rows] from ``first_row`` on, as far as it has rows."""
    (rows,) = ir.MemRefType(target.type).shape
    f32 = ir.F32Type.get()
    warp, g, q = thread_position()
    for tile, register in enumerate(numbers.registers.reshape(-1)):
        for e in range(2):
            row = arith.addi(arith.muli(q, const(2)), arith.addi(first_row.registers.item(), const(8 * tile + e)))
            valid = arith.cmpi(arith.CmpIPredicate.ult, row, const(rows))
            # The same in every row of the matrix: one thread writes it.
            first = arith.cmpi(arith.CmpIPredicate.eq, arith.addi(warp, g), const(0))
            branch = scf.IfOp(arith.andi(valid, first))
            with ir.InsertionPoint(branch.then_block):
                llvm.store(element_of(register, e), utils.getelementptr(utils.memref_ptr(target), [row], f32))
                scf.YieldOp([])


def load_keys(_: mgpu.LaunchContext, keys: ir.Value, *, head_dim: int) -> mgpu.FragmentedArray:
    """Keys, H/2 bytes a token in shared memory, as E4M3 [tokens, H] in WGMMA_8BIT layout.

    The thread's part of a row is H/8 contiguous bytes: word j gives the four channels of column
    tile j (first codes) and of column tile j + H/32 (second codes).
    """
    tokens, stored = _tokens(keys, head_dim), head_dim // 2
    words = stored // 16
    base = utils.memref_ptr(keys)
    warp, g, q = thread_position()
    row = arith.addi(arith.muli(warp, const(16)), g)
    offset = arith.addi(arith.muli(row, const(stored)), arith.muli(q, const(4 * words)))
    tiles = np.empty((tokens // 64, 2 * words, 2), dtype=object)
    for m, h in np.ndindex(tokens // 64, 2):
        loaded = load_words(base, arith.addi(offset, const((64 * m + 8 * h) * stored)), words)
        for j, word in enumerate(loaded):
            tiles[m, j, h], tiles[m, words + j, h] = codes_to_e4m3(word)
    return fragments(tiles, (tokens, 2 * stored))


def load_values(_: mgpu.LaunchContext, values: ir.Value, *, head_dim: int) -> mgpu.FragmentedArray:
    """Values, H/2 bytes a token in shared memory, as E4M3 V^T [H, tokens] in WGMMA_8BIT layout.

    Row 64 b + 16 w + 8 h + g of the result is the channel of code h of byte
    (8 w + g) * H/64 + b. Column 128 i + 4 (8 w + g) + e is token
    128 i + 64 (e // 2) + 16 w + 8 (e % 2) + g: the order of :func:`store_probabilities`.
    """
    tokens, stored = _tokens(values, head_dim), head_dim // 2
    width = stored // 32  # bytes of a token that a thread takes
    base = utils.memref_ptr(values)
    warp, g, q = thread_position()
    column = arith.muli(arith.addi(arith.muli(warp, const(8)), g), const(width))
    offset = arith.addi(arith.muli(q, const(stored)), column)
    tiles = np.empty((width, tokens // 16, 2), dtype=object)
    for tile in range(tokens // 16):
        # The column tile holds columns 16 * tile + 4 * q + e: w = tile // 2 % 4, g = 4 * (tile % 2) + q.
        first = tile // 8 * TOKEN_BLOCK + 16 * (tile // 2 % 4) + 4 * (tile % 2)
        token = [first + 64 * (e // 2) + 8 * (e % 2) for e in range(4)]
        loaded = [_load_narrow(base, arith.addi(offset, const(t * stored)), width) for t in token]
        for b, word in enumerate(transpose_bytes(loaded, width)):
            tiles[b, tile, 0], tiles[b, tile, 1] = codes_to_e4m3(word)
    return fragments(tiles, (2 * stored, tokens))


def store_probabilities(_: mgpu.LaunchContext, p: mgpu.FragmentedArray, p_smem: ir.Value) -> None:
    """P^T [tokens, N] float32 (WGMMA layout) -> E4M3 P [N, tokens] in shared memory.

    ``p_smem`` is tiled (8, 128) with 128-byte swizzle: [N/8, tokens/128, 8, 128]. Each thread
    writes whole words: for one query, the four tokens it holds of every 128.
    """
    blocks, column_tiles = p.shape[0] // TOKEN_BLOCK, p.shape[1] // 8
    registers = p.registers.reshape(blocks, 2, column_tiles, 2)
    base = utils.memref_ptr(p_smem)
    warp, g, q = thread_position()
    chunk = arith.addi(arith.muli(warp, const(2)), arith.shrui(g, const(2)))
    within = arith.muli(arith.andi(g, const(3)), const(4))
    i8 = ir.IntegerType.get_signless(8)
    for j in range(2):
        row = arith.addi(arith.muli(q, const(2)), const(j))  # of 8
        swizzled = arith.muli(arith.xori(chunk, row), const(16))
        offset = arith.addi(arith.addi(arith.muli(row, const(128)), swizzled), within)
        for block, tile in np.ndindex(blocks, column_tiles):
            word = to_e4m3([element_of(registers[block, m, tile, h], j) for m in range(2) for h in range(2)])
            position = arith.addi(offset, const((tile * blocks + block) * 8 * 128))
            llvm.store(word, utils.getelementptr(base, [position], i8), alignment=4)


def _tokens(packed: ir.Value, head_dim: int) -> int:
    return math.prod(ir.MemRefType(packed.type).shape) // (head_dim // 2)


def _load_narrow(base: ir.Value, offset: ir.Value, width: int) -> ir.Value:
    """``width`` (1, 2 or 4) bytes of shared memory in the low bytes of a word."""
    i8, i32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32)
    pointer = utils.getelementptr(base, [offset], i8)
    loaded = llvm.load(ir.IntegerType.get_signless(8 * width), pointer, alignment=width)
    return loaded if width == 4 else arith.extui(i32, loaded)
