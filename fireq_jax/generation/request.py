"""A call of ``generate``, validated: prompts padded to shapes that similar calls share, and how tokens are chosen."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from fireq_jax.device_memory import check_fits
from fireq_jax.generation.sampling import SamplingArrays, SamplingConfig, SamplingOptions
from fireq_jax.models.inputs import as_array, check_shapes, check_values
from fireq_jax.models.kv_cache import slot_bytes
from fireq_jax.models.llama import CausalLM

BUCKET = 64  # lengths are rounded up to a multiple of this
_MOST_SLOTS = 1 << 30  # positions are int32


class Choice(NamedTuple):
    """How tokens are chosen and when a sequence ends; all of it traced."""

    sampling: SamplingArrays
    keys: Key[Array, " B"] | None
    eos: Int[np.ndarray, " E"]
    pad: np.int32


class Request(NamedTuple):
    """A validated call."""

    prompt: Int[np.ndarray, "B T"]
    tokens: Int[np.ndarray, "B padded"]
    lengths: Int[np.ndarray, " B"]
    choice: Choice
    new_tokens: int
    capacity: int
    cache_bytes: int

    @property
    def inputs(self) -> tuple[np.ndarray, np.ndarray, Choice]:
        """What the programs take besides the model."""
        return self.tokens, self.lengths, self.choice


def prepare(
    model: CausalLM,
    input_ids: Any,
    attention_mask: Any,
    max_new_tokens: int,
    *,
    eos_token_ids: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    key: Key[Array, "..."] | None = None,
    cache_capacity: int | None = None,
    token_type_ids: Any = None,
    **sampling: Unpack[SamplingOptions],
) -> Request:
    """Validate a call; arguments and errors are those of ``generate``."""
    config = model.config
    prompt = as_array("input_ids", input_ids)
    mask = None if attention_mask is None else as_array("attention_mask", attention_mask)
    if token_type_ids is not None and (types := as_array("token_type_ids", token_type_ids)).any():
        raise ValueError(f"token_type_ids has values {np.unique(types)[:8]}; expected 0: the model has no segments")
    tokens, lengths = _right_padded(prompt, mask, config.vocab_size)
    if not _is_whole(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; expected a whole number of at least 1")
    if cache_capacity is not None and not _is_whole(cache_capacity):
        raise ValueError(f"cache_capacity is {cache_capacity!r}; expected a whole number, or None")
    longest = int(lengths.max())
    total = longest + int(max_new_tokens)
    if cache_capacity is not None and total > cache_capacity:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, together {total}; "
            f"cache_capacity is {cache_capacity}"
        )
    if total > _MOST_SLOTS:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at most {_MOST_SLOTS} tokens with the prompt's")
    capacity = round_up(total) if cache_capacity is None else int(cache_capacity)
    cache_bytes = len(tokens) * capacity * slot_bytes(config, model.quantization, model.dtype)
    check_fits(f"the cache of {len(tokens)} x {capacity} tokens", cache_bytes, jax.tree.leaves(model))
    width = min(round_up(longest), capacity)
    tokens = np.pad(tokens[:, :longest], ((0, 0), (0, width - longest)))
    eos = config.eos_token_ids
    if eos_token_ids is not None:
        eos = tuple(np.atleast_1d(as_array("eos_token_ids", eos_token_ids)).tolist())
    for name, given, ids in (("eos_token_ids", eos_token_ids, eos), ("pad_token_id", pad_token_id, (pad_token_id,))):
        if given is not None and not all(_is_whole(token) and 0 <= token < config.vocab_size for token in ids):
            raise ValueError(f"{name} is {given!r}; expected ids from 0 to {config.vocab_size - 1}")
    # Old checkpoints have -1 for no padding id.
    default_pad = None if config.pad_token_id is None or config.pad_token_id < 0 else config.pad_token_id
    defaults = (pad_token_id, default_pad, *eos, 0)
    chosen = SamplingConfig(**sampling)
    choice = Choice(
        sampling=chosen.arrays(),
        keys=None if chosen.greedy else _row_keys(key, len(tokens)),
        eos=np.asarray(eos, np.int32),
        pad=np.int32(next(token for token in defaults if token is not None)),
    )
    return Request(prompt.astype(np.int32), tokens, lengths, choice, int(max_new_tokens), capacity, cache_bytes)


def _right_padded(
    prompt: np.ndarray, mask: np.ndarray | None, vocab_size: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Validated prompts with their tokens first and 0 elsewhere, and their lengths; int32."""
    check_shapes(prompt, mask)
    check_values(prompt, mask, vocab_size)
    mask = np.ones(prompt.shape, bool) if mask is None else mask.astype(bool)
    lengths = mask.sum(axis=1, dtype=np.int32)
    if not lengths.all():
        raise ValueError(
            f"attention_mask is 0 throughout rows {np.flatnonzero(lengths == 0)}; expected a token in each"
        )
    order = np.argsort(~mask, axis=1, kind="stable")
    tokens = np.take_along_axis(np.where(mask, prompt, 0), order, axis=1)
    return tokens.astype(np.int32), lengths


def _row_keys(key: Key[Array, "..."] | None, batch: int) -> Key[Array, " B"]:
    keys = jax.random.key(jax.device_put(np.uint32(0))) if key is None else key
    if not isinstance(keys, jax.Array):
        raise ValueError(f"key is {key!r}; expected jax.random.key(seed), or an array of one such key a sequence")
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        try:
            keys = jax.random.wrap_key_data(keys)
        except TypeError as error:
            raise ValueError(f"key is {key!r}; expected jax.random.key(seed)") from error
    if keys.shape not in ((), (batch,)):
        raise ValueError(f"key has shape {keys.shape}; expected () or ({batch},), one key a sequence")
    return jnp.broadcast_to(keys, (batch,))


def _is_whole(number: Any) -> TypeGuard[int | np.integer]:
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def round_up(length: int) -> int:
    """To a multiple of ``BUCKET``, and of an eighth of the largest power of two below."""
    step = max(BUCKET, 1 << (length - 1).bit_length() >> 4)
    return -(-length // step) * step
