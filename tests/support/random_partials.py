"""What a matmul of FP8 rows leaves to be added up, for the tests of the kernels that do."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.split_k import SplitKPartials


def random_partials(rows: tuple[int, ...], n: int, padded: int, parts: int, **changes: object) -> SplitKPartials:
    """Sums of size 1 of parts that are larger; what pads them is NaN. ``changes`` replace fields."""
    keys = jax.random.split(jax.random.key(parts), 3)
    count = math.prod(rows)
    values = 100 * jax.random.normal(keys[0], (parts, count, padded))
    operands = {
        "parts": values.at[..., n:].set(jnp.nan),
        "channel_scale": jnp.exp(jax.random.normal(keys[1], (padded,))) / 100,
        "x_scale": jnp.exp(jax.random.normal(keys[2], (count,))),
        "bias": None,
        "residual": None,
        "rows": rows,
        "n": n,
        "activation": "none",
    }
    return SplitKPartials(**(operands | changes))
