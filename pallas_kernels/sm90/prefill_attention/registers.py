"""The prefill kernel's registers: products in flight, P as an operand, and numbers of rows and columns.

Tokens of V^T, of P's columns and of the columns' numbers stand in one order, in which a thread's
part of the scores, once cast, is its part of P as WGMMA's A operand (:func:`permute_tokens`).
"""

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector
from jaxtyping import Array

from pallas_kernels.sm90.attention.registers import fragments, load_words, thread_position
from pallas_kernels.sm90.common.ptx import ROWS, asm, const, f32, to_e4m3
from pallas_kernels.sm90.common.ptx import element as element_of


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
    layout = ROWS.to_mgpu()
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
