"""INT4 codes as WGMMA's operands, in registers: what both attention kernels and the preparation share.

A code's bits (``formats.pack_int4``) are those of an E4M3 subnormal, worth code * 2^-9 (``CODE_UNIT``) exactly, so that
codes turn into E4M3 by masks. A thread of a warpgroup is thread 32 w + 4 g + q: warp w and, in that, group g of four.
"""

import jax.experimental.mosaic.gpu as mgpu
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.sm90.common.ptx import const
from pallas_kernels.sm90.common.ptx import element as element_of

# E4M3 value of the byte that code 1 turns into.
CODE_UNIT = 2.0**-9


def thread_position() -> tuple[ir.Value, ir.Value, ir.Value]:
    """(w, g, q) of the thread in its warpgroup."""
    thread = arith.remui(utils.thread_idx(), const(128))
    lane = arith.remui(thread, const(32))
    return arith.divui(thread, const(32)), arith.divui(lane, const(4)), arith.remui(lane, const(4))


def codes_to_e4m3(word: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Four bytes of ``formats.pack_int4`` -> four E4M3 bytes each of the first and of the second codes."""
    left, right = arith.shli(word, const(4)), arith.shrui(word, const(4))
    second = arith.ori(arith.andi(right, const(0x07070707)), arith.andi(left, const(0x80808080)))
    return arith.andi(word, const(0x87878787)), second


def transpose_bytes(loaded: list[ir.Value], width: int) -> list[ir.Value]:
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


def load_words(base: ir.Value, offset: ir.Value, words: int) -> list[ir.Value]:
    """``words`` consecutive 32-bit words of shared memory, by loads of up to 16 bytes."""
    i8, i32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32)
    per_load = min(words, 4)
    vector_type = ir.VectorType.get((per_load,), i32)
    result = []
    for first in range(0, words, per_load):
        pointer = utils.getelementptr(base, [arith.addi(offset, const(4 * first))], i8)
        loaded = llvm.load(vector_type, pointer, alignment=4 * per_load)
        result += [element_of(loaded, i) for i in range(per_load)]
    return result


def fragments(tiles: np.ndarray, shape: tuple[int, int]) -> mgpu.FragmentedArray:
    """Words [rows/64, columns/16, half] as an E4M3 array in WGMMA_8BIT layout."""
    e4m3 = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
    registers = np.empty(tiles.shape, dtype=object)
    for index, word in np.ndenumerate(tiles):
        registers[index] = utils.bitcast(word, e4m3)
    layout = mgpu.WGMMA_LAYOUT_8BIT
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None
    )


def _prmt(a: ir.Value, b: ir.Value, selector: int) -> ir.Value:
    """Bytes of ``a`` (0-3) and ``b`` (4-7) picked by the selector's nibbles, lowest byte first."""
    return utils.prmt(a, b, const(selector))
