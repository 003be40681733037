"""Register-level pieces of the attention kernels: INT4 codes and probabilities as WGMMA operands.

The cache rows are read as they are stored ([tokens, H/2] bytes, element i in the low nibble and
i + H/2 in the high one). Three freedoms make this cheap:

* An INT4 nibble (sign, 3-bit magnitude) becomes E4M3 by moving its sign to bit 7: the magnitude
  is then the mantissa of a subnormal, so the byte is worth code * 2^-9 (``CODE_UNIT``), exactly.
* The order of a contraction index is free if both operands share it. For S^T = K Q^T a thread
  takes whichever channels lie together in the row, and Q's channels are permuted to match
  (:func:`permute_channels`). For O^T = V^T P^T a thread of P's accumulator holds, for one query,
  four tokens of every 128; they become four neighbours of the contraction index, one word of P.
* The order of the rows of O^T is free as well: :func:`restore_channels` undoes it.

Notation below: warp w, lane = 4 * g + q, half h (rows r and r + 8 of a fragment), byte e of a word.
"""

import math

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float, UInt8

from pallas_kernels import formats

# E4M3 value of the byte that code 1 turns into.
CODE_UNIT = 2.0**-9
# Tokens whose probabilities fill whole words of P: 2 (m64 blocks) x 2 (halves) a thread.
TOKEN_BLOCK = 128


def permute_channels(q: Array) -> Array:
    """Channels of [..., H] in the order in which :func:`load_keys` presents a key's."""
    *rows, head_dim = q.shape
    q = q.reshape(*rows, 2, 4, head_dim // 32, 4)  # [nibble, q, word, e]
    return q.swapaxes(-2, -3).reshape(*rows, head_dim)


def restore_channels(out: Array) -> Array:
    """Undo the row order of :func:`load_values`: [..., H, N] -> [..., H, N], channels in order."""
    *rows, head_dim, n = out.shape
    out = out.reshape(*rows, head_dim // 64, 4, 2, 8, n)  # [byte, w, nibble, g]
    axes = (*range(len(rows)), *(len(rows) + axis for axis in (2, 1, 3, 0, 4)))
    return out.transpose(axes).reshape(*rows, head_dim, n)


def load_keys(_: mgpu.LaunchContext, keys: ir.Value, *, head_dim: int) -> mgpu.FragmentedArray:
    """Keys, H/2 bytes a token in shared memory, as E4M3 [tokens, H] in WGMMA_8BIT layout.

    The thread's part of a row is H/8 contiguous bytes: word j gives the four channels of column
    tile j (low nibbles) and of column tile j + H/32 (high nibbles).
    """
    tokens, stored = _tokens(keys, head_dim), head_dim // 2
    words = stored // 16
    base = utils.memref_ptr(keys)
    warp, g, q = _thread()
    row = arith.addi(arith.muli(warp, _i32(16)), g)
    offset = arith.addi(arith.muli(row, _i32(stored)), arith.muli(q, _i32(4 * words)))
    tiles = np.empty((tokens // 64, 2 * words, 2), dtype=object)
    for m, h in np.ndindex(tokens // 64, 2):
        loaded = _load_words(base, arith.addi(offset, _i32((64 * m + 8 * h) * stored)), words)
        for j, word in enumerate(loaded):
            tiles[m, j, h], tiles[m, words + j, h] = _codes_to_e4m3(word)
    return _fragments(tiles, (tokens, 2 * stored))


def load_values(_: mgpu.LaunchContext, values: ir.Value, *, head_dim: int) -> mgpu.FragmentedArray:
    """Values, H/2 bytes a token in shared memory, as E4M3 V^T [H, tokens] in WGMMA_8BIT layout.

    Row 64 b + 16 w + 8 h + g of the result is the channel in nibble h of byte
    (8 w + g) * H/64 + b. Column 128 i + 4 (8 w + g) + e is token
    128 i + 64 (e // 2) + 16 w + 8 (e % 2) + g: the order of :func:`store_probabilities`.
    """
    tokens, stored = _tokens(values, head_dim), head_dim // 2
    width = stored // 32  # bytes of a token that a thread takes
    base = utils.memref_ptr(values)
    warp, g, q = _thread()
    column = arith.muli(arith.addi(arith.muli(warp, _i32(8)), g), _i32(width))
    offset = arith.addi(arith.muli(q, _i32(stored)), column)
    tiles = np.empty((width, tokens // 16, 2), dtype=object)
    for tile in range(tokens // 16):
        # The column tile holds columns 16 * tile + 4 * q + e: w = tile // 2 % 4, g = 4 * (tile % 2) + q.
        first = tile // 8 * TOKEN_BLOCK + 16 * (tile // 2 % 4) + 4 * (tile % 2)
        token = [first + 64 * (e // 2) + 8 * (e % 2) for e in range(4)]
        loaded = [_load_narrow(base, arith.addi(offset, _i32(t * stored)), width) for t in token]
        for b, word in enumerate(_transpose_bytes(loaded, width)):
            tiles[b, tile, 0], tiles[b, tile, 1] = _codes_to_e4m3(word)
    return _fragments(tiles, (2 * stored, tokens))


def store_probabilities(_: mgpu.LaunchContext, p: mgpu.FragmentedArray, p_smem: ir.Value) -> None:
    """P^T [tokens, N] float32 (WGMMA layout) -> E4M3 P [N, tokens] in shared memory.

    ``p_smem`` is tiled (8, 128) with 128-byte swizzle: [N/8, tokens/128, 8, 128]. Each thread
    writes whole words: for one query, the four tokens it holds of every 128.
    """
    blocks, column_tiles = p.shape[0] // TOKEN_BLOCK, p.shape[1] // 8
    registers = p.registers.reshape(blocks, 2, column_tiles, 2)
    base = utils.memref_ptr(p_smem)
    warp, g, q = _thread()
    chunk = arith.addi(arith.muli(warp, _i32(2)), arith.shrui(g, _i32(2)))
    within = arith.muli(arith.andi(g, _i32(3)), _i32(4))
    i8 = ir.IntegerType.get_signless(8)
    for j in range(2):
        row = arith.addi(arith.muli(q, _i32(2)), _i32(j))  # of 8
        swizzled = arith.muli(arith.xori(chunk, row), _i32(16))
        offset = arith.addi(arith.addi(arith.muli(row, _i32(128)), swizzled), within)
        for block, tile in np.ndindex(blocks, column_tiles):
            word = _to_e4m3_word([_element(registers[block, m, tile, h], j) for m in range(2) for h in range(2)])
            position = arith.addi(offset, _i32((tile * blocks + block) * 8 * 128))
            llvm.store(word, utils.getelementptr(base, [position], i8), alignment=4)


def _tokens(packed: ir.Value, head_dim: int) -> int:
    return math.prod(ir.MemRefType(packed.type).shape) // (head_dim // 2)


def _thread() -> tuple[ir.Value, ir.Value, ir.Value]:
    """(w, g, q) of the thread in its warpgroup."""
    thread = arith.remui(utils.thread_idx(), _i32(128))
    lane = arith.remui(thread, _i32(32))
    return arith.divui(thread, _i32(32)), arith.divui(lane, _i32(4)), arith.remui(lane, _i32(4))


def _codes_to_e4m3(word: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Four bytes of two INT4 codes -> four E4M3 bytes each of the low and of the high codes."""
    left, right = arith.shli(word, _i32(4)), arith.shrui(word, _i32(4))
    low = arith.ori(arith.andi(word, _i32(0x07070707)), arith.andi(left, _i32(0x80808080)))
    high = arith.ori(arith.andi(right, _i32(0x07070707)), arith.andi(word, _i32(0x80808080)))
    return low, high


def _transpose_bytes(loaded: list[ir.Value], width: int) -> list[ir.Value]:
    """Word b holds byte b of each of the four words ``loaded``, for b < width."""
    t0, t1, t2, t3 = loaded
    if width == 1:
        return [_prmt(_prmt(t0, t1, 0x0040), _prmt(t2, t3, 0x0040), 0x5410)]
    front = _prmt(t0, t1, 0x5140), _prmt(t2, t3, 0x5140)  # bytes 0 0 1 1
    result = [_prmt(*front, 0x5410), _prmt(*front, 0x7632)]
    if width == 4:
        back = _prmt(t0, t1, 0x7362), _prmt(t2, t3, 0x7362)  # bytes 2 2 3 3
        result += [_prmt(*back, 0x5410), _prmt(*back, 0x7632)]
    return result


def _to_e4m3_word(elements: list[ir.Value]) -> ir.Value:
    """Four float32 -> one word of E4M3, the first in the lowest byte."""
    # A conversion puts its first operand in the upper byte.
    assembly = """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
    }"""
    word = llvm.inline_asm(ir.IntegerType.get_signless(32), elements, assembly, "=r,f,f,f,f")
    assert isinstance(word, ir.Value)
    return word


def _load_words(base: ir.Value, offset: ir.Value, words: int) -> list[ir.Value]:
    """``words`` consecutive 32-bit words of shared memory, by loads of up to 16 bytes."""
    i8, i32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32)
    per_load = min(words, 4)
    vector_type = ir.VectorType.get((per_load,), i32)
    result = []
    for first in range(0, words, per_load):
        pointer = utils.getelementptr(base, [arith.addi(offset, _i32(4 * first))], i8)
        loaded = llvm.load(vector_type, pointer, alignment=4 * per_load)
        result += [_element(loaded, i) for i in range(per_load)]
    return result


def _load_narrow(base: ir.Value, offset: ir.Value, width: int) -> ir.Value:
    """``width`` (1, 2 or 4) bytes of shared memory in the low bytes of a word."""
    i8, i32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32)
    pointer = utils.getelementptr(base, [offset], i8)
    loaded = llvm.load(ir.IntegerType.get_signless(8 * width), pointer, alignment=width)
    return loaded if width == 4 else arith.extui(i32, loaded)


def _fragments(tiles: np.ndarray, shape: tuple[int, int]) -> mgpu.FragmentedArray:
    """Words [rows/64, columns/16, half] as an E4M3 array in WGMMA_8BIT layout."""
    e4m3 = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
    registers = np.empty(tiles.shape, dtype=object)
    for index, word in np.ndenumerate(tiles):
        registers[index] = utils.bitcast(word, e4m3)
    layout = mgpu.WGMMA_LAYOUT_8BIT
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
    )


def _element(vec: ir.Value, i: int) -> ir.Value:
    return vector.extract(vec, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def _prmt(a: ir.Value, b: ir.Value, selector: int) -> ir.Value:
    """Bytes of ``a`` (0-3) and ``b`` (4-7) picked by the selector's nibbles, lowest byte first."""
    return utils.prmt(a, b, _i32(selector))


def _i32(value: int) -> ir.Value:
    return utils.c(value, ir.IntegerType.get_signless(32))
