"""Quantization: configurations, recipes, smoothing and quantized weights."""

from fireq_jax.quantization import recipes
from fireq_jax.quantization.config import QuantizationConfig, SmoothingConfig
from pallas_kernels.codebooks import register_codebook
from pallas_kernels.quantized_tensor import QuantizedTensor

__all__ = ["QuantizationConfig", "QuantizedTensor", "SmoothingConfig", "recipes", "register_codebook"]
