"""Codes in the form of compressed-tensors, which other engines read.

The reader of the same form is ``fireq_jax.checkpoints.compressed_tensors``.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fireq_jax.checkpoints.packing import WORD, pack_words
from fireq_jax.checkpoints.safetensors_writer import TensorSpec
from fireq_jax.models.coded_weight import CodedWeight
from fireq_jax.quantization.config import QuantizationConfig

_INT32, _FLOAT32, _INT64 = np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.int64)
_GROUPS = (32, 64, 128)


@dataclasses.dataclass(frozen=True)
class PackedInt4:
    """Eight codes to a word, the first in its lowest bits, in offset binary; a float32 scale for each group.

    Attributes:
        group_size: inputs of a group; divides the kernels' groups and every layer's inputs.
    """

    group_size: int
    name: str = "pack-quantized"

    @property
    def description(self) -> str:
        """For people."""
        rare = "" if self.group_size in _GROUPS else ", a size that few engines have kernels for"
        return f"INT4 weights in groups of {self.group_size}{rare}"

    @property
    def arguments(self) -> dict[str, Any]:
        """What compressed-tensors calls the weights."""
        return {"num_bits": 4, "type": "int", "strategy": "group", "group_size": self.group_size}

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """What stands for a weight [N, K], by what follows the layer's name."""
        n, k = shape
        return {
            ".weight_packed": TensorSpec((n, -(-k // WORD)), _INT32),
            ".weight_scale": TensorSpec((n, k // self.group_size), _FLOAT32),
            ".weight_shape": TensorSpec((2,), _INT64),
        }

    def encode(self, weight: CodedWeight) -> dict[str, np.ndarray]:
        """The same of its codes; the scale of a group is its own times the channel's."""
        n, k = weight.shape
        assert weight.group_size is not None
        scale = np.repeat(weight.group_scale, weight.group_size // self.group_size, axis=1)
        return {
            ".weight_packed": pack_words(np.asarray(weight.values)),
            ".weight_scale": scale[:, : k // self.group_size] * weight.channel_scale[:, None],
            ".weight_shape": np.array([n, k], np.int64),
        }


@dataclasses.dataclass(frozen=True)
class Float8:
    """E4M3 weights, and a float32 scale for each output channel."""

    name: str = "float-quantized"

    @property
    def description(self) -> str:
        """For people."""
        return "FP8 weights by channel"

    @property
    def arguments(self) -> dict[str, Any]:
        """What compressed-tensors calls the weights."""
        return {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """What stands for a weight [N, K], by what follows the layer's name."""
        return {
            ".weight": TensorSpec(shape, np.dtype("float8_e4m3fn")),
            ".weight_scale": TensorSpec((shape[0], 1), _FLOAT32),
        }

    def encode(self, weight: CodedWeight) -> dict[str, np.ndarray]:
        """The same of its codes."""
        return {".weight": np.asarray(weight.values), ".weight_scale": np.asarray(weight.channel_scale)[:, None]}


Form = PackedInt4 | Float8


def forms_of(quantization: QuantizationConfig, inputs: Mapping[str, int]) -> dict[str, Form]:
    """The form of each quantized layer's weight, by the layer's name.

    Args:
        quantization: the recipe.
        inputs: K of the layers that are quantized.

    Raises:
        ValueError: for weights that compressed-tensors has no form of.
    """
    found = {name: quantization.weight_format_of(name) for name in inputs}
    for name, weight_format in found.items():
        if weight_format not in ("int4", "fp8"):
            raise ValueError(
                f"weight_format of {name} is {weight_format!r}; compressed-tensors has a form of 'int4' and 'fp8' "
                "only: use --format huggingface"
            )
    packed = PackedInt4(math.gcd(quantization.group_size, *(inputs[name] for name in found if found[name] == "int4")))
    return {name: packed if weight_format == "int4" else Float8() for name, weight_format in found.items()}


def compression_config(forms: Mapping[str, Form], ignore: list[str], *, fp8_rows: bool) -> dict[str, Any]:
    """``quantization_config`` of a config.json.

    A form that all have goes by the class of layers. Each of several lists its own layers: an engine that fuses some
    looks for the names of their parts only where no class fits.

    Args:
        forms: of the weights, by the checkpoint's names of the layers.
        ignore: names of linear layers that are floats.
        fp8_rows: whether activations are rounded to FP8, token by token.
    """
    rows = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    different = list(dict.fromkeys(forms.values()))
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(different) == 1 else [name for name in forms if forms[name] == form],
            "weights": {**form.arguments, "symmetric": True, "dynamic": False},
            "input_activations": rows if fp8_rows else None,
            "output_activations": None,
            "format": form.name,
        }
        for i, form in enumerate(different)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": different[0].name if len(different) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
