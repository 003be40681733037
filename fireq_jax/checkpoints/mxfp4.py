"""gpt-oss as it is published: ``quant_method`` "mxfp4", with all experts' matrices in one tensor."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fireq_jax.checkpoints.packing import unpack_nibbles
from fireq_jax.checkpoints.storage import MX_GROUP, Part, QuantizedFormat, Shape, mx_weight
from fireq_jax.models.coded_weight import CodedKind, CodedWeight


def read_format(fields: Mapping[str, Any]) -> QuantizedFormat:
    """There is one form, and nothing to choose."""
    storage = StackedStorage()
    return QuantizedFormat("mxfp4", lambda layer: storage)


@dataclasses.dataclass(frozen=True)
class StackedStorage:
    """E2M1 in groups of 32 with scales 2^(e - 127); matrices are [N, K], where floats would be [K, N]."""

    @property
    def kind(self) -> CodedKind | None:
        """FP8, in which such numbers are exact."""
        return CodedKind("fp8", None)

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Groups of 16 bytes, the first weight of each in its low half, and their exponents; ``shape`` is [E, K, N]."""
        if len(shape) != 3 or shape[1] % MX_GROUP:
            raise ValueError(f"the weight has shape {shape}; expected experts' matrices of whole groups of {MX_GROUP}")
        count, k, n = shape
        groups = k // MX_GROUP
        return {
            "_blocks": Part(((count, n, groups, MX_GROUP // 2),), ("U8",)),
            "_scales": Part(((count, n, groups),), ("U8", "F8_E8M0")),
        }

    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> CodedWeight:
        """As FP8 [E, N, K]."""
        count, k, n = shape
        codes = unpack_nibbles(parts["_blocks"].reshape(count * n, -1)).reshape(count, n, k)
        return mx_weight(codes, parts["_scales"].view(np.uint8))
