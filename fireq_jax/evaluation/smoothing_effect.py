"""What smoothing did to a converted model, as its folder says: channel maxima of weights and keys."""

import re
from pathlib import Path

import numpy as np

# "layers.0.mlp.down_proj" or "layers.0.keys" -> "before" and so on -> [K], or of keys [kv_heads, H].
SmoothingEffect = dict[str, dict[str, np.ndarray]]
_FILE = "smoothing.npz"
_MOMENTS = ("before", "after")
_KEY_MOMENTS = ("before", "pre_rope", "post_rope")
_NAME = re.compile(
    r"(?P<what>layers\.[0-9]{1,5}\.(keys|(self_attn\.(qkv|o)|mlp\.(experts\.)?(gate_up|down))_proj))\.(?P<moment>[a-z_]+)"
)


def was_smoothed(model: Path) -> bool:
    """Whether a model's folder says what smoothing did."""
    return (model / _FILE).is_file()


def read_smoothing(model: str | Path) -> SmoothingEffect:
    """What ``smoothing.npz`` in a converted folder holds: magnitudes by name.

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
