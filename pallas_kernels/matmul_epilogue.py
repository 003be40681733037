"""What follows the product in ``jax.numpy``: bias, activation, residual."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import layouts

Activation = Literal["none", "silu_mul", "gelu_tanh_mul", "clamped_silu_mul"]

# gelu_tanh(x) = x / (1 + exp(-GELU_SLOPE (x + GELU_CUBIC x^3)))
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715
# gpt-oss: what gates and ups are clamped to, and the slope of its SiLU.
GATE_LIMIT = 7.0
SILU_SLOPE = 1.702


def width_out(n: int, activation: Activation) -> int:
    """Columns that N products become: a gate and an up make one."""
    return n if activation == "none" else n // 2


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU's tanh approximation, x (1 + tanh(u)) / 2 (arXiv 1606.08415).

    Written x sigmoid(2 u), which of large negative x keeps the digits that 1 + tanh(u) loses.
    """
    return x * jax.nn.sigmoid(GELU_SLOPE * (x + GELU_CUBIC * x * x * x))


def clamped_silu_mul(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """x sigmoid(s x) (1 + up) of x = min(gate, c) and |up| <= c, as gpt-oss' experts have it."""
    gate, up = jnp.minimum(gate, GATE_LIMIT), jnp.clip(up, -GATE_LIMIT, GATE_LIMIT)
    return gate * jax.nn.sigmoid(SILU_SLOPE * gate) * (1 + up)


def epilogue(
    y: Float[Array, "*rows N"],
    bias: Float[Array, " N"] | None,
    activation: Activation,
    residual: Float[Array, "*rows N_out"] | None,
) -> Float[Array, "*rows N_out"]:
    """activation(y + bias) + residual in float32, as ``matmul.matmul`` describes them."""
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    if activation != "none":
        gate, up = layouts.split_gate_up(y)
        if activation == "clamped_silu_mul":
            y = clamped_silu_mul(gate, up)
        else:
            y = (jax.nn.silu if activation == "silu_mul" else gelu_tanh)(gate) * up
    return y if residual is None else y + residual.astype(jnp.float32)
