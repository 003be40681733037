"""FP8 flash attention over the INT4 cache on Hopper: the kernel behind ``prefill_attention``.

A pass over the cache first writes what WGMMA wants: the codes as E4M3 (exactly: a code is the
mantissa of a subnormal), keys as they lie and values head_dim-major, because FP8 WGMMA takes no
transposed operand. The token scales stay apart: the key's multiplies a column of the scores, the
value's joins it as a logarithm, so that P is cast to FP8 with it and its largest term is exact.

A thread block is two or three compute warpgroups of 64 queries of one head each, and one that
issues TMA copies into a ring of K and V tiles. There is one on each multiprocessor; it goes from
one block of queries to the next, whose copies run under the end of the last. ``Config.pipeline``
says how far the products run ahead of the softmax inside a warpgroup:

1  Q.K^T, softmax and P.V of a tile one after the other.
2  Q.K^T of tile j+1 runs under the softmax of tile j.
3  Q.K^T of tile j+1 follows P.V of tile j to the tensor cores, into the registers that held the
   scores; the output's sum runs under it, and the other warpgroup's softmax under both.
4  As 3, with P.V of the first half of the keys under the exponentials of the second.

Softmax statistics and the output are float32. P.V of a tile is accumulated from zero by the
tensor cores, whose FP8 accumulation is short, and added to the output by FMAs. With ``Config.sums``
they also sum P: V then has eight more columns, which hold one over the values' scales.

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
from pallas_kernels.sm90.attention.prefill_device import BLOCK_Q, kernel, prepare_kernel
from pallas_kernels.sm90.attention.prefill_registers import PREPARED_TOKENS, SUM_COLUMNS
from pallas_kernels.sm90.attention.registers import CODE_UNIT
from pallas_kernels.sm90.hardware import NUM_SMS

_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile configuration of the prefill kernel.

    Attributes:
        block_kv: keys of a tile: 64 or 128.
        warpgroups: compute warpgroups, each with 64 queries.
        stages: K and V tiles in the shared-memory ring, at least 2.
        pipeline: how far the products run ahead of the softmax (see the module).
        one_barrier: a tile's keys, values and numbers arrive and are freed together; wants a stage more.
        sums: the softmax's sums are columns of P.V; head_dim up to 128.
        lazy: in pipelines 3 and 4, row maxima follow the scores only in large steps.
        turns: in pipelines 3 and 4, two warpgroups start their products alternately.
    """

    block_kv: int = 128
    warpgroups: int = 2
    stages: int = 2
    pipeline: int = 2
    one_barrier: bool = False
    sums: bool = False
    turns: bool = False
    lazy: bool = False

    def __post_init__(self):
        if self.block_kv not in (64, 128):
            raise ValueError(f"block_kv is {self.block_kv}; expected 64 or 128")
        if self.warpgroups not in (1, 2, 3, 4):
            raise ValueError(f"warpgroups is {self.warpgroups}; expected 1, 2, 3 or 4")
        if self.stages < 2:
            raise ValueError(f"stages is {self.stages}; expected at least 2")
        if self.pipeline not in (1, 2, 3, 4):
            raise ValueError(f"pipeline is {self.pipeline}; expected 1, 2, 3 or 4")
        if self.pipeline >= 3 and not (self.one_barrier and self.sums):
            raise ValueError(f"pipeline {self.pipeline} needs one_barrier and sums")
        if self.pipeline == 4 and self.block_kv != 128:
            raise ValueError("pipeline 4 needs tiles of 128 keys")
        if self.lazy and self.pipeline < 3:
            raise ValueError("lazy needs pipeline 3 or 4")
        if self.turns and (self.pipeline < 3 or self.warpgroups != 2):
            raise ValueError("turns are of pipelines 3 and 4 with 2 warpgroups")


def default_config(head_dim: int) -> Config:
    """Two warpgroups in pipeline 2; a head of 256 leaves no registers to run ahead in."""
    return Config(block_kv=64, pipeline=1) if head_dim == 256 else Config()


def unsupported(
    query: ScaledArray, key: ScaledArray, value: ScaledArray, scale: float, out_dtype: jax.typing.DTypeLike
) -> str | None:
    """Why the kernel cannot run these operands, or None."""
    if jnp.dtype(out_dtype) != jnp.bfloat16:
        return f"out_dtype is {jnp.dtype(out_dtype)}, not bfloat16"
    if scale <= 0:
        return f"scale is {scale}, not positive"
    return unsupported_formats(query, key, value)


@functools.partial(jax.jit, static_argnames=("scale", "causal", "window", "out_dtype", "config"))
def prefill_attention(
    query: ScaledArray,
    key: ScaledArray,
    value: ScaledArray,
    *,
    query_start: Int[Array, " B"],
    kv_lengths: Int[Array, " B"],
    scale: float,
    causal: bool = True,
    window: int | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: Config | None = None,
) -> Float[Array, "B T heads H"]:
    """Attention of [B, T, heads, H] queries over an INT4 cache; arguments as ``prefill_attention``."""
    length, head_dim = query.values.shape[1], query.values.shape[-1]
    assert query.scale is not None
    out = launch(
        jnp.pad(query.values, ((0, 0), (0, -length % 8), (0, 0), (0, 0))),
        query.scale[..., 0],
        *prepare(key, value, kv_lengths, sums=(config or default_config(head_dim)).sums),
        query_start.astype(jnp.int32),
        kv_lengths.astype(jnp.int32),
        scale=scale,
        causal=causal,
        window=window,
        out_dtype=out_dtype,
        config=config or default_config(head_dim),
    )
    return out[:, :length]


def prepare(
    key: ScaledArray, value: ScaledArray, kv_lengths: Int[Array, " B"], *, sums: bool = False
) -> tuple[
    Float[Array, "B kv_heads columns H"],
    Float[Array, "B kv_heads H columns"],
    Float[Array, "B kv_heads 3 columns"],
]:
    """The kernel's K, V^T and their columns' numbers, by one pass over the cache.

    ``columns`` is the number of slots rounded up to whole tiles. The columns' numbers are the key's
    scale, the logarithm of the value's, and one over it.
    """
    assert key.scale is not None
    assert value.scale is not None
    batch, kv_heads, slots, stored = key.values.shape
    blocks = -(-slots // PREPARED_TOKENS)
    columns = blocks * PREPARED_TOKENS
    return plgpu.kernel(
        prepare_kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, columns, 2 * stored), formats.E4M3),
            jax.ShapeDtypeStruct((batch, kv_heads, 2 * stored + SUM_COLUMNS * sums, columns), formats.E4M3),
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
    v: Float[Array, "B kv_heads H columns"],
    columns: Float[Array, "B kv_heads 3 columns"],
    query_start: Int[Array, " B"],
    kv_lengths: Int[Array, " B"],
    *,
    scale: float,
    causal: bool,
    window: int | None,
    out_dtype: jax.typing.DTypeLike,
    config: Config,
) -> Float[Array, "B T8 heads H"]:
    """The kernel itself, on queries (T8 is T rounded up to 8) and the operands of :func:`prepare`."""
    batch, length, heads, head_dim = q.shape
    if config.sums and head_dim > 128:
        raise ValueError(f"head_dim is {head_dim}; sums leave room for 128")
    rows, block_kv, stages = BLOCK_Q * config.warpgroups, config.block_kv, config.stages
    ring = functools.partial(plgpu.Barrier, num_barriers=stages)
    return plgpu.kernel(
        functools.partial(
            kernel,
            to_scores=scale * _LOG2E / CODE_UNIT,
            causal=causal,
            window=window,
            pipeline=config.pipeline,
            one_barrier=config.one_barrier,
            lazy=config.lazy,
        ),
        out_type=jax.ShapeDtypeStruct(q.shape, out_dtype),
        grid=(min(NUM_SMS, heads * -(-length // rows) * batch),),
        grid_names=("cta",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "q_smem": swizzled((config.warpgroups, BLOCK_Q, head_dim), formats.E4M3),
            "out_smem": swizzled((config.warpgroups, BLOCK_Q, head_dim), out_dtype),
            "k_smem": swizzled((stages, block_kv, head_dim), formats.E4M3),
            "v_smem": swizzled(
                (stages, v.shape[2], block_kv), formats.E4M3, block_kv // 2 if config.pipeline == 4 else None
            ),
            "columns_smem": plgpu.SMEM((stages, 3, block_kv), jnp.float32),
            "q_full": plgpu.Barrier(num_barriers=config.warpgroups),
            "q_free": plgpu.Barrier(num_barriers=config.warpgroups),
            "k_full": ring(num_arrivals=3 if config.one_barrier else 1),
            "v_full": ring(num_arrivals=2),
            "k_free": ring(num_arrivals=config.warpgroups),
            "v_free": ring(num_arrivals=config.warpgroups),
            "turns": plgpu.Barrier(num_barriers=2) if config.turns else None,
        },
        kernel_name="prefill_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(q, q_scale, k, v, columns, query_start, kv_lengths)
