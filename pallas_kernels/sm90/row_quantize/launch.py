"""Rows to FP8 on Hopper: the launches behind ``row_quantize``."""

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import formats
from pallas_kernels.formats import ScaledArray
from pallas_kernels.sm90.common import split_k
from pallas_kernels.sm90.row_quantize.config import (
    MAX_CHUNKS,
    POST_NORM_CHUNKS,
    Config,
    default_config,
    parts_config,
)
from pallas_kernels.sm90.row_quantize.kernel import kernel
from pallas_kernels.split_k import SplitKPartials


@functools.partial(jax.jit, static_argnames="config")
def quantize_rows(x: Float[Array, "*rows D"], *, config: Config | None = None) -> ScaledArray:
    """bf16 rows in FP8; see ``row_quantize.quantize_rows``."""
    return _launch(x.shape, {"x": x.reshape(-1, x.shape[-1])}, config or default_config(x.shape[-1]))[0]


@functools.partial(jax.jit, static_argnames=("eps", "config"))
def rms_norm_quantize(
    x: Float[Array, "*rows D"], weight: Float[Array, " D"], *, eps: float, config: Config | None = None
) -> ScaledArray:
    """Normalized bf16 rows in FP8; see ``row_quantize.rms_norm_quantize``."""
    operands = {"x": x.reshape(-1, x.shape[-1]), "weight": weight}
    return _launch(x.shape, operands, config or default_config(x.shape[-1]), eps)[0]


@functools.partial(jax.jit, static_argnames=("eps", "config"))
def sum_norm_quantize(
    y: SplitKPartials, weight: Float[Array, " D"], *, eps: float, config: Config | None = None
) -> tuple[ScaledArray, Float[Array, "*rows D"]]:
    """Normalized sums in FP8, and the sums plus residual in bf16; see ``row_quantize.sum_norm_quantize``."""
    operands = {**split_k.operands(y), "residual": y.residual, "weight": weight}
    config = config or parts_config(math.prod(y.rows), y.n, len(y.parts))
    rows, x = _launch((*y.rows, y.n), operands, config, eps)
    assert x is not None
    return rows, x


@functools.partial(jax.jit, static_argnames=("eps", "config"))
def post_norm_quantize(
    branch: Float[Array, "*rows D"] | SplitKPartials,
    post_weight: Float[Array, " D"],
    residual: Float[Array, "*rows D"],
    weight: Float[Array, " D"] | None,
    *,
    eps: float,
    config: Config | None = None,
) -> tuple[ScaledArray, Float[Array, "*rows D"]]:
    """residual + norm of the branch in FP8 and in bf16; see ``row_quantize.post_norm_quantize``."""
    width = residual.shape[-1]
    count = math.prod(residual.shape[:-1])
    if isinstance(branch, SplitKPartials):
        operands = split_k.operands(branch)
        config = config or parts_config(count, width, len(branch.parts))
    else:
        operands = {"branch": branch.reshape(-1, width)}
        config = config or default_config(width, chunks=POST_NORM_CHUNKS)
    operands |= {"residual": residual.reshape(-1, width), "post_weight": post_weight}
    operands |= {} if weight is None else {"weight": weight}
    rows, x = _launch(residual.shape, operands, config, eps)
    assert x is not None
    return rows, x


@functools.partial(jax.jit, static_argnames=("group", "config"))
def combine_quantize(
    partial: Float[Array, "B kv_heads splits 1 rows H"],
    row_max: Float[Array, "B kv_heads splits rows"],
    row_sum: Float[Array, "B kv_heads splits rows"],
    *,
    group: int,
    config: Config | None = None,
) -> ScaledArray:
    """Decode attention's output [B, T, heads * H] from that of its splits, in FP8 with a scale per token.

    The arguments are the attention kernel's results, whose rows are T tokens' ``group`` heads. The numbers are those of
    the splits combined in bf16 and then ``quantize_rows``.
    """
    batch, kv_heads, splits, _, rows, head_dim = partial.shape
    length, width = rows // group, kv_heads * group * head_dim
    operands = {"partial": partial, "row_max": row_max, "row_sum": row_sum}
    return _launch((batch, length, width), operands, config or parts_config(batch * length, width, splits))[0]


def _launch(
    shape: tuple[int, ...], operands: dict[str, Any], config: Config, eps: float = 0.0
) -> tuple[ScaledArray, Array | None]:
    """FP8 rows of ``shape``, and the bf16 rows x where they are made here: where there is a "residual"."""
    *rows, width = shape
    flat = math.prod(rows), width
    if config.threads * config.chunk * MAX_CHUNKS < width:
        raise ValueError(f"config is {config}; expected more warpgroups for rows of {width} elements")
    if config.cluster > 1 and not {"parts", "partial"} & set(operands):
        raise ValueError(f"config is {config}; expected a cluster of 1 for rows that do not come in parts")
    out_types = {
        "values": jax.ShapeDtypeStruct(flat, formats.E4M3),
        "scale": jax.ShapeDtypeStruct(flat[:1], jnp.float32),
    }
    name = "rms_norm_quantize" if "weight" in operands else "quantize_rows"
    if "residual" in operands:
        out_types["x"] = jax.ShapeDtypeStruct(flat, jnp.bfloat16)
        name = "post_norm_quantize" if "post_weight" in operands else "sum_norm_quantize"
    elif "partial" in operands:
        name = "combine_quantize"
    warps = 4 * config.warpgroups
    partials = ("post_partials", "partials") if "post_weight" in operands else ("partials",)
    scratch = {name: plgpu.SMEM((2 * config.cluster * warps,), jnp.float32) for name in partials}
    if config.cluster > 1:
        scratch["arrived"] = plgpu.SMEM((len(partials), 2), jnp.int32)
    results = plgpu.kernel(
        functools.partial(kernel, names=(*operands, *out_types, *scratch), config=config, eps=eps),
        out_type=tuple(out_types.values()),
        grid=flat[:1],
        grid_names=("row",),
        cluster=(config.cluster,) if config.cluster > 1 else (),
        cluster_names=("peer",) if config.cluster > 1 else (),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*operands.values())
    values, scale, *x = results
    return ScaledArray(values.reshape(shape), scale.reshape(*rows, 1)), x[0].reshape(shape) if x else None
