"""Which cache format a model with biases in attention can have, measured on calibration text.

Qwen2's keys have biases many times as large as what text adds to them. Where RoPE hardly turns them ``key_offset``
takes them away, and where no query reads them N does; what is left takes the range of INT4's 15 values, of FP8's three
bits of mantissa, and of FP8 queries too (docs/decisions/keys_and_values.md). No number of one
layer says how much of that a model forgives, so it is asked: a little text goes through float weights with each format.
"""

import functools
import logging
import math
from collections.abc import Collection, Mapping
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from checkpoints_convert.algorithms.smoothing import leaving, smooth_block
from checkpoints_convert.calibrate import Calibrator, Hidden, abstract_layer, run_samples
from checkpoints_convert.model_head import head_logits, head_tensors
from fireq_jax.checkpoints.reader import CheckpointReader
from fireq_jax.compilation import COMPILE_QUICKLY
from fireq_jax.models.block import Block
from fireq_jax.models.coded_weight import float32_block
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.parameters import Parameter, global_parameters, layer_parameters, with_parameters
from fireq_jax.quantization import recipes
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels import formats

# Calibration windows that are asked, at most.
WINDOWS = 8
# Nats a token of Kullback-Leibler divergence from the float model that a cache may cost.
MOST_DIVERGENCE = 0.1
logger = logging.getLogger(__name__)


def fit_cache(
    source: CheckpointReader,
    quantization: QuantizationConfig,
    tokens: Int[np.ndarray, "samples T"] | None,
    batch_size: int,
    kept: Collection[str] = (),
) -> tuple[formats.KVFormat, dict[str, float | None] | None]:
    """The smallest cache format, from the recipe's on, that costs ``MOST_DIVERGENCE`` at most.

    Models without biases in attention keep the recipe's format, and nothing is measured. Without text nothing can be:
    keys and values then stay as they are.

    Args:
        source: the checkpoint.
        quantization: the recipe's config; its weights are not looked at.
        tokens: calibration tokens, or None.
        batch_size: windows a step, at most.
        kept: linear layers that nothing is folded into, as their codes are kept.

    Returns:
        The format, and the divergence that was measured by format, None where it is not finite; None if nothing was.
    """
    if not source.config.attention_bias or quantization.kv_format == "none":
        return quantization.kv_format, None
    if tokens is None:
        logger.warning(
            "attention of this model has biases, whose keys a quantized cache may not hold, and this recipe reads no "
            "text to see: the cache is not quantized; --kv-format overrides"
        )
        return "none", None
    divergence = cache_divergence(source, quantization, tokens[:WINDOWS], batch_size, kept)
    fitting: list[formats.KVFormat] = [name for name, cost in divergence.items() if cost <= MOST_DIVERGENCE]
    chosen = fitting[0] if fitting else "none"
    changed = chosen != quantization.kv_format
    logger.log(
        logging.WARNING if changed else logging.INFO,
        "attention of this model has biases; on calibration text a cache costs, in nats a token: %s. At most %g are "
        "taken, so the format is %s%s; --kv-format overrides",
        ", ".join(f"{name} {cost:.3g}" for name, cost in divergence.items()),
        MOST_DIVERGENCE,
        chosen,
        f" instead of {quantization.kv_format}" if changed else "",
    )
    return chosen, {name: cost if math.isfinite(cost) else None for name, cost in divergence.items()}


def cache_divergence(
    source: CheckpointReader,
    quantization: QuantizationConfig,
    tokens: Int[np.ndarray, "samples T"],
    batch_size: int,
    kept: Collection[str] = (),
) -> dict[formats.KVFormat, float]:
    """Mean Kullback-Leibler divergence of next tokens, in nats, by each quantized cache format from the config's on.

    Weights and activations are float, keys and values smoothed as the config says. Other arguments are those of
    :func:`fit_cache`.
    """
    config, names = source.config, get_args(formats.KVFormat)
    tried = {
        name: quantization.with_float_weights().with_kv_format(name)
        for name in names[names.index(quantization.kv_format) :]
        if name != "none"
    }
    calibrator = Calibrator(config, batch_size)
    hidden = source.global_tensor("embed_tokens")[tokens].astype(np.float32) * np.float32(config.embedding_scale)
    streams: dict[formats.KVFormat, Hidden] = dict.fromkeys(tried, hidden)
    for index in range(config.num_layers):
        block: Block = float32_block(source.block(index))
        hidden, statistics = calibrator.run(block, index, hidden)
        if quantization.smoothing is not None:
            inputs = {name: channels.mean_abs for name, channels in statistics.inputs.items()}
            left = [name.removeprefix(f"layers.{index}.") for name in kept]
            smoothing = leaving(quantization.smoothing, left, config)
            block = smooth_block(block, statistics.keys, config, smoothing, inputs, statistics.values)
        for name, cached in tried.items():
            parameters = layer_parameters(block, index, cached, jnp.float32)
            own = {full.removeprefix(f"layers.{index}."): value for full, value in parameters.items()}
            layer = with_parameters(abstract_layer(config, cached, index), own)
            streams[name] = run_samples(layer, config, streams[name], batch_size)
    head = head_tensors(source)
    own = global_parameters(head, recipes.none(), head["lm_head"].dtype)
    # A window at a time, for all logits are of the size of the vocabulary.
    return {
        name: float(np.mean([_divergence(own, config, *pair) for pair in zip(hidden, stream, strict=True)]))
        for name, stream in streams.items()
    }


@functools.partial(jax.jit, static_argnums=1, compiler_options=COMPILE_QUICKLY)
def _divergence(
    parameters: Mapping[str, Parameter], config: ModelConfig, exact: Float[Array, "T D"], other: Float[Array, "T D"]
) -> Float[Array, ""]:
    """Mean divergence of the next tokens that hidden states of a window say."""
    logs = [jax.nn.log_softmax(head_logits(parameters, config, x)) for x in (exact, other)]
    return jnp.mean(jnp.sum(jnp.exp(logs[0]) * (logs[0] - logs[1]), axis=-1))
