"""Hopper (sm_90a) kernels in Pallas Mosaic GPU, one file or folder an op of the floor above."""
