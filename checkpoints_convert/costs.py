"""What a conversion costs: said before it begins, and of its memory afterwards."""

import resource
import sys

import numpy as np
from jaxtyping import Int

from checkpoints_convert.compensation import compensation_operations
from checkpoints_convert.held_out import Streams
from fireq_jax.checkpoints.reader import CheckpointReader
from fireq_jax.models.block import block_shapes
from fireq_jax.quantization.config import QuantizationConfig


def describe_cost(
    source: CheckpointReader,
    quantization: QuantizationConfig,
    tokens: Int[np.ndarray, "samples T"] | None,
    held_out: Int[np.ndarray, "windows T"] | None,
) -> str:
    """What a conversion is going to read, compute and write, before it begins.

    Args:
        source: the checkpoint.
        quantization: of the conversion.
        tokens: calibration tokens; None for none.
        held_out: tokens that are only measured on; None for none.
    """
    config = source.config
    text = f"reads {source.nbytes / 1e9:.2f} GB twice (check, convert) in {config.num_layers} blocks"
    if tokens is None:
        return text + "; no calibration"
    parameters = sum(int(np.prod(shape)) for shape in block_shapes(config).values())
    operations = 2 * parameters * tokens.size
    states = 2 * tokens.size * config.hidden_size * 4
    unseen = 0 if held_out is None else held_out.size
    if quantization.reads_text:
        operations += compensation_operations(config, quantization, *tokens.shape)
        states *= 2 if quantization.calibration_stream == "quantized" else 1
    operations += 2 * parameters * unseen * len(Streams._fields)
    states += 2 * unseen * config.hidden_size * 4 * len(Streams._fields)
    return (
        f"{text}; calibration on {tokens.size} tokens, {unseen} held out: "
        f"{operations * config.num_layers / 1e12:.2f} TFLOP and {states / 1e9:.2f} GB of hidden states on disk"
    )


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
