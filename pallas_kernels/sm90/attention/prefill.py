"""FP8 flash attention over the INT4 cache on Hopper: the kernel behind ``prefill_attention``.

A pass over the cache first writes what WGMMA wants: the codes as E4M3 (exactly: a code is the
mantissa of a subnormal), keys as they lie and values head_dim-major, because FP8 WGMMA takes no
transposed operand. The token scales stay apart: the key's multiplies a column of the scores, the
value's joins it as a logarithm, so that P is cast to FP8 with it.

A thread block is two compute warpgroups of 64 queries of one head each, and one that issues TMA
copies into a ring of tiles: keys, values and the numbers of their columns, which arrive and are
freed together. There is one block on each multiprocessor; it goes from one block of queries to the
next, whose copies run under the end of the last. Inside a compute warpgroup (``Config.pipeline``):

1  Q.K^T, softmax and P.V of a tile run one after the other: head_dim 256, whose output and its
   product leave no registers for more.
2  The exponentials of a tile's last 64 keys run under P.V of its first 64. Q.K^T of the next tile
   follows to the tensor cores at once, into the registers of the scores that have become P; the
   addition of P.V to the output runs under it.

In pipeline 2 the warpgroups take turns: one starts its products of a tile (P.V and the next Q.K^T)
when the other has its P.V, and only the Q.K^T behind that is still in flight. So the softmax of one runs
under the products of the other, where without an order both would wait for the tensor cores at the
same time and then for the exponentials.

Softmax statistics and the output are float32. P.V of a tile is accumulated from zero by the
tensor cores, whose FP8 accumulation is short, and added to the output by FMAs. P is in units of the
greatest of its own tile, not of all before: so a row whose weight lies in a few keys does not round
away the many others, and the output changes its unit from tile to tile, within float32's range.

A row's denominator is the sum of P / v_scale. Pipeline 1 sums P in float32. In pipeline 2 the tensor
cores do, and sum P in E4M3 as they multiply it: V has ``SUM_COLUMNS`` more columns, whose E4M3 numbers
add up to 1 / v_scale, each of a unit ``SUM_STEP`` times finer than the one before. The first unit is
a tile's, which is a block of the preparation: the power of two for which the inverse of its least scale
becomes 128 to 256.

FireQ (arXiv 2505.20839), attention; FlashAttention-3 (arXiv 2407.08608).
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
from pallas_kernels.sm90.attention.decode import unsupported_formats
from pallas_kernels.sm90.attention.decode_device import swizzled
from pallas_kernels.sm90.attention.prefill_device import BLOCK_Q, PRODUCT_KEYS, WARPGROUPS, kernel, prepare_kernel
from pallas_kernels.sm90.attention.prefill_registers import PREPARED_TOKENS, SUM_COLUMNS
from pallas_kernels.sm90.attention.registers import CODE_UNIT
from pallas_kernels.sm90.attention.schedule import Schedule, causal_schedule
from pallas_kernels.sm90.common.hardware import NUM_SMS

_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile configuration of the prefill kernel.

    Attributes:
        pipeline: how products and softmax overlap (see the module): 1, or 2 for head_dim up to 128.
        block_kv: keys of a tile: 64 or 128; pipeline 2 needs 128.
        stages: tiles in the shared-memory ring, at least 2.
    """

    pipeline: int = 2
    block_kv: int = 128
    stages: int = 3

    def __post_init__(self):
        if self.pipeline not in (1, 2):
            raise ValueError(f"pipeline is {self.pipeline}; expected 1 or 2")
        if self.block_kv not in (64, 128):
            raise ValueError(f"block_kv is {self.block_kv}; expected 64 or 128")
        if self.pipeline == 2 and self.block_kv != 128:
            raise ValueError(f"block_kv is {self.block_kv}; expected 128 in pipeline 2")
        if self.stages < 2:
            raise ValueError(f"stages is {self.stages}; expected at least 2")

    @property
    def sum_columns(self) -> int:
        """Columns of V that the softmax's denominators take."""
        return SUM_COLUMNS if self.pipeline == 2 else 0


def default_config(head_dim: int) -> Config:
    """Pipeline 2; a head of 256 leaves no registers for it."""
    return Config(pipeline=1, block_kv=64) if head_dim == 256 else Config()


def unsupported(
    query: ScaledArray, key: ScaledArray, value: ScaledArray, scale: float, out_dtype: jax.typing.DTypeLike
) -> str | None:
    """Why the kernel cannot run these operands, or None."""
    if jnp.dtype(out_dtype) != jnp.bfloat16:
        return f"out_dtype is {jnp.dtype(out_dtype)}, not bfloat16"
    if scale <= 0:
        return f"scale is {scale}, not positive"
    return unsupported_formats(query, key, value)


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


def prepare(
    key: ScaledArray,
    value: ScaledArray,
    kv_lengths: Int[Array, " B"],
    config: Config | None = None,
    *,
    slots: int | None = None,
) -> tuple[
    Float[Array, "B kv_heads columns H"],
    Float[Array, "B kv_heads H_sums columns"],
    Float[Array, "B kv_heads 3 columns"],
]:
    """The kernel's K, V^T and their columns' numbers, by one pass over the cache's first ``slots`` (None: all).

    ``columns`` is the number of these rounded up to whole tiles, and H_sums is H and the config's
    ``sum_columns``. The columns' numbers are the key's scale, the logarithm of the value's and one
    over it, or where V has columns for that their unit.
    """
    assert key.scale is not None
    assert value.scale is not None
    batch, kv_heads, capacity, stored = key.values.shape
    blocks = -(-(capacity if slots is None else slots) // PREPARED_TOKENS)
    columns = blocks * PREPARED_TOKENS
    sum_columns = (config or default_config(2 * stored)).sum_columns
    return plgpu.kernel(
        prepare_kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, columns, 2 * stored), formats.E4M3),
            jax.ShapeDtypeStruct((batch, kv_heads, 2 * stored + sum_columns, columns), formats.E4M3),
            jax.ShapeDtypeStruct((batch, kv_heads, 3, columns), jnp.float32),
        ),
        grid=(blocks, kv_heads, batch),
        grid_names=("block", "head", "batch"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="prepare_attention",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(key.values, key.scale[..., 0], value.values, value.scale[..., 0], kv_lengths.astype(jnp.int32))


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
    block_kv, stages = config.block_kv, config.stages
    row_blocks = -(-length // (WARPGROUPS * BLOCK_Q))
    copies = heads * batch
    ctas = min(NUM_SMS, row_blocks * copies)
    schedule = causal_schedule(row_blocks, copies, ctas) if causal else Schedule(row_blocks * copies, ctas)
    options = {"causal": causal, "window": window, "pipeline": config.pipeline}
    options["softcap"] = None if softcap is None else softcap * _LOG2E
    to_scores = scale * (_LOG2E if softcap is None else 1 / softcap) / CODE_UNIT
    own = () if sinks is None else (sinks.astype(jnp.float32) * _LOG2E,)
    return plgpu.kernel(
        functools.partial(kernel, schedule=schedule, to_scores=to_scores, **options),
        out_type=jax.ShapeDtypeStruct(q.shape, out_dtype),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types={
            "q_smem": swizzled((WARPGROUPS, BLOCK_Q, head_dim), formats.E4M3),
            "out_smem": swizzled((WARPGROUPS, BLOCK_Q, head_dim), out_dtype),
            "k_smem": swizzled((stages, block_kv, head_dim), formats.E4M3),
            "v_smem": swizzled((stages, v.shape[2], block_kv), formats.E4M3, PRODUCT_KEYS),
            "columns_smem": plgpu.SMEM((stages, 3, block_kv), jnp.float32),
            "q_full": plgpu.Barrier(num_barriers=WARPGROUPS),
            "q_free": plgpu.Barrier(num_barriers=WARPGROUPS),
            "full": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            "turns": plgpu.Barrier(num_barriers=WARPGROUPS),
        },
        kernel_name="prefill_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(q, q_scale, k, v, columns, query_start, kv_lengths, *own)
