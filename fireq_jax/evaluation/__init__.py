"""Perplexity, comparisons and plots."""

from fireq_jax.evaluation.comparison import Evaluation, evaluate, format_table
from fireq_jax.evaluation.perplexity import PerplexityResult, perplexity

__all__ = ["Evaluation", "PerplexityResult", "evaluate", "format_table", "perplexity"]
