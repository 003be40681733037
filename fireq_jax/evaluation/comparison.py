"""Several models on the same tokens: one perplexity each, and a table of them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int32

from fireq_jax.checkpoints.hub import is_hub_id, resolve_model
from fireq_jax.checkpoints.tokenizer import load_tokenizer
from fireq_jax.evaluation.perplexity import PerplexityResult, check_windows, perplexity
from fireq_jax.models import CausalLM
from fireq_jax.text_data import Document, read_documents, tokenize
from pallas_kernels.dispatch import Implementation
from pallas_kernels.formats import KVFormat


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One model's result.

    Attributes:
        model: its folder or hub id, as the caller named it.
        perplexity: exp of the mean negative log-likelihood of a token.
        tokens: number of tokens scored.
        bytes: of all parameters, as they are stored in memory.
    """

    model: str
    perplexity: float
    tokens: int
    bytes: int


def evaluate(
    models: Sequence[str | Path],
    text: str | Path,
    *,
    text_field: str = "text",
    join: bool = False,
    window: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 4,
    kv_format: KVFormat | None = None,
    dtype: jax.typing.DTypeLike = "bfloat16",
    implementation: Implementation = "auto",
    revision: str | None = None,
    verify: bool = True,
    progress: bool = True,
) -> list[Evaluation]:
    """Perplexity of each model on the same text; one model is in memory at a time.

    Args:
        models: folders or hub ids, of Hugging Face checkpoints or converted models.
        text: file, folder or data set (see :mod:`fireq_jax.text_data`), with its ``text_field``.
        join: make one document of all, as in :func:`~fireq_jax.text_data.read_documents`.
        window, stride, max_windows, batch_size, progress: as in
            :func:`~fireq_jax.evaluation.perplexity.perplexity`.
        kv_format: overrides the models' cache format.
        dtype: of hidden states and unquantized weights.
        implementation: of the ops, see ``pallas_kernels.dispatch``.
        revision: branch, tag or commit of the models that are hub ids.
        verify: as in :meth:`~fireq_jax.models.llama.CausalLM.from_pretrained`; also of tokenizers.

    Raises:
        ValueError: for options out of range, if a model or the text cannot be read, a model is named twice,
            or two models tokenize the text differently, so that their perplexities cannot be compared.
    """
    check_windows(window, stride, batch_size, max_windows)
    for model in models:
        if list(models).count(model) > 1:
            raise ValueError(f"model {model!r} is named more than once")
    documents = read_documents(text, text_field=text_field, join=join)
    folders = resolve_models(models, revision)
    tokens = _common_tokens(folders, documents, verify=verify)
    if len(tokens) < 2:
        raise ValueError(f"{text} has {len(tokens)} tokens; expected at least 2: one to start from, one to predict")

    load = functools.partial(
        CausalLM.from_pretrained, dtype=dtype, kv_format=kv_format, implementation=implementation, verify=verify
    )
    score = functools.partial(
        perplexity, window=window, stride=stride, batch_size=batch_size, max_windows=max_windows, progress=progress
    )
    return [_evaluate_one(name, load(folder), tokens, score) for name, folder in folders.items()]


def _evaluate_one(
    name: str, model: CausalLM, tokens: Int32[np.ndarray, " tokens"], score: Callable[..., PerplexityResult]
) -> Evaluation:
    try:
        result = score(model, tokens, description=name)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return Evaluation(name, result.perplexity, result.tokens, model.nbytes)


def resolve_models(models: Sequence[str | Path], revision: str | None = None) -> dict[str, Path]:
    """Each model's name and folder; hub ids are downloaded, at ``revision``.

    Raises:
        ValueError: if one is neither a folder nor a hub id, or cannot be loaded by its config, or if there is a
            ``revision`` and no hub id.
    """
    names = list(map(str, models))
    if revision is not None and not any(map(is_hub_id, names)):
        raise ValueError(f"revision is {revision!r}, and none of {names} is a hub id")
    return {name: resolve_model(name, revision if is_hub_id(name) else None) for name in names}


def format_table(results: Sequence[Evaluation]) -> str:
    """Aligned columns: model, perplexity, its ratio to the first model's, tokens, size."""
    rows = [("model", "perplexity", "ratio", "tokens", "size")]
    for result in results:
        ratio = result.perplexity / results[0].perplexity
        numbers = f"{result.perplexity:.4f}", f"{ratio:.4f}", f"{result.tokens:,}", f"{result.bytes / 1e6:,.1f} MB"
        rows.append((result.model, *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])]) for name, *numbers in rows
    )


def _common_tokens(
    folders: Mapping[str, Path], documents: Sequence[Document], *, verify: bool
) -> Int32[np.ndarray, " tokens"]:
    reference, *others = folders
    first = tokenize(documents, load_tokenizer(folders[reference], verify=verify))
    for model in others:
        other = tokenize(documents, load_tokenizer(folders[model], verify=verify))
        if not np.array_equal(first, other):
            shorter = min(len(first), len(other))
            differing = np.flatnonzero(first[:shorter] != other[:shorter])
            raise ValueError(
                f"{reference} and {model} have different tokenizers: they cut the text into {len(first)} and "
                f"{len(other)} tokens, which differ from token {differing[0] if differing.size else shorter} on; "
                "perplexities per token can only be compared between models with the same tokenizer"
            )
    return first
