"""Perplexity, comparisons and plots."""

from fireq_jax.evaluation.comparison import Evaluation, Protocol, evaluate, format_table
from fireq_jax.evaluation.perplexity import PerplexityResult, perplexity

__all__ = ["Evaluation", "PerplexityResult", "Protocol", "evaluate", "format_table", "perplexity"]
