"""The compiled programs of generation: a prompt's first token, with or without a cache, and the tokens after it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fireq_jax.compilation import cached_export
from fireq_jax.generation.constraints import Constraints, constrain
from fireq_jax.generation.request import Choice, Static
from fireq_jax.generation.sampling import SamplingArrays, sample
from fireq_jax.models.kv_cache import KVCache, LayerCache
from fireq_jax.models.llama import CausalLM
from pallas_kernels.formats import ScaledArray


class Logprobs(NamedTuple):
    """Log-probabilities by the model's own distribution: of the tokens [B], and of the K most likely ones [B, K]."""

    chosen: Float[Array, "*B"]
    top: Float[Array, "*B K"] | None
    top_tokens: Int[Array, "*B K"] | None


class NewTokens(NamedTuple):
    """Tokens [B], or those of several steps [B, S], and their log-probabilities if these are asked for."""

    tokens: Int[Array, "*B"]
    logprobs: Logprobs | None


class Progress(NamedTuple):
    """Sequences between two steps.

    ``new`` are chosen but not in the cache yet; ``running`` [B] have not ended; ``seen`` [B, V] are the
    tokens that the repetition penalty applies to; ``history`` [B, S] are the tokens in the cache and the new
    ones, -1 elsewhere, for what looks back at them.
    """

    new: NewTokens
    running: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None
    history: Int[Array, "B S"] | None


# The export cache stores arguments' and results' types by these names.
for _kind in (LayerCache, SamplingArrays, Constraints, Choice, Logprobs, NewTokens, Progress):
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


@functools.partial(jax.jit, static_argnames=("structure", "capacity", "static"))
@cached_export("structure", "capacity", "static")
def prefill(
    structure: Any,
    arrays: list[Array],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    choice: Choice,
    capacity: int,
    static: Static,
) -> tuple[KVCache, Progress]:
    """The first token; ``structure`` and ``arrays`` are the model, flattened once for several calls."""
    model: CausalLM = jax.tree.unflatten(structure, arrays)
    logits, cache = model.prefill(tokens, lengths, capacity)
    seen, history = _looked_at(tokens, lengths, logits.shape[1], capacity, choice, static)
    return cache, _choose(logits, cache, jnp.ones_like(lengths, bool), seen, history, choice, static)


@functools.partial(jax.jit, static_argnames=("structure", "capacity", "static"))
@cached_export("structure", "capacity", "static")
def resume(
    structure: Any,
    arrays: list[Array],
    cache: KVCache,
    rest: tuple[Int[Array, "B R"], Int[Array, " B"]],
    tokens: Int[Array, "B T"] | None,
    lengths: Int[Array, " B"],
    choice: Choice,
    capacity: int,
    static: Static,
) -> tuple[KVCache, Progress]:
    """:func:`prefill` of prompts of which ``cache`` holds the beginnings, and ``rest`` are the other tokens.

    ``tokens`` are the whole prompts; None if nothing looks at them.
    """
    model: CausalLM = jax.tree.unflatten(structure, arrays)
    logits, cache = model.extend(*rest, cache.grown(capacity))
    seen = history = None
    if tokens is not None:
        seen, history = _looked_at(tokens, lengths, logits.shape[1], capacity, choice, static)
    return cache, _choose(logits, cache, jnp.ones_like(lengths, bool), seen, history, choice, static)


def looks_back(choice: Choice, static: Static) -> bool:
    """Whether a choice depends on the tokens so far."""
    penalty = choice.sampling.repetition_penalty is not None
    return penalty or choice.constraints.look_back or bool(static.logits_processor)


def _looked_at(
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    vocabulary: int,
    capacity: int,
    choice: Choice,
    static: Static,
) -> tuple[Bool[Array, "B V"] | None, Int[Array, "B S"] | None]:
    """``seen`` and ``history`` of :class:`Progress`, after the prompts; None for what nobody looks at."""
    batch, there = len(lengths), jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    seen = history = None
    if choice.sampling.repetition_penalty is not None:
        token_or_none = jnp.where(there, tokens, vocabulary)
        seen = jnp.zeros((batch, vocabulary), bool).at[jnp.arange(batch)[:, None], token_or_none].set(True, mode="drop")
    if choice.constraints.look_back or static.logits_processor:
        token_or_none = jnp.where(there, tokens, -1)
        history = jnp.full((batch, capacity), -1, jnp.int32).at[:, : tokens.shape[1]].set(token_or_none)
    return seen, history


@functools.partial(jax.jit, static_argnames=("structure", "static"), donate_argnames="cache")
@cached_export("structure", "static")
def decode(
    structure: Any,
    arrays: list[Array],
    cache: KVCache,
    progress: Progress,
    choice: Choice,
    count: Int[Array, ""],
    static: Static,
) -> tuple[KVCache, Progress, NewTokens, Int[Array, " B"]]:
    """Up to ``count`` more tokens, fewer if all sequences end.

    Streaming runs the same program with a small ``count``: another one would round otherwise.

    Returns:
        The cache, in the argument's memory; where the sequences are; the new tokens [B, S], as wide as
        the cache so that ``count`` is not compiled in; and how many of each sequence are new.
    """
    model: CausalLM = jax.tree.unflatten(structure, arrays)
    batch = progress.running.shape[0]

    def unfinished(carry: tuple) -> Bool[Array, ""]:
        step, _, progress, _, _ = carry
        return (step < count) & jnp.any(progress.running)

    def body(carry: tuple) -> tuple:
        step, cache, progress, written, lengths = carry
        running = progress.running
        logits, cache = model.extend(progress.new.tokens[:, None], running.astype(jnp.int32), cache)
        progress = _choose(logits, cache, running, progress.seen, progress.history, choice, static)
        written = jax.tree.map(lambda steps, new: steps.at[:, step].set(new), written, progress.new)
        return step + 1, cache, progress, written, lengths + running

    def padding(new: Array) -> Array:
        fill = choice.pad if jnp.issubdtype(new.dtype, jnp.integer) else 0
        return jnp.full((batch, cache.capacity, *new.shape[1:]), fill, new.dtype)

    start = (jnp.int32(0), cache, progress, jax.tree.map(padding, progress.new), jnp.zeros((batch,), jnp.int32))
    _, cache, progress, written, lengths = jax.lax.while_loop(unfinished, body, start)
    return cache, progress, written, lengths


def _choose(
    logits: Float[Array, "B V"],
    cache: KVCache,
    running: Bool[Array, " B"],
    seen: Bool[Array, "B V"] | None,
    history: Int[Array, "B S"] | None,
    choice: Choice,
    static: Static,
) -> Progress:
    positions, rows = cache.lengths, jnp.arange(logits.shape[0])

    def restrict(scores: Float[Array, "B V"]) -> Float[Array, "B V"]:
        scores = constrain(scores, choice.constraints, history, positions)
        for function in static.logits_processor:
            assert history is not None
            scores = _checked(function(history, scores), scores, function)
        return scores

    tokens = sample(logits, choice.sampling, keys=choice.keys, positions=positions, seen=seen, restrict=restrict)
    tokens = jnp.where(running, tokens, choice.pad)
    ended = jnp.any(tokens[:, None] == choice.eos[None], axis=1)
    if seen is not None:
        seen = seen.at[rows, tokens].set(True)
    if history is not None:
        history = history.at[rows, jnp.where(running, positions, history.shape[1])].set(tokens, mode="drop")
    logprobs = None if static.logprobs is None else _logprobs(logits, tokens, running, static.logprobs)
    return Progress(NewTokens(tokens, logprobs), running & ~ended, seen, history)


def _logprobs(
    logits: Float[Array, "B V"], tokens: Int[Array, " B"], running: Bool[Array, " B"], count: int
) -> Logprobs:
    """Of the tokens, and of the ``count`` most likely ones; 0 for sequences that had ended."""
    every = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.where(running, jnp.take_along_axis(every, tokens[:, None], axis=1)[:, 0], 0)
    if count == 0:
        return Logprobs(chosen, None, None)
    top, top_tokens = jax.lax.top_k(every, count)
    here = running[:, None]
    return Logprobs(chosen, jnp.where(here, top, 0), jnp.where(here, top_tokens, tokens[:, None]))


def _checked(result: Any, scores: Float[Array, "B V"], function: Any) -> Float[Array, "B V"]:
    """What a caller's function made of the logits."""
    if (shape := jnp.shape(result)) != scores.shape:
        raise ValueError(f"logits_processor {function} returned shape {shape}; expected the logits', {scores.shape}")
    return jnp.asarray(result, scores.dtype)
