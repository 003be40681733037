"""Learn a quantized block's codes, channel scales and gains on calibration text, for the block's output.

The input is what the blocks before made of the text, the target what the float model makes of it, so that
a block also learns to make up for those before it. Gradients are of the block with float activations,
keys and values: the real block's output has their rounding in it, which no weight can undo, and
learning from it fits that noise. The real block judges: some sequences are kept from learning, and
unless their error has fallen the block stays as it was.
"""

import functools
import logging
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from checkpoints_convert.algorithms.learned_rounding import (
    Change,
    changed_parameters,
    float_parameters,
    learned_weights,
    no_change,
    optimizer,
    origin,
)
from checkpoints_convert.calibrate import Hidden, abstract_layer, batches_of, run_layer
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.parameters import Parameter, with_parameters
from fireq_jax.quantization.config import QuantizationConfig

# One sequence in so many judges; a step learns from one of the others.
HELD_OUT = 8
logger = logging.getLogger(__name__)


def reconstruct(
    config: ModelConfig,
    quantization: QuantizationConfig,
    start: Mapping[str, Parameter],
    weights: Mapping[str, Float[Array, "N K"]],
    hidden: Hidden,
    target: Hidden,
    *,
    batch_size: int,
    index: int,
) -> dict[str, Parameter]:
    """The parameters of a block that learning changed; none if the held-out error did not fall.

    Args:
        config: the architecture.
        quantization: of the block, called "layers.0"; its ``learned_steps`` are taken.
        start: all parameters of the layer by name without prefix, in float32 or quantized.
        weights: what the quantized ones were rounded from.
        hidden: the block's input.
        target: what its output should be.
        batch_size: sequences that are evaluated at once, at most.
        index: of the block; seeds the order of the sequences.

    Raises:
        ValueError: if there are not two sequences, one to learn from and one to judge by.
    """
    samples, steps = len(hidden), quantization.learned_steps
    kind = config.first_like(index)
    check_sequences(samples)
    origins = {name: origin(value, weights[name]) for name, value in learned_weights(start).items()}
    if not origins:
        return {}
    learning = samples - max(1, samples // HELD_OUT)
    random = np.random.default_rng(index)
    order = np.concatenate([random.permutation(learning) for _ in range(-(-steps // learning))])[:steps]
    change = no_change(start, origins)
    state = optimizer(steps).init(change)
    for i in order:
        change, state = _learning_step(
            config, quantization, kind, start, origins, change, state, jnp.asarray(hidden[i]), jnp.asarray(target[i])
        )
    learned = changed_parameters(change, start, origins)

    held_out, expected = hidden[learning:], target[learning:]

    def error(parameters: Mapping[str, Parameter]) -> float:
        errors = [
            _real_error(
                config, quantization, kind, parameters, jnp.asarray(held_out[part]), jnp.asarray(expected[part])
            )
            for part in batches_of(samples - learning, batch_size)
        ]
        return float(np.mean(errors))

    before, after = error(start), error({**start, **learned})
    logger.info("block %d: error of held-out text %.3g, %.3g after %d steps", index, before, after, steps)
    return learned if after < before else {}


def check_sequences(samples: int) -> None:
    """Raise ValueError unless there is a sequence to learn from and one to judge by."""
    if samples < 2:
        raise ValueError(f"learned_steps needs at least 2 calibration sequences, not {samples}")


def reconstruction_operations(parameters: int, steps: int, samples: int, length: int) -> int:
    """About how many operations :func:`reconstruct` of a block with so many ``parameters`` is.

    A step is a forward and a backward pass (two forward passes' work); the held-out sequences go
    through the block twice, and all once through the float block, which says what should come out.
    """
    passes = 3 * steps + 2 * max(1, samples // HELD_OUT) + samples
    return 2 * parameters * length * passes


def relative_error(output: Float[Array, "*rows D"], target: Float[Array, "*rows D"]) -> Float[Array, ""]:
    """Mean of |output - target|^2 / |target|^2 over the tokens: the next block normalizes each token."""
    size = jnp.sum(jnp.square(target), axis=-1)
    return jnp.mean(jnp.sum(jnp.square(output - target), axis=-1) / jnp.where(size > 0, size, 1.0))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(5, 6))
def _learning_step(
    config: ModelConfig,
    quantization: QuantizationConfig,
    kind: int,
    start: Mapping[str, Parameter],
    origins: Mapping[str, Float[Array, "N K"]],
    change: Change,
    state: optax.OptState,
    hidden: Float[Array, "T D"],
    target: Float[Array, "T D"],
) -> tuple[Change, optax.OptState]:
    smooth = abstract_layer(config, quantization.with_float_weights().with_kv_format("none"), kind)

    def cost(change: Change) -> Float[Array, ""]:
        layer = with_parameters(smooth, float_parameters(change, start, origins))
        return relative_error(run_layer(layer, config, hidden[None])[0], target)

    updates, state = optimizer(quantization.learned_steps).update(jax.grad(cost)(change), state)
    updated = optax.apply_updates(change, updates)
    assert isinstance(updated, Change)
    return updated, state


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _real_error(
    config: ModelConfig,
    quantization: QuantizationConfig,
    kind: int,
    parameters: Mapping[str, Parameter],
    hidden: Float[Array, "B T D"],
    target: Float[Array, "B T D"],
) -> Float[Array, ""]:
    layer = with_parameters(abstract_layer(config, quantization, kind), parameters)
    return relative_error(run_layer(layer, config, hidden), target)
