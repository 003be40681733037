"""Flash decoding over the INT4 cache on Hopper: the kernel behind ``decode_attention``.

A thread block reads a range of one sequence's slots for one kv head, once for all query heads of
the group. Its warpgroups share the range and nothing else: each has its own ring of shared-memory
stages, which it asks TMA to fill, so that one's arithmetic hides another's latencies. Codes are
dequantized in registers and are WGMMA's A operand in both products (S^T = K Q^T, O^T = V^T P^T):
the few queries are the narrow N side. The warpgroups' results are combined in shared memory; the
blocks', where a sequence is split over several, by a second kernel. Output in FP8 needs a token's
largest number: a third kernel finds it, unless the token's splits are few enough for the second.

P is cast to FP8 with the value's scale folded in: P = exp2(score - m) * scale_v * 256, where m is
the running maximum of score + log2(scale_v); nothing overflows and the largest term of each
output keeps full precision. Each tile's P.V is accumulated from zero by the tensor cores and
added to the float32 sum by an FMA, so their shorter accumulation never spans more than a tile.

FireQ (arXiv 2505.20839), attention; Flash-Decoding (Dao et al., 2023).
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import formats
from pallas_kernels.formats import ScaledArray
from pallas_kernels.sm90.attention import registers
from pallas_kernels.sm90.attention.decode_device import COPY_ROW, combine_kernel, kernel, swizzled
from pallas_kernels.sm90.common.hardware import NUM_SMS
from pallas_kernels.sm90.row_quantize import launch as row_quantize

HEAD_DIMS = (64, 128, 256)
PAGE_MULTIPLE = 256  # a page holds whole tiles
SHORT = 4096  # slots up to which small blocks are faster than long streams; half as many where a multiprocessor has one
# Numbers of a token's splits (splits x heads x head_dim) up to which one block, or each of a cluster's,
# combines and quantizes them: 192 KiB, which a multiprocessor reads in less than the time of another
# kernel, 2 us.
MOST_IN_A_BLOCK = 3 << 14
MOST_IN_A_THREAD = 128  # of them, in registers
_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile configuration of the decode kernel.

    Attributes:
        block_kv: slots of a tile; a multiple of 128.
        stages: tiles in each warpgroup's shared-memory ring, at least 2.
        warpgroups: warpgroups of a thread block, 1 to 4.
        residents: blocks that share a multiprocessor; sequences are split to occupy all of them evenly.
    """

    block_kv: int = 256
    stages: int = 2
    warpgroups: int = 3
    residents: int = 1

    def __post_init__(self):
        if self.block_kv <= 0 or self.block_kv % registers.TOKEN_BLOCK:
            raise ValueError(f"block_kv is {self.block_kv}; expected a positive multiple of {registers.TOKEN_BLOCK}")
        if self.stages < 2:
            raise ValueError(f"stages is {self.stages}; expected at least 2")
        if not 1 <= self.warpgroups <= 4:
            raise ValueError(f"warpgroups is {self.warpgroups}; expected 1 to 4")
        if self.residents < 1:
            raise ValueError(f"residents is {self.residents}; expected a positive number")

    def splits(self, rows: int, slots: int) -> int:
        """Ranges into which ``slots`` slots are split when the grid has ``rows`` other blocks.

        The fewest that leave at most one multiprocessor in 20 idle, or the best there is. Blocks that share
        a multiprocessor do not begin and end together: as many as find room at once.
        """
        most = max(1, -(-slots // (self.block_kv * self.warpgroups)))
        if self.residents > 1:
            return max(1, min(most, NUM_SMS * self.residents // rows))

        def occupied(splits: int) -> float:
            waves = -(-rows * splits // NUM_SMS)
            return rows * splits / (waves * NUM_SMS)

        enough = (splits for splits in range(1, most + 1) if occupied(splits) >= 0.95)
        return next(enough, None) or max(range(1, most + 1), key=occupied)


def default_config(head_dim: int, block_rows: int, blocks: int, slots: int) -> Config:
    """Tiles that leave the accumulators of ``block_rows`` rows their registers and shared memory.

    ``blocks`` is how many there are if no sequence is split.
    """
    if head_dim <= 128 and block_rows == 8:
        # Few tiles each, so about four warpgroups a multiprocessor: in small blocks, unless it has just one or two.
        residents = -(-blocks // NUM_SMS) if 0.75 * NUM_SMS <= blocks <= 2 * NUM_SMS else 4
        if slots > (SHORT if residents > 1 else SHORT // 2):
            return Config()
        return Config(block_kv=128, warpgroups=min(3, 4 // residents), residents=residents)
    if head_dim <= 128:
        return Config(block_kv=128, stages=3, warpgroups=3 if head_dim * block_rows <= 2048 else 2)
    return Config(block_kv=128, stages=2, warpgroups=2)


def unsupported(
    query: ScaledArray, key: ScaledArray, value: ScaledArray, page_table: Array | None = None
) -> str | None:
    """Why the kernel cannot run these operands, or None."""
    slots = key.values.shape[2]
    if page_table is not None and slots % PAGE_MULTIPLE:
        return f"a page has {slots} slots, not a multiple of {PAGE_MULTIPLE}"
    # TMA wants rows of a multiple of 16 bytes; the scales are rows of bf16.
    if slots % 8:
        return f"the cache has {slots} slots, not a multiple of 8"
    return unsupported_formats(query, key, value)


def unsupported_formats(query: ScaledArray, key: ScaledArray, value: ScaledArray) -> str | None:
    """Why the attention kernels cannot run these formats, or None."""
    head_dim = query.values.shape[-1]
    if query.values.dtype != formats.E4M3 or query.scale is None:
        return f"the query is {query.values.dtype}, not E4M3 with scales"
    if query.scale.dtype != jnp.float32 or query.scale.shape != (*query.values.shape[:-1], 1):
        return f"the query scales are {query.scale.dtype} {query.scale.shape}, not one float32 a token and head"
    if key.values.dtype != jnp.uint8 or value.values.dtype != jnp.uint8:
        return f"the cache is {key.values.dtype} and {value.values.dtype}, not INT4 (uint8)"
    for name, rows in (("key", key), ("value", value)):
        if rows.scale is None or rows.scale.dtype != jnp.bfloat16 or rows.scale.shape[-1] != 1:
            return f"the {name} scales are not one bf16 number a token and head"
    if head_dim not in HEAD_DIMS:
        return f"head_dim is {head_dim}, not one of {HEAD_DIMS}"
    if query.values.size == 0 or key.values.size == 0:
        return "there is nothing to attend to"
    return None


@functools.partial(jax.jit, static_argnames=("scale", "window", "softcap", "out_dtype", "config"))
def decode_attention(
    query: ScaledArray,
    key: ScaledArray,
    value: ScaledArray,
    *,
    query_start: Int[Array, " B"],
    kv_lengths: Int[Array, " B"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    page_table: Int[Array, "B pages"] | None = None,
    config: Config | None = None,
) -> Float[Array, "B T heads H"] | ScaledArray:
    """Causal attention of [B, T, heads, H] queries over an INT4 cache.

    Arguments are those of :func:`~pallas_kernels.decode_attention.decode_attention`. With a
    ``page_table`` the cache is [pages, kv_heads, page_size, H/2] and page_table[b, i] holds the
    slots i * page_size ... of sequence b.
    """
    batch, length, heads, head_dim = query.values.shape
    kv_heads, page_size = key.values.shape[1:3]
    assert query.scale is not None
    assert key.scale is not None
    assert value.scale is not None
    slots = page_size if page_table is None else page_size * page_table.shape[1]

    # A row block is as many (token, head) rows as one pass over the cache serves; O^T of
    # head_dim x rows float32 lives in registers, twice.
    group = heads // kv_heads
    rows = length * group
    block_rows = min(-(-rows // 8) * 8, 4096 // head_dim)
    row_blocks = -(-rows // block_rows)
    blocks = batch * kv_heads * row_blocks
    config = config or default_config(head_dim, block_rows, blocks, slots)
    if page_table is not None and page_size % config.block_kv:
        raise ValueError(f"a page has {page_size} slots; expected a multiple of block_kv {config.block_kv}")
    splits = config.splits(blocks, slots)

    quantized = jnp.dtype(out_dtype) == formats.E4M3
    out_type = jax.ShapeDtypeStruct(query.values.shape, jnp.bfloat16 if quantized else out_dtype)
    numbers = jax.ShapeDtypeStruct((batch, kv_heads, splits, rows), jnp.float32)
    # One more dimension, so that a split's rows look like one token's heads.
    partial_type = jax.ShapeDtypeStruct((batch, kv_heads, splits, 1, rows, head_dim), jnp.float32)
    body = functools.partial(
        kernel,
        block_kv=config.block_kv,
        stages=config.stages,
        warpgroups=config.warpgroups,
        group=group,
        to_scores=scale * (_LOG2E if softcap is None else 1 / softcap) / registers.CODE_UNIT,
        window=window,
        softcap=None if softcap is None else softcap * _LOG2E,
        has_sinks=sinks is not None,
        page_size=None if page_table is None else page_size,
    )
    warpgroups, ring = config.warpgroups, config.warpgroups * config.stages
    codes = (ring, config.block_kv * head_dim // 2 // COPY_ROW, COPY_ROW)
    partials = plgpu.kernel(
        body,
        out_type=(out_type,) if splits == 1 else (partial_type, numbers, numbers),
        grid=(splits, kv_heads * row_blocks, batch),
        grid_names=("split", "head", "batch"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types={
            "q_smem": swizzled((block_rows, head_dim)),
            "p_smem": swizzled((warpgroups, block_rows, config.block_kv)),
            "k_smem": plgpu.SMEM(codes, jnp.uint8),
            "v_smem": plgpu.SMEM(codes, jnp.uint8),
            "k_scale_smem": plgpu.SMEM((ring, config.block_kv), jnp.bfloat16),
            "v_scale_smem": plgpu.SMEM((ring, config.block_kv), jnp.bfloat16),
            "reduction_smem": plgpu.SMEM((warpgroups, 512), jnp.float32),
            "peak_smem": plgpu.SMEM((warpgroups, block_rows), jnp.float32),
            "total_smem": plgpu.SMEM((warpgroups, block_rows), jnp.float32),
            "out_smem": plgpu.SMEM((head_dim, block_rows), jnp.float32),
            "q_barrier": plgpu.Barrier(),
            "k_barriers": plgpu.Barrier(num_arrivals=2, num_barriers=ring),
            "v_barriers": plgpu.Barrier(num_arrivals=2, num_barriers=ring),
            "done_barrier": plgpu.Barrier(num_arrivals=warpgroups),
            "turn_barriers": plgpu.Barrier(num_barriers=warpgroups),
        },
        kernel_name="decode_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(
        query.values,
        query.scale[..., 0],
        _copy_rows(key.values),
        key.scale[..., 0],
        _copy_rows(value.values),
        value.scale[..., 0],
        query_start.astype(jnp.int32),
        kv_lengths.astype(jnp.int32),
        *(() if page_table is None else (page_table.astype(jnp.int32),)),
        *(() if sinks is None else (jnp.broadcast_to(sinks.astype(jnp.float32) * _LOG2E, (length, heads)),)),
    )
    if splits == 1:
        (out,) = partials
    elif quantized and (together := _in_one_kernel(batch * length, heads * head_dim, splits)):
        return row_quantize.combine_quantize(*partials, group=group, config=together)
    else:
        out = combine_splits(*partials, out_type=out_type)
    return row_quantize.quantize_rows(out.reshape(batch, length, -1)) if quantized else out


def _in_one_kernel(tokens: int, width: int, splits: int) -> row_quantize.Config | None:
    """How one kernel combines and quantizes the splits; None if two are better."""
    config = row_quantize.parts_config(tokens, width, splits)
    fits = splits * width <= MOST_IN_A_BLOCK * config.cluster and splits * config.chunk <= MOST_IN_A_THREAD
    return config if fits else None


def combine_splits(
    partial: Float[Array, "B kv_heads splits 1 rows H"],
    peak: Float[Array, "B kv_heads splits rows"],
    total: Float[Array, "B kv_heads splits rows"],
    *,
    out_type: jax.ShapeDtypeStruct,
) -> Float[Array, "B T heads H"]:
    """The output, of ``out_type``, from that of the splits as the kernel leaves it."""
    batch, kv_heads, _, _, rows, head_dim = partial.shape
    return plgpu.kernel(
        functools.partial(combine_kernel, group=out_type.shape[2] // kv_heads),
        out_type=out_type,
        grid=(-(-rows * head_dim // (4 * 128)), kv_heads, batch),
        grid_names=("block", "head", "batch"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="combine_splits",
    )(partial, peak, total)


def _copy_rows(codes: Array) -> Array:
    """[B, kv_heads, S, H/2] -> [B, kv_heads, rows, 256]: the same bytes in longer rows for TMA."""
    return codes.reshape(*codes.shape[:2], -1, COPY_ROW)
