"""Prefill once, then decode: in one jitted ``while_loop``, or a few steps at a time for streaming.

Prompts go to the model right-padded to a length of ``_round_up`` and the cache's capacity is one too, so
that calls of similar lengths share their compilations.
"""

import functools
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeGuard, Unpack

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from fireq_jax.compilation import lowered_once
from fireq_jax.device_memory import check_fits
from fireq_jax.generation.sampling import SamplingArrays, SamplingConfig, SamplingOptions, sample
from fireq_jax.models.inputs import as_array, check_shapes, check_values
from fireq_jax.models.kv_cache import KVCache, LayerCache, slot_bytes
from fireq_jax.models.llama import CausalLM
from pallas_kernels.formats import ScaledArray

BUCKET = 64
_MOST_SLOTS = 1 << 30  # positions are int32
# A call costs the host as much as several steps of a fast GPU, and what arrives within so many seconds a reader sees at
# once: streaming makes as many tokens a call as that holds.
GLANCE = 0.1
logger = logging.getLogger(__name__)


class GenerationOptions(SamplingOptions, total=False):
    """Further options of :func:`generate`, which says what they mean, :func:`stream` and :func:`compile_ahead`."""

    eos_token_ids: int | Sequence[int] | None
    pad_token_id: int | None
    key: Key[Array, "..."] | None
    cache_capacity: int | None
    token_type_ids: jax.typing.ArrayLike | Sequence[Sequence[int]] | None


class GenerationOutput(NamedTuple):
    """What :func:`generate` returns.

    Attributes:
        sequences: int32 [B, T + max_new_tokens], the prompts as they were given, then the new
            tokens, then the padding id after a sequence's end.
        lengths: int32 [B], new tokens of each sequence, its EOS token included.
        finished: bool [B], whether the sequence ended with an EOS token.
    """

    sequences: Int[Array, "B total"]
    lengths: Int[Array, " B"]
    finished: Bool[Array, " B"]


class StreamStep(NamedTuple):
    """One step of :func:`stream`.

    Attributes:
        tokens: int32 [B], the new token of each sequence; the padding id where it had ended before.
        active: bool [B], sequences that had not.
    """

    tokens: np.ndarray
    active: np.ndarray


def generate(
    model: CausalLM,
    input_ids: jax.typing.ArrayLike | Sequence[Sequence[int]],
    attention_mask: jax.typing.ArrayLike | Sequence[Sequence[int]] | None = None,
    *,
    max_new_tokens: int,
    **options: Unpack[GenerationOptions],
) -> GenerationOutput:
    """Continue each prompt by up to ``max_new_tokens`` tokens; greedy unless options say otherwise.

    It stops early when all sequences have ended. Neither the rest of the batch nor padding changes
    a sequence's text, beyond rounding. The model is compiled again only if the batch size, the
    lengths rounded up (to 64 tokens, past 1024 to an eighth of the power of two below), the number of
    EOS ids, or which sampling options are on, are new; their values are not compiled in. It cannot
    itself be called under ``jax.jit``.

    Past the model's ``max_position_embeddings`` it goes on, with a warning in the log: text gets
    worse there, but most sequences end before.

    Args:
        model: float or quantized.
        input_ids: int [B, T], prompts.
        attention_mask: 1 for tokens, 0 for padding on either side, [B, T]; None means no padding.
            Ids under padding are free.
        max_new_tokens: at most so many, at least 1.
        eos_token_ids: ids that end a sequence; None means the model's, () none.
        pad_token_id: what follows a sequence's end; None means the model's, or the first EOS id, or 0.
        key: ``jax.random.key`` for all sequences, or one each [B]; None means ``jax.random.key(0)``.
            Sequences under one key share its noise, and equal prompts get equal text: to sample a
            prompt several times, give each copy its own key.
            Keys of the default threefry implementation keep sequences independent of the batch.
        cache_capacity: slots of the cache; None means as many as needed, rounded up.
        token_type_ids: 0 throughout, for these models have no segments: some tokenizers' results hold them, which
            may be passed whole, ``generate(model, **tokenizer(texts), ...)``.
        **options: the options above from ``eos_token_ids`` on, and
            :class:`~fireq_jax.generation.sampling.SamplingConfig`'s fields: ``temperature``,
            ``top_k``, ``top_p``, ``min_p`` and ``repetition_penalty``.

    Raises:
        TypeError: without ``max_new_tokens``, or for an option of another name.
        ValueError: for empty prompts, ids outside the vocabulary, a mask of another shape or with
            other values than 0 and 1, options out of range, more tokens than ``cache_capacity``, or a
            cache that cannot fit into memory.
    """
    request = _prepare(model, input_ids, attention_mask, max_new_tokens, **options)
    _warn_beyond_positions(model, request)
    arrays, structure = jax.tree.flatten(model)
    tokens, lengths, choice = jax.device_put(request.inputs)
    cache, progress = _prefill(structure, arrays, tokens, lengths, choice, request.capacity)
    first, further = progress.tokens, request.new_tokens - 1
    _, progress, new_tokens, lengths = _decode(structure, arrays, cache, progress, choice, _on_device(further))
    # Put together by numpy, which compiles nothing for lengths that it has not seen.
    first, new_tokens, lengths, running = jax.device_get((first, new_tokens, lengths, progress.running))
    sequences = np.concatenate([request.prompt, first[:, None], new_tokens[:, :further]], axis=1)
    return GenerationOutput(*jax.device_put((sequences, 1 + lengths, ~running)))


def stream(
    model: CausalLM,
    input_ids: jax.typing.ArrayLike | Sequence[Sequence[int]],
    attention_mask: jax.typing.ArrayLike | Sequence[Sequence[int]] | None = None,
    *,
    max_new_tokens: int,
    **options: Unpack[GenerationOptions],
) -> Iterator[StreamStep]:
    """:func:`generate`, handing out tokens as they are made.

    Arguments and errors are the same, and so are the tokens. Errors are raised by the call itself,
    not by the iteration. On a fast device tokens come a few at a time, within ``GLANCE`` seconds.
    """
    request = _prepare(model, input_ids, attention_mask, max_new_tokens, **options)
    _warn_beyond_positions(model, request)
    return _steps(model, request)


def check_call(
    model: CausalLM,
    input_ids: jax.typing.ArrayLike | Sequence[Sequence[int]],
    attention_mask: jax.typing.ArrayLike | Sequence[Sequence[int]] | None = None,
    *,
    max_new_tokens: int,
    **options: Unpack[GenerationOptions],
) -> int:
    """Raise what :func:`generate` would for such a call, computing nothing; the model may be abstract.

    Returns:
        Bytes of the cache that the call makes.
    """
    return _prepare(model, input_ids, attention_mask, max_new_tokens, **options).cache_bytes


def compile_ahead(
    model: CausalLM,
    input_ids: jax.typing.ArrayLike | Sequence[Sequence[int]],
    attention_mask: jax.typing.ArrayLike | Sequence[Sequence[int]] | None = None,
    *,
    max_new_tokens: int,
    only_prefill: bool = False,
    **options: Unpack[GenerationOptions],
) -> None:
    """Compile what :func:`generate` and :func:`stream` run for such a call, and for calls that share its programs.

    Arguments and errors are theirs, and ``only_prefill``: the first token's program alone. The model may be
    ``CausalLM.abstract``, whose arrays are read meanwhile.
    """
    request = _prepare(model, input_ids, attention_mask, max_new_tokens, **options)
    arrays, structure = jax.tree.flatten(model)
    tokens, lengths, choice = jax.device_put(request.inputs)
    prompt = structure, arrays, tokens, lengths, choice, request.capacity
    with ThreadPoolExecutor() as pool:
        compiling = [pool.submit(_prefill.lower(*prompt).compile)]
        if not only_prefill:
            cache, progress = _placed_with(arrays[0], jax.eval_shape(_prefill, *prompt))
            decode = _decode.lower(structure, arrays, cache, progress, choice, _on_device(1))
            compiling.append(pool.submit(decode.compile))
        for program in compiling:
            program.result()


def _placed_with(array: Array | jax.ShapeDtypeStruct, results: Any) -> Any:
    """Shapes of a program's results, placed as it places them: where an argument is committed to."""
    committed = array.committed if isinstance(array, jax.Array) else array.sharding is not None
    sharding = array.sharding if committed else None
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), results)


def _steps(model: CausalLM, request: "_Request") -> Iterator[StreamStep]:
    arrays, structure = jax.tree.flatten(model)
    tokens, lengths, choice = jax.device_put(request.inputs)
    cache, progress = _prefill(structure, arrays, tokens, lengths, choice, request.capacity)
    tokens, running = jax.device_get((progress.tokens, progress.running))
    yield StreamStep(tokens, np.ones(len(tokens), bool))
    done, count = 1, 1
    while done < request.new_tokens and running.any():
        count = min(count, request.new_tokens - done)
        begin = time.perf_counter()
        steps = _on_device(count)
        cache, progress, new_tokens, lengths = _decode(structure, arrays, cache, progress, choice, steps)
        new_tokens, lengths, running = jax.device_get((new_tokens, lengths, progress.running))
        seconds = time.perf_counter() - begin
        for step in range(lengths.max()):
            yield StreamStep(new_tokens[:, step].copy(), step < lengths)
        done += count
        count = _next_count(count, seconds)


def _on_device(count: int) -> Int[Array, ""]:
    return jax.device_put(np.int32(count))


def _next_count(count: int, seconds: float) -> int:
    """How many tokens to ask for after a call for ``count`` that took so long."""
    if seconds > GLANCE:
        return max(1, count // 2)
    return 2 * count if seconds < GLANCE / 2 else count


class _Choice(NamedTuple):
    """How tokens are chosen and when a sequence ends; all of it traced."""

    sampling: SamplingArrays
    keys: Key[Array, " B"] | None
    eos: Int[np.ndarray, " E"]
    pad: np.int32


class _Request(NamedTuple):
    """A validated call."""

    prompt: Int[np.ndarray, "B T"]
    tokens: Int[np.ndarray, "B padded"]
    lengths: Int[np.ndarray, " B"]
    choice: _Choice
    new_tokens: int
    capacity: int
    cache_bytes: int

    @property
    def inputs(self) -> tuple[np.ndarray, np.ndarray, _Choice]:
        """What the programs take besides the model."""
        return self.tokens, self.lengths, self.choice


class _Progress(NamedTuple):
    """Sequences between two steps.

    ``tokens`` [B] are chosen but not in the cache yet; ``running`` [B] have not ended; ``seen``
    [B, V] are the tokens that the repetition penalty applies to.
    """

    tokens: Int[Array, " B"]
    running: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None


# What programs of ``_prefill`` and ``_decode`` are kept with.
for _kind in (LayerCache, SamplingArrays, _Choice, _Progress):
    jax.export.register_namedtuple_serialization(_kind, serialized_name=f"fireq_jax.{_kind.__name__}")
jax.export.register_pytree_node_serialization(
    KVCache, serialized_name="fireq_jax.KVCache", serialize_auxdata=lambda _: b"", deserialize_auxdata=lambda _: ()
)
jax.export.register_pytree_node_serialization(
    ScaledArray,
    serialized_name="fireq_jax.ScaledArray",
    serialize_auxdata=lambda static: static[0].encode(),
    deserialize_auxdata=lambda data: (data.decode(),),
)


@functools.partial(jax.jit, static_argnames=("structure", "capacity"))
@lowered_once("structure", "capacity")
def _prefill(
    structure: Any,
    arrays: list[Array],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    choice: _Choice,
    capacity: int,
) -> tuple[KVCache, _Progress]:
    """The first token; ``structure`` and ``arrays`` are the model, flattened once for several calls."""
    model: CausalLM = jax.tree.unflatten(structure, arrays)
    logits, cache = model.prefill(tokens, lengths, capacity)
    batch, vocabulary = logits.shape
    seen = None
    if choice.sampling.repetition_penalty is not None:
        token_or_none = jnp.where(jnp.arange(tokens.shape[1])[None] < lengths[:, None], tokens, vocabulary)
        seen = jnp.zeros((batch, vocabulary), bool).at[jnp.arange(batch)[:, None], token_or_none].set(True, mode="drop")
    return cache, _choose(logits, cache, jnp.ones((batch,), bool), seen, choice)


@functools.partial(jax.jit, static_argnames="structure", donate_argnames="cache")
@lowered_once("structure")
def _decode(
    structure: Any,
    arrays: list[Array],
    cache: KVCache,
    progress: _Progress,
    choice: _Choice,
    count: Int[Array, ""],
) -> tuple[KVCache, _Progress, Int[Array, "B S"], Int[Array, " B"]]:
    """Up to ``count`` more tokens, fewer if all sequences end.

    Streaming runs the same program with a small ``count``: another one would round otherwise.

    Returns:
        The cache, in the argument's memory; where the sequences are; the new tokens, as wide as
        the cache so that ``count`` is not compiled in; and how many of each sequence are new.
    """
    model: CausalLM = jax.tree.unflatten(structure, arrays)
    batch = progress.tokens.shape[0]

    def unfinished(carry: tuple) -> Bool[Array, ""]:
        step, _, progress, _, _ = carry
        return (step < count) & jnp.any(progress.running)

    def body(carry: tuple) -> tuple:
        step, cache, progress, new_tokens, lengths = carry
        running = progress.running
        logits, cache = model.extend(progress.tokens[:, None], running.astype(jnp.int32), cache)
        progress = _choose(logits, cache, running, progress.seen, choice)
        return step + 1, cache, progress, new_tokens.at[:, step].set(progress.tokens), lengths + running

    new_tokens, lengths = jnp.full((batch, cache.capacity), choice.pad), jnp.zeros((batch,), jnp.int32)
    start = (jnp.int32(0), cache, progress, new_tokens, lengths)
    _, cache, progress, new_tokens, lengths = jax.lax.while_loop(unfinished, body, start)
    return cache, progress, new_tokens, lengths


def _choose(
    logits: Float[Array, "B V"],
    cache: KVCache,
    running: Bool[Array, " B"],
    seen: Bool[Array, "B V"] | None,
    choice: _Choice,
) -> _Progress:
    tokens = sample(logits, choice.sampling, keys=choice.keys, positions=cache.lengths, seen=seen)
    tokens = jnp.where(running, tokens, choice.pad)
    ended = jnp.any(tokens[:, None] == choice.eos[None], axis=1)
    if seen is not None:
        seen = seen.at[jnp.arange(tokens.shape[0]), tokens].set(True)
    return _Progress(tokens, running & ~ended, seen)


def _prepare(
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
) -> _Request:
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
    capacity = _round_up(total) if cache_capacity is None else int(cache_capacity)
    cache_bytes = len(tokens) * capacity * slot_bytes(config, model.quantization, model.dtype)
    check_fits(f"the cache of {len(tokens)} x {capacity} tokens", cache_bytes, jax.tree.leaves(model))
    width = min(_round_up(longest), capacity)
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
    choice = _Choice(
        sampling=chosen.arrays(),
        keys=None if chosen.greedy else _row_keys(key, len(tokens)),
        eos=np.asarray(eos, np.int32),
        pad=np.int32(next(token for token in defaults if token is not None)),
    )
    return _Request(prompt.astype(np.int32), tokens, lengths, choice, int(max_new_tokens), capacity, cache_bytes)


def _warn_beyond_positions(model: CausalLM, request: _Request) -> None:
    longest, positions = int(request.lengths.max()), model.config.max_position_embeddings
    if longest + request.new_tokens > positions and model.config.rope.rope_type != "dynamic":
        logger.warning(
            "a prompt of %d tokens and %d new ones exceed the model's %d positions; text beyond them may be poor",
            longest, request.new_tokens, positions,
        )  # fmt: skip


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


def _round_up(length: int) -> int:
    """To a multiple of ``BUCKET``, and of an eighth of the largest power of two below."""
    step = max(BUCKET, 1 << (length - 1).bit_length() >> 4)
    return -(-length // step) * step
