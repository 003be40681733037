"""What becomes of the Hopper matmul's accumulators: scales, promotion to a second sum, activation, stores."""

import math
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
from pallas_kernels.matmul_epilogue import GELU_CUBIC, GELU_SLOPE, Activation, width_out
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
    load_word,
    raw_array,
    shared_address,
    thread,
    to_float,
)


def load_rows(ref: Any, start: jax.Array) -> jax.Array:
    """ref[start : start + 64] of a vector in GMEM, as each thread needs it for its rows; raw int32 [64].

    Past its end the last element is read, for rows that are never stored.
    """

    @inlined(arg_types=(plgpu.RefType(), SCALAR), return_type=plgpu.ShapeDtypeStruct((64,), jnp.int32, layout=ROWS))
    def inline(_: Any, source: ir.Value, first: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        (size,) = ir.MemRefType(source.type).shape
        row, _lane, _warp = fragment_position()
        row = arith.addi(first.registers.item(), row)
        indices = [arith.minsi(arith.addi(row, const(8 * r)), const(size - 1)) for r in range(2)]
        return raw_array([load_word(source, index) for index in indices], ROWS, (64,))

    return inline(ref, start)


def read_group_scale(ref: Any) -> jax.Array:
    """The scales of a warpgroup's rows in a group, ref bf16 [64] in SMEM; raw int32 [64]."""

    @inlined(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((64,), jnp.int32, layout=ROWS))
    def inline(_: Any, scales: ir.Value) -> mgpu.FragmentedArray:
        i16 = ir.IntegerType.get_signless(16)
        row, _lane, _warp = fragment_position()
        words = [load_at(scales, arith.addi(row, const(8 * r)), i16, i16) for r in range(2)]
        return raw_array([arith.extui(i32(), word) for word in words], ROWS, (64,))

    return inline(ref)


def token_slots(tile_m: int) -> int:
    """Length of the vector in which a warpgroup holds the scales of ``tile_m`` tokens."""
    return WARPGROUP if tile_m <= WARPGROUP else 2 * WARPGROUP


def load_tokens(ref: Any, start: jax.Array, tile_m: int) -> jax.Array:
    """ref[start:], float32 in GMEM, over the warpgroup's threads; raw int32 [token_slots(tile_m)]."""
    slots = token_slots(tile_m)
    layout = plgpu.Layout.WG_STRIDED((slots,), vec_size=1)

    @inlined(
        arg_types=(plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct((slots,), jnp.int32, layout=layout),
    )
    def inline(_: Any, source: ir.Value, first: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        (size,) = ir.MemRefType(source.type).shape
        position = arith.addi(first.registers.item(), thread())
        indices = [arith.addi(position, const(WARPGROUP * i)) for i in range(slots // WARPGROUP)]
        return raw_array([load_word(source, arith.minsi(index, const(size - 1))) for index in indices], layout)

    return inline(ref, start)


# The float32 sum next to WGMMA's accumulator is kept as raw scalars: as an array of accumulator
# layout it would be pairs, for which the compiler wants aligned registers and spills.


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


def raw_sum(acc: jax.Array) -> jax.Array:
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


def leave_sum(total: jax.Array, ref: Any) -> None:
    """Each thread writes its part of a raw sum to ref, int32 [64 * tile_m or more] in SMEM."""

    @inlined(arg_types=(_strided(total), plgpu.RefType()))
    def inline(_: Any, total: mgpu.FragmentedArray, ref: ir.Value) -> None:
        values = [element(v, 0) for v in total.registers]
        address = arith.addi(shared_address(ref), arith.muli(thread(), const(16)))
        for i in range(0, len(values), 4):
            code = f"st.shared.v4.f32 [$0 + {4 * WARPGROUP * i}], {{$1, $2, $3, $4}};"
            asm([], [address, *values[i : i + 4]], code, volatile=True)

    inline(total, ref)


def add_left_sum(total: jax.Array, ref: Any) -> jax.Array:
    """total plus what ``leave_sum`` has put into ref."""
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


def activated(gate: ir.Value, activation: Activation) -> ir.Value:
    """The gate of ``matmul_epilogue``: x / (1 + exp(-s x)), where s is 1 (SiLU) or a polynomial in x (GELU).

    exp2 and the reciprocal are PTX's approximations (2 ulp of float32).
    """
    exponent = "mul.f32 e, $1, 0fBFB8AA3B;"
    if activation == "gelu_tanh_mul":
        slope = -GELU_SLOPE * math.log2(math.e)
        exponent = f"""mul.f32 e, $1, $1;
        fma.rn.f32 e, e, {_literal(slope * GELU_CUBIC)}, {_literal(slope)};
        mul.f32 e, e, $1;"""
    (result,) = asm(
        [f32()],
        [gate],
        f"""{{
        .reg .f32 e;
        {exponent}
        ex2.approx.ftz.f32 e, e;
        add.f32 e, e, 0f3F800000;
        rcp.approx.ftz.f32 e, e;
        mul.f32 $0, $1, e;
        }}""",
        volatile=False,
    )
    return result


def _literal(value: float) -> str:
    """A float32 as PTX writes it."""
    return f"0f{int(np.float32(value).view(np.uint32)):08X}"


def store_outputs(
    acc: jax.Array,
    channel_scale: jax.Array,
    bias: jax.Array | None,
    bias_bits: int,
    token_scale_ref: Any | None,
    out_ref: Any,
    *,
    activation: Activation,
    add_residual: bool,
) -> None:
    """Finish a 64 x tokens accumulator and write it, transposed, to SMEM.

    Args:
        acc: float32 [64, tokens].
        channel_scale: from ``load_rows`` of a float32 vector, multiplied.
        bias: from ``load_rows`` of a vector of ``bias_bits`` (16 or 32) a number, added.
        token_scale_ref: float32 (as int32) [tokens] in SMEM, multiplied before the bias.
        out_ref: bf16 [tokens, 64] (or [tokens, 32] of a gate and its up) in SMEM, swizzled over a row.
        activation: of a gate, if rows n and n + 8 of each 16 are a gate and its up.
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

    @inlined(arg_types=types)
    def inline(_: Any, acc: mgpu.FragmentedArray, channel: mgpu.FragmentedArray, *rest: Any) -> None:
        bias_rows = rest[0] if bias is not None else None
        out, *tokens_in = rest[1:] if bias is not None else rest
        _row, lane4, warp = fragment_position()
        lane = arith.andi(thread(), const(31))
        values = acc.registers.reshape(tokens // 8, 2)
        pair = ir.VectorType.get((2,), f32())
        scales = [to_float(element(v, 0), 32) for v in channel.registers.flat]
        biases = None if bias_rows is None else [to_float(element(v, 0), bias_bits) for v in bias_rows.registers.flat]

        def finished(j: int) -> list[list[ir.Value]]:
            """[r][two tokens] after scales, bias and activation; one r of a gate and its up."""
            by_token = None
            if tokens_in:
                by_token = load_at(tokens_in[0], arith.addi(lane4, const(4 * j)), pair, pair)
            result = []
            for r in range(2):
                row_values = []
                for i in range(2):
                    value = arith.mulf(element(values[j, r], i), scales[r])
                    if by_token is not None:
                        value = arith.mulf(value, element(by_token, i))
                    if biases is not None:
                        value = arith.addf(value, biases[r])
                    row_values.append(value)
                result.append(row_values)
            if activation == "none":
                return result
            return [[arith.mulf(activated(g, activation), u) for g, u in zip(*result, strict=True)]]

        per_j = width_out(2, activation)
        blocks = [(j, block) for j in range(tokens // 8) for block in range(per_j)]
        width = next(width for width in (4, 2, 1) if len(blocks) % width == 0)
        # Lane l gives the address of row l % 8 of matrix l // 8. Adding 8 tokens leaves the bits
        # that the swizzle reads alone, so one address with constant offsets serves them all.
        matrix = arith.shrui(lane, const(3))
        token = arith.addi(arith.andi(lane, const(7)), arith.shli(arith.divui(matrix, const(per_j)), const(3)))
        chunk = arith.addi(arith.muli(warp, const(per_j)), arith.remui(matrix, const(per_j)))
        offset = arith.addi(arith.muli(token, const(swizzle)), arith.shli(chunk, const(4)))
        flip = arith.andi(arith.shrui(offset, const(7)), const(swizzle // 16 - 1))
        address = arith.addi(shared_address(out), arith.xori(offset, arith.shli(flip, const(4))))
        suffix = f"sync.aligned.m8n8.x{width}.trans.shared.b16"
        for start in range(0, len(blocks), width):
            group = blocks[start : start + width]
            byte = group[0][0] * 8 * swizzle
            added: list[ir.Value | None] = [None] * width
            if add_residual:
                outputs = ", ".join(f"${i}" for i in range(width))
                added = list(
                    asm(
                        [i32()] * width,
                        [address],
                        f"ldmatrix.{suffix} {{{outputs}}}, [${width} + {byte}];",
                        volatile=True,
                    )
                )
            done = {j: finished(j) for j, _ in group}
            packed = []
            for (j, block), residual in zip(group, added, strict=True):
                low, high = done[j][block]
                if residual is not None:
                    bits = arith.shli(residual, const(16)), arith.andi(residual, const(0xFFFF0000))
                    low, high = (arith.addf(v, arith.bitcast(f32(), b)) for v, b in zip((low, high), bits, strict=True))
                packed += asm([i32()], [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", volatile=False)
            inputs = ", ".join(f"${i + 1}" for i in range(width))
            asm(
                [],
                [address, *packed],
                f"stmatrix.{suffix} [$0 + {byte}], {{{inputs}}};",
                volatile=True,
            )

    inline(*args)
