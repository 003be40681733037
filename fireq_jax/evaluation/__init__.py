"""Perplexity and reports."""
