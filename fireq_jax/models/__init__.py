"""Flax (nnx) models of Llama and its relatives."""

from fireq_jax.models.config import ModelConfig, RopeConfig
from fireq_jax.models.kv_cache import KVCache
from fireq_jax.models.llama import AutoModelForCausalLM, CausalLM, LlamaForCausalLM

__all__ = ["AutoModelForCausalLM", "CausalLM", "KVCache", "LlamaForCausalLM", "ModelConfig", "RopeConfig"]
