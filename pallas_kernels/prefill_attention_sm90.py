"""FP8 flash attention over the INT4 cache on Hopper: the kernel behind ``prefill_attention``.

A pass over the cache first writes what WGMMA wants: keys' codes as E4M3 (exactly: a code is the
mantissa of a subnormal) as they lie, values' codes times their scale's power of two (exactly as
well) head_dim-major, because FP8 WGMMA takes no transposed operand. The key's scale stays apart and
multiplies a column of the scores; what is left of the value's, its mantissa, joins the score as a
logarithm, so that P is cast to FP8 with it.

A thread block is one or two compute warpgroups of 64 queries of one head each, and one that
issues TMA copies into a ring of K and V tiles. In a warpgroup P.V of tile j runs under the softmax
of tile j+1; with ``Config.take_turns`` the two hand each other the tensor cores, so that one's
products run under the other's softmax.

Softmax statistics and the output are float32. The tensor cores add P.V to a running output, whose
FP8 accumulation is short; every ``Config.settle_every`` tiles it is added to a float32 sum in shared
memory. The softmax's denominator is eight more columns of P.V.

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
from pallas_kernels import prefill_attention_registers_sm90 as registers
from pallas_kernels.attention_registers_sm90 import CODE_UNIT
from pallas_kernels.decode_attention_sm90 import unsupported_formats
from pallas_kernels.formats import ScaledArray
from pallas_kernels.prefill_attention_device import BLOCK_Q, PREPARED_TOKENS, kernel, parts, prepare_kernel

_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile configuration of the prefill kernel.

    Attributes:
        block_kv: keys of a tile: 64 or 128.
        warpgroups: compute warpgroups, each with 64 queries.
        stages: K and V tiles in the shared-memory ring, at least 2.
        settle_every: tiles whose P.V the tensor cores add up before it joins the float32 sum.
        take_turns: whether two warpgroups take turns on the tensor cores.
    """

    block_kv: int = 128
    warpgroups: int = 2
    stages: int = 3
    settle_every: int = 16
    take_turns: bool = True

    def __post_init__(self):
        if self.block_kv not in (64, 128):
            raise ValueError(f"block_kv is {self.block_kv}; expected 64 or 128")
        if self.warpgroups not in (1, 2):
            raise ValueError(f"warpgroups is {self.warpgroups}; expected 1 or 2")
        if self.stages < 2:
            raise ValueError(f"stages is {self.stages}; expected at least 2")
        if self.settle_every < 1:
            raise ValueError(f"settle_every is {self.settle_every}; expected a positive number")
        if self.take_turns and self.warpgroups != 2:
            raise ValueError(f"take_turns is {self.take_turns}; expected False for {self.warpgroups} warpgroups")


def default_config(head_dim: int) -> Config:
    """Two warpgroups; a head of 256 leaves shared memory for one."""
    return Config(block_kv=64, warpgroups=1, take_turns=False) if head_dim == 256 else Config()


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
    length = query.values.shape[1]
    queries = jnp.pad(query.values, ((0, 0), (0, -length % 8), (0, 0), (0, 0)))
    assert query.scale is not None
    out = launch(
        queries,
        query.scale[..., 0],
        *prepare(key, value, kv_lengths, config.block_kv),
        query_start.astype(jnp.int32),
        kv_lengths.astype(jnp.int32),
        scale=scale,
        causal=causal,
        window=window,
        out_dtype=out_dtype,
        config=config,
    )
    return out[:, :length]


def prepare(
    key: ScaledArray, value: ScaledArray, kv_lengths: Int[Array, " B"], block_kv: int
) -> tuple[
    Float[Array, "B kv_heads columns H"],
    Float[Array, "B kv_heads tiles H8 block_kv"],
    Float[Array, "B kv_heads 2 columns"],
    Float[Array, "B kv_heads"],
]:
    """The kernel's operands: K, V^T with the rows of its totals, their columns' numbers, and the highest value scale.

    V^T is stored tile by tile, so that a copy reads consecutive bytes.
    ``columns`` is the number of slots rounded up to 128; ``H8`` is H + 8. The columns' numbers are the
    key's scale and log2 of the mantissa of the value's.
    """
    assert key.scale is not None
    assert value.scale is not None
    batch, kv_heads, slots, stored = key.values.shape
    k_scale, v_scale = key.scale[..., 0], value.scale[..., 0]
    # Slots beyond the end may hold anything, NaN included.
    valid = (jnp.arange(slots) < kv_lengths[:, None])[:, None]
    highest = jnp.max(jnp.where(valid, v_scale, 0), axis=-1).astype(jnp.float32)
    columns = -(-slots // PREPARED_TOKENS) * PREPARED_TOKENS
    tiles = (batch, kv_heads, columns // block_kv)
    keys, values, numbers = plgpu.kernel(
        prepare_kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, columns, 2 * stored), formats.E4M3),
            jax.ShapeDtypeStruct((*tiles, 2 * stored + registers.TOTAL_ROWS, block_kv), formats.E4M3),
            jax.ShapeDtypeStruct((batch, kv_heads, 2, columns), jnp.float32),
        ),
        grid=(columns // PREPARED_TOKENS, kv_heads, batch),
        grid_names=("block", "head", "batch"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types={"units_smem": plgpu.SMEM((PREPARED_TOKENS,), jnp.float16)},
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(key.values, k_scale, value.values, v_scale, highest, kv_lengths.astype(jnp.int32))
    return keys, values, numbers, highest


def launch(
    q: Float[Array, "B T8 heads H"],
    q_scale: Float[Array, "B T heads"],
    k: Float[Array, "B kv_heads columns H"],
    v: Float[Array, "B kv_heads tiles H8 block_kv"],
    columns: Float[Array, "B kv_heads 2 columns"],
    highest: Float[Array, "B kv_heads"],
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
    rows, block_kv, stages = BLOCK_Q * config.warpgroups, config.block_kv, config.stages
    ring = functools.partial(plgpu.Barrier, num_barriers=stages)
    body = functools.partial(
        kernel,
        to_scores=scale * _LOG2E / CODE_UNIT,
        causal=causal,
        window=window,
        settle_every=config.settle_every,
        take_turns=config.take_turns,
    )
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, out_dtype),
        grid=(heads, -(-length // rows), batch),
        grid_names=("head", "block", "batch"),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "q_smem": _swizzled((config.warpgroups, BLOCK_Q, head_dim), formats.E4M3),
            "out_smem": _swizzled((config.warpgroups, BLOCK_Q, head_dim), out_dtype),
            "k_smem": _swizzled((stages, block_kv, head_dim), formats.E4M3),
            "v_smem": _swizzled((stages, v.shape[3], block_kv), formats.E4M3),
            "columns_smem": plgpu.SMEM((stages, 2, block_kv), jnp.float32),
            "sum_smem": plgpu.SMEM((config.warpgroups, BLOCK_Q * v.shape[3]), jnp.float32),
            "q_barriers": plgpu.Barrier(num_barriers=config.warpgroups),
            "k_full": ring(),
            "v_full": ring(num_arrivals=1 + len(parts(head_dim))),
            "k_free": ring(num_arrivals=config.warpgroups),
            "v_free": ring(num_arrivals=config.warpgroups),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(q, q_scale, k, v, columns, highest, query_start, kv_lengths)


def _swizzled(shape: tuple[int, int, int], dtype: jax.typing.DTypeLike):
    """Shared memory in WGMMA's order: rows of up to 128 bytes in tiles of 8, swizzled."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, shape[-1] * size)
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)
