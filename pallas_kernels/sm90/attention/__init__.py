"""Attention over the INT4 cache: prefill and decode."""
