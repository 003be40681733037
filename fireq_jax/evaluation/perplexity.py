"""Perplexity of a model on a stream of tokens: exp of the mean negative log-likelihood of a token.

The stream is read in windows; window w holds tokens ``[w * stride, w * stride + window)`` and its
first token is never scored, for nothing comes before it.

- Non-overlapping (``stride=None``, the same as ``stride=window``): each window scores its other
  window - 1 tokens.
- Sliding (``stride < window``): the first window does the same, each later one scores only its
  tokens that no window before has seen, with at least window - stride tokens of context. So every
  token but the very first is scored exactly once.

The last window may be shorter than the others.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32
from tqdm import tqdm

from fireq_jax.compilation import cached_export
from fireq_jax.device_memory import check_fits
from fireq_jax.generation.likelihood import of_next, token_nll
from fireq_jax.models import CausalLM

_MOST_NLL = 700.0  # nats a token, whose exponential is still a float

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was computed from.

    Attributes:
        perplexity: exp(nll / tokens).
        tokens: number of tokens scored.
        nll: their summed negative log-likelihood, in nats.
        windows: that they were read in.
        divergence: mean over them of the Kullback-Leibler divergence of the model's distribution of the next token
            from the reference's, sum p_reference log(p_reference / p_model), in nats; None without a reference.
        agreement: share of them before which both models have the same likeliest token, 0 to 1; None likewise.
    """

    perplexity: float
    tokens: int
    nll: float
    windows: int
    divergence: float | None = None
    agreement: float | None = None


def perplexity(
    model: CausalLM,
    tokens: Int[np.ndarray, " tokens"],
    *,
    reference: CausalLM | None = None,
    window: int = 1024,
    stride: int | None = None,
    batch_size: int = 4,
    max_windows: int | None = None,
    progress: bool = True,
    description: str = "perplexity",
) -> PerplexityResult:
    """Perplexity of ``model`` on ``tokens``; probabilities in float32, their sum in float64.

    Args:
        model: any CausalLM, quantized or not.
        tokens: one stream, such as :func:`fireq_jax.text_data.load_tokens` makes.
        reference: a model of the same vocabulary to compare distributions with, such as the float model; it computes
            every window as well.
        window: tokens the model sees at once.
        stride: tokens from one window's beginning to the next; None means ``window``.
        batch_size: windows computed together. The largest array is float32
            [batch_size, window, vocab_size]; with a reference there are two.
        max_windows: stop after so many windows; None means all.
        progress: show a progress bar on stderr, labelled ``description``.

    Raises:
        ValueError: for sizes out of range, logits that cannot fit into memory, fewer than two tokens,
            tokens outside the vocabulary, a reference of another vocabulary, or a model whose log-likelihoods (or
            divergence) are not finite, or none that a perplexity can be made of.
    """
    check_windows(window, stride, batch_size, max_windows)
    _check_models(model, reference, tokens, window)
    stride = window if stride is None else stride
    windows = count_windows(len(tokens), window, stride)
    windows = windows if max_windows is None else min(windows, max_windows)
    shape = min(batch_size, windows), min(window, len(tokens))
    score = _scores(model, reference, shape)

    totals, scored = np.zeros(1 if reference is None else 3), 0
    with tqdm(total=windows, desc=description, unit="window", disable=not progress) as bar:
        for first in range(0, windows, shape[0]):
            indices = range(first, min(first + shape[0], windows))
            of_tokens = score(*jax.device_put(_batch(tokens, indices, shape, stride, masked=_counts_padding(model))))
            for row, index in enumerate(indices):
                begin, end = scored_range(index, len(tokens), window, stride)
                # Column i belongs to the window's token i + 1.
                totals += [values[row, begin - 1 : end - 1].sum(dtype=np.float64) for values in of_tokens]
                scored += end - begin
                _check_totals(totals, scored, index)
            bar.update(len(indices))
            bar.set_postfix_str(f"{math.exp(totals[0] / scored):.4f}", refresh=False)
    return PerplexityResult(
        math.exp(totals[0] / scored), scored, float(totals[0]), windows, *map(float, totals[1:] / scored)
    )


def logits_nbytes(batch_size: int, window: int, vocab_size: int, *, models: int = 1) -> int:
    """Bytes of the largest arrays that :func:`perplexity` makes: the logits of a batch, by each of so many models."""
    return models * batch_size * window * vocab_size * np.dtype(np.float32).itemsize


def _scores(
    model: CausalLM, reference: CausalLM | None, shape: tuple[int, int]
) -> Callable[..., tuple[Float32[np.ndarray, "B T-1"], ...]]:
    """A function of a batch of ``shape`` and its mask: each token's nll, and with a reference the other two scores."""
    arrays, structure = jax.tree.flatten(model)
    others, other_structure = jax.tree.flatten(reference)
    needed = logits_nbytes(*shape, model.config.vocab_size, models=1 if reference is None else 2)
    check_fits(f"the logits of batch_size {shape[0]} x window {shape[1]} tokens", needed, arrays + others)

    def run(tokens: Array, mask: Array | None) -> tuple[np.ndarray, ...]:
        if reference is None:
            return (jax.device_get(token_nll(structure, arrays, tokens, mask)),)
        return jax.device_get(_token_scores(structure, other_structure, arrays, others, tokens, mask))

    return run


class TokenScores(NamedTuple):
    """What two models say of each row's tokens 1, 2, ..., T - 1; fields are as in :class:`PerplexityResult`."""

    nll: Float32[Array, "B T-1"]
    divergence: Float32[Array, "B T-1"]
    agreement: Bool[Array, "B T-1"]


def compare(
    logits: Float32[Array, "B T V"], reference: Float32[Array, "B T V"], tokens: Int32[Array, "B T"]
) -> TokenScores:
    """Scores of a model's ``logits`` beside those of a reference."""
    own, exact = (jax.nn.log_softmax(x[:, :-1]) for x in (logits, reference))
    # What the reference holds for impossible adds nothing, however impossible the model finds it.
    terms = jnp.where(exact > -jnp.inf, jnp.exp(exact) * (exact - own), 0.0)
    return TokenScores(
        -of_next(own, tokens), jnp.sum(terms, axis=-1), jnp.argmax(own, axis=-1) == jnp.argmax(exact, axis=-1)
    )


def _batch(
    tokens: Int[np.ndarray, " tokens"], indices: range, shape: tuple[int, int], stride: int, *, masked: bool
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"] | None]:
    """The windows at ``indices``, and the mask of their tokens if one is asked for.

    All batches have one ``shape``, so that there is one compilation. Padding comes after a window's tokens, where
    causal attention lets nothing see it.
    """
    batch = np.zeros(shape, np.int32)
    mask = np.zeros_like(batch) if masked else None
    for row, index in enumerate(indices):
        part = tokens[index * stride :][: shape[1]]
        batch[row, : len(part)] = part
        if mask is not None:
            mask[row, : len(part)] = 1
    return batch, mask


def count_windows(length: int, window: int, stride: int) -> int:
    """Windows that score at least one of ``length`` tokens."""
    return 1 + max(0, length - 1 - max(1, window - stride)) // stride


def scored_range(index: int, length: int, window: int, stride: int) -> tuple[int, int]:
    """Begin and end, counted inside window ``index``, of the tokens that it scores."""
    begin = 1 if index == 0 else max(1, window - stride)
    return begin, min(window, length - index * stride)


@functools.partial(jax.jit, static_argnames=("structure", "reference"))
@cached_export("structure", "reference")
def _token_scores(
    structure: Any,
    reference: Any,
    arrays: list[Array],
    reference_arrays: list[Array],
    tokens: Int32[Array, "B T"],
    mask: Int32[Array, "B T"] | None,
) -> tuple[Float32[Array, "B T-1"], Float32[Array, "B T-1"], Bool[Array, "B T-1"]]:
    """:class:`TokenScores`, which no export can name, of the two models that were flattened."""
    model: CausalLM = jax.tree.unflatten(structure, arrays)
    exact: CausalLM = jax.tree.unflatten(reference, reference_arrays)
    scores = compare(model(tokens, mask), exact(tokens, mask), tokens)
    return scores.nll, scores.divergence, scores.agreement


def check_windows(window: int, stride: int | None, batch_size: int, max_windows: int | None) -> None:
    """Raise ValueError for sizes that :func:`perplexity` does not take."""
    if window < 2:
        raise ValueError(f"window is {window}; expected at least 2 tokens: one to start from, one to predict")
    if stride is not None and not 1 <= stride <= window:
        raise ValueError(f"stride is {stride}; expected 1 to {window}, the window")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows is {max_windows}; expected 1 or more, or None for all")


def _check_models(model: CausalLM, reference: CausalLM | None, tokens: np.ndarray, window: int) -> None:
    """Raise ValueError for models that do not go with the tokens, or with one another."""
    _check_tokens(tokens, model.config.vocab_size)
    if reference is not None and reference.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the reference's vocabulary has {reference.config.vocab_size} entries; expected "
            f"{model.config.vocab_size}, as many as the model's"
        )
    if window > (positions := model.config.max_position_embeddings):
        logger.warning("a window of %d exceeds the model's %d positions", window, positions)


def _check_totals(totals: np.ndarray, scored: int, index: int) -> None:
    """Raise ValueError for sums that no perplexity, or divergence, can be made of."""
    if not totals[0] / scored < _MOST_NLL:
        raise ValueError(f"window {index}: the negative log-likelihood is {totals[0]}; the model is broken")
    if not np.isfinite(totals).all():
        raise ValueError(f"window {index}: the divergence from the reference is {totals[1]}; one model is broken")


def _counts_padding(model: CausalLM) -> bool:
    """Whether rotations depend on a sequence's length, so that padding has to be masked."""
    return model.config.rope.rope_type in ("dynamic", "longrope")


def _check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    if tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(f"tokens have shape {tokens.shape}; expected one stream of at least 2")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(
            f"token ids reach from {tokens.min()} to {tokens.max()}; expected 0 to {vocab_size - 1}, the model's "
            "vocabulary: is this the model's tokenizer?"
        )
