"""Several models on the same tokens: what each says of them, how far it is from the first model, and a table of it."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int32

from fireq_jax.checkpoints.folder import StoredModel
from fireq_jax.checkpoints.hub import is_hub_id, resolve_model
from fireq_jax.checkpoints.tokenizer import load_tokenizer
from fireq_jax.device_memory import check_fits
from fireq_jax.evaluation.perplexity import PerplexityResult, check_windows, logits_nbytes, perplexity
from fireq_jax.models import CausalLM
from fireq_jax.text_data import Document, protocol, read_documents, tokenize
from pallas_kernels.dispatch import Implementation
from pallas_kernels.formats import KVFormat

Visit = Callable[[str, CausalLM, Int32[np.ndarray, " tokens"]], None]
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How text was read. Perplexities that were measured in different ways cannot be compared.

    Attributes:
        text: where it came from.
        joined: whether its documents were joined by blank lines before they were tokenized.
        text_tokens: of all of it.
        window: tokens that a model sees at once.
        stride: tokens from one window's beginning to the next.
        windows: that were read.
        tokens: that were scored.
    """

    text: str
    joined: bool
    text_tokens: int
    window: int
    stride: int
    windows: int
    tokens: int

    def __str__(self) -> str:
        overlap = "side by side" if self.stride == self.window else f"stride {self.stride}"
        return (
            f"{self.windows:,} windows of {self.window:,} tokens, {overlap}, of {self.text} ({self.text_tokens:,} "
            f"tokens; {protocol(join=self.joined)}): {self.tokens:,} tokens scored"
        )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One model's result.

    Attributes:
        model: its folder or hub id, as the caller named it.
        perplexity: exp of the mean negative log-likelihood of a token.
        tokens: number of tokens scored.
        bytes: of all parameters, as they are stored in memory.
        loss: perplexity over the first model's, minus 1; None for the first.
        divergence: mean Kullback-Leibler divergence of the distribution of the next token from the first model's, in
            nats; None for the first, and where it was not measured.
        agreement: share of tokens before which the likeliest one is the first model's, 0 to 1; None likewise.
        protocol: how the text was read; None if nobody says.
    """

    model: str
    perplexity: float
    tokens: int
    bytes: int
    loss: float | None = None
    divergence: float | None = None
    agreement: float | None = None
    protocol: Protocol | None = None


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
    divergence: bool = True,
    kv_format: KVFormat | None = None,
    dtype: jax.typing.DTypeLike = "bfloat16",
    implementation: Implementation = "auto",
    revision: str | None = None,
    verify: bool = True,
    progress: bool = True,
    visit: Visit | None = None,
) -> list[Evaluation]:
    """Each model on the same text, compared with the first, which stays in memory beside each of the others.

    Args:
        models: folders or hub ids, of Hugging Face checkpoints or converted models.
        text: file, folder or data set (see :mod:`fireq_jax.text_data`), with its ``text_field``.
        join: make one document of all, as in :func:`~fireq_jax.text_data.read_documents`.
        window, stride, max_windows, batch_size, progress: as in
            :func:`~fireq_jax.evaluation.perplexity.perplexity`.
        divergence: measure divergence and agreement, for which the first model reads the text once more for each of
            the others. Without, one model is in memory at a time; as it is, with a warning, where two do not fit.
        kv_format: overrides the models' cache format.
        dtype: of hidden states and unquantized weights.
        implementation: of the ops, see ``pallas_kernels.dispatch``.
        revision: branch, tag or commit of the models that are hub ids.
        verify: as in :meth:`~fireq_jax.models.llama.CausalLM.from_pretrained`; also of tokenizers.
        visit: called with each model's name, the model while it is in memory, and the tokens.

    Raises:
        ValueError: for options out of range, if a model or the text cannot be read, a model is named twice,
            or two models tokenize the text differently, so that their perplexities cannot be compared.
    """
    check_windows(window, stride, batch_size, max_windows)
    if repeated := next((model for model in models if list(models).count(model) > 1), None):
        raise ValueError(f"model {repeated!r} is named more than once")
    documents = read_documents(text, text_field=text_field, join=join)
    folders = resolve_models(models, revision)
    tokens = _common_tokens(folders, documents, verify=verify)
    if len(tokens) < 2:
        raise ValueError(f"{text} has {len(tokens)} tokens; expected at least 2: one to start from, one to predict")
    options = {"dtype": dtype, "kv_format": kv_format, "implementation": implementation}
    score = functools.partial(
        perplexity, window=window, stride=stride, batch_size=batch_size, max_windows=max_windows, progress=progress
    )
    together = divergence and _fit_together(list(folders.values()), batch_size, min(window, len(tokens)), **options)
    load = functools.partial(CausalLM.from_pretrained, verify=verify, **options)
    how = Protocol(str(text), join, len(tokens), window, stride or window, 0, 0)
    return _evaluate(folders, tokens, load, score, how, visit, together=together)


def _evaluate(
    folders: Mapping[str, Path],
    tokens: Int32[np.ndarray, " tokens"],
    load: Callable[[Path], CausalLM],
    score: Callable[..., PerplexityResult],
    how: Protocol,
    visit: Visit | None,
    *,
    together: bool,
) -> list[Evaluation]:
    """One model after the other; ``together``: beside the first, and compared with it."""
    results: list[Evaluation] = []
    reference: CausalLM | None = None
    for name, folder in folders.items():
        model = load(folder)
        if visit is not None:
            visit(name, model, tokens)
        try:
            found = score(model, tokens, reference=reference, description=name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        done = dataclasses.replace(how, windows=found.windows, tokens=found.tokens)
        loss = found.perplexity / results[0].perplexity - 1 if results else None
        compared = loss, found.divergence, found.agreement, done
        results.append(Evaluation(name, found.perplexity, found.tokens, model.nbytes, *compared))
        reference = model if together and reference is None else reference
        del model  # before the next is read
    return results


def _fit_together(
    folders: Sequence[Path],
    batch_size: int,
    window: int,
    *,
    dtype: jax.typing.DTypeLike,
    kv_format: KVFormat | None,
    implementation: Implementation,
) -> bool:
    """Whether there is anything to compare with the first model, and each fits beside it; a warning if one does not."""
    if len(folders) < 2:
        return False
    first, *others = (
        CausalLM.abstract(
            StoredModel.open(folder, verify=False), dtype=dtype, kv_format=kv_format, implementation=implementation
        )
        for folder in folders
    )
    size = first.config.vocab_size
    needed = logits_nbytes(batch_size, window, size, models=2)
    for folder, other in zip(folders[1:], others, strict=True):
        problem = None
        if other.config.vocab_size != size:
            problem = f"{folder} has a vocabulary of {other.config.vocab_size} entries, and {folders[0]} of {size}"
        else:
            try:
                check_fits(f"{folder} beside {folders[0]}: logits", needed, jax.tree.leaves((first, other)))
            except ValueError as error:
                problem = str(error)
        if problem is not None:
            logger.warning("divergence is not measured: %s", problem)
            return False
    return True


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


def table_columns(results: Sequence[Evaluation]) -> dict[str, list[str]]:
    """Name -> cells of each column: model, perplexity, what compares it with the first model, tokens, size."""
    columns: dict[str, list[str]] = {
        "model": [result.model for result in results],
        "perplexity": [f"{result.perplexity:.4f}" for result in results],
    }
    for name, field, form in (("loss", "loss", "+z.2%"), ("KL", "divergence", ".4f"), ("top-1", "agreement", ".2%")):
        values = [getattr(result, field) for result in results]
        if any(value is not None for value in values):
            columns[name] = ["" if value is None else format(value, form) for value in values]
    columns["tokens"] = [f"{result.tokens:,}" for result in results]
    columns["size"] = [f"{result.bytes / 1e6:,.1f} MB" for result in results]
    return columns


def format_table(results: Sequence[Evaluation]) -> str:
    """:func:`table_columns`, aligned."""
    columns = table_columns(results)
    rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
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
