"""RoPE, quantization and append on a Hopper GPU: the kernel against XLA's form of the same op.

    python examples/benchmarks/rope_quantize.py [--groups N ...]

Llama 3 8B's heads. Device times (CUPTI), the cache donated. The floor is the bytes that have to
move (q, k, v, cos, sin; codes and scales) over the card's copy bandwidth; XLA's form is the jitted
reference. ``--groups`` also times the kernel with that many groups of heads a warp.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from timing import device_time, kernel_times, require_hopper

from pallas_kernels.formats import ScaledArray
from pallas_kernels.rope_quantize import rope_quantize_reference
from pallas_kernels.sm90.rope_quantize import launch as sm90
from pallas_kernels.sm90.rope_quantize.config import Config

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
COPY_BYTES_PER_US = 4.28e6
# batch, tokens of each sequence, slots
SHAPES = ((1, 1, 8192), (16, 1, 8192), (64, 1, 8192), (256, 1, 8192), (1, 1024, 1152), (16, 1024, 1152))


def random_cache(key: jax.Array, batch: int, slots: int) -> ScaledArray:
    """A cache entry of random codes."""
    shape = (batch, KV_HEADS, slots)
    values = jax.random.bits(key, (*shape, HEAD_DIM // 2), jnp.uint8)
    return ScaledArray(values, jnp.ones((*shape, 1), jnp.bfloat16), "int4")


def donating(step: Callable[..., Any], cache: tuple[ScaledArray, ScaledArray]) -> Callable[..., Any]:
    """``step`` with the cache of its last call donated to it."""
    held = list(jax.tree.map(jnp.copy, cache))
    compiled = jax.jit(step, donate_argnums=(3, 4))

    def call(packed: jax.Array, cos: jax.Array, sin: jax.Array, start: jax.Array, lengths: jax.Array) -> jax.Array:
        query, *held[:] = compiled(packed, cos, sin, *held, start=start, lengths=lengths)
        return query.values

    return call


def measure(batch: int, length: int, slots: int, groups: Sequence[int]) -> str:
    """One line of the table."""
    keys = jax.random.split(jax.random.key(batch * length), 5)
    columns = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    packed = jax.random.normal(keys[0], (batch, length, columns), jnp.bfloat16)
    angles = jax.random.uniform(keys[1], (batch, length, HEAD_DIM // 2), maxval=100.0)
    start = jnp.full((batch,), 0 if length > 1 else slots // 2, jnp.int32)
    arguments = [(packed, jnp.cos(angles), jnp.sin(angles), start, jnp.full((batch,), length, jnp.int32))]
    cache = (random_cache(keys[2], batch, slots), random_cache(keys[3], batch, slots))

    row = HEAD_DIM // 2 + jnp.dtype(jnp.bfloat16).itemsize
    moved = batch * length * (2 * columns + 4 * HEAD_DIM + HEADS * (HEAD_DIM + 4) + 2 * KV_HEADS * row)
    floor = moved / COPY_BYTES_PER_US
    us = device_time(donating(sm90.rope_quantize, cache), arguments)
    line = f"{batch:4d} x {length:5d} | {us:7.2f} | {moved / us / 1e3:5.0f} | {floor / us:5.2f}"
    reference = donating(rope_quantize_reference, cache)
    reference(*arguments[0])
    kernels = len(kernel_times(lambda: reference(*arguments[0])))
    plain = device_time(reference, arguments)
    line += f" | {plain:8.2f} ({kernels} kernels) | {plain / us:5.2f}"
    for count in groups:
        step = functools.partial(sm90.rope_quantize, config=Config(count))
        line += f" | {count}: {device_time(donating(step, cache), arguments):.2f}"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="*", default=[])
    options = parser.parse_args()
    require_hopper(parser)
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")
    print("batch x tokens | us | GB/s | floor / ours | XLA us | XLA / ours")
    for shape in SHAPES:
        print(measure(*shape, options.groups), flush=True)


if __name__ == "__main__":
    main()
