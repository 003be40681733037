"""Quantized inference of Llama and its relatives in JAX: INT4 weights, FP8 activations, INT4 keys and values."""

from fireq_jax.checkpoints.tokenizer import load_tokenizer
from fireq_jax.generation import TextStream, generate, stream, token_logprobs, warmup
from fireq_jax.models import AutoModelForCausalLM, KVCache, LlamaForCausalLM, ModelConfig, config_from_huggingface
from fireq_jax.quantization import QuantizationConfig, recipes
from fireq_jax.version import __version__

__all__ = [
    "AutoModelForCausalLM",
    "KVCache",
    "LlamaForCausalLM",
    "ModelConfig",
    "QuantizationConfig",
    "TextStream",
    "__version__",
    "config_from_huggingface",
    "generate",
    "load_tokenizer",
    "recipes",
    "stream",
    "token_logprobs",
    "warmup",
]
