"""A layer's matmuls of a few tokens in two kernels (``pallas_kernels.decoder_layer``) against a kernel for each step.

    PYTHONPATH=. python examples/benchmarks/decoder_layer.py [--rows 1 2 4] [--layer 4096,14336,6144]

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

from pallas_kernels.decoder_layer import LayerWeights, after_attention, before_attention
from pallas_kernels.formats import nbytes
from pallas_kernels.norm import Norm
from pallas_kernels.projection import Projection, project
from pallas_kernels.quantized_tensor import QuantizedTensor
from pallas_kernels.residual_stream import ResidualStream
from pallas_kernels.row_quantize import quantize_rows, sum_norm_quantize
from pallas_kernels.split_k import SplitKPartials, reduced

ROTATED_BYTES = 500_000_000


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_layer(seed: jax.Array, hidden: int, intermediate: int, packed: int) -> LayerWeights:
    """The weights of one layer."""
    shapes = (packed, hidden), (hidden, hidden), (2 * intermediate, hidden), (hidden, intermediate)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    linear = (Projection(QuantizedTensor.random(*pair)) for pair in zip(keys, shapes, strict=True))
    norm = Norm(jnp.ones((hidden,)), 1e-5)
    return LayerWeights(*linear, input_norm=norm, mlp_norm=norm)


@jax.jit
def in_chains(attention: Any, x: ResidualStream, layer: LayerWeights) -> Any:
    """Two kernels."""
    return before_attention(after_attention(attention, x, layer), layer)


@jax.jit
def one_by_one(attention: Any, residual: jax.Array, layer: LayerWeights) -> Any:
    """The same by a kernel for each step; what is left in parts stays so, as in the model."""

    def normalized(x: jax.Array | SplitKPartials, norm: Norm | None) -> Any:
        assert norm is not None
        if isinstance(x, SplitKPartials):
            return sum_norm_quantize(x, norm.weight, norm.eps)
        return norm.quantized(x), x

    assert layer.gate_up is not None
    assert layer.down is not None
    rows, x = normalized(project(attention, layer.o_proj, residual=residual), layer.mlp_norm)
    hidden = reduced(project(rows, layer.gate_up, activation=layer.activation))
    rows, x = normalized(project(hidden, layer.down, residual=x), layer.input_norm)
    return project(rows, layer.qkv), x


def measure(rows: int, sizes: tuple[int, int, int], bandwidth: float) -> dict[str, float]:
    """Microseconds of both, and of the floor."""
    keys = jax.random.split(jax.random.key(rows))
    attention = quantize_rows(jax.random.normal(keys[0], (rows, 1, sizes[0])).astype(jnp.bfloat16))
    residual = jax.random.normal(keys[1], (rows, 1, sizes[0])).astype(jnp.bfloat16)
    first = random_layer(jnp.int32(0), *sizes)
    size = nbytes(first)
    layers = [random_layer(jnp.int32(i), *sizes) for i in range(max(2, -(-ROTATED_BYTES // size)))]
    # Its barrier serves one call, and its low bits are zero again after it, which is all that the next wants of it.
    _, x = jax.jit(before_attention)(ResidualStream(residual), first)
    return {
        "rows": rows,
        "chains_us": device_time(in_chains, [(attention, x, layer) for layer in layers]),
        "separate_us": device_time(one_by_one, [(attention, residual, layer) for layer in layers]),
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
