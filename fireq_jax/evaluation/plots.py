"""Figures of a model: an overview of what quantization meets in all its layers, and a page of a layer.

Heat maps show a channel's largest magnitude over the median channel's: values that share one scale lose what is
small beside the largest. Figures are dark on white, in colours that are told apart in the common forms of colour
blindness; they need no display and leave pyplot's global state alone.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import LogFormatter, MaxNLocator

from fireq_jax.config_fields import mapping
from fireq_jax.evaluation.activations import INPUTS, ActivationStatistics, largest_to_median
from fireq_jax.evaluation.smoothing_effect import SmoothingEffect, read_smoothing, was_smoothed
from fireq_jax.json_files import errors_name, read_json

# Blue, vermilion, green, purple, black (Okabe and Ito), each with a dash and a marker of its own.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
    {"color": "#000000", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "x"},
)
# In the order in which data walks through a block, as ``INPUTS``.
LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
INPUT_NAMES = {name: f"input of {linear}" for name, linear in zip(INPUTS, LINEARS, strict=True)}
_BRIGHTEST = 99.9  # percentile of a heat map's ratios from which on colours are the same
_COLUMNS = 600  # of a heat map, at most: wider ones show the largest of neighbours
_KEY_HEADS = 4  # kv heads on a layer's page, at most
_REPORT = "report.json"


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is known of a model that is drawn.

    Attributes:
        name: heading of its figures.
        statistics: of its activations.
        before: those of the model that it is compared with, such as the float one; None without.
        before_name: that model's name.
        effect: what its smoothing did; None of a model that was not smoothed.
        errors: kind of linear layer -> relative Frobenius error of its weights by layer, NaN where it is float; empty
            if nobody knows.
    """

    name: str
    statistics: ActivationStatistics
    before: ActivationStatistics | None = None
    before_name: str = ""
    effect: SmoothingEffect | None = None
    errors: Mapping[str, Float[np.ndarray, " L"]] = dataclasses.field(default_factory=dict)

    @property
    def title(self) -> str:
        """The name, and what "before" means."""
        return self.name if self.before is None else f"{self.name} (before: {self.before_name})"

    @property
    def num_layers(self) -> int:
        """Layers L."""
        return len(self.statistics.first_token)


def subject_of(
    name: str, folder: Path, statistics: ActivationStatistics, first: tuple[str, ActivationStatistics] | None = None
) -> Subject:
    """A model with what its folder says: ``smoothing.npz`` and ``report.json``, where they are there.

    Args:
        name: of the model.
        folder: of the model.
        statistics: of its activations.
        first: name and statistics of the model to compare it with, which is left out if its keys are of other shapes.

    Raises:
        ValueError: naming the file that cannot be read.
    """
    effect = read_smoothing(folder) if was_smoothed(folder) else None
    for what, moments in (effect or {}).items():
        if what.endswith(".keys") and (shape := moments["before"].shape) != (expected := statistics.keys.shape[1:]):
            raise ValueError(f"{folder} has smoothing of another model: {what} is {shape}; expected {expected}")
    errors = _weight_errors(folder / _REPORT, statistics) if (folder / _REPORT).is_file() else {}
    before_name, before = ("", None) if first is None else first
    if before is not None and before.keys.shape != statistics.keys.shape:
        before = None
    return Subject(name, statistics, before, before_name, effect, errors)


def plot_overview(subject: Subject) -> Figure:
    """Heat maps of keys and inputs by layer and channel, before and after, and curves by layer."""
    rows = _heat_rows(subject)
    curves = _curves(subject)
    heights = [1.0] * len(rows) + [1.7] * -(-len(curves) // 2)
    figure = new_figure(subject.title, size=(13, 0.9 + 1.75 * sum(heights)))
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    _draw_heat_maps(figure, grid, rows)
    for place, (title, unit, log, series) in enumerate(curves):
        axes = figure.add_subplot(grid[len(rows) + place // 2, place % 2])
        draw_curves(axes, title, unit, series, log=log)
    return figure


def plot_layer(subject: Subject, layer: int) -> Figure:
    """One layer: the channels of its linear layers' inputs, of their weights, and of its keys.

    Raises:
        ValueError: if there is no such layer.
    """
    if not 0 <= layer < subject.num_layers:
        raise ValueError(f"layer is {layer}; expected 0 to {subject.num_layers - 1}")
    panels = [*_input_panels(subject, layer), *_weight_panels(subject, layer), *_key_panels(subject, layer)]
    figure = new_figure(
        f"Layer {layer} of {subject.title}; in brackets: largest over median channel",
        size=(13, 0.8 + 2.3 * -(-len(panels) // 2)),
    )
    grid = figure.add_gridspec(-(-len(panels) // 2), 2)
    for place, (title, x, series) in enumerate(panels):
        _draw_channels(figure.add_subplot(grid[place // 2, place % 2]), title, x, series)
    return figure


def save_figures(subject: Subject, folder: Path, layers: Iterable[int] = ()) -> list[Path]:
    """``overview.png`` and ``layer.N.png`` of the ``layers`` in a folder, which is made if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "overview.png"]
    plot_overview(subject).savefig(paths[0])
    for layer in layers:
        paths.append(folder / f"layer.{layer:02d}.png")
        plot_layer(subject, layer).savefig(paths[-1])
    return paths


def new_figure(title: str, size: tuple[float, float]) -> Figure:
    """An empty figure of ``size`` in hundreds of pixels."""
    figure = Figure(figsize=size, dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    return figure


def draw_curves(
    axes: Axes, title: str, unit: str, series: Mapping[str, Float[np.ndarray, " n"]], *, log: bool = False
) -> None:
    """Lines over layers; later ones are thinner, so that an earlier one shows where they coincide."""
    for i, (label, values) in enumerate(series.items()):
        style = STYLES[i % len(STYLES)]
        size = {"linewidth": 2.6 - 0.4 * i, "markersize": 4, "markevery": max(1, len(values) // 12)}
        axes.plot(values, label=label, **style, **size)
    axes.set_ylabel(unit, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(axes, title, "layer", log=log)
    if len(series) > 1:
        axes.margins(y=0.4)  # room for the legend
        axes.legend(loc="upper left", ncols=3, fontsize=8, framealpha=0.85)


def _weight_errors(path: Path, statistics: ActivationStatistics) -> dict[str, Float[np.ndarray, " L"]]:
    """What a conversion's report says, in the order of the linear layers in a block."""
    with errors_name(path):
        layers = mapping(read_json(path).get("layers", {}), "layers")
        of_layers = [mapping(layers.get(f"layers.{i}", {}), "layers") for i in range(len(statistics.first_token))]
        rows = [mapping(layer.get("weight_error", {}), "weight_error") for layer in of_layers]
        known = {kind for row in rows for kind in row if kind.rsplit(".", 1)[-1] in LINEARS}
        kinds = sorted(known, key=lambda kind: LINEARS.index(kind.rsplit(".", 1)[-1]))
        return {kind: np.asarray([row.get(kind, np.nan) for row in rows], np.float64) for kind in kinds}


def _heat_rows(subject: Subject) -> list[list[tuple[str, str, np.ndarray]]]:
    """(title, channels' name, [L, K] ratios) of each row's heat maps: before and after, or one."""
    now, before = subject.statistics, subject.before
    rows: list[list[tuple[str, str, np.ndarray]]] = []
    stored = [("keys as the cache stores them", "key channel of all kv heads", _over_median(now.keys))]
    earlier = before.keys if before is not None else _keys_before(subject)
    if earlier is not None:
        stored.insert(0, ("keys before", "key channel of all kv heads", _over_median(earlier)))
    rows.append(stored)
    singles = []
    for name, found in now.inputs.items():
        panel = (INPUT_NAMES[name], "channel", _over_median(found.absmax))
        if before is None or before.inputs[name].absmax.shape != found.absmax.shape:
            singles.append(panel)
            continue
        first = (f"{INPUT_NAMES[name]}, before", "channel", _over_median(before.inputs[name].absmax))
        rows.append([first, (f"{INPUT_NAMES[name]}, after", *panel[1:])])
    return rows + [singles[i : i + 2] for i in range(0, len(singles), 2)]


def _keys_before(subject: Subject) -> np.ndarray | None:
    """What ``smoothing.npz`` says of all layers, from calibration text."""
    names = [f"layers.{i}.keys" for i in range(subject.num_layers)]
    if subject.effect is None or not all(name in subject.effect for name in names):
        return None
    return np.stack([subject.effect[name]["before"] for name in names])


def _curves(subject: Subject) -> list[tuple[str, str, bool, dict[str, np.ndarray]]]:
    """(title, unit, whether logarithmic, lines) of each panel."""
    now, before = subject.statistics, subject.before
    names = {name: INPUT_NAMES[name].removeprefix("input of ") for name in now.inputs}
    ratios = {names[name]: largest_to_median(found.absmax) for name, found in now.inputs.items()}
    hidden = {"largest token": now.hidden_max, "median token": now.hidden_median}
    sinks = {"this model": now.first_token}
    if before is not None:
        sinks = {"before": before.first_token, "this model": now.first_token}
    curves = [
        (
            "Kurtosis of the inputs (3: normal distribution)", "E x⁴ / (E x²)²", True,
            {names[name]: found.kurtosis for name, found in now.inputs.items()},
        ),
        (
            "Outlier channels: largest over median channel", "ratio", True,
            {**ratios, "keys (worst kv head)": largest_to_median(now.keys).max(axis=-1)},
        ),
        ("Massive activations: largest |hidden state| of a token", "magnitude", True, hidden),
        ("Attention sink: mean weight of the first token", "attention weight", False, sinks),
    ]  # fmt: skip
    if subject.errors:
        errors = {kind.rsplit(".", 1)[-1]: 100 * values for kind, values in subject.errors.items()}
        curves.append(("Error of the quantized weights", "% of their Frobenius norm", False, errors))
    return curves


def _draw_heat_maps(figure: Figure, grid: GridSpec, rows: Sequence[Sequence[tuple[str, str, np.ndarray]]]) -> None:
    """One colour scale for a row, whose maps are compared with one another."""
    for place, row in enumerate(rows):
        norm = LogNorm(0.5, top := max(2.0, *(float(np.percentile(ratios, _BRIGHTEST)) for _, _, ratios in row)))
        panels = []
        for column, (title, x, ratios) in enumerate(row):
            panels.append(axes := figure.add_subplot(grid[place, column if len(row) > 1 else slice(None)]))
            extent = (0, ratios.shape[1], len(ratios) - 0.5, -0.5)
            image = axes.imshow(
                _pooled(np.clip(ratios, 0.5, top)), aspect="auto", cmap="cividis", norm=norm, extent=extent,
                interpolation="nearest",
            )  # fmt: skip
            axes.set_title(f"{title}: at most {ratios.max():.3g} times the median", fontsize=10, loc="left")
            axes.set_xlabel(x, fontsize=9)
            axes.set_ylabel("layer", fontsize=9)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            axes.tick_params(labelsize=8)
            if column == len(row) - 1:
                bar = figure.colorbar(image, ax=panels, pad=0.01, aspect=12, extend="max")
                bar.set_label("largest / median", fontsize=8)
                _label_plainly(bar.ax)
                bar.ax.tick_params(labelsize=8, which="both")


def _input_panels(subject: Subject, layer: int) -> Iterable[tuple[str, str, dict[str, np.ndarray]]]:
    for name, found in subject.statistics.inputs.items():
        series = {"this model": found.absmax[layer]}
        if subject.before is not None and subject.before.inputs[name].absmax.shape == found.absmax.shape:
            series = {"before": subject.before.inputs[name].absmax[layer], **series}
        yield f"{INPUT_NAMES[name]}: largest |x|", "channel", series


def _weight_panels(subject: Subject, layer: int) -> Iterable[tuple[str, str, dict[str, np.ndarray]]]:
    prefix, effect = f"layers.{layer}.", subject.effect or {}
    for kind in LINEARS:
        for what in (what for what in effect if what.startswith(prefix) and what.endswith(f".{kind}")):
            name, moments = what.removeprefix(prefix), effect[what]
            yield f"weights of {name}: largest |w| of a column", "input channel", dict(moments)


def _key_panels(subject: Subject, layer: int) -> Iterable[tuple[str, str, dict[str, np.ndarray]]]:
    """Of the kv heads with the largest outliers."""
    stored = subject.statistics.keys[layer]
    series = {}
    if subject.before is not None:
        series["before"] = subject.before.keys[layer]
    elif subject.effect is not None and (moments := subject.effect.get(f"layers.{layer}.keys")) is not None:
        series["before (calibration text)"] = moments["before"]
    series["as stored"] = stored
    ratios = largest_to_median(next(iter(series.values())))
    heads = sorted(np.argsort(-ratios, kind="stable")[:_KEY_HEADS].tolist())
    for head in heads:
        title = f"keys of kv head {head} of {len(ratios)}, after RoPE: largest |k|"
        yield title, "channel (rotary pairs: i and i + H/2)", {name: x[head] for name, x in series.items()}


def _draw_channels(axes: Axes, title: str, x: str, series: Mapping[str, Float[np.ndarray, " K"]]) -> None:
    """Lines over channels, on a logarithmic axis: what matters are ratios between channels."""
    positive = np.concatenate([values[values > 0] for values in series.values()])
    floor = positive.min() / 2 if positive.size else 1.0
    for i, (label, values) in enumerate(series.items()):
        style = {name: STYLES[i][name] for name in ("color", "linestyle")}
        label = f"{label} ({largest_to_median(values):.3g})"
        drawn = _pooled(np.maximum(values, floor)[None])[0]
        places = np.linspace(0, len(values) - 1, len(drawn))
        axes.plot(places, drawn, label=label, linewidth=1.8 - 0.7 * i, drawstyle="steps-mid", **style)
    _dress(axes, title, x, log=True)
    axes.margins(x=0.01, y=0.3)
    axes.legend(loc="upper left", ncols=len(series), fontsize=8, framealpha=0.85)


def _dress(axes: Axes, title: str, x: str, *, log: bool) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    if log:
        axes.set_yscale("log")
        _label_plainly(axes)
    axes.tick_params(labelsize=8, which="both")
    axes.grid(alpha=0.3)


class _PlainNumbers(LogFormatter):
    """Labels the ticks that a LogFormatter labels, as 0.5 and 2000."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _label_plainly(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(_PlainNumbers())
    axes.yaxis.set_minor_formatter(_PlainNumbers(minor_thresholds=(1, 0.4)))


def _over_median(magnitudes: Float[np.ndarray, "L *heads K"]) -> Float[np.ndarray, "L channels"]:
    """Each channel over the median of its row (of its kv head, where there are several)."""
    median = np.median(magnitudes, axis=-1, keepdims=True)
    ratios = magnitudes / np.where(median > 0, median, 1)
    return ratios.reshape(len(magnitudes), -1)


def _pooled(rows: Float[np.ndarray, "rows K"]) -> Float[np.ndarray, "rows columns"]:
    """At most ``_COLUMNS`` columns, each the largest of neighbours: what stands out is never left out."""
    if rows.shape[1] <= _COLUMNS:
        return rows
    begins = np.linspace(0, rows.shape[1], _COLUMNS, endpoint=False).astype(int)
    return np.maximum.reduceat(rows, begins, axis=1)
