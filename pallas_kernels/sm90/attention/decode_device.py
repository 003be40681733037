"""Device code of the decode kernel; ``decode`` describes it and launches it."""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import formats, jax_compat
from pallas_kernels.sm90.attention import registers
from pallas_kernels.sm90.attention.combine import combine_head

SCALAR = plgpu.Layout.WG_SPLAT(())
COPY_ROW = 256  # bytes of a row as TMA sees it, its longest; tokens' own rows are shorter


def kernel(
    q_gmem,
    q_scale_gmem,
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
    block_kv: int,
    stages: int,
    warpgroups: int,
    group: int,
    to_scores: float,
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    page_size: int | None,
):
    """One block: partial attention of ``block_rows`` rows over one range of slots."""
    page_table_gmem, refs = refs[: page_size is not None], refs[page_size is not None :]
    sinks_gmem, partial_gmem = refs[:has_sinks], refs[has_sinks:]
    block_rows, head_dim = q_smem.shape
    splits = lax.axis_size("split")
    batch, split, warpgroup = (lax.axis_index(name) for name in ("batch", "split", "warpgroup"))
    row_blocks = lax.axis_size("head") // k_gmem.shape[1]
    kv_head = lax.div(lax.axis_index("head"), jnp.int32(row_blocks))
    row_block = lax.rem(lax.axis_index("head"), jnp.int32(row_blocks))
    first_row, first_head = row_block * block_rows, kv_head * group
    row, column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    # Before the first tiles, behind which they would wait.
    queries, q_scale = _load_queries(
        first_row, first_head, q_gmem.at[batch], q_scale_gmem.at[batch], rows=block_rows, group=group
    )
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
    # All rows see all of the tiles in front of this one.
    full_slots = jnp.minimum(length, position + 1) if window is None else jnp.int32(0)
    full_end = jnp.clip(lax.div(full_slots, jnp.int32(block_kv)), begin, jnp.maximum(begin, end))

    def slot_of(tile):
        return warpgroup * stages + lax.rem(tile - begin, jnp.int32(stages))

    def fetch(tile):
        slot = slot_of(tile)
        if page_size is None:
            page, offset = batch, tile * block_kv
        else:
            page = page_table_gmem[0][batch, lax.div(tile * block_kv, jnp.int32(page_size))]
            offset = lax.rem(tile * block_kv, jnp.int32(page_size))
        codes = (page, kv_head, pl.ds(lax.div(offset, jnp.int32(2 * COPY_ROW // head_dim)), k_smem.shape[1]))
        scales = (page, kv_head, pl.ds(offset, block_kv))
        plgpu.copy_gmem_to_smem(k_gmem.at[codes], k_smem.at[slot], k_barriers.at[slot])
        plgpu.copy_gmem_to_smem(k_scale_gmem.at[scales], k_scale_smem.at[slot], k_barriers.at[slot])
        plgpu.copy_gmem_to_smem(v_gmem.at[codes], v_smem.at[slot], v_barriers.at[slot])
        plgpu.copy_gmem_to_smem(v_scale_gmem.at[scales], v_scale_smem.at[slot], v_barriers.at[slot])

    for i in range(stages - 1):
        pl.when(begin + i < end)(functools.partial(fetch, begin + i))

    @pl.when(warpgroup == 0)
    def _queries():
        store = functools.partial(registers.store_queries, valid_rows=q_gmem.shape[1] * group, head_dim=head_dim)
        types = (SCALAR, registers.query_layout(block_rows, head_dim), plgpu.RefType(swizzle(head_dim)))
        plgpu.inline_mgpu(arg_types=types)(store)(first_row, queries, q_smem)
        plgpu.commit_smem()
        plgpu.barrier_arrive(q_barrier)

    row_to_scores = _over_rows(q_scale * to_scores, block_kv)
    plgpu.barrier_wait(q_barrier)

    shape = (block_kv, block_rows)
    slot_in_tile = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
    row_of = first_row + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    row_position = start + lax.div(row_of, jnp.int32(group))

    def reduce_rows(operation: str, x):
        return _reduce_rows(operation, x, reduction_smem.at[warpgroup])

    def step(tile, carry, *, masked: bool):
        peak, total, out = carry
        slot = slot_of(tile)

        plgpu.barrier_wait(k_barriers.at[slot])
        keys = _load_codes(
            functools.partial(registers.load_keys, head_dim=head_dim), k_smem.at[slot], (block_kv, head_dim)
        )

        def scores_of(acc):
            plgpu.wgmma(acc, keys, jax_compat.transpose_ref(q_smem))
            return acc[...]

        scores = pl.run_scoped(scores_of, plgpu.WGMMAAccumulatorRef(shape))
        k_scale = jax_compat.load_registers(k_scale_smem.at[slot], row).astype(jnp.float32)
        scores = scores * lax.broadcast_in_dim(k_scale, shape, (0,)) * row_to_scores
        if softcap is not None:
            scores = jnp.tanh(scores) * softcap

        if masked:
            index = slot_in_tile + tile * block_kv
            visible = (index < length) & (index <= row_position)
            if window is not None:
                visible &= index > row_position - window
            scores = jnp.where(visible, scores, -jnp.inf)

        plgpu.barrier_wait(v_barriers.at[slot])
        v_scale = jax_compat.load_registers(v_scale_smem.at[slot], row).astype(jnp.float32)
        log_v_scale = jnp.log2(v_scale)
        if masked:
            # Slots beyond the end may hold anything; a NaN would survive the product with P = 0.
            row_index = plgpu.broadcasted_iota(jnp.int32, (block_kv,), 0, layout=row) + tile * block_kv
            v_scale = jnp.where(row_index < length, v_scale, 0.0)
            log_v_scale = jnp.where(row_index < length, log_v_scale, -jnp.inf)
        weighted = scores + lax.broadcast_in_dim(log_v_scale, shape, (0,))
        new_peak = jnp.maximum(peak, reduce_rows("max", weighted))
        # Until a row sees its first slot the peak is -inf, and -inf - -inf would be NaN.
        safe_peak = jnp.where(new_peak == -jnp.inf, 0.0, new_peak) if masked else new_peak
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

        product = pl.run_scoped(product_of, plgpu.WGMMAAccumulatorRef((head_dim, block_rows)))
        out = out * _over_rows(decay, head_dim) + product
        return new_peak, total, out

    def full(value, size, layout):
        return plgpu.layout_cast(jnp.full(size, value, jnp.float32), layout)

    initial = (
        full(-jnp.inf, (block_rows,), column),
        full(0.0, shape, plgpu.Layout.WGMMA),
        full(0.0, (head_dim, block_rows), plgpu.Layout.WGMMA),
    )
    carry = lax.fori_loop(begin, full_end, functools.partial(step, masked=False), initial)
    peak, total, out = lax.fori_loop(full_end, end, functools.partial(step, masked=True), carry)
    total = reduce_rows("add", total)

    # Bring the warpgroups' results to their common maximum and add them up, one after the other.
    jax_compat.store_registers(peak_smem.at[warpgroup], peak)
    jax_compat.store_registers(total_smem.at[warpgroup], total)
    plgpu.barrier_arrive(done_barrier)
    plgpu.barrier_wait(done_barrier)
    peaks = [jax_compat.load_registers(peak_smem.at[i], column) for i in range(warpgroups)]
    totals = [jax_compat.load_registers(total_smem.at[i], column) for i in range(warpgroups)]
    highest = functools.reduce(jnp.maximum, peaks)
    sink = None
    if has_sinks:
        # A sequence's first split alone counts it.
        sink = _load_numbers(first_row, first_head, sinks_gmem[0], rows=block_rows, group=group)
        sink += jnp.where(split == 0, 0.0, -jnp.inf)
        highest = jnp.maximum(highest, sink)
    safe_highest = jnp.where(highest == -jnp.inf, 0.0, highest)
    terms = [x * jnp.exp2(y - safe_highest) for x, y in zip(totals, peaks, strict=True)]
    total = functools.reduce(jnp.add, terms)
    if sink is not None:
        total += jnp.exp2(sink - safe_highest)
    weight = jnp.exp2(peak - safe_highest)
    if splits == 1:
        denominator = total * (formats.PROBABILITY_SCALE * registers.CODE_UNIT)
        weight *= jnp.where(total > 0, 1.0 / jnp.where(total > 0, denominator, 1.0), 0.0)
    out *= _over_rows(weight, head_dim)
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
            elif splits == 1:
                (out_gmem,) = partial_gmem
                _store_output(result, first_row, first_head, out_gmem.at[batch], group)
            else:
                out_gmem, peak_gmem, total_gmem = partial_gmem
                where = (batch, kv_head, split)
                _store_output(result, first_row, jnp.int32(0), out_gmem.at[where], out_gmem.shape[4])
                store = plgpu.inline_mgpu(arg_types=(column, SCALAR, plgpu.RefType()))(registers.store_column_numbers)
                store(highest, first_row, peak_gmem.at[where])
                store(total, first_row, total_gmem.at[where])


def combine_kernel(partial_gmem, peak_gmem, total_gmem, out_gmem, *, group: int) -> None:
    """One block: 128 x 4 numbers of the output of one kv head, from the partial ones of all splits."""
    batch, kv_head, block = (lax.axis_index(name) for name in ("batch", "head", "block"))
    where = (batch, kv_head)
    run = functools.partial(combine_head, group=group)
    types = (SCALAR, SCALAR, *(plgpu.RefType(),) * 4)
    refs = (partial_gmem.at[(*where, slice(None), 0)], peak_gmem.at[where], total_gmem.at[where], out_gmem.at[batch])
    plgpu.inline_mgpu(arg_types=types)(run)(block, kv_head * group, *refs)


def _store_output(out, first_row, first_head, target, group: int) -> None:
    types = (plgpu.Layout.WGMMA, SCALAR, SCALAR, plgpu.RefType())
    store = functools.partial(registers.store_output, group=group)
    plgpu.inline_mgpu(arg_types=types)(store)(out, first_row, first_head, target)


def swizzled(shape: tuple[int, ...], dtype: jax.typing.DTypeLike = formats.E4M3, columns: int | None = None):
    """Shared memory in WGMMA's order; a product may take ``columns`` of it."""
    return plgpu.SMEM(shape, dtype, transforms=swizzle(columns or shape[-1], dtype))


def swizzle(columns: int, dtype: jax.typing.DTypeLike = formats.E4M3) -> tuple[Any, ...]:
    """Transforms of shared memory in WGMMA's order: rows of up to 128 bytes in tiles of 8, swizzled."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, columns * size)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def _load_queries(first_row, first_head, queries, scales, *, rows: int, group: int):
    """Start to load a block's queries [T, heads, H], as raw words, and their scales [T, heads]."""
    layout = registers.query_layout(rows, queries.shape[2])
    raw = plgpu.ShapeDtypeStruct((rows * queries.shape[2] // 4,), jnp.int32, layout=layout)
    load = functools.partial(registers.load_queries, rows=rows, group=group)
    load = plgpu.inline_mgpu(arg_types=(SCALAR, SCALAR, plgpu.RefType()), return_type=raw)(load)
    words = load(first_row, first_head, queries)
    return words, _load_numbers(first_row, first_head, scales, rows=rows, group=group)


def _load_numbers(first_row, first_head, numbers, *, rows: int, group: int):
    """Start to load one of the numbers [T, heads] for each of a block's rows."""
    result = plgpu.ShapeDtypeStruct((rows,), jnp.float32, layout=plgpu.Layout.WGMMA.reduce(0))
    load = functools.partial(registers.load_query_scales, rows=rows, group=group)
    load = plgpu.inline_mgpu(arg_types=(SCALAR, SCALAR, plgpu.RefType()), return_type=result)(load)
    return load(first_row, first_head, numbers)


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
    arg_types = (plgpu.Layout.WGMMA, plgpu.RefType(swizzle(128)))
    plgpu.inline_mgpu(arg_types=arg_types)(registers.store_probabilities)(p, p_smem)
