"""Memory that says so where a kernel has not written its output."""

import jax
import jax.numpy as jnp


def poison(shape: tuple[int, ...]) -> None:
    """Memory that the next outputs may get holds other bytes than zeros."""
    poisoned = jnp.full(shape, 0x55, jnp.uint8), jnp.full(shape, jnp.nan, jnp.bfloat16), jnp.full(shape[:-1], jnp.nan)
    jax.block_until_ready(poisoned)
