"""Named recipes: presets of :class:`QuantizationConfig`, one function each."""

import inspect
from collections.abc import Callable

from fireq_jax.quantization.config import QuantizationConfig, SmoothingConfig


def fireq() -> QuantizationConfig:
    """The paper's W4A8KV4: FP8 group scales under a per-tensor power of two, Lambda1-3, N and S."""
    return QuantizationConfig(channel_scale="per_tensor_pow2", smoothing=SmoothingConfig())


def fireq_plus() -> QuantizationConfig:
    """``fireq``'s bits and kernels, fewer errors: rotation, searched scales, GPTQ, fitted keys, balanced values."""
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
    """``fireq`` with bf16 group scales: INT4 goes to FP8 exactly and each group's sum is scaled."""
    return QuantizationConfig(scale_dtype="bf16", channel_scale="per_tensor_pow2", smoothing=SmoothingConfig())


def rtn() -> QuantizationConfig:
    """W4A8KV4 by round-to-nearest, without smoothing: the baseline."""
    return QuantizationConfig()


def w4a16() -> QuantizationConfig:
    """INT4 weights only; activations, keys and values stay as they are."""
    return QuantizationConfig(activation_format="none", kv_format="none", query_format="none")


def w8a8_fp8() -> QuantizationConfig:
    """FP8 weights per channel, FP8 activations per token; keys and values stay as they are."""
    return QuantizationConfig(weight_format="fp8", kv_format="none", query_format="none")


def none() -> QuantizationConfig:
    """Nothing quantized: the checkpoint in this project's form."""
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
        lines = [f"{known}: {(inspect.getdoc(recipe) or '').splitlines()[0]}" for known, recipe in RECIPES.items()]
        raise ValueError(f"recipe is {name!r}; expected one of\n  " + "\n  ".join(lines))
    return RECIPES[name]()
