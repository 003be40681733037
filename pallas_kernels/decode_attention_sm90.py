"""Flash decoding over the INT4 cache on Hopper: the kernel behind ``decode_attention``.

A thread block reads a range of one sequence's slots for one kv head, once for all query heads of
the group. Its warpgroups share the range and nothing else: each has its own ring of shared-memory
stages, which it asks TMA to fill, so that one's arithmetic hides another's latencies. Codes are
dequantized in registers and are WGMMA's A operand in both products (S^T = K Q^T, O^T = V^T P^T):
the few queries are the narrow N side. The warpgroups' results are combined in shared memory; the
blocks', where a sequence is split over several, by XLA.

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
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import attention_registers_sm90 as registers
from pallas_kernels import formats, jax_compat
from pallas_kernels.formats import ScaledArray

HEAD_DIMS = (64, 128, 256)
_LOG2E = math.log2(math.e)
_COPY_ROW = 256  # bytes of a row as TMA sees it, its longest; tokens' own rows are shorter


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile configuration of the decode kernel.

    Attributes:
        block_kv: slots of a tile; a multiple of 128.
        stages: tiles in each warpgroup's shared-memory ring, at least 2.
        warpgroups: warpgroups of a thread block, 1 to 4.
        multiprocessors: how many the device has; sequences are split to occupy them evenly.
    """

    block_kv: int = 256
    stages: int = 2
    warpgroups: int = 3
    multiprocessors: int = 132

    def __post_init__(self):
        if self.block_kv <= 0 or self.block_kv % registers.TOKEN_BLOCK:
            raise ValueError(f"block_kv is {self.block_kv}; expected a positive multiple of {registers.TOKEN_BLOCK}")
        if self.stages < 2:
            raise ValueError(f"stages is {self.stages}; expected at least 2")
        if not 1 <= self.warpgroups <= 4:
            raise ValueError(f"warpgroups is {self.warpgroups}; expected 1 to 4")
        if self.multiprocessors < 1:
            raise ValueError(f"multiprocessors is {self.multiprocessors}; expected a positive number")

    def splits(self, rows: int, slots: int) -> int:
        """Ranges into which ``slots`` slots are split when the grid has ``rows`` other blocks.

        The fewest that leave at most one multiprocessor in 20 idle, or the best there is.
        """
        most = max(1, -(-slots // (self.block_kv * self.warpgroups)))

        def occupied(splits: int) -> float:
            waves = -(-rows * splits // self.multiprocessors)
            return rows * splits / (waves * self.multiprocessors)

        enough = (splits for splits in range(1, most + 1) if occupied(splits) >= 0.95)
        return next(enough, None) or max(range(1, most + 1), key=occupied)


def default_config(head_dim: int, block_rows: int) -> Config:
    """Tiles that leave the accumulators of ``block_rows`` rows their registers and shared memory."""
    if head_dim <= 128 and block_rows == 8:
        return Config()
    if head_dim <= 128:
        return Config(block_kv=128, stages=3, warpgroups=3 if head_dim * block_rows <= 2048 else 2)
    return Config(block_kv=128, stages=2, warpgroups=2)


def unsupported(query: ScaledArray, key: ScaledArray, value: ScaledArray) -> str | None:
    """Why the attention kernels cannot run these operands, or None."""
    head_dim = query.values.shape[-1]
    if query.values.dtype != formats.E4M3 or query.scale is None:
        return f"the query is {query.values.dtype}, not E4M3 with scales"
    if key.values.dtype != jnp.uint8 or value.values.dtype != jnp.uint8:
        return f"the cache is {key.values.dtype} and {value.values.dtype}, not INT4 (uint8)"
    for name, rows in (("key", key), ("value", value)):
        if rows.scale is None or rows.scale.dtype != jnp.bfloat16 or rows.scale.shape[-1] != 1:
            return f"the {name} scales are not one bf16 number a token and head"
    if head_dim not in HEAD_DIMS:
        return f"head_dim is {head_dim}, not one of {HEAD_DIMS}"
    # TMA wants rows of a multiple of 16 bytes; the scales are rows of bf16.
    if key.values.shape[2] % 8:
        return f"the cache has {key.values.shape[2]} slots, not a multiple of 8"
    return None


@functools.partial(jax.jit, static_argnames=("scale", "window", "out_dtype", "config"))
def decode_attention_sm90(
    query: ScaledArray,
    key: ScaledArray,
    value: ScaledArray,
    *,
    query_start: Int[Array, " B"],
    kv_lengths: Int[Array, " B"],
    scale: float,
    window: int | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    page_table: Int[Array, "B pages"] | None = None,
    config: Config | None = None,
) -> Float[Array, "B T heads H"]:
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
    config = config or default_config(head_dim, block_rows)
    if page_table is not None and page_size % config.block_kv:
        config = dataclasses.replace(config, block_kv=registers.TOKEN_BLOCK)
        if page_size % config.block_kv:
            raise ValueError(f"page_size is {page_size}; expected a multiple of {config.block_kv}")
    splits = config.splits(batch * kv_heads * row_blocks, slots)

    to_scores = query.scale.astype(jnp.float32) * (scale * _LOG2E / registers.CODE_UNIT)
    q = _by_kv_head(registers.permute_channels(query.values), kv_heads, row_blocks * block_rows)
    to_scores = _by_kv_head(to_scores, kv_heads, row_blocks * block_rows)[..., 0]

    out_shape = (batch, kv_heads, row_blocks, splits)
    out_type = (
        jax.ShapeDtypeStruct((*out_shape, head_dim, block_rows), jnp.float32),
        jax.ShapeDtypeStruct((*out_shape, block_rows), jnp.float32),
        jax.ShapeDtypeStruct((*out_shape, block_rows), jnp.float32),
    )
    body = functools.partial(
        _kernel, config=config, group=group, window=window, page_size=None if page_table is None else page_size
    )
    warpgroups, ring = config.warpgroups, config.warpgroups * config.stages
    codes = (ring, config.block_kv * head_dim // 2 // _COPY_ROW, _COPY_ROW)
    partials = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(splits, kv_heads * row_blocks, batch),
        grid_names=("split", "head", "batch"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=dict(
            q_smem=_swizzled((block_rows, head_dim)),
            p_smem=_swizzled((warpgroups, block_rows, config.block_kv)),
            k_smem=plgpu.SMEM(codes, jnp.uint8),
            v_smem=plgpu.SMEM(codes, jnp.uint8),
            k_scale_smem=plgpu.SMEM((ring, config.block_kv), jnp.bfloat16),
            v_scale_smem=plgpu.SMEM((ring, config.block_kv), jnp.bfloat16),
            reduction_smem=plgpu.SMEM((warpgroups, 512), jnp.float32),
            peak_smem=plgpu.SMEM((warpgroups, block_rows), jnp.float32),
            total_smem=plgpu.SMEM((warpgroups, block_rows), jnp.float32),
            out_smem=plgpu.SMEM((head_dim, block_rows), jnp.float32),
            q_barrier=plgpu.Barrier(),
            k_barriers=plgpu.Barrier(num_arrivals=2, num_barriers=ring),
            v_barriers=plgpu.Barrier(num_arrivals=2, num_barriers=ring),
            done_barrier=plgpu.Barrier(num_arrivals=warpgroups),
            turn_barriers=plgpu.Barrier(num_barriers=warpgroups),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(
        q,
        to_scores,
        _copy_rows(key.values),
        key.scale[..., 0],
        _copy_rows(value.values),
        value.scale[..., 0],
        query_start.astype(jnp.int32),
        kv_lengths.astype(jnp.int32),
        *(() if page_table is None else (page_table.astype(jnp.int32),)),
    )
    out = _combine(*partials)[:, :, :rows]
    out = out.reshape(batch, kv_heads, length, group, head_dim)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, length, heads, head_dim).astype(out_dtype)


def _swizzled(shape: tuple[int, ...]):
    """E4M3 shared memory in WGMMA's order: rows of up to 128 bytes in tiles of 8, swizzled."""
    swizzle = min(shape[-1], 128)
    transforms = (plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, formats.E4M3, transforms=transforms)


def _copy_rows(codes: Array) -> Array:
    """[B, kv_heads, S, H/2] -> [B, kv_heads, rows, 256]: the same bytes in longer rows for TMA."""
    return codes.reshape(*codes.shape[:2], -1, _COPY_ROW)


def _by_kv_head(x: Array, kv_heads: int, rows: int) -> Array:
    """[B, T, heads, X] -> [B, kv_heads, rows, X]: row t * group + g, padded with zeros."""
    batch, length, heads, width = x.shape
    x = x.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 1, 3, 4)
    x = x.reshape(batch, kv_heads, length * heads // kv_heads, width)
    return jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, 0)))


def _combine(
    out: Float[Array, "B kv_heads row_blocks splits H N"],
    peak: Float[Array, "B kv_heads row_blocks splits N"],
    total: Float[Array, "B kv_heads row_blocks splits N"],
) -> Float[Array, "B kv_heads rows H"]:
    """Sum of the splits' partial outputs, each brought to the common maximum."""
    if out.shape[3] == 1:
        peak = jnp.zeros_like(peak)  # the weight of the only split is 1
    highest = jnp.max(peak, axis=3, keepdims=True)
    weight = jnp.exp2(peak - jnp.where(jnp.isneginf(highest), 0.0, highest))
    denominator = jnp.sum(weight * total, axis=3) * formats.PROBABILITY_SCALE
    inverse = jnp.where(denominator > 0, 1.0 / jnp.where(denominator > 0, denominator, 1.0), 0.0)
    summed = jnp.sum(out * weight[..., None, :], axis=3) * inverse[..., None, :]
    summed = registers.restore_channels(summed).swapaxes(-1, -2)  # [B, kv_heads, row_blocks, N, H]
    return summed.reshape(*summed.shape[:2], -1, summed.shape[-1])


def _kernel(
    q_gmem,
    to_scores_gmem,
    k_gmem,
    k_scale_gmem,
    v_gmem,
    v_scale_gmem,
    query_start_gmem,
    kv_lengths_gmem,
    *refs,
    q_smem,
    p_smem,
    k_smem,
    v_smem,
    k_scale_smem,
    v_scale_smem,
    reduction_smem,
    peak_smem,
    total_smem,
    out_smem,
    q_barrier,
    k_barriers,
    v_barriers,
    done_barrier,
    turn_barriers,
    config: Config,
    group: int,
    window: int | None,
    page_size: int | None,
):
    """One block: partial attention of ``block_rows`` rows over one range of slots."""
    *page_table_gmem, out_gmem, peak_gmem, total_gmem = refs
    block_rows, head_dim = q_smem.shape
    block_kv, stages, warpgroups = config.block_kv, config.stages, config.warpgroups
    row_blocks, splits = out_gmem.shape[2:4]
    batch, split, warpgroup = (lax.axis_index(name) for name in ("batch", "split", "warpgroup"))
    kv_head = lax.div(lax.axis_index("head"), jnp.int32(row_blocks))
    row_block = lax.rem(lax.axis_index("head"), jnp.int32(row_blocks))
    first_row = row_block * block_rows
    row, column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    length = kv_lengths_gmem[batch]
    # Rows of this block are the queries at these positions, first and last.
    start = query_start_gmem[batch]
    position = start + lax.div(first_row, jnp.int32(group))
    last = start + lax.div(first_row + block_rows - 1, jnp.int32(group))
    end_tile = pl.cdiv(jnp.minimum(length, last + 1), jnp.int32(block_kv))
    first_tile = jnp.int32(0)
    if window is not None:
        first_tile = lax.div(jnp.maximum(position - (window - 1), 0), jnp.int32(block_kv))
    tiles = jnp.maximum(end_tile - first_tile, 0)
    part, parts = split * warpgroups + warpgroup, jnp.int32(splits * warpgroups)
    begin = first_tile + lax.div(part * tiles, parts)
    end = first_tile + lax.div((part + 1) * tiles, parts)

    def slot_of(tile):
        return warpgroup * stages + lax.rem(tile - begin, jnp.int32(stages))

    def fetch(tile):
        slot = slot_of(tile)
        if page_size is None:
            page, offset = batch, tile * block_kv
        else:
            page = page_table_gmem[0][batch, lax.div(tile * block_kv, jnp.int32(page_size))]
            offset = lax.rem(tile * block_kv, jnp.int32(page_size))
        codes = (page, kv_head, pl.ds(lax.div(offset, jnp.int32(2 * _COPY_ROW // head_dim)), k_smem.shape[1]))
        scales = (page, kv_head, pl.ds(offset, block_kv))
        plgpu.copy_gmem_to_smem(k_gmem.at[codes], k_smem.at[slot], k_barriers.at[slot])
        plgpu.copy_gmem_to_smem(k_scale_gmem.at[scales], k_scale_smem.at[slot], k_barriers.at[slot])
        plgpu.copy_gmem_to_smem(v_gmem.at[codes], v_smem.at[slot], v_barriers.at[slot])
        plgpu.copy_gmem_to_smem(v_scale_gmem.at[scales], v_scale_smem.at[slot], v_barriers.at[slot])

    for i in range(stages - 1):
        pl.when(begin + i < end)(functools.partial(fetch, begin + i))

    @pl.when(warpgroup == 0)
    def _fetch_queries():
        plgpu.copy_gmem_to_smem(q_gmem.at[batch, kv_head, pl.ds(first_row, block_rows)], q_smem, q_barrier)

    to_scores = jax_compat.load_registers(to_scores_gmem.at[batch, kv_head, pl.ds(first_row, block_rows)], column)
    to_scores = _over_rows(to_scores, block_kv)
    plgpu.barrier_wait(q_barrier)

    shape = (block_kv, block_rows)
    slot_in_tile = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
    row_of = first_row + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    row_position = start + lax.div(row_of, jnp.int32(group))

    def reduce_rows(operation: str, x):
        return _reduce_rows(operation, x, reduction_smem.at[warpgroup])

    def step(tile, carry):
        peak, total, out = carry
        slot = slot_of(tile)

        plgpu.barrier_wait(k_barriers.at[slot])
        keys = _load_codes(
            functools.partial(registers.load_keys, head_dim=head_dim), k_smem.at[slot], (block_kv, head_dim)
        )

        def scores_of(acc):
            plgpu.wgmma(acc, keys, jax_compat.transpose_ref(q_smem))
            return acc[...]

        scores = pl.run_scoped(scores_of, plgpu.ACC(shape))
        k_scale = jax_compat.load_registers(k_scale_smem.at[slot], row).astype(jnp.float32)
        scores = scores * lax.broadcast_in_dim(k_scale, shape, (0,)) * to_scores

        index = slot_in_tile + tile * block_kv
        visible = (index < length) & (index <= row_position)
        if window is not None:
            visible &= index > row_position - window
        scores = jnp.where(visible, scores, -jnp.inf)

        plgpu.barrier_wait(v_barriers.at[slot])
        v_scale = jax_compat.load_registers(v_scale_smem.at[slot], row).astype(jnp.float32)
        # Slots beyond the end may hold anything; a NaN would survive the product with P = 0.
        row_index = plgpu.broadcasted_iota(jnp.int32, (block_kv,), 0, layout=row) + tile * block_kv
        v_scale = jnp.where(row_index < length, v_scale, 0.0)
        log_v_scale = jnp.where(row_index < length, jnp.log2(v_scale), -jnp.inf)
        weighted = scores + lax.broadcast_in_dim(log_v_scale, shape, (0,))
        new_peak = jnp.maximum(peak, reduce_rows("max", weighted))
        # Until a row sees its first slot the peak is -inf, and -inf - -inf would be NaN.
        safe_peak = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        decay = jnp.exp2(peak - safe_peak)
        p = jnp.exp2(scores - _over_rows(safe_peak, block_kv))
        total = total * _over_rows(decay, block_kv) + p
        p *= lax.broadcast_in_dim(v_scale * formats.PROBABILITY_SCALE, shape, (0,))
        _store_probabilities(p, p_smem.at[warpgroup])
        plgpu.commit_smem()
        # Every thread is past its reads of the previous tile: its stage can be filled again.
        pl.when(tile + stages - 1 < end)(functools.partial(fetch, tile + stages - 1))

        values = _load_codes(
            functools.partial(registers.load_values, head_dim=head_dim), v_smem.at[slot], (head_dim, block_kv)
        )

        def product_of(acc):
            plgpu.wgmma(acc, values, jax_compat.transpose_ref(p_smem.at[warpgroup]))
            return acc[...]

        product = pl.run_scoped(product_of, plgpu.ACC((head_dim, block_rows)))
        out = out * _over_rows(decay, head_dim) + product
        return new_peak, total, out

    def full(value, size, layout):
        return plgpu.layout_cast(jnp.full(size, value, jnp.float32), layout)

    initial = (
        full(-jnp.inf, (block_rows,), column),
        full(0.0, shape, plgpu.Layout.WGMMA),
        full(0.0, (head_dim, block_rows), plgpu.Layout.WGMMA),
    )
    peak, total, out = lax.fori_loop(begin, end, step, initial)
    total = reduce_rows("add", total)

    # Bring the warpgroups' results to their common maximum and add them up, one after the other.
    jax_compat.store_registers(peak_smem.at[warpgroup], peak)
    jax_compat.store_registers(total_smem.at[warpgroup], total)
    plgpu.barrier_arrive(done_barrier)
    plgpu.barrier_wait(done_barrier)
    peaks = [jax_compat.load_registers(peak_smem.at[i], column) for i in range(warpgroups)]
    totals = [jax_compat.load_registers(total_smem.at[i], column) for i in range(warpgroups)]
    highest = functools.reduce(jnp.maximum, peaks)
    safe_highest = jnp.where(highest == -jnp.inf, 0.0, highest)
    total = sum(x * jnp.exp2(y - safe_highest) for x, y in zip(totals, peaks, strict=True))
    # The units of V's codes cancel here: CODE_UNIT is a power of two.
    out *= _over_rows(jnp.exp2(peak - safe_highest) * (1.0 / registers.CODE_UNIT), head_dim)
    where = (batch, kv_head, row_block, split)
    for i in range(warpgroups):

        @pl.when(warpgroup == i)
        def _add(i=i):
            result = out
            if i > 0:
                plgpu.barrier_wait(turn_barriers.at[i - 1])
                result += jax_compat.load_registers(out_smem, plgpu.Layout.WGMMA)
            if i + 1 < warpgroups:
                jax_compat.store_registers(out_smem, result)
                plgpu.barrier_arrive(turn_barriers.at[i])
            else:
                jax_compat.store_registers(out_gmem.at[where], result)
                jax_compat.store_registers(peak_gmem.at[where], highest)
                jax_compat.store_registers(total_gmem.at[where], total)


def _over_rows(x, rows: int):
    """[N] -> [rows, N]."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), (1,))


def _reduce_rows(operation: str, x, scratch):
    """[rows, N] -> [N] over the warpgroup's four warps; ``jnp.max``'s scratch is the whole block's."""

    def reduce(_, x, scratch):
        return x.reduce(operation, 0, scratch)

    result = plgpu.ShapeDtypeStruct(x.shape[1:], jnp.float32, layout=plgpu.Layout.WGMMA.reduce(0))
    return plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()), return_type=result)(reduce)(x, scratch)


def _load_codes(load, ref, shape: tuple[int, int]):
    """E4M3 array of ``shape`` in WGMMA_8BIT layout, dequantized from shared memory by ``load``."""
    result = plgpu.ShapeDtypeStruct(shape, formats.E4M3, layout=plgpu.Layout.WGMMA_8BIT)
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)(load)(ref)


def _store_probabilities(p, p_smem) -> None:
    transforms = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
    arg_types = (plgpu.Layout.WGMMA, plgpu.RefType(transforms))
    plgpu.inline_mgpu(arg_types=arg_types)(registers.store_probabilities)(p, p_smem)
