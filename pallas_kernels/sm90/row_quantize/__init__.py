"""Rows to FP8, plain or after a norm; rows may come as split-K partials or as decode attention's splits."""
