"""Rows to FP8, plain and after RMSNorm: the kernels against XLA's form and the bandwidth of a copy.

    PYTHONPATH=. python examples/benchmarks/row_quantize.py

Prints Markdown tables. GB/s counts the bytes that must move (bf16 in, FP8 and scales out), beside
the bandwidth of XLA's copy in this run; for few rows, where time is the launch, XLA's copy of the
same rows (bf16 out) is the measure.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from timing import compile_all, device_time, kernel_times, require_hopper

from pallas_kernels import formats
from pallas_kernels.row_quantize import quantize_rows, rms_norm_quantize, sum_norm_quantize
from pallas_kernels.sm90.row_quantize import config, launch
from pallas_kernels.split_k import SplitKPartials

EPS = 1e-5
SHAPES = ["1x4096", "16x4096", "64x4096", "1x14336", "16x14336", "64x14336", "16384x4096", "16384x14336"]
Op = Callable[..., Any]


def ops(weight: jax.Array) -> dict[str, tuple[Op, Op]]:
    """{name: (kernel, XLA)}; XLA's norm rounds to bf16 before it quantizes, as a model without the fusion does."""

    def norm_then_quantize(x: jax.Array) -> Any:
        wide = x.astype(jnp.float32)
        normalized = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + EPS) * weight
        return formats.quantize_fp8(normalized.astype(x.dtype))

    return {
        "quantize": (lambda x: quantize_rows(x, implementation="mosaic_gpu"), formats.quantize_fp8),
        "norm, quantize": (
            lambda x: rms_norm_quantize(x, weight, EPS, implementation="mosaic_gpu"),
            norm_then_quantize,
        ),
    }


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 2 GiB."""
    array = jnp.zeros((1 << 30,), jnp.bfloat16)
    return 2 * array.nbytes / device_time(jax.jit(jnp.negative), [(array,)]) * 1e6


def inputs(rows: int, width: int) -> list[tuple[jax.Array]]:
    """Few rows stay in the L2 cache, where the kernel before leaves them in a model; many do not fit."""
    keys = jax.random.split(jax.random.key(rows + width), 3)
    return [(jax.random.normal(key, (rows, width)).astype(jnp.bfloat16),) for key in keys]


def random_partials(rows: int, width: int, parts: int) -> SplitKPartials:
    """What a matmul of FP8 rows leaves to be added up."""
    keys = jax.random.split(jax.random.key(rows + width + parts), 4)
    return SplitKPartials(
        parts=jax.random.normal(keys[0], (parts, rows, width)),
        channel_scale=jax.random.uniform(keys[1], (width,)),
        x_scale=jax.random.uniform(keys[2], (rows,)),
        bias=None,
        residual=jax.random.normal(keys[3], (rows, width)).astype(jnp.bfloat16),
        rows=(rows,),
        n=width,
        activation="none",
    )


def time_sums(shapes: list[str], parts: list[int]) -> None:
    """Table of a norm that adds up a matmul's sums, against XLA's sum and the norm's kernel after it."""

    def in_a_block(total: SplitKPartials, weight: jax.Array) -> Any:
        return launch.sum_norm_quantize(total, weight, eps=EPS, config=config.default_config(total.n, chunks=1))

    def by_default(total: SplitKPartials, weight: jax.Array) -> Any:
        return sum_norm_quantize(total, weight, EPS, implementation="mosaic_gpu")

    def xla(total: SplitKPartials, weight: jax.Array) -> Any:
        x = total.reduce()
        return rms_norm_quantize(x, weight, EPS, implementation="mosaic_gpu"), x

    calls = {}
    for shape, count in itertools.product(shapes, parts):
        rows, width = map(int, shape.split("x"))
        arguments = random_partials(rows, width, count), jax.random.uniform(jax.random.key(0), (width,)) + 0.5
        for function in (in_a_block, by_default, xla):
            calls[shape, count, function.__name__] = jax.jit(function), arguments
    programs = compile_all(calls)
    times = {key: device_time(program, [calls[key][1]]) for key, program in programs.items()}
    print("\n| sum, norm, FP8 | parts | a block, us | by default, us | XLA's sum, norm us |\n|---|---|---|---|---|")
    for shape, count in itertools.product(shapes, parts):
        found = [f"{times[shape, count, name]:.2f}" for name in ("in_a_block", "by_default", "xla")]
        print(f"| {shape} | {count} | {' | '.join(found)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x D")
    parser.add_argument("--sums", nargs="*", default=["1x4096", "16x4096", "64x4096"], help="rows x D of sums")
    parser.add_argument("--parts", nargs="+", type=int, default=[2, 4, 8])
    args = parser.parse_args()
    require_hopper(parser)
    bandwidth = copy_bandwidth()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, copy {bandwidth / 1e12:.2f} TB/s\n")
    print("| op | rows x D | us | GB/s | of a copy | copy us | XLA us | kernels | XLA / ours |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in args.shapes:
        rows, width = map(int, shape.split("x"))
        arguments = inputs(rows, width)
        moved = rows * (3 * width + 4)
        copy = device_time(jax.jit(jnp.negative), arguments)
        for name, (kernel, xla) in ops(jax.random.uniform(jax.random.key(0), (width,)) + 0.5).items():
            ours, peer = device_time(jax.jit(kernel), arguments), device_time(jax.jit(xla), arguments)
            run = jax.jit(xla)
            jax.block_until_ready(run(*arguments[0]))
            kernels = len(kernel_times(lambda run=run, x=arguments[0]: run(*x)))
            print(
                f"| {name} | {shape} | {ours:.2f} | {moved / ours / 1e3:.0f} | {moved / ours * 1e6 / bandwidth:.0%} "
                f"| {copy:.2f} | {peer:.2f} | {kernels} | {peer / ours:.2f} |",
                flush=True,
            )
    time_sums(args.sums, args.parts)


if __name__ == "__main__":
    main()
