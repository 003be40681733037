"""RoPE, quantization and append to the cache: read config, launch, kernel, registers."""
