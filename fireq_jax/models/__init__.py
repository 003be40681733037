"""Flax (nnx) Llama models."""

from fireq_jax.models.config import ModelConfig, RopeConfig
from fireq_jax.models.kv_cache import KVCache
from fireq_jax.models.llama import LlamaForCausalLM

__all__ = ["KVCache", "LlamaForCausalLM", "ModelConfig", "RopeConfig"]
