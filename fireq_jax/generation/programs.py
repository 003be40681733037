"""The two compiled programs of generation: a prompt's first token, and the tokens after it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fireq_jax.compilation import cached_export
from fireq_jax.generation.request import Choice
from fireq_jax.generation.sampling import SamplingArrays, sample
from fireq_jax.models.kv_cache import KVCache, LayerCache
from fireq_jax.models.llama import CausalLM
from pallas_kernels.formats import ScaledArray


class Progress(NamedTuple):
    """Sequences between two steps.

    ``tokens`` [B] are chosen but not in the cache yet; ``running`` [B] have not ended; ``seen``
    [B, V] are the tokens that the repetition penalty applies to.
    """

    tokens: Int[Array, " B"]
    running: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None


# The export cache stores arguments' and results' types by these names.
for _kind in (LayerCache, SamplingArrays, Choice, Progress):
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
@cached_export("structure", "capacity")
def prefill(
    structure: Any,
    arrays: list[Array],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    choice: Choice,
    capacity: int,
) -> tuple[KVCache, Progress]:
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
@cached_export("structure")
def decode(
    structure: Any,
    arrays: list[Array],
    cache: KVCache,
    progress: Progress,
    choice: Choice,
    count: Int[Array, ""],
) -> tuple[KVCache, Progress, Int[Array, "B S"], Int[Array, " B"]]:
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
    choice: Choice,
) -> Progress:
    tokens = sample(logits, choice.sampling, keys=choice.keys, positions=cache.lengths, seen=seen)
    tokens = jnp.where(running, tokens, choice.pad)
    ended = jnp.any(tokens[:, None] == choice.eos[None], axis=1)
    if seen is not None:
        seen = seen.at[jnp.arange(tokens.shape[0]), tokens].set(True)
    return Progress(tokens, running & ~ended, seen)
