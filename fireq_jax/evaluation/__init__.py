"""Perplexity and reports."""

from fireq_jax.evaluation.perplexity import PerplexityResult, perplexity

__all__ = ["PerplexityResult", "perplexity"]
