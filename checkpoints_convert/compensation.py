"""Quantize a block's linear layers in the order in which data walks through them.

Each layer is rounded with the second moments of its own inputs. With ``calibration_stream``
"quantized" these inputs come out of the layers already quantized, blocks before included, while
the float model runs beside it and says what should come out. ``reconstruction`` then learns from
the rounded block.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from checkpoints_convert.algorithms.gptq import InputMoments, quantize_measured, rounding_operations
from checkpoints_convert.algorithms.reconstruction import reconstruct, reconstruction_operations
from checkpoints_convert.calibrate import (
    Hidden,
    abstract_layer,
    batches_of,
    layer_quantization,
    run_layer,
    run_samples,
)
from fireq_jax.compilation import COMPILE_QUICKLY
from fireq_jax.models.block import Block, FusedLinear, linears_of
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.llama import DecoderLayer
from fireq_jax.models.parameters import Parameter, layer_parameters, quantize_linear, with_parameters
from fireq_jax.quantization.config import QuantizationConfig
from pallas_kernels import formats
from pallas_kernels.quantized_tensor import QuantizedTensor

# What tokens that do not go to an expert count in its moments: far less than those that do, but they decide for an
# expert that no token goes to.
UNROUTED = 1e-6


class Compensator:
    """Quantizes blocks by what they do to calibration text.

    Args:
        config: the architecture.
        quantization: a config that ``reads_text``.
        batch_size: sequences a step, at most.
    """

    def __init__(self, config: ModelConfig, quantization: QuantizationConfig, batch_size: int) -> None:
        self.config, self.quantization, self.batch_size = config, quantization, batch_size
        self.follows_quantized = quantization.calibration_stream == "quantized"
        self._float = quantization.with_float_weights().with_kv_format("none")

    def quantize(
        self,
        block: Block,
        index: int,
        hidden: Hidden,
        quantized_hidden: Hidden,
        dtype: jax.typing.DTypeLike,
        kept: Mapping[str, QuantizedTensor] | None = None,
    ) -> tuple[dict[str, Parameter], Hidden | None]:
        """Parameters of layer ``index``, and what it makes of ``quantized_hidden``.

        Args:
            block: smoothed float32 weights by Hugging Face name.
            index: of the block.
            hidden: the block's input in the float model.
            quantized_hidden: its input in the quantized model; ``hidden`` itself if calibration
                does not follow the quantized model.
            dtype: of what stays unquantized.
            kept: weights that are quantized already and stay as they are, by name without prefix. A block with any
                learns nothing.

        Returns:
            Parameters by full name; the block's output in the quantized model, None if
            calibration does not follow it or no block comes after.
        """
        own = self._own_parameters(index, block)
        exact = self._layer(index, own, {}, self._float)
        done: dict[str, Parameter] = {}
        for linear in linears_of(self.config):
            if self.quantization.keeps_float(name := f"layers.{index}.{linear.name}"):
                continue
            weight, recipe = own[f"{linear.name}.weight"], self.quantization.for_linear(name)
            if kept and f"{linear.name}.weight" in kept:
                done[f"{linear.name}.weight"] = kept[f"{linear.name}.weight"]
            elif recipe.measures_inputs:
                seen = self._layer(index, own, done, self.quantization) if self.follows_quantized else exact
                moments = self._moments(exact, seen, linear, hidden, quantized_hidden)
                done[f"{linear.name}.weight"] = quantize_measured(weight, moments, recipe)
            else:
                done[f"{linear.name}.weight"] = quantize_linear(weight, recipe)
        if self.quantization.learned_steps and not kept:
            done |= reconstruct(
                self.config,
                self._staged(index, done, self.quantization),
                {**own, **done},
                own,
                quantized_hidden,
                self._run(exact, hidden),
                batch_size=self.batch_size,
                index=index,
            )
        parameters = layer_parameters(block, index, self._float, dtype)
        parameters |= {f"layers.{index}.{name}": value for name, value in done.items()}
        if not self.follows_quantized or index + 1 == self.config.num_layers:
            return parameters, None
        return parameters, self._run(self._layer(index, own, done, self.quantization), quantized_hidden)

    def _run(self, layer: DecoderLayer, hidden: Hidden) -> Hidden:
        """The layer's output."""
        return run_samples(layer, self.config, hidden, self.batch_size)

    def _layer(
        self, index: int, own: Mapping[str, Array], done: Mapping[str, Parameter], quantization: QuantizationConfig
    ) -> DecoderLayer:
        """The block with the linear layers of ``done`` quantized and its ``own`` parameters otherwise."""
        staged = self._staged(index, done, quantization)
        return with_parameters(abstract_layer(self.config, staged, index), {**own, **done})

    def _staged(
        self, index: int, done: Mapping[str, Parameter], quantization: QuantizationConfig
    ) -> QuantizationConfig:
        """Of layer ``index``, called "layers.0", where only the linear layers of ``done`` are quantized."""
        names = [name.removesuffix(".weight") for name in done]
        return layer_quantization(self.config, quantization, index, names)

    def _own_parameters(self, index: int, block: Block) -> dict[str, Array]:
        """The block's parameters in float32, by name without prefix."""
        parameters = layer_parameters(block, index, self._float, jnp.float32)
        return {name.split(".", 2)[2]: value for name, value in parameters.items() if isinstance(value, Array)}

    def _moments(
        self, exact: DecoderLayer, seen: DecoderLayer, linear: FusedLinear, hidden: Hidden, quantized_hidden: Hidden
    ) -> InputMoments:
        exact_graph, exact_state = nnx.split(exact)
        seen_graph, seen_state = nnx.split(seen)
        rounds = self.quantization.activation_format == "fp8"
        total: InputMoments | None = None
        parts = batches_of(len(hidden), self.batch_size)
        for part in parts:
            moments = _moments_step(
                exact_graph,
                seen_graph,
                self.config,
                linear,
                self.follows_quantized,
                rounds,
                exact_state,
                seen_state,
                jnp.asarray(hidden[part]),
                jnp.asarray(quantized_hidden[part]),
            )
            total = moments if total is None else jax.tree.map(jnp.add, total, moments)
        assert total is not None
        return jax.tree.map(lambda x: x / len(parts), total)


def compensation_operations(config: ModelConfig, quantization: QuantizationConfig, samples: int, length: int) -> int:
    """About how many operations :meth:`Compensator.quantize` of one block is, on ``samples`` of ``length`` tokens.

    For moments each linear layer's inputs are computed anew, as far as they go (jit drops what comes after them):
    the layers before it are others by then. Keeping the float model's inputs would save a fifth of
    that and cost the memory of all of them.
    """
    heads, kv_heads, width, inner = config.num_heads, config.num_kv_heads, config.hidden_size, config.intermediate_size
    experts = 1 if config.experts is None else config.experts.count
    shapes = [
        (1, (heads + 2 * kv_heads) * config.head_dim, width),
        (1, width, heads * config.head_dim),
        (experts, 2 * inner, width),
        (experts, width, inner),
    ]
    sizes = [count * n * k for count, n, k in shapes]
    streams = 2 if quantization.calibration_stream == "quantized" else 1
    before = sum(sum(sizes[:i]) for i in range(len(sizes))) if quantization.measures_inputs else 0
    passes = streams * before + (sum(sizes) if streams == 2 else 0)
    moments = streams * sum(count * k * k for count, _, k in shapes) if quantization.measures_inputs else 0
    rounding = (
        sum(count * rounding_operations(n, k) for count, n, k in shapes) if quantization.error_compensation else 0
    )
    steps = quantization.learned_steps
    learning = reconstruction_operations(sum(sizes), steps, samples, length) if steps else 0
    return 2 * samples * length * (passes + moments) + rounding + learning


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5), compiler_options=COMPILE_QUICKLY)
def _moments_step(
    exact_graph: nnx.GraphDef[DecoderLayer],
    seen_graph: nnx.GraphDef[DecoderLayer],
    config: ModelConfig,
    linear: FusedLinear,
    paired: bool,
    rounds: bool,
    exact_state: nnx.State,
    seen_state: nnx.State,
    hidden: Float[Array, "B T D"],
    quantized_hidden: Float[Array, "B T D"],
) -> InputMoments:
    def inputs(graph: nnx.GraphDef[DecoderLayer], state: nnx.State, x: Array) -> tuple[Array, Array | None]:
        taps: dict[str, Array] = {}
        run_layer(nnx.merge(graph, state), config, x, taps.__setitem__)
        rows = taps[linear.input]
        rows = rows.reshape(*rows.shape[:-3], -1, rows.shape[-1]).astype(jnp.float32)
        return rows, taps["expert_weights"].reshape(rows.shape[-2], -1).T if linear.routed else None

    x, weights = inputs(exact_graph, exact_state, hidden)
    if not paired:
        return InputMoments(_second_moment(x, x, weights))
    y, weights = inputs(seen_graph, seen_state, quantized_hidden)
    if rounds:
        y = formats.dequantize(formats.quantize_fp8(y))
    return InputMoments(_second_moment(y, y, weights), _second_moment(x, y, weights))


def _second_moment(
    x: Float[Array, "*experts tokens K"], y: Float[Array, "*experts tokens K"], weights: Float[Array, "E tokens"] | None
) -> Float[Array, "*experts K K"]:
    """The mean of x y^T; for each expert that of its tokens, by the square of what its output is multiplied by."""
    if weights is None:
        return jnp.matmul(x.T, y, precision="highest") / len(x)

    def of_expert(expert: Array) -> Float[Array, "K K"]:
        rows, others = (z if z.ndim == 2 else z[expert] for z in (x, y))
        return _second_moment(rows * (jnp.square(weights[expert]) + UNROUTED)[:, None], others, None)

    return jax.lax.map(of_expert, jnp.arange(len(weights)))
