"""Quantized inference of Llama and its relatives in JAX: INT4 weights, FP8 activations, INT4 keys and values."""

from fireq_jax.generation import generate, stream
from fireq_jax.models import AutoModelForCausalLM, LlamaForCausalLM, ModelConfig
from fireq_jax.quantization import QuantizationConfig, recipes

__all__ = [
    "AutoModelForCausalLM",
    "LlamaForCausalLM",
    "ModelConfig",
    "QuantizationConfig",
    "generate",
    "recipes",
    "stream",
]
