"""RoPE, quantization and append on Hopper: the kernel behind ``rope_quantize``.

A lane holds eight pairs (i, i + H/2) of a row (one head of one token): 16 bytes of each half, so
that RoPE and the packing of two codes into a byte need no other lane, and only the row's largest
magnitude is shuffled, and for a norm the sum of its squares. A warp takes 512 / H heads of a token
at a time: a group. It keeps the token's cos and sin in registers, goes through its groups and loads
one ahead. What a matmul left in parts (``SplitKPartials``) is added up as it is loaded.

With few tokens a warp waits for memory once and then for its own instructions, which are as many as
its lanes have elements: there they have half of them.

The caches are refs that the kernel writes into: where their buffers are donated nothing is copied.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import formats
from pallas_kernels.formats import ScaledArray
from pallas_kernels.head_norm import HeadNorm
from pallas_kernels.sm90.common import split_k
from pallas_kernels.sm90.common.hardware import NUM_SMS
from pallas_kernels.sm90.rope_quantize import device
from pallas_kernels.split_k import SplitKPartials

HEAD_DIMS = (64, 128, 256)
# Warps for each multiprocessor: so few wait for memory, and for each instruction's result; up to so many, each with one
# group, take less time than fewer that load ahead; and so many are enough to load at the memory's speed.
FEW_WARPS, MANY_WARPS, ENOUGH_WARPS = 8, 80, 32


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        groups: groups of heads that a warp goes through, at most.
        warpgroups: warpgroups of a thread block.
        pairs: that a lane holds of a row, 4 or 8.
    """

    groups: int
    warpgroups: int = 1
    pairs: int = 8

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; expected a positive number")
        if self.pairs not in (4, 8):
            raise ValueError(f"pairs is {self.pairs}; expected 4 or 8")


def default_config(tokens: int, groups: int, *, unbiased_keys: bool = False) -> Config:
    """A group a warp as long as these fill a GPU a few times, then half of a token's ``groups``, then all.

    Half a group, if there would be few warps. ``unbiased_keys`` keep the order in which eight pairs are summed.
    """
    warps = tokens * groups / NUM_SMS  # with one group each
    if warps <= FEW_WARPS and not unbiased_keys:
        return Config(1, pairs=4)
    if warps <= MANY_WARPS:
        return Config(1)
    return Config(groups if warps >= ENOUGH_WARPS * groups else -(-groups // 2))


def unsupported(
    packed: Array | SplitKPartials,
    cos: Array,
    sin: Array,
    key: ScaledArray,
    value: ScaledArray,
    quantize_query: bool,
    norm: HeadNorm | None = None,
) -> str | None:
    """Why the kernel cannot run these operands, or None."""
    if isinstance(packed, SplitKPartials):
        if packed.residual is not None:
            return "the sum has a residual"
        if reason := split_k.unsupported(packed):
            return reason
    elif packed.dtype != jnp.bfloat16:
        return f"packed is {packed.dtype}, not bfloat16"
    if cos.dtype != jnp.float32 or sin.dtype != jnp.float32:
        return f"cos is {cos.dtype} and sin {sin.dtype}, not float32"
    if 2 * cos.shape[-1] not in HEAD_DIMS:
        return f"head_dim is {2 * cos.shape[-1]}, not one of {HEAD_DIMS}"
    if not quantize_query:
        return "the query is not quantized"
    if norm is not None and norm.across_heads:
        return "the norm is over all heads together"
    for name, entry in (("key", key), ("value", value)):
        if entry.values.dtype != jnp.uint8:
            return f"the {name} cache is {entry.values.dtype}, not INT4 (uint8)"
        if entry.scale is None or entry.scale.dtype != jnp.bfloat16 or entry.scale.shape[-1] != 1:
            return f"the {name} scales are not one bf16 number a token and head"
    return None


@functools.partial(jax.jit, static_argnames=("key_clip", "value_clip", "unbiased_keys", "config"))
def rope_quantize(
    packed: Float[Array, "B T packed"] | SplitKPartials,
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    key: ScaledArray,
    value: ScaledArray,
    *,
    start: Int[Array, " B"],
    lengths: Int[Array, " B"],
    norm: HeadNorm | None = None,
    post_rope_scale: Float[Array, "kv_heads H"] | None = None,
    key_offset: Float[Array, "kv_heads H"] | None = None,
    query_factor: Float[Array, "B T"] | None = None,
    key_clip: float = 1.0,
    value_clip: float = 1.0,
    unbiased_keys: bool = False,
    config: Config | None = None,
) -> tuple[ScaledArray, ScaledArray, ScaledArray]:
    """Queries and the new caches; arguments as :func:`~pallas_kernels.rope_quantize.rope_quantize`."""
    batch, length, columns = packed.shape if isinstance(packed, jax.Array) else (*packed.rows, packed.n)
    head_dim = 2 * cos.shape[-1]
    _, kv_heads, capacity, _ = key.values.shape
    problem = device.Problem(
        batch=batch,
        length=length,
        heads=columns // head_dim - 2 * kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        key_clip=key_clip,
        value_clip=value_clip,
        unbiased_keys=unbiased_keys,
        norm=None if norm is None else device.Norm(norm.eps, norm.width or head_dim, norm.placement == "after_rope"),
    )
    config = config or default_config(problem.tokens, problem.groups, unbiased_keys=unbiased_keys)
    problem = dataclasses.replace(problem, pairs=config.pairs)
    parts = -(-problem.groups // config.groups)
    blocks = -(-problem.tokens * parts // (4 * config.warpgroups))
    optional = {"post_rope_scale": post_rope_scale, "key_offset": key_offset, "query_factor": query_factor}
    if norm is not None:
        optional |= {"query_norm": norm.query, "key_norm": norm.key}
    optional = {name: x.astype(jnp.float32) for name, x in optional.items() if x is not None}
    source = split_k.operands(packed) if isinstance(packed, SplitKPartials) else {"packed": packed}
    names = (*source, "cos", "sin", "start", "lengths", *optional, *device.CACHE, "query", "query_scale")

    def kernel(*refs):
        block = lax.axis_index("block")
        device.run(dict(zip(names, refs, strict=True)), block, problem, config.groups, 4 * config.warpgroups)

    caches = [jax.new_ref(x) for x in (key.values, key.scale, value.values, value.scale)]
    # Not plgpu.kernel, through which JAX 0.10 passes no refs.
    launch: Any = pl.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, length, problem.heads, head_dim), formats.E4M3),
            jax.ShapeDtypeStruct((batch, length, problem.heads, 1), jnp.float32),
        ),
        mesh=plgpu.Mesh(grid=(blocks,), grid_names=("block",), num_threads=config.warpgroups, thread_name="warpgroup"),
        name="rope_quantize",
    )
    query, query_scale = launch(
        *source.values(), cos, sin, start.astype(jnp.int32), lengths.astype(jnp.int32), *optional.values(), *caches
    )
    key_values, key_scale, value_values, value_scale = (jax.freeze(ref) for ref in caches)
    return ScaledArray(query, query_scale), ScaledArray(key_values, key_scale), ScaledArray(value_values, value_scale)
