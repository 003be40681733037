"""What a conversion loses on text that it does not calibrate on, beside what rounding to nearest loses.

With little calibration text, or text of one kind, a recipe fits that text and harms the model on any
other. So windows that calibration leaves alone go through every block three times: as it was, as it is
stored, and in the same formats by rounding to nearest. Only their hidden states are kept.
"""

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from checkpoints_convert.calibrate import Hidden, abstract_layer, layer_quantization, run_samples
from checkpoints_convert.model_head import head_logits, head_tensors
from fireq_jax.checkpoints.reader import CheckpointReader
from fireq_jax.compilation import COMPILE_QUICKLY
from fireq_jax.models.block import Block
from fireq_jax.models.coded_weight import float32_block
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.parameters import Parameter, global_parameters, layer_parameters, with_parameters
from fireq_jax.quantization import recipes
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels.quantized_tensor import QuantizedTensor

# Of a layer's K inputs: second moments of fewer tokens describe this one text. A model of K = 1536, calibrated on 2048
# tokens of one subject, lost more on another than by rounding to nearest.
TOKENS_PER_INPUT = 2
# Differences of the loss, in nats a token, that say nothing.
NEGLIGIBLE = 1e-3
MOST_NLL = 700.0  # nats a token, whose exponential is still a float
logger = logging.getLogger(__name__)


class Streams(NamedTuple):
    """Hidden states of the held-out windows in three models, each [windows, T, D] float32."""

    float: Hidden
    quantized: Hidden
    round_to_nearest: Hidden


class HeldOut:
    """Runs held-out windows through the blocks of the three models, in float32 as calibration runs.

    Args:
        original: the checkpoint, as it was before anything was rotated.
        quantization: of the conversion.
        dtype: of what it leaves unquantized.
        batch_size: windows a step, at most.
        tokens: the windows, of two tokens or more.
    """

    def __init__(
        self,
        original: CheckpointReader,
        quantization: QuantizationConfig,
        dtype: jax.typing.DTypeLike,
        batch_size: int,
        tokens: Int[np.ndarray, "windows T"],
    ) -> None:
        self.original, self.config = original, original.config
        self.quantization, self.dtype = quantization, dtype
        self.batch_size, self.tokens = batch_size, tokens

    def start(self, converted: Float[np.ndarray, "V D"]) -> Streams:
        """What enters the first block; of embeddings as they are ``converted`` in the quantized model."""
        exact, stored = (
            embedding[self.tokens].astype(np.float32) * np.float32(self.config.embedding_scale)
            for embedding in (self.original.global_tensor("embed_tokens"), converted)
        )
        nearest, stored = (np.asarray(jnp.asarray(x).astype(self.dtype).astype(jnp.float32)) for x in (exact, stored))
        return Streams(exact, stored, nearest)

    def original_block(self, index: int) -> dict[str, Array]:
        """Block ``index`` as it was, in float32."""
        return float32_block(self.original.block(index))

    def run_float(self, index: int, block: Block, hidden: Streams) -> Streams:
        """Block ``index`` as it was, float32 by Hugging Face name, and rounded to nearest."""
        none, nearest = recipes.none(), self.quantization.round_to_nearest()
        return hidden._replace(
            float=self._run(none, index, layer_parameters(block, index, none, jnp.float32), hidden.float),
            round_to_nearest=self._run(
                nearest, index, layer_parameters(block, index, nearest, self.dtype), hidden.round_to_nearest
            ),
        )

    def run_quantized(self, index: int, parameters: Mapping[str, Parameter], hidden: Streams) -> Streams:
        """Block ``index`` as it is stored, by full name."""
        return hidden._replace(quantized=self._run(self.quantization, index, parameters, hidden.quantized))

    def report(self, converted: CheckpointReader, hidden: Streams) -> dict[str, Any]:
        """What the three models lose.

        Args:
            converted: where the last norm and the head are as they are converted.
            hidden: what left the last block.

        Returns:
            ``tokens``, how many were predicted: all but each window's first; and ``perplexity``, by the names of
            :class:`Streams`, None where it is not finite.
        """
        own, other = head_tensors(self.original), head_tensors(converted)
        parameters = {
            "float": global_parameters(own, recipes.none(), own["lm_head"].dtype),
            "quantized": global_parameters(other, self.quantization, self.dtype),
            "round_to_nearest": global_parameters(own, self.quantization, self.dtype),
        }
        return {
            "tokens": self.tokens[:, 1:].size,
            "perplexity": {
                name: self._perplexity(parameters[name], states) for name, states in hidden._asdict().items()
            },
        }

    def _perplexity(self, parameters: Mapping[str, Parameter], hidden: Hidden) -> float | None:
        # A window at a time, for all logits are of the size of the vocabulary.
        nll = np.mean(
            [
                _mean_nll(parameters, self.config, jnp.asarray(states), jnp.asarray(window))
                for states, window in zip(hidden, self.tokens, strict=True)
            ],
            dtype=np.float64,
        )
        return math.exp(nll) if nll < MOST_NLL else None

    def _run(
        self, quantization: QuantizationConfig, index: int, parameters: Mapping[str, Parameter], hidden: Hidden
    ) -> Hidden:
        own = {
            name.removeprefix(f"layers.{index}."): value.astype(jnp.float32) if isinstance(value, Array) else value
            for name, value in parameters.items()
        }
        quantized = [name.removesuffix(".weight") for name, value in own.items() if isinstance(value, QuantizedTensor)]
        staged = layer_quantization(self.config, quantization, index, quantized)
        layer = abstract_layer(self.config, staged, index)
        return run_samples(with_parameters(layer, own), self.config, hidden, self.batch_size)


@functools.partial(jax.jit, static_argnums=1, compiler_options=COMPILE_QUICKLY)
def _mean_nll(
    parameters: Mapping[str, Parameter], config: ModelConfig, hidden: Float[Array, "T D"], tokens: Int[Array, " T"]
) -> Float[Array, ""]:
    """Negative log-likelihood of a window's tokens 1, 2, ..., T - 1."""
    logits = head_logits(parameters, config, hidden[:-1])
    chosen = jnp.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def scored(held_out: Int[np.ndarray, "windows T"] | None) -> Int[np.ndarray, "windows T"] | None:
    """The windows, if there are any in which something is predicted."""
    return held_out if held_out is not None and held_out[..., 1:].size else None


def check_amount(config: ModelConfig, quantization: QuantizationConfig, tokens: Int[np.ndarray, "samples T"]) -> None:
    """Warn if these calibration tokens are too few for what the config does with them."""
    # An expert sees one token in so many.
    spread = 1 if config.experts is None else config.experts.count / config.experts.per_token
    inputs = ((config.num_heads * config.head_dim, 1), (config.hidden_size, spread), (config.intermediate_size, spread))
    expected, width = max((math.ceil(TOKENS_PER_INPUT * width * spread), width) for width, spread in inputs)
    if quantization.reads_text and tokens.size < expected:
        logger.warning(
            "%d tokens of calibration text are few for layers of %d inputs; on other text the model may be worse than "
            "by rounding to nearest; expected %d or more",
            tokens.size,
            width,
            expected,
        )


def log_report(report: Mapping[str, Any], recipe: str) -> None:
    """Say what :meth:`HeldOut.report` found; a warning if the recipe is worse than rounding to nearest."""
    by_name = {name: math.inf if value is None else value for name, value in report["perplexity"].items()}
    exact, quantized, nearest = (by_name[name] for name in Streams._fields)
    logger.info(
        "perplexity on %d held-out tokens: %.3f float, %.3f %s, %.3f round-to-nearest",
        report["tokens"], exact, quantized, recipe, nearest,
    )  # fmt: skip
    if quantized > nearest * (1 + NEGLIGIBLE) or math.isinf(quantized):
        logger.warning(
            "recipe %r is worse than rounding to nearest on text that it was not calibrated on: perplexity %.3f, not "
            "%.3f (float %.3f); give more calibration text, and of more kinds, or take recipe 'rtn'",
            recipe, quantized, nearest, exact,
        )  # fmt: skip
