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
from pallas_kernels.sm90.rope_quantize.config import Config, Norm, Problem, default_config
from pallas_kernels.sm90.rope_quantize.kernel import CACHE, run
from pallas_kernels.split_k import SplitKPartials

WARPS = 4  # of a warpgroup


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
    problem = Problem(
        batch=batch,
        length=length,
        heads=columns // head_dim - 2 * kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        key_clip=key_clip,
        value_clip=value_clip,
        unbiased_keys=unbiased_keys,
        norm=None if norm is None else Norm(norm.eps, norm.width or head_dim, norm.placement == "after_rope"),
    )
    config = config or default_config(problem.tokens, problem.groups, unbiased_keys=unbiased_keys)
    problem = dataclasses.replace(problem, pairs=config.pairs)
    operands = split_k.operands(packed) if isinstance(packed, SplitKPartials) else {"packed": packed}
    operands |= {"cos": cos, "sin": sin, "start": start.astype(jnp.int32), "lengths": lengths.astype(jnp.int32)}
    optional = {"post_rope_scale": post_rope_scale, "key_offset": key_offset, "query_factor": query_factor}
    if norm is not None:
        optional |= {"query_norm": norm.query, "key_norm": norm.key}
    operands |= {name: x.astype(jnp.float32) for name, x in optional.items() if x is not None}
    return _launch(operands, key, value, problem, config)


def _launch(
    operands: dict[str, Array], key: ScaledArray, value: ScaledArray, problem: Problem, config: Config
) -> tuple[ScaledArray, ScaledArray, ScaledArray]:
    """The kernel on operands by the names that it knows them by."""
    warps = WARPS * config.warpgroups
    names = (*operands, *CACHE, "query", "query_scale")

    def kernel(*refs):
        run(dict(zip(names, refs, strict=True)), lax.axis_index("block"), problem, config.groups, warps)

    blocks = pl.cdiv(problem.tokens * pl.cdiv(problem.groups, config.groups), warps)
    rows = (problem.batch, problem.length, problem.heads)
    # Not plgpu.kernel, through which JAX 0.10 passes no refs.
    launch: Any = pl.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((*rows, problem.head_dim), formats.E4M3),
            jax.ShapeDtypeStruct((*rows, 1), jnp.float32),
        ),
        mesh=plgpu.Mesh(grid=(blocks,), grid_names=("block",), num_threads=config.warpgroups, thread_name="warpgroup"),
        name="rope_quantize",
    )
    caches = [jax.new_ref(x) for x in (key.values, key.scale, value.values, value.scale)]
    query, query_scale = launch(*operands.values(), *caches)
    key_values, key_scale, value_values, value_scale = (jax.freeze(ref) for ref in caches)
    new_key = dataclasses.replace(key, values=key_values, scale=key_scale)
    return ScaledArray(query, query_scale), new_key, dataclasses.replace(value, values=value_values, scale=value_scale)
