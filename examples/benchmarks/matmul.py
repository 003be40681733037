"""The INT4 x FP8 matmul against XLA's FP8 x FP8 and bf16 x bf16, over rotating weights.

    PYTHONPATH=. python examples/benchmarks/matmul.py --shapes 28672x4096 --tokens 1 16 64 1024 4096

A shape takes a minute, most of it compiling: start a process for each, with
XLA_PYTHON_CLIENT_PREALLOCATE=false, and their measurements wait for each other. Prints a Markdown
table. The floor is the larger of the bytes that must move (packed weights, scales, x, y) over this
run's read bandwidth and the operations over 2 * 4096 a cycle and SM at the GPU's highest clock; the
tensor cores do not hold that clock under load.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from timing import compile_all, device_time, require_hopper
from tune_matmul import LLAMA

from pallas_kernels import formats
from pallas_kernels.matmul import matmul
from pallas_kernels.quantized_tensor import QuantizedTensor

PEAK_FLOPS = 2 * 4096 * 132 * 1.98e9
ROTATED_BYTES = 500_000_000

_dot = jax.jit(lambda x, w: lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16))


def read_bandwidth() -> float:
    """Bytes a second that a reduction of 1 GiB reads; what a process once had it keeps from those beside it."""
    array = jnp.ones((1 << 28,), jnp.float32)
    return array.nbytes / device_time(jax.jit(jnp.max), [(array,)]) * 1e6


def copies(bytes_each: float) -> int:
    """So many that the L2 cache holds none of the next one."""
    return max(2, min(16, int(ROTATED_BYTES // bytes_each)))


def variants(n: int, k: int, m: int) -> dict[str, tuple[Any, list[tuple[Any, ...]]]]:
    """{column: (jitted function, arguments to rotate over)} of the fused variants, for one shape."""
    keys = jax.random.split(jax.random.key(n + k), copies(n * k / 2))
    x = formats.quantize_fp8(jax.random.normal(jax.random.key(m), (m, k)))
    plain = [(x, QuantizedTensor.random(key, (n, k))) for key in keys]
    exact = [(x, QuantizedTensor.random(key, (n, k), scale_dtype="bf16")) for key in keys]
    residual = jax.random.normal(jax.random.key(m), (m, n)).astype(jnp.bfloat16)
    x16 = jax.random.normal(jax.random.key(m), (m, k)).astype(jnp.bfloat16)

    def op(**kwargs: Any) -> Any:
        return jax.jit(lambda x, w, *r: matmul(x, w, implementation="mosaic_gpu", **kwargs, **_named(r)))

    def _named(rest: tuple[Any, ...]) -> dict[str, Any]:
        return {"residual": rest[0]} if rest else {}

    return {
        "int4 x fp8": (op(), plain),
        "SiLU * up": (op(activation="silu_mul"), plain),
        "residual": (op(), [(*args, residual) for args in plain]),
        "bf16 scales": (op(), exact),
        "int4 x bf16": (op(), [(x16, weight) for _, weight in plain]),
    }


def compare(n: int, k: int, tokens: list[int], bandwidth: float) -> None:
    """Table rows of one weight shape."""
    weights = [QuantizedTensor.random(key, (n, k)) for key in jax.random.split(jax.random.key(n), copies(n * k / 2))]
    dense = jax.random.normal(jax.random.key(k), (n, k), jnp.bfloat16)
    wide = [dense * (1 + i / 8) for i in range(copies(n * k * 2))]
    eight = [w.astype(formats.E4M3) for w in wide]
    op = jax.jit(lambda x, w: matmul(x, w, implementation="mosaic_gpu"))
    calls = {}
    for m in tokens:
        x = jax.random.normal(jax.random.key(m), (m, k))
        x8 = formats.quantize_fp8(x)
        calls[m, "ours"] = op, [(x8, w) for w in weights]
        calls[m, "fp8"] = _dot, [(x8.values, w) for w in eight]
        calls[m, "bf16"] = _dot, [(x.astype(jnp.bfloat16), w) for w in wide]
    programs = compile_all({key: (function, arguments[0]) for key, (function, arguments) in calls.items()})
    for m in tokens:
        ours, fp8, bf16 = (device_time(programs[m, name], calls[m, name][1]) for name in ("ours", "fp8", "bf16"))
        moved = weights[0].nbytes + m * k + 4 * m + 2 * m * n
        floor = max(moved / bandwidth, 2 * m * n * k / PEAK_FLOPS) * 1e6
        rate = f"{moved / ours / 1e3:.0f} GB/s" if m <= 64 else f"{2 * m * n * k / ours / 1e6:.0f} TFLOP/s"
        print(
            f"| {n} x {k} | {m} | {ours:.1f} | {rate} | {fp8:.1f} | {fp8 / ours:.2f} | {bf16:.1f} | {bf16 / ours:.2f} "
            f"| {floor / ours:.2f} |",
            flush=True,
        )


def compare_variants(n: int, k: int, tokens: list[int]) -> None:
    """Table rows of the fused variants of one weight shape."""
    for m in tokens:
        calls = variants(n, k, m)
        programs = compile_all({name: (function, arguments[0]) for name, (function, arguments) in calls.items()})
        times = {name: device_time(program, calls[name][1]) for name, program in programs.items()}
        for name, us in times.items():
            print(f"| {n} x {k} | {m} | {name} | {us:.1f} | {times['int4 x fp8'] / us:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=LLAMA, help="N x K of the weights")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 32, 64, 1024, 4096, 16384])
    parser.add_argument("--variants", action="store_true", help="time the epilogues and scale modes too")
    args = parser.parse_args()
    require_hopper(parser)
    device = jax.devices()[0]
    bandwidth = read_bandwidth()
    print(f"{device.device_kind}, JAX {jax.__version__}, read bandwidth {bandwidth / 1e12:.2f} TB/s\n")
    print("| N x K | M | us | rate | FP8 us | FP8 / ours | bf16 us | bf16 / ours | floor / ours |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in args.shapes:
        n, k = map(int, shape.split("x"))
        compare(n, k, args.tokens, bandwidth)
    if not args.variants:
        return
    print("\n| N x K | M | variant | us | plain / variant |\n|---|---|---|---|---|")
    for shape in args.shapes:
        n, k = map(int, shape.split("x"))
        compare_variants(n, k, args.tokens)


if __name__ == "__main__":
    main()
