"""Hopper (sm_90a) kernels in Pallas Mosaic GPU, one file or folder an op of the floor above."""

# Multiprocessors of an H100 or H200 (SXM).
NUM_SMS = 132
