"""What the attention kernels share: checks of their operands, the softmax's units, and INT4 codes in registers."""
