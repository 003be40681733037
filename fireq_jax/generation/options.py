"""Options of a call of ``generate``: their names, types and defaults."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

import jax
from jaxtyping import Array, Float, Int, Key

from fireq_jax.generation.constraints import is_whole
from fireq_jax.generation.sampling import SamplingOptions
from fireq_jax.generation.text import check_stop_strings
from fireq_jax.models.kv_cache import KVCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LogitsProcessor = Callable[[Int[Array, "B S"], Float[Array, "B V"]], Float[Array, "B V"]]


class OwnOptions(TypedDict, total=False):
    """:class:`Options`' fields as keyword arguments."""

    eos_token_ids: int | Sequence[int] | None
    pad_token_id: int | None
    key: Key[Array, "..."] | None
    cache_capacity: int | None
    token_type_ids: jax.typing.ArrayLike | Sequence[Sequence[int]] | None
    stop_strings: str | Sequence[str] | None
    tokenizer: "PreTrainedTokenizerBase | None"
    min_new_tokens: int | None
    no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    logits_processor: Sequence[LogitsProcessor] | None
    num_return_sequences: int
    logprobs: bool
    top_logprobs: int | None
    cache: KVCache | None
    return_cache: bool


class GenerationOptions(OwnOptions, SamplingOptions, total=False):
    """:class:`Options`' fields and :class:`~fireq_jax.generation.sampling.SamplingConfig`'s as keyword arguments."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of :func:`~fireq_jax.generation.generate.generate` besides how to sample.

    Attributes:
        eos_token_ids: ids that end a sequence; None means the model's, () none.
        pad_token_id: what follows a sequence's end; None means the model's, or the first EOS id, or 0.
        key: ``jax.random.key`` for all prompts, or one each [B]; None means ``jax.random.key(0)``.
            Prompts under one key share its noise, and equal ones get equal text: to sample a prompt several times,
            ask for ``num_return_sequences``, or give each copy its own key.
            Keys of the default threefry implementation keep sequences independent of the batch.
        cache_capacity: slots of the cache; None means as many as needed, rounded up.
        token_type_ids: 0 throughout, for these models have no segments: some tokenizers' results hold them, which
            may be passed whole, ``generate(model, **tokenizer(texts), ...)``.
        stop_strings: a text, or several, that end a sequence when the new text holds one; its tokens are kept up to
            the one that completes it. Text of the prompt does not count. The text is looked at between calls of the
            device, which are as short as :func:`~fireq_jax.generation.generate.stream`'s. A special token
            ("<|im_end|>") ends a sequence as an EOS id does.
        tokenizer: the model's; needed for ``stop_strings``.
        min_new_tokens: EOS ids are not chosen before so many tokens.
        no_repeat_ngram_size: no sequence, its prompt included, gets so many tokens twice in the same order; 0: off.
        bad_words_ids: token sequences that are never completed.
        logits_processor: functions ``f(tokens, logits) -> logits``, applied in this order after the options above and
            before temperature and filters. ``tokens`` are int32 [B, S], each sequence's so far, its prompt's first,
            and -1 after them; ``logits`` float32 [B, V]. They are traced inside the compiled programs: written in
            ``jax.numpy``, without effects, with shapes that do not change. Another function object compiles anew, so
            define it once, not in each call, and close over no array that changes; a process cannot keep its
            programs for others then.
        num_return_sequences: sequences for each prompt, one after the other, when sampling; the j-th of a prompt
            draws under ``jax.random.fold_in(key, j)``.
        logprobs: return log-probabilities (nats) of the chosen tokens, by the model's own distribution: before
            temperature, penalties and filters.
        top_logprobs: return those of so many most likely tokens, too; implies ``logprobs``.
        cache: of an earlier call for the same batch, in the same order, whose tokens each prompt begins with, which is
            not checked: only the rest of a prompt, at least one token, is computed. It stays as it is;
            ``cache.cut(lengths)`` forgets tokens that another prompt does not begin with.
        return_cache: return the cache, with the prompt and the new tokens but the last one.

    Raises:
        ValueError: for values out of range, or ``stop_strings`` without a tokenizer.
    """

    eos_token_ids: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    key: Key[Array, "..."] | None = None
    cache_capacity: int | None = None
    token_type_ids: jax.typing.ArrayLike | Sequence[Sequence[int]] | None = None
    stop_strings: str | Sequence[str] | None = None
    tokenizer: "PreTrainedTokenizerBase | None" = None
    min_new_tokens: int | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    logits_processor: Sequence[LogitsProcessor] | None = None
    num_return_sequences: int = 1
    logprobs: bool = False
    top_logprobs: int | None = None
    cache: KVCache | None = None
    return_cache: bool = False

    def __post_init__(self) -> None:
        if self.cache_capacity is not None and not is_whole(self.cache_capacity):
            raise ValueError(f"cache_capacity is {self.cache_capacity!r}; expected a whole number, or None")
        if not is_whole(self.num_return_sequences) or self.num_return_sequences < 1:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences!r}; expected a whole number of at least 1"
            )
        if not isinstance(self.logprobs, bool):
            raise ValueError(f"logprobs is {self.logprobs!r}; expected True or False: top_logprobs takes a number")
        if self.top_logprobs is not None and (not is_whole(self.top_logprobs) or self.top_logprobs < 1):
            raise ValueError(f"top_logprobs is {self.top_logprobs!r}; expected a whole number of at least 1, or None")
        if not isinstance(self.return_cache, bool):
            raise ValueError(f"return_cache is {self.return_cache!r}; expected True or False")
        if self.cache is not None and not isinstance(self.cache, KVCache):
            raise ValueError(
                f"cache is a {type(self.cache).__name__}; expected the KVCache of an earlier call, or None"
            )
        processors = () if self.logits_processor is None else self.logits_processor
        if not isinstance(processors, Sequence) or not all(map(callable, processors)):
            raise ValueError(f"logits_processor is {processors!r}; expected a list of functions f(tokens, logits)")
        check_stop_strings(self.stop_strings, self.tokenizer)
