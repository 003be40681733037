"""Sizes of an H100 or H200 (SXM)."""

NUM_SMS = 132  # streaming multiprocessors
SMEM_BYTES = 227 * 1024  # the most shared memory of a thread block
