"""What an H100 or H200 (SXM) has."""

NUM_SMS = 132
# Shared memory that a thread block can have.
SMEM_BYTES = 227 * 1024
