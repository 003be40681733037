"""INT4 x FP8 (and INT4 x BF16) matmul for Hopper in Pallas Mosaic GPU: operands in, kernel chosen, y out.

The kernels compute y^T = W x^T: a weight tile, dequantized in registers, is WGMMA's A operand and
x [M, K], row-major, is the K-major B operand in shared memory. ``ring`` has the one for many tokens and
for wide weights, ``decode`` the one for few tokens and weights of few rows.

FireQ (arXiv 2505.20839), INT4 x FP8 kernel; mapping and packing are ours (see ``layouts``).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt32

from pallas_kernels import formats, layouts
from pallas_kernels.matmul_epilogue import Activation, width_out
from pallas_kernels.sm90.matmul import decode, ring, weights
from pallas_kernels.sm90.matmul.config import Config, DecodeConfig, Problem
from pallas_kernels.sm90.matmul.output import Operands
from pallas_kernels.split_sum import SplitSum


# Equal calls of a program are lowered once, which for an unrolled kernel takes a second.
@functools.partial(jax.jit, static_argnames=("n", "config", "activation", "codebook"))
def matmul(
    x: Float[Array, "M K"],
    words: UInt32[Array, "tiles_n tiles_k 2 128 4"],
    group_scale: Float[Array, "G N"],
    channel_scale: Float[Array, " N"],
    *,
    n: int,
    config: Config | DecodeConfig,
    x_scale: Float[Array, " M"] | None = None,
    bias: Float[Array, " n"] | None = None,
    residual: Float[Array, "M n_out"] | None = None,
    activation: Activation = "none",
    codebook: formats.Codebook = "int4",
) -> Float[Array, "M n_out"] | SplitSum:
    """y = activation(x_scale * channel_scale * (x W^T) + bias) + residual in bfloat16.

    Args:
        x: E4M3 or bfloat16; K is a multiple of 128.
        words: the packed weight (``layouts.pack_weight``).
        group_scale: E4M3: codes become fp8(code * scale). bfloat16: the float32 sum of each group
            is multiplied by it.
        channel_scale: float32; N is n rounded up to a multiple of 64.
        n: output channels before the activation.
        config: how to cut the work.
        x_scale: float32.
        bias: float32 or bfloat16.
        residual: bfloat16, added last in float32.
        activation: as in ``matmul.matmul``; gate and up rows alternate in blocks of 8.
        codebook: what codes stand for; with bfloat16 ``group_scale`` E4M3 numbers ("int4", "fp4").

    Returns:
        bfloat16, n_out being n, or n / 2 where a gate is activated. With ``config.split_k`` > 1 what y is to
        be summed from.
    """
    m, k = x.shape
    n_out = width_out(n, activation)
    # A row of y must be a multiple of 16 bytes for TMA.
    n_stored = -(-n_out // 8) * 8
    split = config.split_k > 1
    problem = Problem(
        m=m,
        n=words.shape[0] * layouts.TILE_N,
        k=k,
        n_out=n_stored,
        groups=group_scale.shape[0] * layouts.TILE_K // k,
        values="e4m3" if x.dtype == formats.E4M3 else "bf16",
        scale_in_table=group_scale.dtype == formats.E4M3,
        activation=activation,
        codebook=codebook,
    )
    if problem.values == "bf16":
        x = weights.interleave_columns(x)
    operands = Operands(
        # Columns in blocks of one swizzled row of SMEM, so that TMA can lay them out one by one.
        x=x.reshape(m, -1, layouts.TILE_K // problem.halves),
        words=lax.bitcast_convert_type(words, jnp.int32).reshape(*words.shape[:2], 4, 256),
        group_scale=lax.bitcast_convert_type(group_scale, jnp.uint8) if problem.scale_in_table else group_scale,
        channel_scale=None if split else channel_scale,
        x_scale=None if split else x_scale,
        bias=None if split else bias,
        residual=None if split or residual is None else jnp.pad(residual, ((0, 0), (0, n_stored - n_out))),
        y=None,
    )
    arrays = {name: value for name, value in operands._asdict().items() if value is not None}
    if isinstance(config, DecodeConfig):
        y = decode.kernel(problem, config, tuple(arrays))(*arrays.values())
    else:
        if not problem.scale_in_table:
            # Each group's sum is multiplied by its scale, so it must be a sum of its own.
            config = dataclasses.replace(config, promote=1)
        y = ring.kernel(problem, config, tuple(arrays))(*arrays.values())
    if split:
        return SplitSum(y, channel_scale, x_scale, bias, residual, rows=(m,), n=n, activation=activation)
    return y[:, :n_out] if n_stored != n_out else y
