"""Rows to FP8 on Hopper: the kernels behind ``row_quantize``.

A thread block takes one row. It loads the row once, 8 elements (16 bytes) a thread and step, and
holds it in registers; warps reduce by shuffles, the block through shared memory; then the row is
multiplied by its scale's reciprocal, cast and stored, 8 bytes a thread and step. A row has as few
warpgroups as its registers fit in: many rows want several blocks on a multiprocessor, so that one's
loads hide another's reduction, and one row wants few partial results to wait for. A row that a
matmul (``SplitSum``) or decode attention left in parts is added up as it is loaded; it has a thread
for each 8 elements, so that all of its parts are on their way at once.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Float

from pallas_kernels import formats
from pallas_kernels.formats import ScaledArray
from pallas_kernels.sm90 import split_sum
from pallas_kernels.sm90.attention.combine import combine_eight
from pallas_kernels.sm90.inline import (
    SCALAR,
    WARPGROUP,
    absmax_scale,
    asm,
    const,
    i32,
    inlined,
    number,
    reciprocal,
    to_e4m3,
)
from pallas_kernels.sm90.memory import address, load, load_eight, offset, pack, store, unpack
from pallas_kernels.sm90.reduction import inverse_rms, larger, over_block, own_units, weighted
from pallas_kernels.split_sum import SplitSum

CHUNK = 8  # elements of a load
MAX_WARPGROUPS = 8
MAX_CHUNKS = 8  # a thread holds at most, as 64 float32 registers
MAX_WIDTH = CHUNK * WARPGROUP * MAX_WARPGROUPS * MAX_CHUNKS


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel cuts a row.

    Attributes:
        warpgroups: that share a row, 1 to 8.
    """

    warpgroups: int

    def __post_init__(self):
        if not 1 <= self.warpgroups <= MAX_WARPGROUPS:
            raise ValueError(f"warpgroups is {self.warpgroups}; expected 1 to {MAX_WARPGROUPS}")


def default_config(width: int, *, parts: bool = False) -> Config:
    """The fewest warpgroups that hold a row of ``width`` elements, or a part of it in a load a thread."""
    warpgroups = -(-width // (CHUNK * WARPGROUP * (1 if parts else MAX_CHUNKS)))
    return Config(min(warpgroups, MAX_WARPGROUPS))


def unsupported(x: Array | SplitSum) -> str | None:
    """Why the kernel cannot run these rows, or None."""
    if isinstance(x, SplitSum):
        return _unsupported_sum(x)
    if x.dtype != jnp.bfloat16:
        return f"x has dtype {x.dtype}, not bfloat16"
    if x.size == 0:
        return "x is empty"
    return _unsupported_width(x.shape[-1])


def _unsupported_sum(total: SplitSum) -> str | None:
    if total.residual is None or total.residual.dtype != jnp.bfloat16:
        return "the sum has no bfloat16 residual"
    return split_sum.unsupported(total) or _unsupported_width(total.n)


def _unsupported_width(width: int) -> str | None:
    if width % CHUNK or width > MAX_WIDTH:
        return f"rows have {width} elements, not a multiple of {CHUNK} up to {MAX_WIDTH}"
    return None


@functools.partial(jax.jit, static_argnames="config")
def quantize_rows(x: Float[Array, "*rows D"], *, config: Config | None = None) -> ScaledArray:
    """bf16 rows in FP8; see ``row_quantize.quantize_rows``."""
    return _launch(x.shape, {"x": x.reshape(-1, x.shape[-1])}, config or default_config(x.shape[-1]))[0]


@functools.partial(jax.jit, static_argnames=("eps", "config"))
def rms_norm_quantize(
    x: Float[Array, "*rows D"], weight: Float[Array, " D"], *, eps: float, config: Config | None = None
) -> ScaledArray:
    """Normalized bf16 rows in FP8; see ``row_quantize.rms_norm_quantize``."""
    operands = {"x": x.reshape(-1, x.shape[-1]), "weight": weight}
    return _launch(x.shape, operands, config or default_config(x.shape[-1]), eps)[0]


@functools.partial(jax.jit, static_argnames=("eps", "config"))
def sum_norm_quantize(
    total: SplitSum, weight: Float[Array, " D"], *, eps: float, config: Config | None = None
) -> tuple[ScaledArray, Float[Array, "*rows D"]]:
    """Normalized sums in FP8, and the sums in bf16; see ``row_quantize.sum_norm_quantize``."""
    operands = {**split_sum.operands(total), "residual": total.residual, "weight": weight}
    rows, x = _launch((*total.rows, total.n), operands, config or default_config(total.n, parts=True), eps)
    assert x is not None
    return rows, x


@functools.partial(jax.jit, static_argnames="group")
def combine_quantize(
    partial: Float[Array, "B kv_heads splits 1 rows H"],
    peak: Float[Array, "B kv_heads splits rows"],
    total: Float[Array, "B kv_heads splits rows"],
    *,
    group: int,
) -> ScaledArray:
    """Decode attention's output [B, T, heads * H] from that of its splits, in FP8 with a scale per token.

    The arguments are what the kernel leaves, rows of T tokens and ``group`` heads; the numbers are
    those of the splits' combination in bf16 and ``quantize_rows``.
    """
    batch, kv_heads, _, _, rows, head_dim = partial.shape
    width = kv_heads * group * head_dim
    operands = {"partial": partial, "peak": peak, "total": total}
    return _launch((batch, rows // group, width), operands, default_config(width, parts=True))[0]


def _launch(
    shape: tuple[int, ...], operands: dict[str, Any], config: Config, eps: float = 0.0
) -> tuple[ScaledArray, Array | None]:
    """FP8 rows of ``shape``, and x where it is summed from "parts" (but not "partial", attention's)."""
    *rows, width = shape
    flat = math.prod(rows), width
    if config.warpgroups * WARPGROUP * CHUNK * MAX_CHUNKS < width:
        raise ValueError(f"config is {config}; expected more warpgroups for rows of {width} elements")
    out_types = {
        "values": jax.ShapeDtypeStruct(flat, formats.E4M3),
        "scale": jax.ShapeDtypeStruct(flat[:1], jnp.float32),
    }
    name = "rms_norm_quantize" if "weight" in operands else "quantize_rows"
    if "parts" in operands:
        out_types["x"] = jax.ShapeDtypeStruct(flat, jnp.bfloat16)
        name = "sum_norm_quantize"
    elif "partial" in operands:
        name = "combine_quantize"
    results = plgpu.kernel(
        functools.partial(_kernel, names=(*operands, *out_types), warpgroups=config.warpgroups, eps=eps),
        out_type=tuple(out_types.values()),
        grid=flat[:1],
        grid_names=("row",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        scratch_types={"partials": plgpu.SMEM((2 * 4 * config.warpgroups,), jnp.float32)},
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*operands.values())
    values, scale, *x = results
    return ScaledArray(values.reshape(shape), scale.reshape(*rows, 1)), x[0].reshape(shape) if x else None


# --- device code ------------------------------------------------------------------------------------


def _kernel(*refs, names: tuple[str, ...], partials, warpgroups: int, eps: float):
    @inlined(arg_types=(*(plgpu.RefType() for _ in (*names, "partials")), SCALAR))
    def inline(_: Any, *arguments: Any) -> None:
        *memory, row = arguments
        _quantize_row(dict(zip((*names, "partials"), memory, strict=True)), row.registers.item(), warpgroups, eps)

    inline(*refs, partials, lax.axis_index("row"))


def _quantize_row(refs: dict[str, ir.Value], row: ir.Value, warpgroups: int, eps: float) -> None:
    """Row ``row`` of x, or of what it is the sum of, to values and scale; normalized if there is a weight.

    Args:
        refs: in global memory, by the names of ``_launch``; ``partials``, float32 [2 * warps], is shared.
        row: which.
        warpgroups: of the block.
        eps: of the norm.
    """
    (_, width), threads = ir.MemRefType(refs["values"].type).shape, WARPGROUP * warpgroups
    thread, chunks = utils.thread_idx(), width // CHUNK
    index, inside = own_units(chunks, threads)
    if "parts" in refs:
        loaded = [_add_up(refs, row, i) for i in index]
    elif "partial" in refs:
        loaded = [pack(combine_eight(refs, row, i)) for i in index]
    else:
        start = address(refs["x"], row, 2 * width)
        loaded = [load(offset(start, i, 2 * CHUNK), i32()) for i in index]
    held = [unpack(words) for words in loaded]
    total = None
    if "weight" not in refs:
        largest = _finite_absmax([word for words in loaded for word in words])
    else:
        start = address(refs["weight"])
        factors = [load_eight(offset(start, i, 4 * CHUNK)) for i in index]
        held, largest, total = weighted(held, factors, inside)
    largest, total = over_block(largest, total, refs["partials"], warpgroups)

    row_scale = absmax_scale(largest, number(1 / formats.E4M3_MAX))
    inverse = reciprocal(row_scale)

    target = address(refs["values"], row, width)
    for i, elements in zip(index, held, strict=True):
        scaled = [arith.mulf(e, inverse) for e in elements]
        codes = [to_e4m3(scaled[j : j + 4]) for j in range(0, CHUNK, 4)]
        store(offset(target, i, CHUNK), codes)

    with utils.when(arith.cmpi(arith.CmpIPredicate.eq, thread, const(0))):
        if total is not None:
            row_scale = arith.mulf(row_scale, inverse_rms(total, width, eps))
        store(address(refs["scale"], row, 4), [row_scale])


def _add_up(refs: dict[str, ir.Value], row: ir.Value, index: ir.Value) -> list[ir.Value]:
    """The row's ``index``-th eight sums plus residual, written to x; the four words of bf16 that were written."""
    _, width = ir.MemRefType(refs["x"].type).shape
    words = split_sum.start_row(refs, row, index)()
    store(offset(address(refs["x"], row, 2 * width), index, 2 * CHUNK), words)
    return words


def _finite_absmax(words: list[ir.Value]) -> ir.Value:
    """Largest finite magnitude among pairs of bf16, two at a time; 0 where there is none."""
    # x * 0 + x is NaN unless x is finite, and a maximum passes over NaN.
    code = """{
        .reg .b32 zero, finite;
        mov.b32 zero, 0;
        fma.rn.bf16x2 finite, $2, zero, $2;
        abs.bf16x2 finite, finite;
        max.bf16x2 $0, $1, finite;
    }"""
    largest = const(0)
    for word in words:
        (largest,) = asm([i32()], [largest, word], code, "=r,r,r", volatile=False)
    return larger(*unpack([largest]))
