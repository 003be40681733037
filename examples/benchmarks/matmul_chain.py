"""A layer's matmuls of a few tokens in two kernels (``matmul_chain``) against a kernel for each step.

    PYTHONPATH=. python examples/benchmarks/matmul_chain.py [--rows 1 2 4] [--layer 4096,14336,6144]

From attention's output to the next layer's queries, keys and values: O, norm, gate and up, SiLU, down,
norm, QKV; over rotating weights. Times are the kernels' own (CUPTI), without the gaps between them, of
which a chain has one and the others six. The floor is the packed weights and scales over ``--bandwidth``.
"""

import argparse
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
from timing import device_time, require_hopper

from pallas_kernels import matmul_chain
from pallas_kernels.matmul import deferred_matmul, matmul
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.row_quantize import quantize_rows, rms_norm_quantize, sum_norm_quantize
from pallas_kernels.split_sum import SplitSum

EPS = 1e-5
ROTATED_BYTES = 500_000_000


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_layer(seed: jax.Array, hidden: int, intermediate: int, packed: int) -> dict[str, Any]:
    """The weights of one layer."""
    shapes = {
        "qkv": (packed, hidden),
        "o_proj": (hidden, hidden),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
    }
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    linear = {name: QuantizedTensor.random(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)}
    return {**linear, "norm": jnp.ones((hidden,))}


@jax.jit
def in_chains(attention: Any, residual: jax.Array, barrier: jax.Array, layer: dict[str, Any]) -> Any:
    """Two kernels."""
    o_proj, gate_up, down = layer["o_proj"], layer["gate_up"], layer["down"]
    y = matmul_chain.output_mlp(attention, residual, o_proj, layer["norm"], gate_up, down, EPS, barrier)
    return matmul_chain.norm_matmul(y, layer["norm"], layer["qkv"], EPS)


@jax.jit
def one_by_one(attention: Any, residual: jax.Array, layer: dict[str, Any]) -> Any:
    """The same by a kernel for each step; what is left in parts stays so, as in the model."""

    def norm(x: jax.Array | SplitSum) -> Any:
        if isinstance(x, SplitSum):
            return sum_norm_quantize(x, layer["norm"], EPS)
        return rms_norm_quantize(x, layer["norm"], EPS), x

    rows, x = norm(deferred_matmul(attention, layer["o_proj"], residual=residual))
    hidden = matmul(rows, layer["gate_up"], activation="silu_mul")
    rows, x = norm(deferred_matmul(quantize_rows(hidden), layer["down"], residual=x))
    return deferred_matmul(rows, layer["qkv"]), x


def measure(rows: int, sizes: tuple[int, int, int], bandwidth: float) -> dict[str, float]:
    """Microseconds of both, and of the floor."""
    keys = jax.random.split(jax.random.key(rows))
    attention = quantize_rows(jax.random.normal(keys[0], (rows, 1, sizes[0])).astype(jnp.bfloat16))
    residual = jax.random.normal(keys[1], (rows, 1, sizes[0])).astype(jnp.bfloat16)
    first = random_layer(jnp.int32(0), *sizes)
    size = sum(weight.nbytes for weight in first.values() if isinstance(weight, QuantizedTensor))
    layers = [random_layer(jnp.int32(i), *sizes) for i in range(max(2, -(-ROTATED_BYTES // size)))]
    # A barrier serves one call, and its low bits are zero again after it, which is all that the next wants of it.
    _, x, barrier = matmul_chain.norm_matmul(residual, first["norm"], first["qkv"], EPS)
    return {
        "rows": rows,
        "chains_us": device_time(in_chains, [(attention, x, barrier, layer) for layer in layers]),
        "separate_us": device_time(one_by_one, [(attention, x, layer) for layer in layers]),
        "floor_us": 1e6 * size / bandwidth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layer", default="4096,14336,6144", help="hidden size, intermediate size, channels of QKV")
    parser.add_argument("--bandwidth", type=float, default=4.68e12, help="bytes/s that a read can reach")
    arguments = parser.parse_args()
    require_hopper(parser)
    hidden, intermediate, packed = (int(size) for size in arguments.layer.split(","))
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}; {arguments.layer}")
    print("| rows | chains us | separate us | separate / chains | floor / chains |\n|---|---|---|---|---|")
    results = []
    for rows in arguments.rows:
        found = measure(rows, (hidden, intermediate, packed), arguments.bandwidth)
        results.append(found)
        chains, separate, floor = found["chains_us"], found["separate_us"], found["floor_us"]
        print(
            f"| {rows} | {chains:.1f} | {separate:.1f} | {separate / chains:.2f} | {floor / chains:.2f} |", flush=True
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
