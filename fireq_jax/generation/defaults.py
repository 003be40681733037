"""A model's ``generation_config.json``: what in it has an effect here, and what has none."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from fireq_jax.checkpoints.huggingface import GENERATION_CONFIG, read_generation_config
from fireq_jax.config_fields import check_types, is_a, quote
from fireq_jax.generation.sampling import SamplingConfig, SamplingOptions

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_CONSTRAINTS = ("min_new_tokens", "no_repeat_ngram_size", "bad_words_ids", "stop_strings")
_LISTS = {"eos_token_id", "stop_strings", "bad_words_ids"}
_MOST_TOKENS = 1 << 30  # positions are int32
# Without a meaning for the text: where the file came from, what a call returns, how transformers computes it, and
# options of searches that other keys turn on.
_HARMLESS = {
    "transformers_version", "_from_model_config", "_commit_hash", "_name_or_path", "bos_token_id", "pad_token_id",
    "decoder_start_token_id", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory",
    "compile_config", "disable_compile", "prefill_chunk_size", "continuous_batching_config", "use_mtp",
    "renormalize_logits", "length_penalty", "early_stopping", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "prompt_lookup_num_tokens", "max_matching_ngram_size",
    "speculation_type",
}  # fmt: skip
# Values that change nothing, besides null, false and what is empty.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "diversity_penalty": 0, "min_length": 0,
    "encoder_no_repeat_ngram_size": 0, "typical_p": 1,
    "epsilon_cutoff": 0, "eta_cutoff": 0, "penalty_alpha": 0, "guidance_scale": 1, "encoder_repetition_penalty": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """The keys of a generation config that have an effect here, in transformers' names; None: not given.

    Attributes:
        path: the file.
        ignored: keys whose values would change the text in transformers, and do not here.
        do_sample: whether ``temperature``, ``top_k``, ``top_p`` and ``min_p`` hold.
        max_length: most tokens of a sequence, its prompt's included; ``max_new_tokens`` comes first.
        eos_token_id: what ends a sequence.
        stop_strings: texts that end one.
        min_new_tokens, no_repeat_ngram_size, bad_words_ids: as ``generate`` takes them.

    Raises ValueError, naming the file, for values of other types or out of range.
    """

    path: Path
    ignored: tuple[str, ...] = ()
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] | None = None
    min_new_tokens: int | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        try:
            check_types(self, {"min_new_tokens": (0, _MOST_TOKENS), "no_repeat_ngram_size": (0, _MOST_TOKENS)})
            if not all(isinstance(stop, str) and stop for stop in self.stop_strings or ()):
                raise ValueError(f"stop_strings is {quote(self.stop_strings)}; expected texts that are not empty")
            words = self.bad_words_ids or ()
            if not all(isinstance(word, tuple) and word and all(is_a(id, int) for id in word) for word in words):
                raise ValueError(f"bad_words_ids is {quote(words)}; expected lists of token ids")
            for name in ("max_new_tokens", "max_length"):
                if (value := getattr(self, name)) is not None and not 1 <= value <= _MOST_TOKENS:
                    raise ValueError(f"{name} is {value}; expected 1 to {_MOST_TOKENS} tokens")
            SamplingConfig(**self.sampling())
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Those of a model's folder; all None without the file."""
        fields = read_generation_config(folder)
        known = {field.name for field in dataclasses.fields(cls)} - {"path", "ignored"}
        values = {name: value for name, value in fields.items() if name in known}
        if isinstance(stop := values.get("stop_strings"), str):
            values["stop_strings"] = (stop,)
        values |= {name: _tuples(values[name]) for name in _LISTS & values.keys()}
        ignored = sorted(name for name in set(fields) - known - _HARMLESS if not _is_neutral(name, fields[name]))
        return cls(folder / GENERATION_CONFIG, tuple(ignored), **values)

    def sampling(self, given: Mapping[str, Any] | None = None) -> SamplingOptions:
        """Options ``given`` (None: not given), then those of the file.

        As in transformers, ``do_sample`` decides whether the file's filters and temperature hold, ``top_k``
        is 50 where it does not say, and 0 means none.
        """
        options: dict[str, Any] = {"repetition_penalty": self.repetition_penalty}
        if self.do_sample:
            stated = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
            options |= {"temperature": 1.0, "top_k": 50, **stated}
        stated = {name: value for name, value in (given or {}).items() if value is not None}
        options |= {name: value for name, value in stated.items() if name not in _CONSTRAINTS}
        if options.get("top_k") == 0:
            options["top_k"] = None
        return SamplingOptions(**options)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Options of ``generate``: those ``given`` (None: not given), then those of the file; without EOS ids."""
        constraints = {name: getattr(self, name) if given.get(name) is None else given[name] for name in _CONSTRAINTS}
        return {**self.sampling(given), **constraints}

    def eos_ids(self, of_model: Sequence[int], more: Sequence[int] = ()) -> tuple[int, ...]:
        """The file's EOS ids, or the model's where it has none, and more."""
        own = of_model if self.eos_token_id is None else self.eos_token_id
        return (*(own if isinstance(own, Sequence) else (own,)), *more)

    def new_tokens(self, prompt_tokens: int) -> int | None:
        """How many tokens may follow a prompt; None where the file does not say.

        Raises:
            ValueError: if ``max_length`` leaves none.
        """
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_new_tokens
        if self.max_length <= prompt_tokens:
            raise ValueError(
                f"{self.path}: max_length is {self.max_length}, and the prompt has {prompt_tokens} tokens; "
                "give --max-new-tokens, or a shorter prompt"
            )
        return self.max_length - prompt_tokens

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError for ids that the model does not have."""
        words = [token for word in self.bad_words_ids or () for token in word]
        for name, ids in (("eos_token_id", self.eos_ids(())), ("bad_words_ids", words)):
            if any(not 0 <= token < vocab_size for token in ids):
                raise ValueError(
                    f"{self.path}: {name} is {quote(getattr(self, name))}; expected ids from 0 to {vocab_size - 1}"
                )


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _is_neutral(name: str, value: Any) -> bool:
    return value is None or value is False or value in ([], {}, "") or value == _NEUTRAL.get(name)
