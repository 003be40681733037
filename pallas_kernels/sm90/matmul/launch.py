"""INT4 x FP8 (and INT4 x BF16) matmul for Hopper in Pallas Mosaic GPU: operands in, kernel chosen, y out.

The kernels compute y^T = W x^T: a weight tile, dequantized in registers, is WGMMA's A operand and
x [M, K], row-major, is the K-major B operand in shared memory. ``kernel`` is the warp-specialized one for many
tokens and for wide weights, ``decode`` the one for few tokens and weights of few rows.

FireQ (arXiv 2505.20839), INT4 x FP8 kernel; mapping and packing are ours (see ``layouts``).
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt32

from pallas_kernels import formats, layouts
from pallas_kernels.matmul_epilogue import Activation, width_out
from pallas_kernels.sm90.matmul import decode, kernel, weights
from pallas_kernels.sm90.matmul.config import Config, DecodeConfig, Operands, Problem
from pallas_kernels.split_k import SplitKPartials


# Jitted so that equal calls of a program share one lowering: that of an unrolled kernel takes a second.
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
) -> Float[Array, "M n_out"] | SplitKPartials:
    """y = activation(x_scale * channel_scale * (x W^T) + bias) + residual in bfloat16.

    Args:
        x: E4M3 or bfloat16; K is a multiple of 128.
        words: the packed weight (``layouts.pack_weight``).
        group_scale: E4M3: codes become fp8(code * scale). bfloat16: the float32 sum of each group
            is multiplied by it.
        channel_scale: float32; N is n rounded up to a multiple of 64.
        n: output channels before the activation.
        config: of the kernel; its class chooses which.
        x_scale: float32.
        bias: float32 or bfloat16.
        residual: bfloat16, added last in float32.
        activation: as in ``matmul.matmul``; gate and up rows alternate in blocks of 8.
        codebook: what codes stand for; with bfloat16 ``group_scale`` E4M3 numbers (``formats.is_e4m3``).

    Returns:
        bfloat16, n_out being n, or n / 2 where a gate is activated. With
        ``config.split_k`` > 1 the partial sums that y is to be reduced from.
    """
    m, k = x.shape
    n_out = width_out(n, activation)
    problem = Problem(
        m=m,
        n=words.shape[0] * layouts.TILE_N,
        k=k,
        # TMA stores rows of y, which must be multiples of 16 bytes.
        n_out=8 * pl.cdiv(n_out, 8),
        groups=group_scale.shape[0] * layouts.TILE_K // k,
        values="e4m3" if x.dtype == formats.E4M3 else "bf16",
        scale_in_table=group_scale.dtype == formats.E4M3,
        activation=activation,
        codebook=codebook,
    )
    operands = _operands(problem, x, words, group_scale)
    if config.split_k == 1:
        padded = None if residual is None else jnp.pad(residual, ((0, 0), (0, problem.n_out - n_out)))
        operands = operands._replace(channel_scale=channel_scale, x_scale=x_scale, bias=bias, residual=padded)
    y = _run(problem, config, operands)
    if config.split_k > 1:
        return SplitKPartials(y, channel_scale, x_scale, bias, residual, rows=(m,), n=n, activation=activation)
    return y[:, :n_out] if problem.n_out != n_out else y


def _operands(problem: Problem, x: Array, words: Array, group_scale: Array) -> Operands:
    """What is multiplied, as the kernels see it; the epilogue's operands are None."""
    if problem.values == "bf16":
        x = weights.interleave_columns(x)
    return Operands(
        # Columns in blocks of one swizzled row of SMEM, so that TMA can lay them out one by one.
        x=x.reshape(problem.m, -1, layouts.TILE_K // problem.halves),
        words=lax.bitcast_convert_type(words, jnp.int32).reshape(*words.shape[:2], 4, 256),
        group_scale=lax.bitcast_convert_type(group_scale, jnp.uint8) if problem.scale_in_table else group_scale,
    )


def _run(problem: Problem, config: Config | DecodeConfig, operands: Operands) -> Array:
    """``problem.result``, by the kernel that the configuration is for."""
    arrays = {name: value for name, value in operands._asdict().items() if value is not None}
    if isinstance(config, DecodeConfig):
        return decode.kernel(problem, config, tuple(arrays))(*arrays.values())
    if not problem.scale_in_table:
        # Each group's sum is multiplied by its scale, so it must be a sum of its own.
        config = dataclasses.replace(config, promote=1)
    return kernel.kernel(problem, config, tuple(arrays))(*arrays.values())
