"""Named recipes: presets of :class:`QuantizationConfig`, one function each; and recipes in JSON files.

The first line of a recipe's docstring says what it is, and the next paragraph when to take it.
"""

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fireq_jax.config_fields import check_names, mapping, quote
from fireq_jax.json_files import errors_name, read_json
from fireq_jax.quantization.config import QuantizationConfig, SmoothingConfig


def fireq() -> QuantizationConfig:
    """The paper's W4A8KV4: FP8 group scales under a per-tensor power of two, Lambda1-3, N and S.

    To compare with FireQ's numbers; reads calibration text, and is converted faster than fireq_plus.
    """
    return QuantizationConfig(channel_scale="per_tensor_pow2", smoothing=SmoothingConfig())


def fireq_plus() -> QuantizationConfig:
    """``fireq``'s bits and kernels, fewer errors: rotation, searched scales, GPTQ, fitted keys, balanced values.

    The one to begin with: least loss in 4 bits, as fast and small as fireq; reads calibration text.
    """
    return QuantizationConfig(
        rounding="table",
        scale_search=True,
        error_compensation=True,
        calibration_stream="quantized",
        key_clip=0.97,
        value_clip=0.91,
        unbiased_keys=True,
        smoothing=SmoothingConfig(
            residual_basis="hadamard",
            pair_statistic="rms",
            query_exponent=0.25,
            post_rope_channels=0,
            key_offset=True,
            fit_pairs=True,
            value_basis="balanced",
        ),
    )


def fireq_bf16_scales() -> QuantizationConfig:
    """``fireq`` with bf16 group scales: INT4 goes to FP8 exactly and each group's sum is scaled.

    For export to other engines, which then have the same weights; slower kernels than fireq's.
    """
    return QuantizationConfig(scale_dtype="bf16", channel_scale="per_tensor_pow2", smoothing=SmoothingConfig())


def rtn() -> QuantizationConfig:
    """W4A8KV4 by round-to-nearest, without smoothing: the baseline.

    Without calibration text, in minutes; or where there is too little text to calibrate on.
    """
    return QuantizationConfig()


def w4a16() -> QuantizationConfig:
    """INT4 weights only; activations, keys and values stay as they are.

    For small batches, where memory traffic is all, or where FP8 activations cost too much; no text.
    """
    return QuantizationConfig(activation_format="none", kv_format="none", query_format="none")


def w8a8_fp8() -> QuantizationConfig:
    """FP8 weights per channel, FP8 activations per token; keys and values stay as they are.

    The least loss, at half of bf16's size; for large batches; no text.
    """
    return QuantizationConfig(weight_format="fp8", kv_format="none", query_format="none")


def none() -> QuantizationConfig:
    """Nothing quantized: the checkpoint in this project's form.

    For a reference that loads as fast as the quantized models do.
    """
    return QuantizationConfig(weight_format="none", activation_format="none", kv_format="none", query_format="none")


RECIPES: dict[str, Callable[[], QuantizationConfig]] = {
    recipe.__name__: recipe for recipe in (fireq, fireq_plus, fireq_bf16_scales, rtn, w4a16, w8a8_fp8, none)
}


def by_name(name: str) -> QuantizationConfig:
    """The recipe called ``name``.

    Raises:
        ValueError: if there is none; the message lists what each recipe is.
    """
    if name not in RECIPES:
        lines = [f"{known}: {_paragraphs(known)[0]}" for known in RECIPES]
        raise ValueError(f"recipe is {name!r}; expected a .json file or one of\n  " + "\n  ".join(lines))
    return RECIPES[name]()


def by_name_or_file(recipe: str) -> QuantizationConfig:
    """:func:`from_file` for what ends in ".json", else :func:`by_name`."""
    return from_file(Path(recipe)) if recipe.endswith(".json") else by_name(recipe)


def from_file(path: str | Path) -> QuantizationConfig:
    """A recipe in a JSON file: an object of :class:`QuantizationConfig`'s fields.

    With a key "base", the name of a recipe, others may lack: ``{"base": "fireq_plus", "group_size": 64}``. So may those
    of "smoothing" then, an object; null is none.

    Raises:
        ValueError: naming the file, for unknown, missing or invalid fields.
    """
    path = Path(path)
    fields = read_json(path)
    with errors_name(path):
        if "base" not in fields:
            try:
                return QuantizationConfig.from_dict(fields)
            except ValueError as error:
                raise ValueError(f'{error}; or a recipe to start from, as in "base": "fireq_plus"') from error
        base = fields.pop("base")
        if not isinstance(base, str):
            raise ValueError(f"base is {quote(base)}; expected the name of a recipe")
        return _changed(by_name(base), fields)


def _changed(base: QuantizationConfig, fields: Mapping[str, Any]) -> QuantizationConfig:
    check_names(QuantizationConfig, fields, may_lack=True)
    changes = dict(fields)
    if fields.get("smoothing") is not None:
        smoothing = mapping(fields["smoothing"], "smoothing")
        check_names(SmoothingConfig, smoothing, may_lack=True)
        changes["smoothing"] = dataclasses.replace(base.smoothing or SmoothingConfig(), **smoothing)
    return dataclasses.replace(base, **changes)


def described() -> str:
    """What each recipe is and when to take it, for people."""
    indent = " " * 21
    lines = [
        textwrap.fill(line, 110, initial_indent=f"{start:21}", subsequent_indent=indent)
        for name in RECIPES
        for start, line in zip((f"  {name}", ""), _paragraphs(name), strict=True)
    ]
    return "\n".join(lines)


def _paragraphs(name: str) -> list[str]:
    """What a recipe is, and when to take it."""
    text = (inspect.getdoc(RECIPES[name]) or "").replace("``", "")
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
