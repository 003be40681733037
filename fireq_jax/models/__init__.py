"""Flax (nnx) models of Llama and its relatives."""

from fireq_jax.models.architectures import config_from_huggingface
from fireq_jax.models.config import ExpertsConfig, ModelConfig, RopeConfig
from fireq_jax.models.kv_cache import KVCache
from fireq_jax.models.llama import AutoModelForCausalLM, CausalLM, LlamaForCausalLM

__all__ = [
    "AutoModelForCausalLM",
    "CausalLM",
    "ExpertsConfig",
    "KVCache",
    "LlamaForCausalLM",
    "ModelConfig",
    "RopeConfig",
    "config_from_huggingface",
]
