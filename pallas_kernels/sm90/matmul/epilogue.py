"""The Hopper matmul's epilogue: from a warpgroup's accumulators to y, through shared memory to GMEM."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

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
    inlined,
    load_at,
    load_word,
    raw_array,
    shared_address,
    thread,
    to_float,
)
from pallas_kernels.sm90.matmul.config import STORE_BUFFERS, Operands, Problem


class EpilogueOperands(NamedTuple):
    """What a warpgroup has loaded, or is loading, for its 64 channels of a tile.

    Attributes:
        token: the tile's first.
        column: the first of y that the channels become.
        channel_scale, bias: from ``load_rows``.
        token_scale: from ``load_tokens``.
    """

    token: jax.Array
    column: jax.Array
    channel_scale: jax.Array
    bias: jax.Array | None
    token_scale: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """From accumulators to y, by one of the warpgroups that hold whole sums.

    Attributes:
        problem, operands: of the call.
        tile_m: tokens of a tile.
        wg: its index among those warpgroups.
        y: bf16 [warpgroups, STORE_BUFFERS, tokens, rows_out] in SMEM, which the residual comes into as well.
        tokens: float32, as int32 [warpgroups, token_slots] in SMEM.
        residual_full: barriers [warpgroups * STORE_BUFFERS].
    """

    problem: Problem
    operands: Operands
    tile_m: int
    wg: jax.Array | int
    y: Any
    tokens: Any
    residual_full: Any | None

    def load(self, token: jax.Array, channel: jax.Array) -> EpilogueOperands:
        """Start to load what ``store`` needs for the 64 channels and the tile that begin here."""
        operands = self.operands
        column = channel if self.problem.activation == "none" else channel // 2
        return EpilogueOperands(
            token,
            pl.multiple_of(column, self.problem.rows_out),
            load_rows(operands.channel_scale, channel),
            None if operands.bias is None else load_rows(operands.bias, channel),
            None if operands.x_scale is None else load_tokens(operands.x_scale, token, self.tile_m),
        )

    def load_residual(self, loaded: EpilogueOperands) -> None:
        """Start to copy the residual, if there is one, into the buffers of y."""
        if self.operands.residual is not None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i in range(min(STORE_BUFFERS, self._stores)):
                self._copy_residual(loaded, i)

    def store(self, acc: jax.Array, loaded: EpilogueOperands) -> None:
        """Scale, activate, add, and send to GMEM, some tokens at a time."""
        operands = self.operands
        has_residual = operands.residual is not None
        if loaded.token_scale is not None:
            self.tokens[self.wg] = loaded.token_scale
        tokens = self.y.shape[2]
        for i in range(self._stores):
            buffer, part = i % STORE_BUFFERS, slice(i * tokens, (i + 1) * tokens)
            if has_residual:
                assert self.residual_full is not None
                plgpu.barrier_wait(self.residual_full.at[STORE_BUFFERS * self.wg + buffer])
            # The first wait is also the barrier after which all threads see the tokens' scales.
            if i == 0 or (i >= STORE_BUFFERS and not has_residual):
                plgpu.wait_smem_to_gmem(min(i, STORE_BUFFERS - 1), wait_read_only=True)
            store_outputs(
                acc[:, part] if self._stores > 1 else acc,
                loaded.channel_scale,
                loaded.bias,
                0 if operands.bias is None else 8 * operands.bias.dtype.itemsize,
                None if loaded.token_scale is None else self.tokens.at[self.wg, part],
                self.y.at[self.wg, buffer],
                activation=self.problem.activation,
                add_residual=has_residual,
            )
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.y.at[self.wg, buffer], self._part_of(operands.y, loaded, i))
            if has_residual and i + STORE_BUFFERS < self._stores:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                self._copy_residual(loaded, i + STORE_BUFFERS)

    @property
    def _stores(self) -> int:
        """How many times ``y``'s tokens the tile has."""
        return self.tile_m // self.y.shape[2]

    def _part_of(self, array: Any, loaded: EpilogueOperands, i: int) -> Any:
        """The i-th part (of y or of the residual) of this warpgroup's tile in GMEM."""
        tokens = self.y.shape[2]
        rows, columns = pl.ds(loaded.token + i * tokens, tokens), pl.ds(loaded.column, self.problem.rows_out)
        return array.at[rows, columns]

    def _copy_residual(self, loaded: EpilogueOperands, i: int) -> None:
        assert self.residual_full is not None
        buffer = i % STORE_BUFFERS
        plgpu.copy_gmem_to_smem(
            self._part_of(self.operands.residual, loaded, i),
            self.y.at[self.wg, buffer],
            self.residual_full.at[STORE_BUFFERS * self.wg + buffer],
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
    """Apply the epilogue to a 64 x tokens accumulator and write it, transposed, to SMEM.

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
    row_bytes = 2 * out_ref.shape[1]
    arrays = [(acc, plgpu.Layout.WGMMA), (channel_scale, ROWS)]
    arrays += [] if bias is None else [(bias, ROWS)]
    refs = [(out_ref, plgpu.RefType((plgpu.SwizzleTransform(row_bytes),)))]
    refs += [] if token_scale_ref is None else [(token_scale_ref, plgpu.RefType())]
    args, types = zip(*arrays, *refs, strict=True)

    @inlined(arg_types=types)
    def inline(_: Any, acc: mgpu.FragmentedArray, channel: mgpu.FragmentedArray, *rest: Any) -> None:
        bias_rows = rest[0] if bias is not None else None
        out, *token_scales = rest[1:] if bias is not None else rest
        _row, lane4, warp = fragment_position()
        lane = arith.andi(thread(), const(31))
        values = acc.registers.reshape(tokens // 8, 2)
        pair = ir.VectorType.get((2,), f32())
        scales = [to_float(element(v, 0), 32) for v in channel.registers.flat]
        biases = None if bias_rows is None else [to_float(element(v, 0), bias_bits) for v in bias_rows.registers.flat]

        def finished(j: int) -> list[list[ir.Value]]:
            """The j-th eight tokens: [r][two tokens], one r of a gate and its up."""
            by_token = None
            if token_scales:
                by_token = load_at(token_scales[0], arith.addi(lane4, const(4 * j)), pair, pair)
            scaled = _scaled(values[j], scales, by_token, biases)
            if activation == "none":
                return scaled
            return [[arith.mulf(activated(g, activation), u) for g, u in zip(*scaled, strict=True)]]

        blocks = width_out(2, activation)
        address = _matrix_address(out, lane, warp, row_bytes, blocks)
        _store_matrices(address, finished, tokens // 8, blocks, row_bytes, add_residual=add_residual)

    inline(*args)


def _scaled(
    values: Any, scales: list[ir.Value], by_token: ir.Value | None, biases: list[ir.Value] | None
) -> list[list[ir.Value]]:
    """A thread's accumulators [r] of two tokens each, times both scales and plus the bias: [r][two tokens]."""
    result = []
    for r in range(2):
        row_values = []
        for i in range(2):
            value = arith.mulf(element(values[r], i), scales[r])
            if by_token is not None:
                value = arith.mulf(value, element(by_token, i))
            if biases is not None:
                value = arith.addf(value, biases[r])
            row_values.append(value)
        result.append(row_values)
    return result


def _matrix_address(out: ir.Value, lane: ir.Value, warp: ir.Value, row_bytes: int, blocks: int) -> ir.Value:
    """Where ``stmatrix`` wants this lane's row of the first matrices: row l % 8 of matrix l // 8.

    A warp's 16 channels become ``blocks`` times 8 columns of y. Adding 8 tokens leaves the bits that the swizzle
    reads alone, so one address with constant offsets serves all matrices.
    """
    matrix = arith.shrui(lane, const(3))
    token = arith.addi(arith.andi(lane, const(7)), arith.shli(arith.divui(matrix, const(blocks)), const(3)))
    chunk = arith.addi(arith.muli(warp, const(blocks)), arith.remui(matrix, const(blocks)))
    offset = arith.addi(arith.muli(token, const(row_bytes)), arith.shli(chunk, const(4)))
    flip = arith.andi(arith.shrui(offset, const(7)), const(row_bytes // 16 - 1))
    return arith.addi(shared_address(out), arith.xori(offset, arith.shli(flip, const(4))))


def _store_matrices(
    address: ir.Value,
    finished: Callable[[int], list[list[ir.Value]]],
    count: int,
    blocks: int,
    row_bytes: int,
    *,
    add_residual: bool,
) -> None:
    """Store ``count`` times eight tokens, as many 8 x 8 matrices at once as ``stmatrix`` takes.

    Args:
        address: from ``_matrix_address``.
        finished: finished(j) emits the epilogue of the j-th eight tokens: [block][two tokens] in float32.
        count: how many there are.
        blocks: matrices of eight tokens.
        row_bytes: from one token to the next.
        add_residual: whether what the matrices replace is added to them.
    """
    order = [(j, block) for j in range(count) for block in range(blocks)]
    width = next(width for width in (4, 2, 1) if len(order) % width == 0)
    suffix = f"sync.aligned.m8n8.x{width}.trans.shared.b16"
    for start in range(0, len(order), width):
        group = order[start : start + width]
        byte = group[0][0] * 8 * row_bytes
        residuals: list[ir.Value | None] = [None] * width
        if add_residual:
            outputs = ", ".join(f"${i}" for i in range(width))
            code = f"ldmatrix.{suffix} {{{outputs}}}, [${width} + {byte}];"
            residuals = list(asm([i32()] * width, [address], code, volatile=True))
        done = {j: finished(j) for j, _ in group}
        packed = [_packed(done[j][block], residual) for (j, block), residual in zip(group, residuals, strict=True)]
        inputs = ", ".join(f"${i + 1}" for i in range(width))
        asm([], [address, *packed], f"stmatrix.{suffix} [$0 + {byte}], {{{inputs}}};", volatile=True)


def _packed(values: list[ir.Value], residual: ir.Value | None) -> ir.Value:
    """Two float32 as a word of bf16, plus the two bf16 of ``residual``; rounded once."""
    low, high = values
    if residual is not None:
        bits = arith.shli(residual, const(16)), arith.andi(residual, const(0xFFFF0000))
        low, high = (arith.addf(v, arith.bitcast(f32(), b)) for v, b in zip((low, high), bits, strict=True))
    return asm([i32()], [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", volatile=False)[0]


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
