"""FP8 flash attention over the INT4 cache on Hopper: the kernel behind ``prefill_attention``.

A pass over the cache (``prepare``) first writes what WGMMA wants: the codes as E4M3 (exactly: a code is
the mantissa of a subnormal), keys as they lie and values head_dim-major, because FP8 WGMMA takes no
transposed operand. The token scales stay apart: the key's multiplies a column of the scores, the
value's joins it as a logarithm, so that P is cast to FP8 with it.

A thread block is two consumers, warpgroups that compute attention of 64 queries of one head each, and
a producer, which issues TMA copies into a ring of tiles: keys, values and the numbers of their columns,
which arrive and are freed together. There is one thread block on each multiprocessor; it goes from one
block of queries to the next, whose copies run under the end of the last. In a consumer (``Config.pipeline``):

1  Q.K^T, softmax and P.V of a tile run one after the other: head_dim 256, whose output and its
   product leave no registers for more.
2  The exponentials of a tile's last 64 keys run under P.V of its first 64. Q.K^T of the next tile
   follows to the tensor cores at once, into the registers of the scores that have become P; the
   addition of P.V to the output runs under it.

In pipeline 2 the consumers take turns: one starts its products of a tile (P.V and the next Q.K^T)
when the other has its P.V, and only the Q.K^T behind that is still in flight. So the softmax of one runs
under the products of the other, where without an order both would wait for the tensor cores at the
same time and then for the exponentials.

Softmax statistics and the output are float32. P.V of a tile is accumulated from zero by the
tensor cores, whose FP8 accumulation is short, and added to the output by FMAs. P is in units of the
greatest of its own tile, not of all before: so a row whose weight lies in a few keys does not round
away the many others, and the output changes its unit from tile to tile, within float32's range.

A row's denominator is the sum of P / v_scale. Pipeline 1 sums P in float32. In pipeline 2 the tensor
cores do, and sum P in E4M3 as they multiply it: V has ``SUM_COLUMNS`` more columns, whose E4M3 numbers
add up to 1 / v_scale, each of a unit ``SUM_STEP`` times finer than the one before. The first column's
unit is one number for a tile (and so for a thread block of the preparation): the power of two in units of
which the inverse of the tile's least scale is 128 to 256.

FireQ (arXiv 2505.20839), attention; FlashAttention-3 (arXiv 2407.08608).
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.formats import ScaledArray
from pallas_kernels.sm90.attention.operands import Softmax, sinks_in_log2
from pallas_kernels.sm90.common.hardware import NUM_SMS
from pallas_kernels.sm90.prefill_attention.config import WARPGROUPS, Config, default_config
from pallas_kernels.sm90.prefill_attention.kernel import BLOCK_ROWS, kernel, scratch_types
from pallas_kernels.sm90.prefill_attention.mainloop import Operands
from pallas_kernels.sm90.prefill_attention.prepare import prepare
from pallas_kernels.sm90.prefill_attention.schedule import Schedule, causal_schedule


@functools.partial(jax.jit, static_argnames=("slots", "scale", "causal", "window", "softcap", "out_dtype", "config"))
def prefill_attention(
    query: ScaledArray,
    key: ScaledArray,
    value: ScaledArray,
    *,
    query_start: Int[Array, " B"],
    kv_lengths: Int[Array, " B"],
    scale: float,
    slots: int | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: Config | None = None,
) -> Float[Array, "B T heads H"]:
    """Attention of [B, T, heads, H] queries over an INT4 cache; arguments as ``prefill_attention``.

    ``slots`` says that no query sees a slot from there on; None, that any may be seen.
    """
    length = query.values.shape[1]
    config = config or default_config(query.values.shape[-1])
    assert query.scale is not None
    out = launch(
        jnp.pad(query.values, ((0, 0), (0, -length % 8), (0, 0), (0, 0))),
        query.scale[..., 0],
        *prepare(key, value, kv_lengths, config, slots=slots),
        query_start.astype(jnp.int32),
        kv_lengths.astype(jnp.int32),
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        out_dtype=out_dtype,
        config=config,
    )
    return out[:, :length]


def launch(
    q: Float[Array, "B T8 heads H"],
    q_scale: Float[Array, "B T heads"],
    k: Float[Array, "B kv_heads columns H"],
    v: Float[Array, "B kv_heads H_sums columns"],
    columns: Float[Array, "B kv_heads 3 columns"],
    query_start: Int[Array, " B"],
    kv_lengths: Int[Array, " B"],
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    out_dtype: jax.typing.DTypeLike,
    config: Config,
) -> Float[Array, "B T8 heads H"]:
    """The kernel itself, on queries (T8 is T rounded up to 8) and the operands of :func:`prepare`."""
    batch, length, heads, head_dim = q.shape
    if config.pipeline == 2 and head_dim > 128:
        raise ValueError(f"head_dim is {head_dim}; expected at most 128 in pipeline 2")
    if v.shape[2] != head_dim + config.sum_columns:
        raise ValueError(f"v has {v.shape[2]} rows; expected {head_dim + config.sum_columns} in this config")
    own_sinks = None if sinks is None else sinks_in_log2(sinks)
    operands = Operands(q, q_scale, k, v, columns, query_start, kv_lengths, own_sinks)
    inputs, structure = jax.tree.flatten(operands)
    row_blocks, copies = pl.cdiv(length, BLOCK_ROWS), heads * batch
    ctas = min(NUM_SMS, row_blocks * copies)
    schedule = causal_schedule(row_blocks, copies, ctas) if causal else Schedule(row_blocks * copies, ctas)
    softmax = Softmax.of(scale, softcap=softcap, window=window, causal=causal)

    def body(*refs):
        *inputs_gmem, out_gmem, scratch = refs
        operands_gmem = jax.tree.unflatten(structure, inputs_gmem)
        kernel(operands_gmem, out_gmem, scratch, config=config, schedule=schedule, softmax=softmax)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, out_dtype),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=(scratch_types(config, head_dim, out_dtype),),
        kernel_name="prefill_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*inputs)
