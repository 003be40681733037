"""A chain of matmuls for few tokens as one kernel; ``kernel`` describes it."""
