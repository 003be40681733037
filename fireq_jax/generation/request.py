"""A call of ``generate``, validated: prompts padded to shapes that similar calls share, and how tokens are chosen."""

from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from fireq_jax.device_memory import check_fits
from fireq_jax.generation.constraints import Constraints, constraints_of, is_whole
from fireq_jax.generation.options import GenerationOptions, LogitsProcessor, Options
from fireq_jax.generation.sampling import SamplingArrays, SamplingConfig, SamplingOptions
from fireq_jax.generation.text import TextStream, split_stop_strings
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.inputs import as_array, check_shapes, check_values
from fireq_jax.models.kv_cache import KVCache, slot_bytes
from fireq_jax.models.llama import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUCKET = 64  # lengths are rounded up to a multiple of this
_MOST_SLOTS = 1 << 30  # positions are int32


class Choice(NamedTuple):
    """How tokens are chosen and when a sequence ends; all of it traced."""

    sampling: SamplingArrays
    keys: Key[Array, " B"] | None
    eos: Int[np.ndarray, " E"]
    pad: np.int32
    constraints: Constraints


class Static(NamedTuple):
    """What of a call is compiled in.

    Attributes:
        logits_processor: functions of the caller's.
        logprobs: None if no log-probabilities are asked for, else for how many most likely tokens besides the chosen.
    """

    logits_processor: tuple[LogitsProcessor, ...] = ()
    logprobs: int | None = None


class StopStrings(NamedTuple):
    """Texts that end a sequence, and what turns its tokens into text."""

    strings: tuple[str, ...]
    tokenizer: "PreTrainedTokenizerBase"


class Request(NamedTuple):
    """A validated call; ``cached`` are the tokens of each prompt that ``cache`` holds already."""

    prompt: Int[np.ndarray, "B T"]
    tokens: Int[np.ndarray, "B padded"]
    lengths: Int[np.ndarray, " B"]
    choice: Choice
    static: Static
    stop: StopStrings | None
    cache: KVCache | None
    cached: Int[np.ndarray, " B"]
    new_tokens: int
    capacity: int
    cache_bytes: int

    @property
    def rest(self) -> tuple[Int[np.ndarray, "B padded"], Int[np.ndarray, " B"]]:
        """Tokens of each prompt that the cache does not hold, and how many."""
        lengths = self.lengths - self.cached
        width = min(round_up(int(lengths.max())), self.capacity)
        slots = np.arange(width)[None]
        sources = np.minimum(self.cached[:, None] + slots, self.tokens.shape[1] - 1)
        tokens = np.take_along_axis(self.tokens, sources, axis=1)
        return np.where(slots < lengths[:, None], tokens, 0), lengths

    def text_streams(self) -> list[TextStream]:
        """One for each sequence, to find its stop strings; [] without any."""
        if self.stop is None:
            return []
        prompts = (tokens[:length].tolist() for tokens, length in zip(self.tokens, self.lengths, strict=True))
        return [TextStream(self.stop.tokenizer, prompt, self.stop.strings) for prompt in prompts]


def prepare(
    model: CausalLM,
    input_ids: Any,
    attention_mask: Any,
    max_new_tokens: int,
    **given: Unpack[GenerationOptions],
) -> Request:
    """Validate a call; arguments and errors are those of ``generate``."""
    config = model.config
    own: dict[str, Any] = dict(given)
    sampling = SamplingConfig(**{name: own.pop(name) for name in SamplingOptions.__annotations__ if name in own})
    options = Options(**own)
    if options.token_type_ids is not None and (types := as_array("token_type_ids", options.token_type_ids)).any():
        raise ValueError(f"token_type_ids has values {np.unique(types)[:8]}; expected 0: the model has no segments")
    copies = options.num_return_sequences
    if copies > 1 and sampling.greedy:
        raise ValueError(f"num_return_sequences is {copies}, and all would be equal; give a temperature or a filter")
    prompt = as_array("input_ids", input_ids)
    mask = None if attention_mask is None else as_array("attention_mask", attention_mask)
    tokens, lengths = _right_padded(prompt, mask, config.vocab_size)
    prompt, tokens, lengths = (np.repeat(rows, copies, axis=0) for rows in (prompt, tokens, lengths))
    longest = int(lengths.max())
    capacity = _capacity(longest, max_new_tokens, options.cache_capacity)
    cached = np.zeros_like(lengths) if options.cache is None else _cached(model, options, lengths)
    if options.cache is not None:
        capacity = max(capacity, options.cache.capacity)
    cache_bytes = len(tokens) * capacity * slot_bytes(config, model.quantization, model.dtype)
    check_fits(f"the cache of {len(tokens)} x {capacity} tokens", cache_bytes, jax.tree.leaves(model))
    width = min(round_up(longest), capacity)
    stops, stop_ids = split_stop_strings(options.stop_strings, options.tokenizer)
    eos, pad = _ends(config, options)
    choice = Choice(
        sampling=sampling.arrays(),
        keys=None if sampling.greedy else _row_keys(options.key, len(tokens), copies),
        eos=np.asarray((*eos, *stop_ids), np.int32),
        pad=np.int32(pad),
        constraints=constraints_of(
            lengths,
            eos,
            config.vocab_size,
            min_new_tokens=options.min_new_tokens,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            bad_words_ids=options.bad_words_ids,
        ),
    )
    return Request(
        prompt=prompt.astype(np.int32),
        tokens=np.pad(tokens[:, :longest], ((0, 0), (0, width - longest))),
        lengths=lengths,
        choice=choice,
        static=_static(options, config.vocab_size),
        stop=StopStrings(stops, options.tokenizer) if stops and options.tokenizer is not None else None,
        cache=options.cache,
        cached=cached,
        new_tokens=int(max_new_tokens),
        capacity=capacity,
        cache_bytes=cache_bytes,
    )


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


def _capacity(longest: int, max_new_tokens: Any, asked: int | None) -> int:
    """Slots of the cache, for prompts of up to ``longest`` tokens."""
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; expected a whole number of at least 1")
    total = longest + int(max_new_tokens)
    if asked is not None and total > asked:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, together {total}; "
            f"cache_capacity is {asked}"
        )
    if total > _MOST_SLOTS:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at most {_MOST_SLOTS} tokens with the prompt's")
    return round_up(total) if asked is None else int(asked)


def _cached(model: CausalLM, options: Options, lengths: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
    """Tokens of each prompt that the caller's cache holds."""
    cache = options.cache
    assert cache is not None
    if options.num_return_sequences > 1:
        raise ValueError(f"num_return_sequences is {options.num_return_sequences}, and there is a cache; expected 1")
    expected = jax.eval_shape(
        lambda: KVCache.create(model.config, model.quantization, len(lengths), cache.capacity, model.dtype)
    )
    found = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache)
    if found != expected:
        keys = cache.layers[0].key
        raise ValueError(
            f"cache is of {len(cache.lengths)} sequences and {len(cache.layers)} layers with keys in format "
            f"{keys.format!r}, {keys.values.dtype}{list(keys.values.shape)}; expected that of an earlier call for "
            f"{len(lengths)} prompts of this model"
        )
    if options.cache_capacity is not None and options.cache_capacity < cache.capacity:
        raise ValueError(f"cache_capacity is {options.cache_capacity}; expected at least the cache's, {cache.capacity}")
    held = np.asarray(jax.device_get(cache.lengths))
    if full := [row for row in range(len(held)) if held[row] >= lengths[row]]:
        row = full[0]
        raise ValueError(
            f"the cache holds {held[row]} tokens of sequence {row}, and the prompt has {lengths[row]}; "
            "expected a longer prompt, or cache.cut(lengths)"
        )
    return held


def _ends(config: ModelConfig, options: Options) -> tuple[tuple[int, ...], int]:
    """EOS ids, and the padding id."""
    eos = config.eos_token_ids
    if options.eos_token_ids is not None:
        eos = tuple(np.atleast_1d(as_array("eos_token_ids", options.eos_token_ids)).tolist())
    pad = options.pad_token_id
    for name, given, ids in (("eos_token_ids", options.eos_token_ids, eos), ("pad_token_id", pad, (pad,))):
        if given is not None and not all(is_whole(token) and 0 <= token < config.vocab_size for token in ids):
            raise ValueError(f"{name} is {given!r}; expected ids from 0 to {config.vocab_size - 1}")
    # Old checkpoints have -1 for no padding id.
    default_pad = None if config.pad_token_id is None or config.pad_token_id < 0 else config.pad_token_id
    return eos, next(token for token in (pad, default_pad, *eos, 0) if token is not None)


def _static(options: Options, vocab_size: int) -> Static:
    top = options.top_logprobs
    if top is not None and top > vocab_size:
        raise ValueError(f"top_logprobs is {top}; expected at most {vocab_size}, the vocabulary")
    return Static(tuple(options.logits_processor or ()), top if top is not None else 0 if options.logprobs else None)


def _row_keys(key: Key[Array, "..."] | None, rows: int, copies: int) -> Key[Array, " B"]:
    """A key for each of ``rows`` sequences, ``copies`` of which share a prompt."""
    keys = jax.random.key(jax.device_put(np.uint32(0))) if key is None else key
    if not isinstance(keys, jax.Array):
        raise ValueError(f"key is {key!r}; expected jax.random.key(seed), or an array of one such key a prompt")
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        try:
            keys = jax.random.wrap_key_data(keys)
        except TypeError as error:
            raise ValueError(f"key is {key!r}; expected jax.random.key(seed)") from error
    batch = rows // copies
    if keys.shape not in ((), (batch,)):
        raise ValueError(f"key has shape {keys.shape}; expected () or ({batch},), one key a prompt")
    keys = jnp.broadcast_to(keys, (batch,))
    if copies == 1:
        return keys
    indices = jax.device_put(np.tile(np.arange(copies, dtype=np.uint32), batch))
    return jax.vmap(jax.random.fold_in)(jnp.repeat(keys, copies), indices)


def round_up(length: int) -> int:
    """To a multiple of ``BUCKET``, and of an eighth of the largest power of two below."""
    step = max(BUCKET, 1 << (length - 1).bit_length() >> 4)
    return -(-length // step) * step
