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
from fireq_jax.generation.programs import NewTokens, decode, looks_back, prefill, resume
from fireq_jax.generation.request import Choice, Request, prepare
from fireq_jax.generation.text import TextStream
from fireq_jax.models.kv_cache import KVCache
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
        cache: keys and values of all tokens but each sequence's last; None unless ``return_cache`` was asked for.
    """

    sequences: Int[Array, "B total"]
    lengths: Int[Array, " B"]
    finished: Bool[Array, " B"]
    logprobs: Float[Array, "B N"] | None = None
    top_logprobs: Float[Array, "B N K"] | None = None
    top_tokens: Int[Array, "B N K"] | None = None
    cache: KVCache | None = None


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


class Stream(Iterator[StreamStep]):
    """The steps of :func:`stream`, and the cache that they leave."""

    def __init__(self, run: "_Run") -> None:
        """Of a call on its way."""
        self._run, self._steps = run, _steps(run)
        self._lengths = np.zeros_like(run.request.lengths)

    def __next__(self) -> StreamStep:
        step = next(self._steps)
        self._lengths += step.active
        return step

    @property
    def cache(self) -> KVCache:
        """Keys and values of all tokens so far but each sequence's last, as a further call takes them.

        It is of use when no further step is asked for, whose call of the device would take its memory.
        """
        return self._run.cache_after(self._lengths)


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
    run = _Run(model, request)
    chunks = list(_two_chunks(run) if request.stop is None else _chunks(run))
    # Put together by numpy, which compiles nothing for lengths that it has not seen.
    tokens, logprobs = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *(chunk.new for chunk in chunks))
    pad = request.choice.pad
    tokens, logprobs = jax.tree.map(lambda x: _widened(x, request.new_tokens, pad), (tokens, logprobs))
    sequences = np.concatenate([request.prompt, tokens], axis=1)
    lengths = np.stack([chunk.lengths for chunk in chunks]).sum(axis=0, dtype=np.int32)
    output = GenerationOutput(*jax.device_put((sequences, lengths, ~chunks[-1].running, *(logprobs or ()))))
    return output._replace(cache=run.cache_after(lengths)) if options.get("return_cache") else output


def stream(
    model: CausalLM,
    input_ids: jax.typing.ArrayLike | Sequence[Sequence[int]],
    attention_mask: jax.typing.ArrayLike | Sequence[Sequence[int]] | None = None,
    *,
    max_new_tokens: int,
    **options: Unpack[GenerationOptions],
) -> Stream:
    """:func:`generate`, handing out tokens as they are made.

    Arguments and errors are the same, and so are the tokens. Errors are raised by the call itself,
    not by the iteration. On a fast device tokens come a few at a time, within ``GLANCE`` seconds.
    """
    request = prepare(model, input_ids, attention_mask, max_new_tokens, **options)
    _warn_beyond_positions(model, request)
    return Stream(_Run(model, request))


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
    choice = jax.device_put(request.choice)
    first, inputs = _first_program(structure, arrays, request, choice)
    with ThreadPoolExecutor() as pool:
        compiling = [pool.submit(first.lower(*inputs).compile)]
        if not only_prefill:
            cache, progress = _placed_with(arrays[0], jax.eval_shape(first, *inputs))
            decode_program = decode.lower(structure, arrays, cache, progress, choice, _on_device(1), request.static)
            compiling.append(pool.submit(decode_program.compile))
        for program in compiling:
            program.result()


def _placed_with(array: Array | jax.ShapeDtypeStruct, results: Any) -> Any:
    """Shapes of a program's results, placed as it places them: where an argument is committed to."""
    committed = array.committed if isinstance(array, jax.Array) else array.sharding is not None
    sharding = array.sharding if committed else None
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), results)


def _first_program(structure: Any, arrays: list[Array], request: Request, choice: Choice) -> tuple[Any, tuple]:
    """What makes the first token, and its arguments."""
    tokens, lengths, static = request.tokens, request.lengths, request.static
    if request.cache is None:
        return prefill, (structure, arrays, *jax.device_put((tokens, lengths)), choice, request.capacity, static)
    whole = tokens if looks_back(request.choice, static) else None
    rest, whole, lengths = jax.device_put((request.rest, whole, lengths))
    return resume, (structure, arrays, request.cache, rest, whole, lengths, choice, request.capacity, static)


class _Run:
    """A call on its way: its state on the device, whose first token is being made."""

    def __init__(self, model: CausalLM, request: Request) -> None:
        self.request = request
        self._arrays, self._structure = jax.tree.flatten(model)
        self._choice = jax.device_put(request.choice)
        program, inputs = _first_program(self._structure, self._arrays, request, self._choice)
        self._cache, self.progress = program(*inputs)

    def decode(self, count: int) -> tuple[NewTokens, Int[Array, " B"], Bool[Array, " B"]]:
        """Up to ``count`` more tokens: these, how many of each sequence, and which go on."""
        static, steps = self.request.static, _on_device(count)
        self._cache, self.progress, new, lengths = decode(
            self._structure, self._arrays, self._cache, self.progress, self._choice, steps, static
        )
        return new, lengths, self.progress.running

    def stop(self, running: np.ndarray) -> None:
        """End sequences that are not among ``running``."""
        self.progress = self.progress._replace(running=_placed_like(self.progress.running, running))

    def cache_after(self, lengths: np.ndarray) -> KVCache:
        """The cache, where so many new tokens of each sequence were taken."""
        return self._cache.cut(self.request.lengths + np.maximum(lengths - 1, 0))


def _two_chunks(run: _Run) -> Iterator[_Chunk]:
    """The first token, and all the others, without a look at them in between."""
    first, further = run.progress.new, run.request.new_tokens - 1
    first, (new, lengths, running) = jax.device_get((first, run.decode(further)))
    yield _first_chunk(first, running)
    yield _Chunk(jax.tree.map(lambda x: x[:, :further], new), lengths, running)


def _chunks(run: _Run) -> Iterator[_Chunk]:
    """As many tokens at a time as come at a glance, looked at for stop strings."""
    request = run.request
    texts, pad = request.text_streams(), request.choice.pad
    chunk = _until_stop(_first_chunk(*jax.device_get((run.progress.new, run.progress.running))), texts, pad)
    yield chunk
    done, count = 1, 1
    while done < request.new_tokens and chunk.running.any():
        if texts:
            run.stop(chunk.running)
        count = min(count, request.new_tokens - done)
        begin = time.perf_counter()
        new, lengths, running = jax.device_get(run.decode(count))
        seconds = time.perf_counter() - begin
        made = int(lengths.max())
        chunk = _until_stop(_Chunk(jax.tree.map(lambda x: x[:, :made], new), lengths, running), texts, pad)  # noqa: B023
        yield chunk
        done += count
        count = _next_count(count, seconds)


def _steps(run: _Run) -> Iterator[StreamStep]:
    for new, lengths, _ in _chunks(run):
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
