"""Compiler options of functions that run a few times for each compilation."""

# XLA tunes a Triton matmul by compiling and timing dozens of it, which takes longer here than it saves. (A CPU
# ignores options of GPUs; JAX refuses options of a function that is called inside another jitted one.)
COMPILE_QUICKLY: dict[str, bool | str] = {"xla_gpu_enable_triton_gemm": False}
