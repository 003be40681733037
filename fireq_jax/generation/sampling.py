"""From logits to a token: repetition penalty, temperature, top-k, top-p, min-p, Gumbel noise.

The filters apply in transformers' order, each to what the one before left. Each is a threshold on
the scaled logits, so tokens with equal logits stay or go together and no order among them matters.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

_LARGEST = float(np.finfo(np.float32).max)


class SamplingOptions(TypedDict, total=False):
    """:class:`SamplingConfig`'s fields as keyword arguments."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (greedy). None means 1 if
            ``top_k``, ``top_p`` or ``min_p`` is given, and 0 otherwise.
        top_k: keep the k most likely tokens, and those as likely as the k-th.
        top_p: keep the fewest most likely tokens whose probabilities reach this sum, and those as
            likely as the last of them; in (0, 1].
        min_p: keep tokens at least this fraction as likely as the most likely one; in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens that the
            prompt or the new text holds already.

    None turns an option off. Raises ValueError for values out of range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float | np.number | jax.Array) and not isinstance(value, bool)
            number = number and np.ndim(value) == 0
            if value is not None and not (number and abs(value) <= _LARGEST):
                raise ValueError(f"{field.name} is {value!r}; expected a finite number, or None")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; expected 0 (greedy) or a positive number")
        if self.top_k is not None and (self.top_k != int(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k is {self.top_k}; expected a whole number of at least 1, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected a number in (0, 1], or None")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; expected a number in [0, 1], or None")
        if self.repetition_penalty is not None and self.repetition_penalty < 1 / _LARGEST:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; expected a positive number, or None")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        if self.temperature is None:
            return self.top_k is None and self.top_p is None and self.min_p is None
        return self.temperature == 0

    def arrays(self) -> "SamplingArrays":
        """The same for use under jit, without what has no effect."""
        penalty = None if self.repetition_penalty in (None, 1.0) else np.float32(self.repetition_penalty)
        if self.greedy:
            return SamplingArrays(None, None, None, None, penalty)
        temperature = 1.0 if self.temperature is None else self.temperature
        return SamplingArrays(
            # A temperature that float32 rounds to 0 would divide 0 by 0.
            temperature=np.maximum(np.float32(temperature), np.finfo(np.float32).tiny),
            top_k=None if self.top_k is None else np.int32(min(self.top_k, np.iinfo(np.int32).max)),
            top_p=None if self.top_p in (None, 1.0) else np.float32(self.top_p),
            min_p=None if not self.min_p else np.float32(self.min_p),
            repetition_penalty=penalty,
        )


class SamplingArrays(NamedTuple):
    """A :class:`SamplingConfig` as a pytree of scalars; ``temperature`` None is greedy.

    What is None is decided at compilation, the values are not: changing them recompiles nothing.
    """

    temperature: Float[Array, ""] | np.float32 | None
    top_k: Int[Array, ""] | np.int32 | None
    top_p: Float[Array, ""] | np.float32 | None
    min_p: Float[Array, ""] | np.float32 | None
    repetition_penalty: Float[Array, ""] | np.float32 | None


def sample(
    logits: Float[Array, "B V"],
    sampling: SamplingArrays,
    *,
    keys: Key[Array, " B"] | None,
    positions: Int[Array, " B"],
    seen: Bool[Array, "B V"] | None,
    restrict: Callable[[Float[Array, "B V"]], Float[Array, "B V"]] = lambda logits: logits,
) -> Int[Array, " B"]:
    """The next token of each sequence, int32.

    Args:
        logits: of the last token of each sequence.
        sampling: how to choose.
        keys: one PRNG key a sequence; None if greedy.
        positions: where in its sequence the new token will stand. Noise is a function of key and
            position alone, so a sequence draws the same whatever shares its batch, and text
            generated in two calls is that of one.
        seen: tokens of each sequence so far; None without repetition penalty.
        restrict: what else is done to the logits, between the penalty and the temperature.
    """
    logits = logits.astype(jnp.float32)
    if sampling.repetition_penalty is not None:
        assert seen is not None
        logits = penalize(logits, seen, sampling.repetition_penalty)
    logits = restrict(logits)
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    assert keys is not None
    step_keys = jax.vmap(jax.random.fold_in)(keys, positions)
    return jax.vmap(jax.random.categorical)(step_keys, filter_logits(logits, sampling)).astype(jnp.int32)


def penalize(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""] | np.float32
) -> Float[Array, "B V"]:
    """Repetition penalty (CTRL, arXiv 1909.05858) of the tokens in ``seen``."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: Float[Array, "B V"], sampling: SamplingArrays) -> Float[Array, "B V"]:
    """Logits over temperature, -inf where a filter drops the token; the row's maximum is 0.

    The most likely token always stays.
    """
    assert sampling.temperature is not None
    # Zero at the maximum before the division: no temperature, however small, can overflow it.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    top_k, top_p = sampling.top_k, sampling.top_p
    if top_k is not None:
        scaled = _keep(scaled, lambda above: jnp.sum(above, axis=-1, keepdims=True) < top_k)
    if top_p is not None:
        p = jax.nn.softmax(scaled, axis=-1)
        scaled = _keep(scaled, lambda above: jnp.sum(jnp.where(above, p, 0), axis=-1, keepdims=True) < top_p)
    if sampling.min_p is not None:
        scaled = jnp.where(scaled >= jnp.log(sampling.min_p), scaled, -jnp.inf)
    return scaled


def _keep(x: Float[Array, "B V"], enough: Callable[[Bool[Array, "B V"]], Bool[Array, "B 1"]]) -> Float[Array, "B V"]:
    """-inf for all but the numbers (none positive) that have few ``enough`` above them.

    The smallest such number is found bit by bit: 31 passes over the row cost a GPU less than sorting it.
    """

    def threshold(bits: Int[Array, "B 1"]) -> Float[Array, "B 1"]:
        infinity = jnp.int32(0x7F800000)
        return -jax.lax.bitcast_convert_type(jnp.minimum(bits, infinity), jnp.float32)

    def settle(i: Int[Array, ""], bits: Int[Array, "B 1"]) -> Int[Array, "B 1"]:
        lower = bits | jnp.left_shift(1, 30 - i)
        return jnp.where(enough(x > threshold(lower)), lower, bits)

    bits = jax.lax.fori_loop(0, 31, settle, jnp.zeros((*x.shape[:-1], 1), jnp.int32))
    return jnp.where(x >= threshold(bits), x, -jnp.inf)
