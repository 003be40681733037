"""Checkpoints of bitsandbytes: ``quant_method`` "bitsandbytes", in 4 bits (NF4 or FP4) or in 8."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fireq_jax.checkpoints.packing import unpack_nibbles
from fireq_jax.checkpoints.storage import Part, QuantizedFormat, Shape, Storage, matrix
from fireq_jax.config_fields import is_a, mapping, quote
from fireq_jax.models.coded_weight import CodedKind

_NESTED = (".weight.nested_absmax", ".weight.nested_quant_map")
_STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")


def read_format(fields: Mapping[str, Any]) -> QuantizedFormat:
    """What ``quantization_config`` says.

    Raises:
        ValueError: naming the key, for what cannot be read here.
    """
    loads = {bits: fields.get(f"load_in_{bits}bit") or fields.get(f"_load_in_{bits}bit") for bits in (4, 8)}
    if bool(loads[4]) == bool(loads[8]):
        raise ValueError(f"load_in_4bit is {quote(loads[4])} and load_in_8bit {quote(loads[8])}; expected one of them")
    storage: Storage = Bits4Storage() if loads[4] else Bits8Storage()
    return QuantizedFormat("bitsandbytes", lambda layer: storage)


@dataclasses.dataclass(frozen=True)
class Bits4Storage:
    """Numbers of a table of 16, two a byte, the first in its high half; blocks of the flattened matrix share a scale.

    These may be numbers of a table of 256 in turn.
    """

    kind: CodedKind | None = None

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Codes, tables, scales, and a JSON text as bytes."""
        n, k = matrix(shape)
        half = -(-n * k // 2)
        return {
            ".weight": Part(((half, 1), (1, half)), ("U8",)),
            ".weight.absmax": Part((), ("F32", "U8")),
            ".weight.quant_map": Part(((16,),), ("F32",)),
            _NESTED[0]: Part((), ("F32",), optional=True),
            _NESTED[1]: Part(((256,),), ("F32",), optional=True),
            **{state: Part((), ("U8",), optional=True) for state in _STATES},
        }

    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
        """Looked up, and multiplied by their scales."""
        n, k = matrix(shape)
        state = next((parts[name] for name in _STATES if name in parts), None)
        if state is None:
            raise ValueError("weight.quant_state is missing; expected the JSON text that is saved beside codes")
        fields = mapping(json.loads(state.tobytes()), "quant_state")
        if fields.get("shape") != [n, k]:
            raise ValueError(f"the shape in quant_state is {quote(fields.get('shape'))}; expected {[n, k]}")
        block, scale = fields.get("blocksize"), parts[".weight.absmax"]
        if scale.dtype == np.uint8:
            scale = _nested(scale, parts, fields)
        octets = parts[".weight"].reshape(1, -1)
        codes = unpack_nibbles(octets << 4 | octets >> 4)[0, : n * k]
        weight = parts[".weight.quant_map"][codes] * _each(scale, block, n * k, "absmax")
        return weight.reshape(n, k).astype(np.float32)


def _nested(scale: np.ndarray, parts: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> np.ndarray:
    """Scales that are numbers of a table, in float32."""
    if missing := [name for name in _NESTED if name not in parts]:
        raise ValueError(f"{missing[0][1:]} is missing; expected it, for absmax is quantized")
    above, table = (parts[name] for name in _NESTED)
    if not is_a(offset := fields.get("nested_offset", 0), float):
        raise ValueError(f"nested_offset in quant_state is {quote(offset)}; expected a number")
    each = _each(above, fields.get("nested_blocksize"), scale.size, "nested_absmax")
    return table[scale.reshape(-1)] * each + np.float32(offset)


def _each(scale: np.ndarray, block: Any, count: int, name: str) -> np.ndarray:
    """The scale of each of ``count`` numbers."""
    if not is_a(block, int) or block < 1 or scale.size != -(-count // block):
        raise ValueError(f"{name} has {scale.size} numbers, for {count} in blocks of {quote(block)}")
    return np.repeat(scale.reshape(-1), min(block, count))[:count]


@dataclasses.dataclass(frozen=True)
class Bits8Storage:
    """Integers of 8 bits, 127 of which stand for a row's largest number."""

    kind: CodedKind | None = None

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Codes, the largest numbers, and in what order the codes are."""
        n, k = matrix(shape)
        return {
            ".weight": Part(((n, k),), ("I8",)),
            ".SCB": Part(((n,),), ("F32",)),
            ".weight_format": Part(((),), ("U8",), optional=True),
        }

    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
        """Multiplied by their scales."""
        if (order := int(parts.get(".weight_format", np.zeros(())))) != 0:
            raise ValueError(f"weight_format is {order}; expected 0, rows: save the model with a current bitsandbytes")
        return parts[".weight"].astype(np.float32) * (parts[".SCB"] / np.float32(127))[:, None]
