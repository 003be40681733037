"""Attention of a few queries over the INT4 cache: read config, launch, kernel, mainloop, epilogue."""
