"""Decoder layers of every kind that ``decoder_layer`` knows, with random weights."""

import jax
import jax.numpy as jnp

from pallas_kernels import layouts
from pallas_kernels.decoder_layer import LayerWeights
from pallas_kernels.norm import Norm
from pallas_kernels.projection import Projection
from pallas_kernels.quantized_tensor import QuantizedTensor

EPS = 1e-5
NORMS = ("input_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm")
# Which norms the layers of a family have; a parallel block has one for both branches.
ORDERS = {
    "pre": ("input_norm", "mlp_norm"),
    "post": ("attention_output_norm", "mlp_output_norm"),
    "sandwich": NORMS,
    "parallel": ("input_norm",),
}


def random_layer(
    hidden, intermediate, packed, *, order="pre", kind="rms", bias=None, activation="silu_mul", fp8_rows=True, **options
):
    """Weights in quantized form, or of dtype ``options["float"]``; attention's output is as wide as the hidden states.

    Args:
        hidden, intermediate, packed: sizes.
        order: key of ``ORDERS``.
        kind: of the norms.
        bias: dtype of all biases, or None.
        activation, fp8_rows: as the layer has them.
        options: of ``QuantizedTensor.random``.
    """
    keys = iter(jax.random.split(jax.random.key(0), 12))

    def projection(n, k):
        dtype = options.get("float")
        if dtype is None:
            weight = QuantizedTensor.random(next(keys), (n, k), **{"std": 0.03, **options})
        else:
            weight = (0.03 * jax.random.normal(next(keys), (n, k))).astype(dtype)
        key = next(keys)
        added = None if bias is None else (0.5 * jax.random.normal(key, (n,))).astype(bias)
        return Projection(weight, added, fp8_rows)

    norms = {
        name: Norm(1 + 0.1 * jax.random.normal(key, (hidden,)), EPS, kind)
        for name, key in zip(NORMS, jax.random.split(jax.random.key(1), 4), strict=True)
        if name in ORDERS[order]
    }
    return LayerWeights(
        qkv=projection(packed, hidden),
        o_proj=projection(hidden, hidden),
        gate_up=projection(layouts.interleaved_rows(intermediate), hidden),
        down=projection(hidden, intermediate),
        **norms,
        activation=activation,
        parallel=order == "parallel",
    )


def random_inputs(rows, hidden, dtype=jnp.bfloat16):
    """Attention's output, and the residual stream before it."""
    # Not keys of ``random_layer``: a row of a weight would be the input itself.
    keys = jax.random.split(jax.random.key(100 + rows), 2)
    attention = jax.random.normal(keys[0], (rows, 1, hidden)).astype(dtype)
    return attention, (2 * jax.random.normal(keys[1], (rows, 1, hidden))).astype(dtype)
