"""Prefill once, then decode: in one jitted ``while_loop``, or a few steps at a time for streaming.

Prompts go to the model right-padded to a length of ``round_up`` and the cache's capacity is one too, so that calls of
similar lengths share their compilations.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Unpack

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from fireq_jax.generation.programs import decode, prefill
from fireq_jax.generation.request import Request, prepare
from fireq_jax.generation.sampling import SamplingOptions
from fireq_jax.models.llama import CausalLM

# Seconds that a reader does not notice. A call costs the host as much as several steps of a fast GPU, so streaming asks
# for as many tokens a call as the device makes in this time.
GLANCE = 0.1
logger = logging.getLogger(__name__)


class GenerationOptions(SamplingOptions, total=False):
    """Further options of :func:`generate`, which says what they mean, :func:`stream` and :func:`warmup`."""

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
    request = prepare(model, input_ids, attention_mask, max_new_tokens, **options)
    _warn_beyond_positions(model, request)
    arrays, structure = jax.tree.flatten(model)
    tokens, lengths, choice = jax.device_put(request.inputs)
    cache, progress = prefill(structure, arrays, tokens, lengths, choice, request.capacity)
    first, further = progress.tokens, request.new_tokens - 1
    _, progress, new_tokens, lengths = decode(structure, arrays, cache, progress, choice, _on_device(further))
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
    request = prepare(model, input_ids, attention_mask, max_new_tokens, **options)
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
    return prepare(model, input_ids, attention_mask, max_new_tokens, **options).cache_bytes


def warmup(
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
    request = prepare(model, input_ids, attention_mask, max_new_tokens, **options)
    arrays, structure = jax.tree.flatten(model)
    tokens, lengths, choice = jax.device_put(request.inputs)
    prompt = structure, arrays, tokens, lengths, choice, request.capacity
    with ThreadPoolExecutor() as pool:
        compiling = [pool.submit(prefill.lower(*prompt).compile)]
        if not only_prefill:
            cache, progress = _placed_with(arrays[0], jax.eval_shape(prefill, *prompt))
            decode_program = decode.lower(structure, arrays, cache, progress, choice, _on_device(1))
            compiling.append(pool.submit(decode_program.compile))
        for program in compiling:
            program.result()


def _placed_with(array: Array | jax.ShapeDtypeStruct, results: Any) -> Any:
    """Shapes of a program's results, placed as it places them: where an argument is committed to."""
    committed = array.committed if isinstance(array, jax.Array) else array.sharding is not None
    sharding = array.sharding if committed else None
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), results)


def _steps(model: CausalLM, request: Request) -> Iterator[StreamStep]:
    arrays, structure = jax.tree.flatten(model)
    tokens, lengths, choice = jax.device_put(request.inputs)
    cache, progress = prefill(structure, arrays, tokens, lengths, choice, request.capacity)
    tokens, running = jax.device_get((progress.tokens, progress.running))
    yield StreamStep(tokens, np.ones(len(tokens), bool))
    done, count = 1, 1
    while done < request.new_tokens and running.any():
        count = min(count, request.new_tokens - done)
        begin = time.perf_counter()
        steps = _on_device(count)
        cache, progress, new_tokens, lengths = decode(structure, arrays, cache, progress, choice, steps)
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


def _warn_beyond_positions(model: CausalLM, request: Request) -> None:
    longest, positions = int(request.lengths.max()), model.config.max_position_embeddings
    if longest + request.new_tokens > positions and model.config.rope.rope_type != "dynamic":
        logger.warning(
            "a prompt of %d tokens and %d new ones exceed the model's %d positions; text beyond them may be poor",
            longest, request.new_tokens, positions,
        )  # fmt: skip
