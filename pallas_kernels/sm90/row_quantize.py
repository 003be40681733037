"""Rows to FP8 on Hopper: the kernels behind ``row_quantize``.

A thread block takes a row. It loads the row once, 8 elements (16 bytes) a thread and step, and
holds it in registers; warps reduce by shuffles, the block through shared memory; then the row is
multiplied by its scale's reciprocal, cast and stored, 8 bytes a thread and step. A row has as few
warpgroups as its registers fit in: many rows want several blocks on a multiprocessor, so that one's
loads hide another's reduction, and one row wants few partial results to wait for. A row that a
matmul (``SplitSum``) or decode attention left in parts is added up as it is loaded; it has a thread
for each 8 elements, so that all of its parts are on their way at once. The parts of a few rows are much
to read for so few multiprocessors: a cluster of blocks takes each row, with a thread for each 4 elements,
and its blocks tell each other their maxima, and their sums of squares, through shared memory. A norm after a
branch (``post_norm_quantize``) is one more such reduction, over what is loaded; its sum with the residual is the row.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
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
from pallas_kernels.sm90.decode_attention.combine import combine_channels
from pallas_kernels.sm90.hardware import NUM_SMS
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
from pallas_kernels.sm90.memory import address, load, load_floats, offset, pack, store, unpack
from pallas_kernels.sm90.reduction import inverse_rms, larger, over_block, own_units, start_over_cluster, weighted
from pallas_kernels.split_sum import SplitSum

CHUNK = 8  # elements of a load
MAX_WARPGROUPS = 8
CLUSTERS = (8, 4, 2)
MAX_CLUSTERED = 4  # warpgroups of a block in a cluster
# Bytes that a cluster must spare one multiprocessor to be repaid for its blocks' waiting for each other, at the
# start and for their numbers: about 0.2 us, in which one multiprocessor reads as many.
MIN_SPARED = 22 << 10
MAX_CHUNKS = 8  # a thread holds at most, as 64 float32 registers
POST_NORM_CHUNKS = 4  # of them, where there are two rows to hold
MAX_WIDTH = CHUNK * WARPGROUP * MAX_WARPGROUPS * MAX_CHUNKS


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel cuts a row.

    Attributes:
        warpgroups: of a block, 1 to 8; up to 4 in a cluster.
        cluster: blocks that share a row in parts: 1, 2, 4 or 8.
    """

    warpgroups: int
    cluster: int = 1

    def __post_init__(self):
        most = MAX_WARPGROUPS if self.cluster == 1 else MAX_CLUSTERED
        if not 1 <= self.warpgroups <= most:
            raise ValueError(f"warpgroups is {self.warpgroups}; expected 1 to {most}")
        if self.cluster not in (1, *CLUSTERS):
            raise ValueError(f"cluster is {self.cluster}; expected 1 or one of {CLUSTERS}")

    @property
    def threads(self) -> int:
        """That share a row."""
        return WARPGROUP * self.warpgroups * self.cluster

    @property
    def chunk(self) -> int:
        """Elements of a thread's step."""
        return CHUNK if self.cluster == 1 else CHUNK // 2


def default_config(width: int, *, chunks: int = MAX_CHUNKS) -> Config:
    """The fewest warpgroups that hold a row of ``width`` elements in so many loads a thread, or the most."""
    warpgroups = -(-width // (CHUNK * WARPGROUP * chunks))
    return Config(min(warpgroups, MAX_WARPGROUPS))


def parts_config(rows: int, width: int, parts: int) -> Config:
    """The largest cluster that leaves each of its blocks a multiprocessor and a warpgroup of work; else one block.

    Of few bytes always one block.
    """
    for cluster in CLUSTERS:
        one, spared = Config(1, cluster), 4 * parts * width * (cluster - 1) // cluster
        if rows * cluster <= NUM_SMS and width >= one.threads * one.chunk and spared >= MIN_SPARED:
            return Config(min(-(-width // (one.threads * one.chunk)), MAX_CLUSTERED), cluster)
    return default_config(width, chunks=1)


def unsupported(x: Array | SplitSum) -> str | None:
    """Why the kernel cannot run these rows, or None."""
    if isinstance(x, SplitSum):
        return _unsupported_sum(x)
    if x.dtype != jnp.bfloat16:
        return f"x has dtype {x.dtype}, not bfloat16"
    if x.size == 0:
        return "x is empty"
    return _unsupported_width(x.shape[-1])


def unsupported_branch(branch: Array | SplitSum, residual: Array) -> str | None:
    """Why the kernel cannot normalize these rows and add them to that, or None."""
    if residual.dtype != jnp.bfloat16:
        return f"the residual has dtype {residual.dtype}, not bfloat16"
    if not isinstance(branch, SplitSum):
        return unsupported(branch)
    if branch.residual is not None:
        return "the sum has a residual of its own"
    return split_sum.unsupported(branch) or _unsupported_width(branch.n)


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
    config = config or parts_config(math.prod(total.rows), total.n, len(total.parts))
    rows, x = _launch((*total.rows, total.n), operands, config, eps)
    assert x is not None
    return rows, x


@functools.partial(jax.jit, static_argnames=("eps", "config"))
def post_norm_quantize(
    branch: Float[Array, "*rows D"] | SplitSum,
    post_weight: Float[Array, " D"],
    residual: Float[Array, "*rows D"],
    weight: Float[Array, " D"] | None,
    *,
    eps: float,
    config: Config | None = None,
) -> tuple[ScaledArray, Float[Array, "*rows D"]]:
    """residual + norm of the branch in FP8 and in bf16; see ``row_quantize.post_norm_quantize``."""
    width = residual.shape[-1]
    count = math.prod(residual.shape[:-1])
    if isinstance(branch, SplitSum):
        operands = split_sum.operands(branch)
        config = config or parts_config(count, width, len(branch.parts))
    else:
        operands = {"branch": branch.reshape(-1, width)}
        config = config or default_config(width, chunks=POST_NORM_CHUNKS)
    operands |= {"residual": residual.reshape(-1, width), "post_weight": post_weight}
    operands |= {} if weight is None else {"weight": weight}
    rows, x = _launch(residual.shape, operands, config, eps)
    assert x is not None
    return rows, x


@functools.partial(jax.jit, static_argnames=("group", "config"))
def combine_quantize(
    partial: Float[Array, "B kv_heads splits 1 rows H"],
    row_max: Float[Array, "B kv_heads splits rows"],
    row_sum: Float[Array, "B kv_heads splits rows"],
    *,
    group: int,
    config: Config | None = None,
) -> ScaledArray:
    """Decode attention's output [B, T, heads * H] from that of its splits, in FP8 with a scale per token.

    The arguments are what the kernel leaves, rows of T tokens and ``group`` heads; the numbers are
    those of the splits' combination in bf16 and ``quantize_rows``.
    """
    batch, kv_heads, splits, _, rows, head_dim = partial.shape
    length, width = rows // group, kv_heads * group * head_dim
    operands = {"partial": partial, "row_max": row_max, "row_sum": row_sum}
    return _launch((batch, length, width), operands, config or parts_config(batch * length, width, splits))[0]


def _launch(
    shape: tuple[int, ...], operands: dict[str, Any], config: Config, eps: float = 0.0
) -> tuple[ScaledArray, Array | None]:
    """FP8 rows of ``shape``, and x where it is a sum with a "residual"."""
    *rows, width = shape
    flat = math.prod(rows), width
    if config.threads * config.chunk * MAX_CHUNKS < width:
        raise ValueError(f"config is {config}; expected more warpgroups for rows of {width} elements")
    if config.cluster > 1 and not {"parts", "partial"} & set(operands):
        raise ValueError(f"config is {config}; expected a cluster of 1, but for rows in parts")
    out_types = {
        "values": jax.ShapeDtypeStruct(flat, formats.E4M3),
        "scale": jax.ShapeDtypeStruct(flat[:1], jnp.float32),
    }
    name = "rms_norm_quantize" if "weight" in operands else "quantize_rows"
    if "residual" in operands:
        out_types["x"] = jax.ShapeDtypeStruct(flat, jnp.bfloat16)
        name = "post_norm_quantize" if "post_weight" in operands else "sum_norm_quantize"
    elif "partial" in operands:
        name = "combine_quantize"
    warps = 4 * config.warpgroups
    partials = ("post_partials", "partials") if "post_weight" in operands else ("partials",)
    scratch = {name: plgpu.SMEM((2 * config.cluster * warps,), jnp.float32) for name in partials}
    if config.cluster > 1:
        scratch["arrived"] = plgpu.SMEM((len(partials), 2), jnp.int32)
    results = plgpu.kernel(
        functools.partial(_kernel, names=(*operands, *out_types, *scratch), config=config, eps=eps),
        out_type=tuple(out_types.values()),
        grid=flat[:1],
        grid_names=("row",),
        cluster=(config.cluster,) if config.cluster > 1 else (),
        cluster_names=("peer",) if config.cluster > 1 else (),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*operands.values())
    values, scale, *x = results
    return ScaledArray(values.reshape(shape), scale.reshape(*rows, 1)), x[0].reshape(shape) if x else None


# --- device code ------------------------------------------------------------------------------------


def _kernel(*refs, names: tuple[str, ...], config: Config, eps: float, **scratch):
    place = [lax.axis_index("row"), *([lax.axis_index("peer")] if config.cluster > 1 else [])]

    @inlined(arg_types=(*(plgpu.RefType() for _ in names), *(SCALAR for _ in place)))
    def inline(_: Any, *arguments: Any) -> None:
        memory, place = arguments[: len(names)], arguments[len(names) :]
        _quantize_row(
            dict(zip(names, memory, strict=True)), *(x.registers.item() for x in place), config=config, eps=eps
        )

    inline(*refs, *(scratch[name] for name in names[len(refs) :]), *place)


def _quantize_row(
    refs: dict[str, ir.Value], row: ir.Value, peer: ir.Value | None = None, *, config: Config, eps: float
) -> None:
    """Row ``row`` of x, or of what it is the sum of, to values and scale; normalized if there is a weight.

    Args:
        refs: in global memory, by the names of ``_launch``; ``partials``, ``post_partials`` and ``arrived``
            are shared, as ``over_block`` and ``start_over_cluster`` want them.
        row: which.
        peer: which of the cluster's blocks this is, where there is one.
        config: how the row is cut.
        eps: of the norm.
    """
    (_, width), chunk = ir.MemRefType(refs["values"].type).shape, config.chunk
    thread = utils.thread_idx()
    partials = [refs[name] for name in ("post_partials", "partials") if name in refs]
    if peer is None:
        of_block = functools.partial(over_block, warpgroups=config.warpgroups)
        over_row = [functools.partial(of_block, partials=shared) for shared in partials]
    else:
        thread = arith.addi(arith.muli(peer, const(WARPGROUP * config.warpgroups)), thread)
        with_sum = [True, "weight" in refs][-len(partials) :]
        cut = config.warpgroups, config.cluster
        over_row = start_over_cluster(partials, refs["arrived"], peer, *cut, with_sum=with_sum)
    index, inside = own_units(width // chunk, config.threads, thread)
    if "post_weight" in refs:
        loaded = _add_normalized(refs, row, index, inside, chunk, eps, over_row[0])
    elif "parts" in refs:
        loaded = [_add_up(refs, row, i, chunk) for i in index]
    elif "partial" in refs:
        loaded = [pack(combine_channels(refs, row, i, chunk)) for i in index]
    else:
        start = address(refs["x"], row, 2 * width)
        loaded = [load(offset(start, i, 2 * CHUNK), i32()) for i in index]
    held = [unpack(words) for words in loaded]
    total = None
    if "weight" not in refs:
        largest = _finite_absmax([word for words in loaded for word in words])
    else:
        start = address(refs["weight"])
        factors = [load_floats(offset(start, i, 4 * chunk), chunk) for i in index]
        held, largest, total = weighted(held, factors, inside)
    largest, total = over_row[-1](largest, total)

    row_scale = absmax_scale(largest, number(1 / formats.E4M3_MAX))
    inverse = reciprocal(row_scale)

    target = address(refs["values"], row, width)
    for i, elements in zip(index, held, strict=True):
        scaled = [arith.mulf(e, inverse) for e in elements]
        codes = [to_e4m3(scaled[j : j + 4]) for j in range(0, chunk, 4)]
        store(offset(target, i, chunk), codes)

    with utils.when(arith.cmpi(arith.CmpIPredicate.eq, thread, const(0))):
        if total is not None:
            row_scale = arith.mulf(row_scale, inverse_rms(total, width, eps))
        store(address(refs["scale"], row, 4), [row_scale])


def _add_up(refs: dict[str, ir.Value], row: ir.Value, index: ir.Value, count: int) -> list[ir.Value]:
    """The row's ``index``-th ``count`` sums plus residual, written to x; the words of bf16 that were written."""
    _, width = ir.MemRefType(refs["x"].type).shape
    words = split_sum.start_row(refs, row, index, count)()
    store(offset(address(refs["x"], row, 2 * width), index, 2 * count), words)
    return words


def _add_normalized(
    refs: dict[str, ir.Value],
    row: ir.Value,
    index: list[ir.Value],
    inside: ir.Value | None,
    count: int,
    eps: float,
    over_row: Callable[[ir.Value, ir.Value | None], tuple[ir.Value, ir.Value | None]],
) -> list[list[ir.Value]]:
    """The row's residual plus its normalized branch, written to x; the words of bf16 that were written.

    Args:
        refs: as ``_quantize_row`` has them.
        row: which.
        index, inside: this thread's units of ``count`` elements, from ``own_units``.
        count: four or eight.
        eps: of the norm.
        over_row: ``over_block`` or what stands for it.
    """
    _, width = ir.MemRefType(refs["x"].type).shape

    def words(name: str) -> list[list[ir.Value]]:
        start = address(refs[name], row, 2 * width)
        return [load(offset(start, i, 2 * count), i32(), count // 2) for i in index]

    residual = words("residual")
    # In bf16 as whole rows are, so that the numbers do not depend on how the matmul cut K.
    branch = [pack(split_sum.add_up(refs, row, i, count)) for i in index] if "parts" in refs else words("branch")
    factors = [load_floats(offset(address(refs["post_weight"]), i, 4 * count), count) for i in index]
    held, _, total = weighted([unpack(unit) for unit in branch], factors, inside)
    _, total = over_row(number(0.0), total)
    assert total is not None
    inverse = inverse_rms(total, width, eps)
    summed = []
    for i, elements, others in zip(index, held, residual, strict=True):
        normalized = [arith.mulf(e, inverse) for e in elements]
        summed.append(pack([arith.addf(*pair) for pair in zip(normalized, unpack(others), strict=True)]))
        store(offset(address(refs["x"], row, 2 * width), i, 2 * count), summed[-1])
    return summed


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
