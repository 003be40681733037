"""What follows the product in ``jax.numpy``: bias, activation, residual."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import layouts

Activation = Literal["none", "silu_mul"]


def epilogue(
    y: Float[Array, "*rows N"],
    bias: Float[Array, " N"] | None,
    activation: Activation,
    residual: Float[Array, "*rows N_out"] | None,
) -> Float[Array, "*rows N_out"]:
    """activation(y + bias) + residual in float32, as ``matmul.matmul`` describes them."""
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    if activation == "silu_mul":
        gate, up = layouts.split_gate_up(y)
        y = jax.nn.silu(gate) * up
    return y if residual is None else y + residual.astype(jnp.float32)
