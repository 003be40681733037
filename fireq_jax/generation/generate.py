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
from jaxtyping import Array, Bool, Float, Int

from fireq_jax.generation.options import GenerationOptions
from fireq_jax.generation.programs import NewTokens, decode, prefill
from fireq_jax.generation.request import Request, prepare
from fireq_jax.generation.text import TextStream
from fireq_jax.models.llama import CausalLM

# Seconds that a reader does not notice. A call costs the host as much as several steps of a fast GPU, so streaming asks
# for as many tokens a call as the device makes in this time.
GLANCE = 0.1
logger = logging.getLogger(__name__)


class GenerationOutput(NamedTuple):
    """What :func:`generate` returns; B counts each prompt's ``num_return_sequences``.

    Attributes:
        sequences: int32 [B, T + max_new_tokens], the prompts as they were given, then the new
            tokens, then the padding id after a sequence's end.
        lengths: int32 [B], new tokens of each sequence, its EOS token included.
        finished: bool [B], whether the sequence ended with an EOS token or a stop string.
        logprobs: float32 [B, max_new_tokens], log-probabilities of the new tokens, 0 after a sequence's end,
            so that a row's sum is its text's; None unless ``logprobs`` was asked for.
        top_logprobs: float32 [B, max_new_tokens, K], of the ``top_logprobs`` most likely tokens, best first.
        top_tokens: int32 [B, max_new_tokens, K], these tokens.
    """

    sequences: Int[Array, "B total"]
    lengths: Int[Array, " B"]
    finished: Bool[Array, " B"]
    logprobs: Float[Array, "B N"] | None = None
    top_logprobs: Float[Array, "B N K"] | None = None
    top_tokens: Int[Array, "B N K"] | None = None


class StreamStep(NamedTuple):
    """One step of :func:`stream`.

    Attributes:
        tokens: int32 [B], the new token of each sequence; the padding id where it had ended before.
        active: bool [B], sequences that had not.
        logprobs: float32 [B], of these tokens; None unless asked for.
        top_logprobs: float32 [B, K], of the most likely tokens, best first; None unless asked for.
        top_tokens: int32 [B, K], these tokens.
    """

    tokens: np.ndarray
    active: np.ndarray
    logprobs: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    top_tokens: np.ndarray | None = None


class _Chunk(NamedTuple):
    """What one call of the device made: new tokens [B, S], how many of each sequence, and which go on; on the host."""

    new: NewTokens
    lengths: np.ndarray
    running: np.ndarray


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
    EOS ids, the number and length of bad words (to powers of two), ``top_logprobs``, the logits processors or which
    options are on, are new; other values are not compiled in. It cannot itself be called under ``jax.jit``.

    Past the model's ``max_position_embeddings`` it goes on, with a warning in the log: text gets
    worse there, but most sequences end before.

    Args:
        model: float or quantized.
        input_ids: int [B, T], prompts.
        attention_mask: 1 for tokens, 0 for padding on either side, [B, T]; None means no padding.
            Ids under padding are free.
        max_new_tokens: at most so many, at least 1.
        **options: the fields of :class:`~fireq_jax.generation.options.Options` (ends, keys, constraints,
            log-probabilities) and of :class:`~fireq_jax.generation.sampling.SamplingConfig`: ``temperature``,
            ``top_k``, ``top_p``, ``min_p`` and ``repetition_penalty``.

    Raises:
        TypeError: without ``max_new_tokens``, or for an option of another name.
        ValueError: for empty prompts, ids outside the vocabulary, a mask of another shape or with
            other values than 0 and 1, options out of range, more tokens than ``cache_capacity``, or a
            cache that cannot fit into memory.
    """
    request = prepare(model, input_ids, attention_mask, max_new_tokens, **options)
    _warn_beyond_positions(model, request)
    chunks = list(_two_chunks(model, request) if request.stop is None else _chunks(model, request))
    # Put together by numpy, which compiles nothing for lengths that it has not seen.
    tokens, logprobs = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *(chunk.new for chunk in chunks))
    pad = request.choice.pad
    tokens, logprobs = jax.tree.map(lambda x: _widened(x, request.new_tokens, pad), (tokens, logprobs))
    sequences = np.concatenate([request.prompt, tokens], axis=1)
    lengths = np.sum([chunk.lengths for chunk in chunks], axis=0, dtype=np.int32)
    return GenerationOutput(*jax.device_put((sequences, lengths, ~chunks[-1].running, *(logprobs or ()))))


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
    prompt = structure, arrays, tokens, lengths, choice, request.capacity, request.static
    with ThreadPoolExecutor() as pool:
        compiling = [pool.submit(prefill.lower(*prompt).compile)]
        if not only_prefill:
            cache, progress = _placed_with(arrays[0], jax.eval_shape(prefill, *prompt))
            decode_program = decode.lower(structure, arrays, cache, progress, choice, _on_device(1), request.static)
            compiling.append(pool.submit(decode_program.compile))
        for program in compiling:
            program.result()


def _placed_with(array: Array | jax.ShapeDtypeStruct, results: Any) -> Any:
    """Shapes of a program's results, placed as it places them: where an argument is committed to."""
    committed = array.committed if isinstance(array, jax.Array) else array.sharding is not None
    sharding = array.sharding if committed else None
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), results)


def _two_chunks(model: CausalLM, request: Request) -> Iterator[_Chunk]:
    """The first token, and all the others, without a look at them in between."""
    arrays, structure = jax.tree.flatten(model)
    tokens, lengths, choice = jax.device_put(request.inputs)
    cache, progress = prefill(structure, arrays, tokens, lengths, choice, request.capacity, request.static)
    first, further = progress.new, request.new_tokens - 1
    steps = _on_device(further)
    _, progress, new, lengths = decode(structure, arrays, cache, progress, choice, steps, request.static)
    first, new, lengths, running = jax.device_get((first, new, lengths, progress.running))
    yield _first_chunk(first, running)
    yield _Chunk(jax.tree.map(lambda x: x[:, :further], new), lengths, running)


def _chunks(model: CausalLM, request: Request) -> Iterator[_Chunk]:
    """As many tokens at a time as come at a glance, looked at for stop strings."""
    arrays, structure = jax.tree.flatten(model)
    tokens, lengths, choice = jax.device_put(request.inputs)
    cache, progress = prefill(structure, arrays, tokens, lengths, choice, request.capacity, request.static)
    texts, pad = request.text_streams(), request.choice.pad
    chunk = _until_stop(_first_chunk(*jax.device_get((progress.new, progress.running))), texts, pad)
    yield chunk
    done, count = 1, 1
    while done < request.new_tokens and chunk.running.any():
        if texts:
            progress = progress._replace(running=_placed_like(progress.running, chunk.running))
        count = min(count, request.new_tokens - done)
        begin = time.perf_counter()
        steps = _on_device(count)
        cache, progress, new, lengths = decode(structure, arrays, cache, progress, choice, steps, request.static)
        new, lengths, running = jax.device_get((new, lengths, progress.running))
        seconds = time.perf_counter() - begin
        made = int(lengths.max())
        chunk = _until_stop(_Chunk(jax.tree.map(lambda x: x[:, :made], new), lengths, running), texts, pad)  # noqa: B023
        yield chunk
        done += count
        count = _next_count(count, seconds)


def _steps(model: CausalLM, request: Request) -> Iterator[StreamStep]:
    for new, lengths, _ in _chunks(model, request):
        for step in range(lengths.max()):
            tokens, logprobs = jax.tree.map(lambda x: x[:, step].copy(), new)  # noqa: B023
            yield StreamStep(tokens, step < lengths, *(logprobs or ()))


def _first_chunk(new: NewTokens, running: np.ndarray) -> _Chunk:
    return _Chunk(jax.tree.map(lambda x: x[:, None], new), np.ones(len(running), np.int32), running)


def _until_stop(chunk: _Chunk, texts: list[TextStream], pad: np.int32) -> _Chunk:
    """The same, with sequences ended where their text has a stop string."""
    if not texts:
        return chunk
    new, lengths, running = jax.tree.map(np.array, chunk)
    for row, text in enumerate(texts):
        for step in range(lengths[row]):
            text.push(new.tokens[row, step])
            if text.stopped:
                lengths[row], running[row] = step + 1, False
                for array in jax.tree.leaves(new):
                    array[row, step + 1 :] = _padding(array, pad)
                break
    return _Chunk(new, lengths, running)


def _widened(array: np.ndarray, steps: int, pad: np.int32) -> np.ndarray:
    """[B, S, ...] as [B, steps, ...], padded after the S that are there."""
    missing = np.full((len(array), steps - array.shape[1], *array.shape[2:]), _padding(array, pad), array.dtype)
    return np.concatenate([array, missing], axis=1)


def _padding(array: np.ndarray, pad: np.int32) -> np.int32 | float:
    """What stands after a sequence's end: of tokens the padding id, of log-probabilities 0."""
    return pad if np.issubdtype(array.dtype, np.integer) else 0.0


def _placed_like(array: Array, values: np.ndarray) -> Array:
    """``values`` where a program's result of the same shape is: another placement would be another program."""
    return jax.device_put(values, array.sharding if array.committed else None)


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
