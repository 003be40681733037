"""The float32 sums of the Hopper matmul beside WGMMA's accumulators: promotion, reductions over warpgroups, split K.

Such a sum is kept as raw scalars, float32 [64 * tile_m]: as an array in the accumulator's layout it would be pairs,
for which the compiler wants aligned registers and spills.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as math_ops

from pallas_kernels import layouts
from pallas_kernels.sm90.common.ptx import (
    ROWS,
    SCALAR,
    WARPGROUP,
    asm,
    const,
    element,
    f32,
    fragment_position,
    i32,
    i64,
    inlined,
    load_at,
    raw_array,
    shared_address,
    thread,
    to_float,
)


def _sum_layout(tile_m: int) -> Any:
    return plgpu.Layout.WG_STRIDED((layouts.TILE_N * tile_m,), vec_size=1)


def _strided(total: jax.Array) -> Any:
    return _sum_layout(total.shape[0] // layouts.TILE_N)


def zero_sum(tile_m: int) -> jax.Array:
    """A raw float32 sum for a 64 x tile_m tile."""
    return plgpu.layout_cast(jnp.zeros((layouts.TILE_N * tile_m,), jnp.float32), _sum_layout(tile_m))


def add_to_sum(total: jax.Array, acc: jax.Array, scale: jax.Array | None) -> jax.Array:
    """total + acc * scale (from ``read_group_scale``, one a row; None: 1)."""
    layout = _sum_layout(acc.shape[1])
    arrays = [(total, layout), (acc, plgpu.Layout.WGMMA)]
    arrays += [] if scale is None else [(scale, ROWS)]
    args, types = zip(*arrays, strict=True)

    @inlined(arg_types=types, return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, layout=layout))
    def inline(_: Any, total: mgpu.FragmentedArray, acc: mgpu.FragmentedArray, *scales: Any) -> Any:
        factors = [to_float(element(v, 0), 16) for v in scales[0].registers.flat] if scales else None
        one = ir.VectorType.get((1,), f32())
        summed = []
        for i, old in enumerate(total.registers):
            pair, column = divmod(i, 2)
            value = element(acc.registers.flat[pair], column)
            if factors is None:
                value = arith.addf(element(old, 0), value)
            else:
                value = math_ops.fma(value, factors[pair % 2], element(old, 0))
            summed.append(vector.broadcast(one, value))
        return mgpu.FragmentedArray(_registers=np.array(summed, object), _layout=layout.to_mgpu(), _is_signed=None)

    return inline(*args)


def sum_from_accumulator(acc: jax.Array) -> jax.Array:
    """float32 [64, tile_m] in the accumulator's layout as a raw sum."""
    layout = _sum_layout(acc.shape[1])
    shape = (layouts.TILE_N * acc.shape[1],)

    @inlined(arg_types=(plgpu.Layout.WGMMA,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout))
    def inline(_: Any, acc: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        one = ir.VectorType.get((1,), f32())
        values = [vector.broadcast(one, element(pair, i)) for pair in acc.registers.flat for i in range(2)]
        return mgpu.FragmentedArray(_registers=np.array(values, object), _layout=layout.to_mgpu(), _is_signed=None)

    return inline(acc)


def sum_to_accumulator(total: jax.Array) -> jax.Array:
    """A raw sum as float32 [64, tile_m] in the accumulator's layout."""
    tile_m = total.shape[0] // layouts.TILE_N

    @inlined(
        arg_types=(_strided(total),),
        return_type=plgpu.ShapeDtypeStruct((layouts.TILE_N, tile_m), jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def inline(_: Any, total: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        layout = plgpu.Layout.WGMMA.to_mgpu()
        pair = ir.VectorType.get((2,), f32())
        values = [element(v, 0) for v in total.registers]
        pairs = [vector.from_elements(pair, values[i : i + 2]) for i in range(0, len(values), 2)]
        return mgpu.FragmentedArray(
            _registers=np.array(pairs, object).reshape(layout.registers_shape((layouts.TILE_N, tile_m))),
            _layout=layout,
            _is_signed=None,
        )

    return inline(total)


def store_sum(total: jax.Array, ref: Any) -> None:
    """Each thread writes its part of a raw sum to ref, int32 [64 * tile_m or more] in SMEM."""

    @inlined(arg_types=(_strided(total), plgpu.RefType()))
    def inline(_: Any, total: mgpu.FragmentedArray, ref: ir.Value) -> None:
        values = [element(v, 0) for v in total.registers]
        address = arith.addi(shared_address(ref), arith.muli(thread(), const(16)))
        for i in range(0, len(values), 4):
            code = f"st.shared.v4.f32 [$0 + {4 * WARPGROUP * i}], {{$1, $2, $3, $4}};"
            asm([], [address, *values[i : i + 4]], code, volatile=True)

    inline(total, ref)


def add_stored_sum(total: jax.Array, ref: Any) -> jax.Array:
    """total plus what ``store_sum`` has put into ref."""
    layout = _strided(total)

    @inlined(
        arg_types=(layout, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, layout=layout),
    )
    def inline(_: Any, total: mgpu.FragmentedArray, ref: ir.Value) -> mgpu.FragmentedArray:
        quad, one = ir.VectorType.get((4,), f32()), ir.VectorType.get((1,), f32())
        registers = list(total.registers)
        summed = []
        for i in range(0, len(registers), 4):
            other = load_at(ref, arith.addi(thread(), const(WARPGROUP * i // 4)), quad, quad)
            for j in range(4):
                value = arith.addf(element(registers[i + j], 0), element(other, j))
                summed.append(vector.broadcast(one, value))
        return mgpu.FragmentedArray(_registers=np.array(summed, object), _layout=layout.to_mgpu(), _is_signed=None)

    return inline(total, ref)


def store_partial(total: jax.Array, ref: Any, part: jax.Array, token: jax.Array, n_tile: jax.Array) -> None:
    """Write a raw sum over one part of K to ref, float32 [parts, M, N] in GMEM, for 64 channels and from ``token`` on.

    Each instruction fills whole sectors of 32 bytes: eight channels of four tokens.
    """

    @inlined(arg_types=(_strided(total), plgpu.RefType(), SCALAR, SCALAR, SCALAR))
    def inline(_: Any, total: Any, ref: ir.Value, part: Any, token: Any, n_tile: Any) -> None:
        _parts, m, n = ir.MemRefType(ref.type).shape
        row, lane4, _warp = fragment_position()
        channel = arith.addi(arith.muli(n_tile.registers.item(), const(layouts.TILE_N)), row)
        token = arith.addi(token.registers.item(), arith.muli(lane4, const(2)))
        first = arith.addi(arith.muli(part.registers.item(), const(m)), token)
        index = arith.addi(arith.muli(first, const(n)), channel)
        pointer = utils.getelementptr(utils.memref_ptr(ref), [index], f32())
        address = llvm.ptrtoint(i64(), pointer)
        # A tile past the last channel has no tokens.
        tokens = arith.select(
            arith.cmpi(arith.CmpIPredicate.slt, channel, const(n)), arith.subi(const(m), token), const(0)
        )
        for i, value in enumerate(total.registers):
            j, r, column = i // 4, i // 2 % 2, i % 2
            offset = 4 * ((8 * j + column) * n + 8 * r)
            asm(
                [],
                [address, element(value, 0), tokens],
                f"{{\n.reg .pred p;\nsetp.gt.s32 p, $2, {8 * j + column};\n@p st.global.f32 [$0 + {offset}], $1;\n}}",
                volatile=True,
            )

    inline(total, ref, part, token, n_tile)


def read_group_scale(ref: Any) -> jax.Array:
    """The scales of a warpgroup's rows in a group, ref bf16 [64] in SMEM; raw int32 [64]."""

    @inlined(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((64,), jnp.int32, layout=ROWS))
    def inline(_: Any, scales: ir.Value) -> mgpu.FragmentedArray:
        i16 = ir.IntegerType.get_signless(16)
        row, _lane, _warp = fragment_position()
        words = [load_at(scales, arith.addi(row, const(8 * r)), i16, i16) for r in range(2)]
        return raw_array([arith.extui(i32(), word) for word in words], ROWS, (64,))

    return inline(ref)
