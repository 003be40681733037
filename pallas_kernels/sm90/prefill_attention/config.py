"""How the prefill kernel cuts its work, and which operands it takes."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.formats import ScaledArray
from pallas_kernels.sm90.attention.operands import unsupported_operands

BLOCK_Q = 64  # queries of a warpgroup: WGMMA's M
WARPGROUPS = 2  # consumers of a thread block; a third would leave each too few registers
PRODUCT_KEYS = 64  # keys of a product P V where a tile's are two, and so the width of V's swizzled tiles
# Columns of P V that hold the softmax's sums, and how much finer the unit of each is than that of the one before.
SUM_COLUMNS, SUM_STEP = 8, 8.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile configuration of the prefill kernel.

    Attributes:
        pipeline: how products and softmax overlap (see ``launch``): 1, or 2 for head_dim up to 128.
        block_kv: keys of a tile: 64 or 128; pipeline 2 needs 128.
        stages: tiles in the shared-memory ring, at least 2.
    """

    pipeline: int = 2
    block_kv: int = 128
    stages: int = 3

    def __post_init__(self):
        if self.pipeline not in (1, 2):
            raise ValueError(f"pipeline is {self.pipeline}; expected 1 or 2")
        if self.block_kv not in (64, 128):
            raise ValueError(f"block_kv is {self.block_kv}; expected 64 or 128")
        if self.pipeline == 2 and self.block_kv != 128:
            raise ValueError(f"block_kv is {self.block_kv}; expected 128 in pipeline 2")
        if self.stages < 2:
            raise ValueError(f"stages is {self.stages}; expected at least 2")

    @property
    def sum_columns(self) -> int:
        """Columns of V that the softmax's denominators take."""
        return SUM_COLUMNS if self.pipeline == 2 else 0


def default_config(head_dim: int) -> Config:
    """Pipeline 2; a head of 256 leaves no registers for it."""
    return Config(pipeline=1, block_kv=64) if head_dim == 256 else Config()


def unsupported(
    query: ScaledArray, key: ScaledArray, value: ScaledArray, scale: float, out_dtype: jax.typing.DTypeLike
) -> str | None:
    """Why the kernel cannot run these operands, or None."""
    if jnp.dtype(out_dtype) != jnp.bfloat16:
        return f"out_dtype is {jnp.dtype(out_dtype)}, not bfloat16"
    if scale <= 0:
        return f"scale is {scale}, not positive"
    return unsupported_operands(query, key, value)
