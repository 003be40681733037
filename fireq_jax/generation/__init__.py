"""Jitted text generation."""

from fireq_jax.generation.generate import GenerationOutput, StreamStep, check_call, generate, stream, warmup
from fireq_jax.generation.likelihood import token_logprobs
from fireq_jax.generation.options import GenerationOptions, LogitsProcessor, Options
from fireq_jax.generation.sampling import SamplingConfig
from fireq_jax.generation.text import TextStream

__all__ = [
    "GenerationOptions",
    "GenerationOutput",
    "LogitsProcessor",
    "Options",
    "SamplingConfig",
    "StreamStep",
    "TextStream",
    "check_call",
    "generate",
    "stream",
    "token_logprobs",
    "warmup",
]
