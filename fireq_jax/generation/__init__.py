"""Jitted text generation."""

from fireq_jax.generation.generate import GenerationOutput, StreamStep, check_call, generate, stream, warmup
from fireq_jax.generation.sampling import SamplingConfig

__all__ = ["GenerationOutput", "SamplingConfig", "StreamStep", "check_call", "generate", "stream", "warmup"]
