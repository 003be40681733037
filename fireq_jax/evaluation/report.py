"""``report.html``: what an evaluation found, in one file that needs nothing else."""

import math
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from fireq_jax.evaluation.activations import largest_to_median
from fireq_jax.evaluation.comparison import Evaluation, table_columns
from fireq_jax.evaluation.plots import Subject, plot_layer, plot_overview
from fireq_jax.evaluation.web_page import Cell, code, definitions, details, paragraph, picture, table, write_page

_MEANINGS = (
    ("loss", "perplexity over the first model's, minus 1"),
    ("KL", "mean Kullback-Leibler divergence of the next token's distribution from the first model's, in nats"),
    ("top-1", "share of tokens before which the likeliest token is the first model's"),
)


def write_report(
    path: Path,
    results: Sequence[Evaluation],
    subjects: Mapping[str, Subject],
    *,
    command: Sequence[str],
    layers: Iterable[int] | None = None,
) -> None:
    """Write the page.

    Args:
        path: the file.
        results: of the models.
        subjects: what is drawn of a model, by its name in ``results``; of others nothing is.
        command: arguments that make the page again.
        layers: whose figures are in it; None means all.

    Raises:
        OSError: naming the file.
    """
    columns = table_columns(results)
    chosen = None if layers is None else set(layers)
    sections = [
        ("Models", table(list(columns), zip(*columns.values(), strict=True)) + definitions(_meanings(columns))),
        ("Protocol", definitions(protocol_entries(results))),
    ]
    sections += [(name, model_section(subject, chosen)) for name, subject in subjects.items()]
    sections.append(("To make this page again", code(shlex.join(command))))
    text = "" if results[0].protocol is None else f" on {Path(results[0].protocol.text).name}"
    write_page(path, f"Evaluation{text}", sections)


def protocol_entries(results: Sequence[Evaluation]) -> list[tuple[str, str]]:
    """How it was measured, and with what."""
    protocol = results[0].protocol
    return [] if protocol is None else [("text", str(protocol)), *versions()]


def versions() -> list[tuple[str, str]]:
    """Names and values of what a result depends on besides the model."""
    fields = {
        "jax": jax.__version__,
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind} ({jax.default_backend()})",
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    return list(fields.items())


def model_section(subject: Subject, layers: set[int] | None = None) -> str:
    """Overview, table of layers and, folded, a figure for each of ``layers`` (None: all)."""
    chosen = [i for i in range(subject.num_layers) if layers is None or i in layers]
    text = (
        f"Activations of {subject.statistics.tokens:,} tokens, in float32 with nothing rounded but the weights. Ratios "
        "are of the largest to the median channel."
    )
    figures = "".join(details(f"Layer {i}", picture(plot_layer(subject, i), f"Channels of layer {i}")) for i in chosen)
    overview = picture(plot_overview(subject), f"Overview of {subject.name}")
    return paragraph(text) + overview + "<h3>Layers</h3>" + layer_table(subject) + figures


def layer_table(subject: Subject) -> str:
    """A row a layer; a click on a column sorts by it."""
    now = subject.statistics
    columns: dict[str, np.ndarray] = {}
    for kind, values in subject.errors.items():
        columns[f"error of {kind.rsplit('.', 1)[-1]} (%)"] = 100 * values
    columns["keys, ratio"] = largest_to_median(now.keys).max(axis=-1)
    for name, found in now.inputs.items():
        kind = name.removesuffix("_input")
        columns[f"{kind} input, ratio"] = largest_to_median(found.absmax)
        columns[f"{kind} input, kurtosis"] = found.kurtosis
    columns["largest |hidden|"] = now.hidden_max[1:]
    columns["of the median token"] = now.hidden_median[1:]
    columns["first token's attention (%)"] = 100 * now.first_token
    rows = (
        [(str(i), float(i)), *(number(values[i]) for values in columns.values())] for i in range(subject.num_layers)
    )
    return table(["layer", *columns], rows, sortable=True)


def number(value: float) -> Cell:
    """A cell of four digits that sorts by its value; empty for NaN."""
    text = "" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"
    return text, float(value) if text else None


def _meanings(columns: Iterable[str]) -> list[tuple[str, str]]:
    return [(name, text) for name, text in _MEANINGS if name in columns]
