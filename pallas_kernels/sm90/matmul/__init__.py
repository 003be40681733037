"""INT4 x FP8 and INT4 x BF16 matmul."""
