"""Differences between the supported JAX versions (0.10.2 to 0.12), in one place."""

import jax

JAX_VERSION: tuple[int, ...] = tuple(int(part) for part in jax.__version__.split(".")[:3])
