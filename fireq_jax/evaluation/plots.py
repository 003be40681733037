"""Figures that show what smoothing does: channel maxima of weights and keys before and after.

All functions take plain arrays and write a picture; they need no display and leave pyplot's
global state alone.
"""

import re
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Blue, orange and green that stay distinct in the common forms of colour blindness.
_COLORS = ("#0072B2", "#E69F00", "#009E73")
# "layers.0.mlp.down_proj" or "layers.0.keys" -> "before" and so on -> [K], or of keys [kv_heads, H].
SmoothingEffect = dict[str, dict[str, np.ndarray]]
_FILE = "smoothing.npz"
_MOMENTS = ("before", "after")
_KEY_MOMENTS = ("before", "pre_rope", "post_rope")
_NAME = re.compile(
    r"(?P<what>layers\.[0-9]{1,5}\.(keys|(self_attn\.(qkv|o)|mlp\.(gate_up|down))_proj))\.(?P<moment>[a-z_]+)"
)


def plot_channel_absmax(
    before: Float[np.ndarray, " K"], after: Float[np.ndarray, " K"], title: str, path: str | Path
) -> None:
    """Largest magnitude of each input channel of a weight (its columns) before and after smoothing.

    Args:
        before, after: [K], not negative. Zeros are drawn at the lower edge of the logarithmic axis.
        title: heading of the figure.
        path: file to write; its suffix chooses the format (.png, .pdf, .svg).

    Raises:
        ValueError: if the arrays are not [K] each, or hold negative or non-finite values.
    """
    arrays = [_checked(name, array, 1) for name, array in (("before", before), ("after", after))]
    _check_same_shape(arrays)
    figure, axes = _figure(title, panels=1)
    _draw(axes[0], dict(zip(("before", "after"), arrays, strict=True)))
    axes[0].set_xlabel("input channel")
    axes[0].set_ylabel("absmax")
    figure.savefig(path)


def plot_keys(
    before: Float[np.ndarray, "kv_heads H"],
    after_pre_rope: Float[np.ndarray, "kv_heads H"],
    after_post_rope: Float[np.ndarray, "kv_heads H"],
    title: str,
    path: str | Path,
) -> None:
    """Largest magnitude of each rotated key channel without scaling, with N, and with N and S.

    One panel a kv head; channels i and i + H/2 are a rotary pair.

    Args:
        before, after_pre_rope, after_post_rope: [kv_heads, H], not negative.
        title: heading of the figure.
        path: file to write; its suffix chooses the format.

    Raises:
        ValueError: if the arrays are not [kv_heads, H] each, or hold negative or non-finite values.
    """
    names = ("before", "after_pre_rope", "after_post_rope")
    arrays = [
        _checked(name, array, 2) for name, array in zip(names, (before, after_pre_rope, after_post_rope), strict=True)
    ]
    _check_same_shape(arrays)
    kv_heads, head_dim = arrays[0].shape
    figure, axes = _figure(title, panels=kv_heads)
    for head, panel in enumerate(axes):
        _draw(panel, {label: array[head] for label, array in zip(("before", "N", "N and S"), arrays, strict=True)})
        panel.axvline((head_dim - 1) / 2, color="gray", linewidth=0.8, linestyle=":")
        panel.set_ylabel(f"absmax, kv head {head}")
    axes[-1].set_xlabel("key channel after RoPE (pairs: i and i + H/2)")
    figure.savefig(path)


def was_smoothed(model: Path) -> bool:
    """Whether a model's folder says what smoothing did."""
    return (model / _FILE).is_file()


def read_smoothing(model: str | Path) -> SmoothingEffect:
    """What ``smoothing.npz`` in a converted folder holds: magnitudes by name, as :func:`plot_smoothing` draws them.

    Raises:
        ValueError: naming the file, if it is missing (the model's recipe does not smooth), unreadable, or holds
            other arrays.
    """
    path = Path(model) / _FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; only a converted model whose recipe smooths can be plotted")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zip's, zlib's and numpy's own, MemoryError for absurd shapes
        raise ValueError(f"{path} cannot be read: {error}; expected arrays as fireq-convert writes them") from error
    effect: SmoothingEffect = {}
    for name, array in arrays.items():
        if (known := _NAME.fullmatch(name)) is None:
            raise ValueError(f"{path} holds {name!r}; expected names such as 'layers.0.mlp.down_proj.before'")
        effect.setdefault(known["what"], {})[known["moment"]] = array
    for what, moments in effect.items():
        is_keys = what.endswith("keys")
        expected = _KEY_MOMENTS if is_keys else _MOMENTS
        if set(moments) != set(expected):
            raise ValueError(f"{path} holds {sorted(moments)} of {what}; expected {', '.join(expected)}")
        try:
            _check_same_shape([_checked(f"{what}.{name}", moments[name], 2 if is_keys else 1) for name in expected])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {what}: {error}") from error
    return effect


def plot_smoothing(effect: SmoothingEffect, folder: str | Path) -> list[Path]:
    """All figures of a converted model: each linear layer's inputs and each layer's keys.

    Args:
        effect: what :func:`read_smoothing` found.
        folder: where the pictures go, ``<layer>.<what>.png``; made if it does not exist.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for what, moments in sorted(effect.items()):
        paths.append(folder / f"{what}.png")
        if what.endswith("keys"):
            before, pre_rope, post_rope = (moments[name] for name in _KEY_MOMENTS)
            plot_keys(before, pre_rope, post_rope, what, paths[-1])
        else:
            before, after = (moments[name] for name in _MOMENTS)
            plot_channel_absmax(before, after, what, paths[-1])
    return paths


def _figure(title: str, panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, 1 + 2.6 * panels), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0].tolist()
    figure.suptitle(title)
    return figure, axes


def _draw(axes: Axes, series: dict[str, np.ndarray]) -> None:
    """Lines over channel indices, on a logarithmic axis: what matters are ratios between channels."""
    positive = np.concatenate([values[values > 0] for values in series.values()])
    floor = positive.min() / 2 if positive.size else 1.0
    # Later series are thinner, so that an earlier one shows where they coincide.
    for i, (label, values) in enumerate(series.items()):
        label = f"{label} (max/min {_imbalance(values):.3g})"
        drawn = np.maximum(values, floor)
        axes.plot(drawn, label=label, color=_COLORS[i], linewidth=2.4 - 0.7 * i, drawstyle="steps-mid")
    axes.set_yscale("log")
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    # Above the panel, where it cannot cover an outlier.
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(series), fontsize=8, frameon=False)


def _imbalance(values: np.ndarray) -> float:
    """Largest over smallest positive value; 1 if there are none."""
    positive = values[values > 0]
    return float(positive.max() / positive.min()) if positive.size else 1.0


def _checked(name: str, array: np.ndarray, ndim: int) -> np.ndarray:
    array = np.asarray(array, np.float64)
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; expected {'[K]' if ndim == 1 else '[kv_heads, H]'}")
    if not np.isfinite(array).all() or array.min() < 0:
        raise ValueError(f"{name} has negative or non-finite values; expected magnitudes")
    return array


def _check_same_shape(arrays: list[np.ndarray]) -> None:
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1:
        raise ValueError(f"arrays have shapes {shapes}; expected the same")
