"""What makes a model hard to quantize, measured on text: outliers among its activations and keys.

- Massive activations (arXiv 2402.17762): a few tokens whose hidden state is hundreds of times as large as others'.
- Attention sinks (arXiv 2309.17453): heads that look at the first token whatever it is.
- Outlier channels: of the inputs of linear layers, which share a scale a token, and of keys, which share one a token
  and head.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int
from tqdm import tqdm

from fireq_jax.evaluation.simulated import Roundings, attend, embed, forward
from fireq_jax.models import CausalLM
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.llama import DecoderLayer
from fireq_jax.quantization import recipes
from pallas_kernels.formats import ScaledArray

INPUTS = ("qkv_input", "o_input", "gate_up_input", "down_input")


class InputStatistics(NamedTuple):
    """Of one linear layer's inputs in L layers; of a smoothed or rotated model as they are there.

    Attributes:
        absmax: [L, K], each channel's largest magnitude.
        kurtosis: [L], mean x^4 over squared mean x^2 of all values: 3 for a normal distribution, more with outliers.
    """

    absmax: Float32[np.ndarray, "L K"]
    kurtosis: Float32[np.ndarray, " L"]


@dataclasses.dataclass(frozen=True)
class ActivationStatistics:
    """What :func:`measure_activations` found in L layers.

    Attributes:
        tokens: that were looked at.
        hidden_max: [L + 1], largest magnitude of the hidden states that enter the first layer and leave each.
        hidden_median: [L + 1], the median token's largest magnitude there.
        first_token: [L], mean weight that attention gives to a sequence's first token, over heads and all later
            tokens that see it.
        inputs: of linear layers, by the names in ``INPUTS``; without "down_input" of experts.
        keys: [L, kv_heads, H], each channel's largest magnitude as the cache stores it (turned, scaled and centred,
            where that was done to the model), before it is rounded.
    """

    tokens: int
    hidden_max: Float32[np.ndarray, " L+1"]
    hidden_median: Float32[np.ndarray, " L+1"]
    first_token: Float32[np.ndarray, " L"]
    inputs: dict[str, InputStatistics]
    keys: Float32[np.ndarray, "L kv_heads H"]


def measure_activations(
    model: CausalLM, windows: Int[np.ndarray, "windows T"], *, progress: bool = True, description: str = "activations"
) -> ActivationStatistics:
    """Statistics of a model's activations on text, one window after the other, in float32 and with nothing rounded.

    Args:
        model: any CausalLM. Quantized weights are taken as what their codes stand for.
        windows: token ids of whole sequences, two tokens or more.
        progress: show a progress bar on stderr, labelled ``description``.

    Raises:
        ValueError: for windows of another shape.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows have shape {windows.shape}; expected [windows, T] of two tokens or more")
    layers = [nnx.split(layer) for layer in model.layers]
    found: list[list[_Seen]] = []
    entering: list[Array] = []
    for window in tqdm(windows, desc=description, unit="window", disable=not progress):
        x = embed(model, window[None])
        entering.append(jnp.max(jnp.abs(x[0]), axis=-1))
        of_layers = []
        for graph, state in layers:
            x, seen = _look(graph, model.config, state, x)
            of_layers.append(jax.device_get(seen))
        found.append(of_layers)
    seen = jax.tree.map(lambda *leaves: np.stack(leaves), *[_stacked(of_layers) for of_layers in found])
    hidden = np.concatenate([np.asarray(entering)[:, None], seen.hidden], axis=1)  # [windows, L + 1, T]
    inputs = {
        name: InputStatistics(seen.absmax[name].max(axis=0), _kurtosis(seen.squares[name], seen.fourths[name]))
        for name in INPUTS
        if name in seen.absmax
    }
    return ActivationStatistics(
        tokens=windows.size,
        hidden_max=hidden.max(axis=(0, 2)),
        hidden_median=np.median(hidden, axis=(0, 2)),
        first_token=seen.first_token.mean(axis=0),
        inputs=inputs,
        keys=seen.keys.max(axis=0),
    )


class _Seen(NamedTuple):
    """Of one layer and window: largest magnitude of each token, and the rest as in :class:`ActivationStatistics`."""

    hidden: Float[Array, " T"]
    first_token: Float[Array, ""]
    keys: Float[Array, "kv_heads H"]
    absmax: dict[str, Float[Array, " K"]]
    squares: dict[str, Float[Array, ""]]
    fourths: dict[str, Float[Array, ""]]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look(
    graph: nnx.GraphDef[DecoderLayer], config: ModelConfig, state: nnx.State, x: Float32[Array, "1 T D"]
) -> tuple[Float32[Array, "1 T D"], _Seen]:
    layer, seen = nnx.merge(graph, state), {}
    output = forward(layer, config, recipes.none(), Roundings(), x, seen.__setitem__)
    inputs = {name: seen[name] for name in INPUTS if name in seen}
    # Attention to values that are 1 for the first token and 0 for others is the first token's weight.
    key = ScaledArray(seen["key"], None, "none")
    first = ScaledArray(jnp.zeros_like(seen["key"]).at[:, :, 0].set(1.0), None, "none")
    weights = attend(layer.self_attn, config, ScaledArray(seen["query"], None, "none"), key, first)[0, 1:, :, 0]
    if layer.self_attn.window is not None:
        weights = weights[: layer.self_attn.window - 1]  # of the queries that see it
    return output, _Seen(
        hidden=jnp.max(jnp.abs(output[0]), axis=-1),
        first_token=jnp.mean(weights),
        keys=jnp.max(jnp.abs(seen["key"][0]), axis=1),
        absmax={name: jnp.max(jnp.abs(x), axis=(0, 1)) for name, x in inputs.items()},
        squares={name: jnp.mean(jnp.square(x)) for name, x in inputs.items()},
        fourths={name: jnp.mean(jnp.square(jnp.square(x))) for name, x in inputs.items()},
    )


def _stacked(of_layers: list[_Seen]) -> _Seen:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *of_layers)


def _kurtosis(squares: Float[np.ndarray, "windows L"], fourths: Float[np.ndarray, "windows L"]) -> np.ndarray:
    squares, fourths = squares.mean(axis=0, dtype=np.float64), fourths.mean(axis=0, dtype=np.float64)
    return (fourths / np.where(squares > 0, squares, 1) ** 2).astype(np.float32)


def largest_to_median(magnitudes: Float[np.ndarray, "*rows K"]) -> Float[np.ndarray, " *rows"]:
    """Largest over median of the last axis; 1 where all are 0."""
    median, largest = np.median(magnitudes, axis=-1), magnitudes.max(axis=-1)
    floor = np.where(largest > 0, np.maximum(median, 1e-30), 1)
    return np.where(largest > 0, largest / floor, 1)
