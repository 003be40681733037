"""FP8 flash attention over the INT4 cache on Hopper: the kernel behind ``prefill_attention``.

A pass over the cache first writes what WGMMA wants: the codes as E4M3 (exactly: a code is the
mantissa of a subnormal), keys as they lie and values head_dim-major, because FP8 WGMMA takes no
transposed operand. The token scales stay apart: the key's multiplies a column of the scores, the
value's joins it as a logarithm, so that P is cast to FP8 with it and its largest term is exact.

A thread block is two or three compute warpgroups of 64 queries of one head each, and one that
issues TMA copies into a ring of K and V tiles. ``Config.pipeline`` says how far the products run
ahead of the softmax inside a warpgroup:

1  Q.K^T, softmax and P.V of a tile one after the other.
2  Q.K^T of tile j+1 runs under the softmax of tile j.

Softmax statistics and the output are float32. P.V of a tile is accumulated from zero by the
tensor cores, whose FP8 accumulation is short, and added to the output by FMAs.

FireQ (arXiv 2505.20839), attention; FlashAttention-3 (arXiv 2407.08608).
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import attention_registers_sm90 as registers
from pallas_kernels import formats
from pallas_kernels.decode_attention_sm90 import unsupported_formats
from pallas_kernels.formats import ScaledArray
from pallas_kernels.prefill_attention_device import BLOCK_Q, kernel

_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile configuration of the prefill kernel.

    Attributes:
        block_kv: keys of a tile: 64, 128 or 256.
        warpgroups: compute warpgroups, each with 64 queries.
        stages: K and V tiles in the shared-memory ring, at least 2.
        pipeline: how far the products run ahead of the softmax (see the module).
    """

    block_kv: int = 128
    warpgroups: int = 2
    stages: int = 2
    pipeline: int = 2

    def __post_init__(self):
        if self.block_kv not in (64, 128, 256):
            raise ValueError(f"block_kv is {self.block_kv}; expected 64, 128 or 256")
        if self.warpgroups not in (1, 2, 3):
            raise ValueError(f"warpgroups is {self.warpgroups}; expected 1, 2 or 3")
        if self.stages < 2:
            raise ValueError(f"stages is {self.stages}; expected at least 2")
        if self.pipeline not in (1, 2):
            raise ValueError(f"pipeline is {self.pipeline}; expected 1 or 2")


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
def prefill_attention_sm90(
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
    head_dim = query.values.shape[-1]
    config = config or default_config(head_dim)
    operands = prepare(query, key, value, kv_lengths, scale, config)
    out = launch(
        *operands,
        query_start.astype(jnp.int32),
        kv_lengths.astype(jnp.int32),
        causal=causal,
        window=window,
        out_dtype=out_dtype,
        config=config,
    )
    return out[:, : query.values.shape[1]]


def prepare(
    query: ScaledArray,
    key: ScaledArray,
    value: ScaledArray,
    kv_lengths: Int[Array, " B"],
    scale: float,
    config: Config,
) -> tuple[Array, Array, Array, Array, Array]:
    """The kernel's operands: Q, its rows' factors, K, V^T and their columns' numbers.

    Shapes: [B, T8, heads, H], [B, heads, T'], [B, kv_heads, S', H], [B, kv_heads, H, S'] and
    [B, kv_heads, 3, S']; T8 is T rounded up to 8, T' and S' are whole blocks. The columns'
    numbers are the key's scale, the logarithm of the value's, and one over it.
    """
    assert query.scale is not None
    assert key.scale is not None
    assert value.scale is not None
    length, slots = query.values.shape[1], key.values.shape[2]
    padding = -slots % config.block_kv

    to_scores = query.scale[..., 0].astype(jnp.float32) * (scale * _LOG2E / registers.CODE_UNIT)
    to_scores = jnp.pad(to_scores.swapaxes(1, 2), ((0, 0), (0, 0), (0, -length % (BLOCK_Q * config.warpgroups))))
    queries = jnp.pad(query.values, ((0, 0), (0, -length % 8), (0, 0), (0, 0)))

    # Slots beyond the end may hold anything, NaN included; they are masked, but 0 * NaN is NaN.
    valid = (jnp.arange(slots) < kv_lengths[:, None])[:, None]
    k_scale, v_scale = (jnp.where(valid, x[..., 0].astype(jnp.float32), 1.0) for x in (key.scale, value.scale))
    columns = jnp.stack([k_scale, jnp.log2(v_scale), 1.0 / v_scale], axis=2)
    columns = jnp.pad(columns, ((0, 0), (0, 0), (0, 0), (0, padding)))

    k, v = (jnp.pad(x.values, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (key, value))
    keys, values = registers.keys_to_e4m3(k), registers.values_to_e4m3(v)
    return queries, to_scores, keys, values, registers.permute_tokens(columns)


def launch(
    q: Float[Array, "B T8 heads H"],
    to_scores: Float[Array, "B heads rows"],
    k: Float[Array, "B kv_heads columns H"],
    v: Float[Array, "B kv_heads H columns"],
    columns: Float[Array, "B kv_heads 3 columns"],
    query_start: Int[Array, " B"],
    kv_lengths: Int[Array, " B"],
    *,
    causal: bool,
    window: int | None,
    out_dtype: jax.typing.DTypeLike,
    config: Config,
) -> Float[Array, "B T8 heads H"]:
    """The kernel itself, on the operands of :func:`prepare`."""
    batch, length, heads, head_dim = q.shape
    rows, block_kv, stages = BLOCK_Q * config.warpgroups, config.block_kv, config.stages
    ring = functools.partial(plgpu.Barrier, num_barriers=stages)
    return plgpu.kernel(
        functools.partial(kernel, causal=causal, window=window, pipeline=config.pipeline),
        out_type=jax.ShapeDtypeStruct(q.shape, out_dtype),
        grid=(heads, -(-length // rows), batch),
        grid_names=("head", "block", "batch"),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "q_smem": _swizzled((config.warpgroups, BLOCK_Q, head_dim), formats.E4M3),
            "out_smem": _swizzled((config.warpgroups, BLOCK_Q, head_dim), out_dtype),
            "k_smem": _swizzled((stages, block_kv, head_dim), formats.E4M3),
            "v_smem": _swizzled((stages, head_dim, block_kv), formats.E4M3),
            "columns_smem": plgpu.SMEM((stages, 3, block_kv), jnp.float32),
            "q_barriers": plgpu.Barrier(num_barriers=config.warpgroups),
            "k_full": ring(),
            "v_full": ring(num_arrivals=2),
            "k_free": ring(num_arrivals=config.warpgroups),
            "v_free": ring(num_arrivals=config.warpgroups),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(q, to_scores, k, v, columns, query_start, kv_lengths)


def _swizzled(shape: tuple[int, int, int], dtype: jax.typing.DTypeLike):
    """Shared memory in WGMMA's order: rows of up to 128 bytes in tiles of 8, swizzled."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, shape[-1] * size)
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)
