"""Jitted text generation."""
