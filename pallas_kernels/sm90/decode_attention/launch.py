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

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import formats
from pallas_kernels.formats import ScaledArray
from pallas_kernels.sm90.attention.operands import Softmax, sinks_in_log2
from pallas_kernels.sm90.decode_attention.combine import combine_splits
from pallas_kernels.sm90.decode_attention.config import Config, Problem, default_config
from pallas_kernels.sm90.decode_attention.kernel import kernel, scratch_types
from pallas_kernels.sm90.decode_attention.mainloop import COPY_ROW, Operands
from pallas_kernels.sm90.row_quantize import launch as row_quantize

# Most float32 numbers of a token's splits (splits x heads x head_dim) for which one thread block, or each of a
# cluster's, both combines and quantizes them: 192 KiB, which a multiprocessor reads in less than the 2 us that another
# kernel takes.
MOST_IN_A_BLOCK = 3 << 14
MOST_IN_A_THREAD = 128  # of them, in registers


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
    softmax = Softmax.of(scale, softcap=softcap, window=window)
    problem = _problem(query, key, page_table, softmax)
    config = config or default_config(problem.head_dim, problem.block_rows, problem.blocks, problem.slots)
    if page_table is not None and key.values.shape[2] % config.block_kv:
        raise ValueError(f"a page has {key.values.shape[2]} slots; expected a multiple of block_kv {config.block_kv}")
    operands = _operands(query, key, value, query_start, kv_lengths, page_table, sinks)
    quantized = jnp.dtype(out_dtype) == formats.E4M3
    out_type = jax.ShapeDtypeStruct(query.values.shape, jnp.bfloat16 if quantized else out_dtype)
    partials = _launch(operands, problem, config, out_type)
    if len(partials) == 1:
        (out,) = partials
    elif quantized and (in_one_kernel := _combining_config(problem, splits=partials[0].shape[2])):
        return row_quantize.combine_quantize(*partials, group=problem.group, config=in_one_kernel)
    else:
        out = combine_splits(*partials, out_type=out_type)
    return row_quantize.quantize_rows(out.reshape(problem.batch, problem.length, -1)) if quantized else out


def _problem(query: ScaledArray, key: ScaledArray, page_table: Array | None, softmax: Softmax) -> Problem:
    batch, length, heads, head_dim = query.values.shape
    kv_heads, slots = key.values.shape[1:3]
    page_size = None
    if page_table is not None:
        page_size, slots = slots, slots * page_table.shape[1]
    return Problem(batch, length, heads, kv_heads, head_dim, slots, page_size, softmax)


def _operands(
    query: ScaledArray,
    key: ScaledArray,
    value: ScaledArray,
    query_start: Array,
    kv_lengths: Array,
    page_table: Array | None,
    sinks: Array | None,
) -> Operands:
    """The arrays as the kernel reads them: codes in longer rows for TMA, scales without their axis of groups."""
    assert query.scale is not None
    assert key.scale is not None
    assert value.scale is not None

    def copy_rows(codes: Array) -> Array:
        return codes.reshape(*codes.shape[:2], -1, COPY_ROW)

    return Operands(
        query.values,
        query.scale[..., 0],
        copy_rows(key.values),
        key.scale[..., 0],
        copy_rows(value.values),
        value.scale[..., 0],
        query_start.astype(jnp.int32),
        kv_lengths.astype(jnp.int32),
        None if page_table is None else page_table.astype(jnp.int32),
        # One for each token too, so that rows find theirs as they find their query's scale.
        None if sinks is None else jnp.broadcast_to(sinks_in_log2(sinks), query.values.shape[1:3]),
    )


def _launch(operands: Operands, problem: Problem, config: Config, out_type: jax.ShapeDtypeStruct) -> tuple[Array, ...]:
    """The output; or, where sequences are split, what :func:`combine_splits` makes it of."""
    splits = config.splits(problem.blocks, problem.slots)
    numbers = jax.ShapeDtypeStruct((problem.batch, problem.kv_heads, splits, problem.rows), jnp.float32)
    # One more axis, so that a split's rows look like one token's heads.
    partial_shape = (problem.batch, problem.kv_heads, splits, 1, problem.rows, problem.head_dim)
    partial_type = jax.ShapeDtypeStruct(partial_shape, jnp.float32)
    inputs, structure = jax.tree.flatten(operands)

    def body(*refs):
        *refs, scratch = refs
        inputs_gmem, outputs_gmem = refs[: len(inputs)], tuple(refs[len(inputs) :])
        operands_gmem = jax.tree.unflatten(structure, inputs_gmem)
        kernel(operands_gmem, outputs_gmem, scratch, config=config, problem=problem)

    return plgpu.kernel(
        body,
        out_type=(out_type,) if splits == 1 else (partial_type, numbers, numbers),
        grid=(splits, problem.kv_heads * problem.row_blocks, problem.batch),
        grid_names=("split", "head", "batch"),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        scratch_types=(scratch_types(config, problem),),
        kernel_name="decode_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*inputs)


def _combining_config(problem: Problem, *, splits: int) -> row_quantize.Config | None:
    """How one kernel combines and quantizes the splits; None if two are faster."""
    width = problem.heads * problem.head_dim
    config = row_quantize.parts_config(problem.batch * problem.length, width, splits)
    fits = splits * width <= MOST_IN_A_BLOCK * config.cluster and splits * config.chunk <= MOST_IN_A_THREAD
    return config if fits else None
