"""Quantized Llama inference in JAX: INT4 weights, FP8 activations, INT4 keys and values."""

from fireq_jax.generation import generate
from fireq_jax.models import LlamaForCausalLM, ModelConfig
from fireq_jax.quantization import QuantizationConfig, recipes

__all__ = ["LlamaForCausalLM", "ModelConfig", "QuantizationConfig", "generate", "recipes"]
