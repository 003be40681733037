"""Attention of a prompt over the INT4 cache: read config, launch, prepare, kernel, mainloop."""
