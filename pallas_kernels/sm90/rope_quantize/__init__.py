"""RoPE, quantization and append to the cache."""
