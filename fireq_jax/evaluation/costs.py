"""What variants of a model cost on several texts: a file that grows with them, a table, bars, and a part of a page.

A report is a JSON object::

    settings            what must be the same for all that is in it
    float perplexity    by text
    costs               variant -> text -> fields of ``sensitivity.Cost``, of means over runs with ``spread``s
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fireq_jax.evaluation.plots import STYLES, draw_curves, new_figure
from fireq_jax.evaluation.sensitivity import LAYER_PIECE, Piece, Sensitivity
from fireq_jax.evaluation.web_page import Cell, table
from fireq_jax.json_files import read_json, write_json

# Field -> heading, factor, digits.
FIELDS = {
    "perplexity": ("perplexity", 1, 4),
    "loss": ("loss (%)", 100, 2),
    "divergence": ("KL (nats)", 1, 5),
    "agreement": ("top-1 (%)", 100, 2),
}
Costs = Mapping[str, Mapping[str, Mapping[str, float]]]


def load_report(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier report of the same settings, or an empty one.

    Raises:
        ValueError: naming the file, if it is of other settings or is no report.
    """
    if not path.is_file():
        return {"settings": dict(settings), "float perplexity": {}, "costs": {}}
    report = read_json(path)
    if (before := report.get("settings")) != settings:
        raise ValueError(f"{path} was measured with {before}; expected {dict(settings)}: give another --output")
    return report


def measure_pieces(sensitivity: Sensitivity, pieces: Sequence[Piece], path: Path, settings: Mapping[str, Any]) -> dict:
    """Measure what is missing from the report in ``path``, piece by piece; says on stdout what it is at.

    Returns:
        The report.
    """
    report = load_report(path, settings)
    report["float perplexity"] = sensitivity.perplexity
    missing = [piece for piece in pieces if piece.name not in report["costs"]]
    passes = sum(map(sensitivity.passes, missing))
    print(
        f"{len(missing)} of {len(pieces)} pieces to measure: {passes:,} passes of a window through a layer, about "
        f"{sensitivity.estimate(missing):.0f} s besides compiling and heads",
        flush=True,
    )
    for number, piece in enumerate(missing, start=1):
        costs = sensitivity.measure(piece)
        report["costs"][piece.name] = {text: dataclasses.asdict(cost) for text, cost in costs.items()}
        write_json(path, report)
        found = ", ".join(f"{cost.divergence:.5f}" for cost in costs.values())
        print(f"{number} of {len(missing)}: {piece.name}: KL {found} nats", flush=True)
    return report


def format_costs(costs: Costs) -> str:
    """Markdown: a row a variant and text."""
    lines = [f"| variant | text | {' | '.join(heading for heading, *_ in FIELDS.values())} |", "|---" * 6 + "|"]
    for name, by_text in costs.items():
        for text, cost in by_text.items():
            lines.append(f"| {name} | {text} | {' | '.join(_number(cost, field) for field in FIELDS)} |")
    return "\n".join(lines) + "\n"


def cost_table(costs: Costs) -> str:
    """The same in HTML, sorted by a click."""
    texts = list(next(iter(costs.values()), {}))
    several = len(texts) > 1
    header = ["variant", *(["text"] if several else []), *(heading for heading, *_ in FIELDS.values())]
    rows: list[list[Cell]] = []
    for name, by_text in costs.items():
        for text, cost in by_text.items():
            cells: list[Cell] = [name, text] if several else [name]
            rows.append([*cells, *((_number(cost, field), cost[field]) for field in FIELDS)])
    return table(header, rows, sortable=True)


def average(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Costs by text of one variant: means over its runs, such as over seeds, and standard deviations ("... spread")."""
    means: dict[str, dict[str, float]] = {}
    for text in runs[0]:
        means[text] = {field: float(np.mean([run[text][field] for run in runs])) for field in FIELDS}
        if len(runs) > 1:
            spreads = {f"{field} spread": float(np.std([run[text][field] for run in runs], ddof=1)) for field in FIELDS}
            means[text] |= spreads
    return means


def _number(cost: Mapping[str, float], field: str) -> str:
    _, factor, digits = FIELDS[field]
    spread = cost.get(f"{field} spread")
    return f"{factor * cost[field]:.{digits}f}" + ("" if spread is None else f" +- {factor * spread:.{digits}f}")


def plot_costs(costs: Costs, title: str) -> Figure:
    """Bars of divergence and loss by variant, a colour a text; pieces of single layers are curves below."""
    layers = {name: by_text for name, by_text in costs.items() if name.startswith(LAYER_PIECE)}
    variants = {name: by_text for name, by_text in costs.items() if name not in layers}
    texts = list(next(iter(costs.values())))
    heights = [0.4 + 0.28 * len(variants)] + ([2.6] if layers else [])
    figure = new_figure(title, size=(13, 0.8 + sum(heights)))
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for column, field in enumerate(("divergence", "loss")):
        heading, factor, _ = FIELDS[field]
        axes = figure.add_subplot(grid[0, column])
        width = 0.8 / len(texts)
        for i, text in enumerate(texts):
            values = [factor * by_text[text][field] for by_text in variants.values()]
            places = np.arange(len(values)) + (i - (len(texts) - 1) / 2) * width
            spreads = [factor * by_text[text].get(f"{field} spread", 0.0) for by_text in variants.values()]
            color = STYLES[i % len(STYLES)]["color"]
            axes.barh(places, values, xerr=spreads if any(spreads) else None, height=width, color=color, label=text)
        axes.set_yticks(range(len(variants)), list(variants) if column == 0 else [""] * len(variants), fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel(heading, fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", alpha=0.3)
        if len(texts) > 1 and column == 0:
            axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(texts), frameon=False)
        if layers:
            series = {text: np.asarray([factor * cost[text][field] for cost in layers.values()]) for text in texts}
            draw_curves(figure.add_subplot(grid[1, column]), "Quantized weights in one layer only", heading, series)
    return figure
