"""Learned rounding: what of a quantized block may move, and how gradients move it.

Codes, channel scales and RMSNorm gains cost the same at run time whatever their values are. They are
learned together for the block's output (BRECQ, arXiv 2102.05426; scales and smoothing with it:
OmniQuant, arXiv 2308.13137). A gradient passes straight through rounding (arXiv 1308.3432) to a latent
weight, whose nearest table entry is the code. Gains and codes together hold every smoothing of the
layer's input; group scales stay, so that a code keeps its table.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from pallas_kernels import formats, layouts
from pallas_kernels.quantized_tensor import QuantizedTensor, over_stack

Parameters = Mapping[str, Array | QuantizedTensor]


# Adam's first step; it is as long in every direction, so FACTOR_UNIT says how much shorter it is for factors.
RATE = 0.01
FACTOR_UNIT = 0.1
# Adam's guard against division by 0. A weight's derivative is about 1e-8 in a block of millions of weights
# and falls with their number, so that the usual 1e-8 would decide how far they move.
EPSILON = 1e-20


class Change(NamedTuple):
    """How far a block is from where learning began, by parameter name: zeros are the start; experts are stacked."""

    latent: dict[str, Float[Array, "N K"]]  # in group scales; K is whole groups
    channel: dict[str, Float[Array, " N"]]  # of a channel scale, times exp(FACTOR_UNIT * channel)
    gain: dict[str, Float[Array, " D"]]  # of an RMSNorm gain, likewise


def no_change(start: Parameters, origins: Mapping[str, Float[Array, "N K"]]) -> Change:
    """Zeros, for a block's parameters and the :func:`origin` of each weight."""
    return Change(
        latent={name: jnp.zeros_like(origin) for name, origin in origins.items()},
        channel={name: jnp.zeros(origin.shape[:-1], jnp.float32) for name, origin in origins.items()},
        gain={name: jnp.zeros_like(gain) for name, gain in _gains(start)},
    )


def optimizer(steps: int) -> optax.GradientTransformation:
    """Adam on a :class:`Change`; its rate falls to 0 over ``steps`` as a cosine."""
    return optax.adam(optax.cosine_decay_schedule(RATE, steps), eps=EPSILON)


@jax.custom_jvp
def straight_through(value: Float[Array, "..."], latent: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exactly ``value``, with the derivative of ``latent``."""
    return value


@straight_through.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[0], tangents[1]


@jax.jit
@over_stack
def origin(tensor: QuantizedTensor, weight: Float[Array, "N K"]) -> Float[Array, "N groups_g"]:
    """Latent weights, in channel scales, that have the tensor's values as their nearest.

    Where ``weight`` was rounded to its nearest value the latent weight is itself: it says which way it
    would rather have gone. A code that compensation moved elsewhere starts from its value.

    Args:
        tensor: in 4 bits.
        weight: float32, what the tensor stands for.
    """
    padding = ((0, 0), (0, -weight.shape[1] % tensor.group_size))
    value = jnp.pad(tensor.unscaled(), padding)
    latent = jnp.pad(weight / tensor.channel_scale[: len(weight), None], padding)
    nearest, scale = _codes(tensor, latent)
    return jnp.where(formats.decode_weight(nearest, scale, _codebook(tensor)) == value, latent, value)


def float_parameters(
    change: Change, start: Parameters, origins: Mapping[str, Float[Array, "N K"]]
) -> dict[str, Array | QuantizedTensor]:
    """The changed block with float32 weights: their values rounded, their derivatives not.

    Args:
        change: what has been learned.
        start: the block's parameters, weights in 4 bits.
        origins: the :func:`origin` of each of these.
    """
    result = {
        name: value.dequantize() if isinstance(value, QuantizedTensor) else value
        for name, value in {**start, **_changed_gains(change, start)}.items()
    }
    for name, tensor in learned_weights(start).items():
        result[name] = _float_weight(tensor, origins[name], change.latent[name], change.channel[name])
    return result


@over_stack
def _float_weight(
    tensor: QuantizedTensor,
    origin: Float[Array, "N groups_g"],
    moved: Float[Array, "N groups_g"],
    channel: Float[Array, " N"],
) -> Float[Array, "N K"]:
    latent = _latent(tensor, origin, moved)
    codes, scale = _codes(tensor, jax.lax.stop_gradient(latent))
    weight = straight_through(formats.decode_weight(codes, scale, _codebook(tensor)), latent)
    n, k = tensor.shape
    return weight[:, :k] * (tensor.channel_scale[:n] * _factor(channel))[:, None]


@jax.jit
def changed_parameters(
    change: Change, start: Parameters, origins: Mapping[str, Float[Array, "N K"]]
) -> dict[str, Array | QuantizedTensor]:
    """The parameters that ``change`` touches, as the model stores them; see :func:`float_parameters`.

    Group scales are the start's, bit for bit.
    """
    result: dict[str, Array | QuantizedTensor] = {**_changed_gains(change, start)}
    for name, tensor in learned_weights(start).items():
        result[name] = _changed_weight(tensor, origins[name], change.latent[name], change.channel[name])
    return result


@over_stack
def _changed_weight(
    tensor: QuantizedTensor,
    origin: Float[Array, "N groups_g"],
    moved: Float[Array, "N groups_g"],
    channel: Float[Array, " N"],
) -> QuantizedTensor:
    n, k = tensor.shape
    codes, _ = _codes(tensor, _latent(tensor, origin, moved))
    channel_scale = tensor.channel_scale.at[:n].multiply(_factor(channel))
    return dataclasses.replace(tensor, values=layouts.pack_weight(codes[:, :k]), channel_scale=channel_scale)


def learned_weights(parameters: Parameters) -> dict[str, QuantizedTensor]:
    """The weights of 4 bits; those of 8 stay as they are."""
    return {
        name: value
        for name, value in parameters.items()
        if isinstance(value, QuantizedTensor) and value.format != "fp8"
    }


def _gains(parameters: Parameters) -> list[tuple[str, Float[Array, " D"]]]:
    return [(name, value) for name, value in parameters.items() if "norm" in name and isinstance(value, Array)]


def _changed_gains(change: Change, start: Parameters) -> dict[str, Float[Array, " D"]]:
    return {name: gain * _factor(change.gain[name]) for name, gain in _gains(start)}


def _factor(change: Float[Array, " D"]) -> Float[Array, " D"]:
    return jnp.exp(FACTOR_UNIT * change)


def _codebook(tensor: QuantizedTensor) -> formats.Codebook:
    assert tensor.format != "fp8"
    return tensor.format


def _group_scale(tensor: QuantizedTensor) -> Float[Array, "N G"]:
    return tensor.codes().group_scale


def _latent(
    tensor: QuantizedTensor, origin: Float[Array, "N groups_g"], moved: Float[Array, "N groups_g"]
) -> Float[Array, "N groups_g"]:
    step = jnp.repeat(_group_scale(tensor).astype(jnp.float32), tensor.group_size, axis=1)
    return origin + moved * step


def _codes(tensor: QuantizedTensor, latent: Float[Array, "N K"]) -> tuple[Int[Array, "N K"], Float[Array, "N G"]]:
    """The codes of the nearest values in the kernel's table, and the group scales that they stand under."""
    scale = _group_scale(tensor)
    grouped = latent.reshape(*scale.shape, tensor.group_size)
    return formats.encode_weight(grouped, scale, "table", _codebook(tensor)).reshape(latent.shape), scale
