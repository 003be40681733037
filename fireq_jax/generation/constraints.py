"""Tokens that may not come next, by what the sequence holds already; names and meanings are transformers'."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_LARGEST = np.iinfo(np.int32).max


class Constraints(NamedTuple):
    """A call's constraints as arrays; which are None is decided at compilation, their values are not.

    Attributes:
        eos: int32 [E], ids that ``eos_from`` keeps back.
        eos_from: int32 [B], the first position of each sequence where they may stand.
        ngram: int32, the length of what no sequence may hold twice.
        bad_words: int32 [W, L], token sequences that may not be completed, -1 before those that are shorter.
    """

    eos: Int[np.ndarray, " E"] | None = None
    eos_from: Int[np.ndarray, " B"] | None = None
    ngram: np.int32 | None = None
    bad_words: Int[np.ndarray, "W L"] | None = None

    @property
    def look_back(self) -> bool:
        """Whether they depend on the tokens so far."""
        return self.ngram is not None or (self.bad_words is not None and self.bad_words.shape[1] > 1)


def constraints_of(
    lengths: Int[np.ndarray, " B"],
    eos: Sequence[int],
    vocab_size: int,
    *,
    min_new_tokens: Any,
    no_repeat_ngram_size: Any,
    bad_words_ids: Any,
) -> Constraints:
    """Options of ``generate`` as arrays, without what has no effect; ``lengths`` are the prompts'.

    Raises:
        ValueError: for options out of range.
    """
    for name, value in (("min_new_tokens", min_new_tokens), ("no_repeat_ngram_size", no_repeat_ngram_size)):
        if value is not None and (not is_whole(value) or not 0 <= value <= _LARGEST):
            raise ValueError(f"{name} is {value!r}; expected a whole number of at least 0, or None")
    constraints = Constraints(
        ngram=np.int32(no_repeat_ngram_size) if no_repeat_ngram_size else None,
        bad_words=_bad_words(bad_words_ids, eos, vocab_size),
    )
    if not min_new_tokens or not eos:
        return constraints
    eos_from = np.minimum(lengths.astype(np.int64) + min_new_tokens, _LARGEST).astype(np.int32)
    return constraints._replace(eos=np.asarray(eos, np.int32), eos_from=eos_from)


def _bad_words(given: Any, eos: Sequence[int], vocab_size: int) -> Int[np.ndarray, "W L"] | None:
    """As ``Constraints`` has them; sizes are powers of two, so that other words seldom compile anything."""
    if given is None:
        return None
    expected = f"lists of ids from 0 to {vocab_size - 1}"
    words = _plain(given)
    if not isinstance(words, list):
        raise ValueError(f"bad_words_ids is {given!r}; expected {expected}")
    words = [_plain(word) for word in words]
    for word in words:
        if not isinstance(word, list) or not word or not all(is_whole(id) and 0 <= id < vocab_size for id in word):
            raise ValueError(f"bad_words_ids has {word!r}; expected {expected}")
    # Sequences end as they do otherwise: transformers lets an EOS id pass here too.
    words = [word for word in words if not (len(word) == 1 and word[0] in eos)]
    if not words:
        return None
    count, longest = (1 << (number - 1).bit_length() for number in (len(words), max(map(len, words))))
    words += words[:1] * (count - len(words))
    return np.asarray([[-1] * (longest - len(word)) + word for word in words], np.int32)


def _plain(value: Any) -> Any:
    """Arrays and sequences as lists, anything else as it is."""
    if isinstance(value, np.ndarray | jax.Array):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) else value


def constrain(
    logits: Float[Array, "B V"],
    constraints: Constraints,
    history: Int[Array, "B S"] | None,
    positions: Int[Array, " B"],
) -> Float[Array, "B V"]:
    """Logits, -inf for tokens that may not come next.

    Args:
        logits: of the next token.
        constraints: what holds.
        history: tokens so far from slot 0, -1 after them; None unless constraints ``look_back``.
        positions: how many tokens there are.
    """
    rows, vocabulary = jnp.arange(logits.shape[0])[:, None], logits.shape[1]
    banned = []  # [B, any number] each; an id of ``vocabulary`` bans nothing
    if constraints.ngram is not None:
        assert history is not None
        repeats = _repeats(history, positions, constraints.ngram)
        banned.append(jnp.where(repeats, history, vocabulary))
    if constraints.bad_words is not None:
        complete = _completes(history, positions, constraints.bad_words[:, :-1])
        banned.append(jnp.where(complete, constraints.bad_words[None, :, -1], vocabulary))
    if constraints.eos is not None and constraints.eos_from is not None:
        early = positions < constraints.eos_from
        banned.append(jnp.where(early[:, None], constraints.eos[None], vocabulary))
    for tokens in banned:
        logits = logits.at[rows, tokens].set(-jnp.inf, mode="drop")
    return logits


def _repeats(
    history: Int[Array, "B S"], positions: Int[Array, " B"], n: Int[Array, ""] | np.int32
) -> Bool[Array, "B S"]:
    """Slots whose n - 1 tokens before are the last n - 1: their token would be the end of an n-gram that is there."""
    slots = jnp.arange(history.shape[1])[None]

    def narrowed(back: Int[Array, ""], same: Bool[Array, "B S"]) -> Bool[Array, "B S"]:
        last = jnp.take_along_axis(history, jnp.maximum(positions - back, 0)[:, None], axis=1)
        return same & (jnp.roll(history, back, axis=1) == last)

    # No n - 1 tokens are before the first ones, which is also where a row rolls in its end.
    candidates = (slots >= n - 1) & (slots < positions[:, None])
    return jax.lax.fori_loop(jnp.int32(1), jnp.int32(n), narrowed, candidates)


def _completes(
    history: Int[Array, "B S"] | None, positions: Int[Array, " B"], beginnings: Int[Array, "W L"] | np.ndarray
) -> Bool[Array, "B W"]:
    """Whether a sequence ends with a word's beginning, whose -1 agree with all."""
    words, length = beginnings.shape
    if length == 0:
        return jnp.ones((positions.shape[0], words), bool)
    assert history is not None
    slots = positions[:, None] - jnp.arange(length, 0, -1)[None]
    recent = jnp.where(slots >= 0, jnp.take_along_axis(history, jnp.maximum(slots, 0), axis=1), -2)
    return jnp.all((beginnings[None] == recent[:, None]) | (beginnings[None] < 0), axis=-1)


def is_whole(number: Any) -> TypeGuard[int | np.integer]:
    """Whether it is a Python or NumPy integer."""
    return isinstance(number, int | np.integer) and not isinstance(number, bool)
