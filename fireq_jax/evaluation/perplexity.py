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
import logging
import math

import jax
import numpy as np
from jaxtyping import Int, Int32
from tqdm import tqdm

from fireq_jax.device_memory import check_fits
from fireq_jax.generation.likelihood import token_nll as _token_nll
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
    """

    perplexity: float
    tokens: int
    nll: float


def perplexity(
    model: CausalLM,
    tokens: Int[np.ndarray, " tokens"],
    *,
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
        window: tokens the model sees at once.
        stride: tokens from one window's beginning to the next; None means ``window``.
        batch_size: windows computed together. The largest array is float32
            [batch_size, window, vocab_size].
        max_windows: stop after so many windows; None means all.
        progress: show a progress bar on stderr, labelled ``description``.

    Raises:
        ValueError: for sizes out of range, logits that cannot fit into memory, fewer than two tokens,
            tokens outside the vocabulary, or a model whose log-likelihoods are not finite, or none that a
            perplexity can be made of.
    """
    check_windows(window, stride, batch_size, max_windows)
    _check_tokens(tokens, model.config.vocab_size)
    stride = window if stride is None else stride
    if window > model.config.max_position_embeddings:
        logger.warning("a window of %d exceeds the model's %d positions", window, model.config.max_position_embeddings)
    windows = count_windows(len(tokens), window, stride)
    windows = windows if max_windows is None else min(windows, max_windows)
    batch_size = min(batch_size, windows)
    arrays, structure = jax.tree.flatten(model)
    width = min(window, len(tokens))
    logits = batch_size * width * model.config.vocab_size * np.dtype(np.float32).itemsize
    check_fits(f"the logits of batch_size {batch_size} x window {width} tokens", logits, arrays)
    # Where rotations depend on a sequence's length, padding must not count.
    masked = model.config.rope.rope_type in ("dynamic", "longrope")

    nll, scored = 0.0, 0
    with tqdm(total=windows, desc=description, unit="window", disable=not progress) as bar:
        for first in range(0, windows, batch_size):
            indices = range(first, min(first + batch_size, windows))
            inputs = jax.device_put(_batch(tokens, indices, (batch_size, width), stride, masked=masked))
            token_nll = jax.device_get(_token_nll(structure, arrays, *inputs)).astype(np.float64)
            for row, index in enumerate(indices):
                begin, end = scored_range(index, len(tokens), window, stride)
                # Column i of token_nll belongs to the window's token i + 1.
                nll += float(token_nll[row, begin - 1 : end - 1].sum())
                scored += end - begin
                if not nll / scored < _MOST_NLL:
                    raise ValueError(f"window {index}: the negative log-likelihood is {nll}; the model is broken")
            bar.update(len(indices))
            bar.set_postfix_str(f"{math.exp(nll / scored):.4f}", refresh=False)
    return PerplexityResult(math.exp(nll / scored), scored, nll)


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


def _check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    if tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(f"tokens have shape {tokens.shape}; expected one stream of at least 2")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(
            f"token ids reach from {tokens.min()} to {tokens.max()}; expected 0 to {vocab_size - 1}, the model's "
            "vocabulary: is this the model's tokenizer?"
        )
