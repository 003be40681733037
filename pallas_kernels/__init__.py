"""Ops of quantized transformers in JAX: Pallas kernels for Hopper GPUs, plain ``jax.numpy`` elsewhere.

Each op takes ``implementation=`` (``dispatch``). The functions here have their modules' names: a module's other names
are imported from it, ``from pallas_kernels.matmul import matmul_reference``.
"""

from pallas_kernels.decode_attention import decode_attention, gather_pages
from pallas_kernels.decoder_layer import LayerWeights, after_attention, before_attention
from pallas_kernels.dispatch import Implementation
from pallas_kernels.formats import KVFormat, ScaledArray, dequantize, quantize_fp8, quantize_kv
from pallas_kernels.head_norm import HeadNorm
from pallas_kernels.matmul import matmul, unreduced_matmul
from pallas_kernels.norm import Norm
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.projection import Projection, project
from pallas_kernels.quantized_tensor import QuantizedTensor, quantize
from pallas_kernels.residual_stream import ResidualStream
from pallas_kernels.rope_quantize import rope_quantize
from pallas_kernels.row_quantize import post_norm_quantize, quantize_rows, rms_norm_quantize, sum_norm_quantize
from pallas_kernels.split_k import SplitKPartials

__all__ = [
    "HeadNorm",
    "Implementation",
    "KVFormat",
    "LayerWeights",
    "Norm",
    "Projection",
    "QuantizedTensor",
    "ResidualStream",
    "ScaledArray",
    "SplitKPartials",
    "after_attention",
    "before_attention",
    "decode_attention",
    "dequantize",
    "gather_pages",
    "matmul",
    "post_norm_quantize",
    "prefill_attention",
    "project",
    "quantize",
    "quantize_fp8",
    "quantize_kv",
    "quantize_rows",
    "rms_norm_quantize",
    "rope_quantize",
    "sum_norm_quantize",
    "unreduced_matmul",
]
