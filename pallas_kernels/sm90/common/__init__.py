"""What the Hopper kernels share: inline PTX, memory, barriers, reductions over a row, the chip's sizes."""
