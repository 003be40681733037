"""Which quantized format a checkpoint folder is in, and where each of its layers' tensors are."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fireq_jax.checkpoints import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4
from fireq_jax.checkpoints.storage import QuantizedFormat, Shape, Storage
from fireq_jax.checkpoints.tensor_files import StoredTensor
from fireq_jax.config_fields import mapping, quote
from fireq_jax.json_files import errors_name, is_file, read_json
from fireq_jax.models.coded_weight import CodedWeight

_METHODS: Mapping[str, Callable[[Mapping[str, Any]], QuantizedFormat]] = {
    "compressed-tensors": compressed_tensors.read_format,
    "gptq": gptq.read_format,
    "awq": awq.read_format,
    "fp8": fp8.read_fp8,
    "fbgemm_fp8": fp8.read_fbgemm,
    "modelopt": fp8.read_modelopt,
    "mxfp4": mxfp4.read_format,
    "bitsandbytes": bitsandbytes.read_format,
}
# Of folders whose config.json says nothing.
_SIDECARS = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
# What says how a checkpoint is stored.
FORMAT_FILES = ("config.json", *_SIDECARS)


def quantized_format(folder: Path, fields: Mapping[str, Any]) -> QuantizedFormat | None:
    """The format that a folder says it is in, None of a float checkpoint.

    Args:
        folder: of the checkpoint.
        fields: its ``config.json``.

    Raises:
        ValueError: naming the file and the key, for a format that cannot be read here.
    """
    for key in ("quantization_config", "compression_config"):
        if fields.get(key) is not None:
            with errors_name(folder / "config.json"):
                return _read(mapping(fields[key], key), key, None)
    for file, method in _SIDECARS.items():
        if is_file(path := folder / file):
            with errors_name(path):
                said = read_json(path)
                return _read(mapping(said.get("quantization", said), "quantization"), file, method)
    return None


def _read(fields: Mapping[str, Any], key: str, otherwise: str | None) -> QuantizedFormat:
    method = fields.get("quant_method", otherwise)
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(f"quant_method is {quote(method)}; expected one of {', '.join(_METHODS)}")
    try:
        return _METHODS[method](fields)
    except ValueError as error:
        raise ValueError(f"{key} ({method}): {error}") from error


@dataclasses.dataclass(frozen=True)
class StoredLinear:
    """A weight in a quantized format.

    Attributes:
        name: of the weight in a float checkpoint.
        shape: likewise.
        storage: how it is stored.
        parts: where, by what follows the layer's name.
    """

    name: str
    shape: Shape
    storage: Storage
    parts: Mapping[str, StoredTensor]

    @property
    def path(self) -> Path:
        """A file that it is in."""
        return next(iter(self.parts.values())).path

    @classmethod
    def find(
        cls, name: str, shape: Shape, found: QuantizedFormat, tensors: Mapping[str, StoredTensor]
    ) -> "StoredLinear | None":
        """The weight called ``name``, None if no part of it is there.

        Raises:
            ValueError: naming a part that is missing or of another shape or dtype.
        """
        if len(shape) < 2:  # gains and biases are floats in all formats
            return None
        layer = name.removesuffix(".weight")
        storage = found.storage_of(layer)
        try:
            expected = storage.parts(shape)
        except ValueError as error:
            if not any(other.startswith(layer) for other in tensors):
                return None
            raise ValueError(f"tensor {name}, {found.name}: {error}") from error
        parts = {suffix: tensors[layer + suffix] for suffix in expected if layer + suffix in tensors}
        if not parts:
            return None
        linear = cls(name, shape, storage, parts)
        if missing := [suffix for suffix, part in expected.items() if suffix not in parts and not part.optional]:
            raise ValueError(
                f"tensor {layer}{missing[0]} is missing; {linear.path} has others of a {found.name} weight"
            )
        for suffix, tensor in parts.items():
            shapes, dtypes, _ = expected[suffix]
            where = f"tensor {tensor.name} in {tensor.path}"
            if shapes and tensor.shape not in shapes:
                wanted = " or ".join(map(str, shapes))
                raise ValueError(
                    f"{where} has shape {tensor.shape}; expected {wanted} of a weight {shape} in {found.name}"
                )
            if tensor.dtype not in dtypes:
                raise ValueError(f"{where} has dtype {tensor.dtype}; expected {' or '.join(dtypes)}")
        return linear

    def read(self, read: Callable[[StoredTensor], np.ndarray]) -> CodedWeight | np.ndarray:
        """Codes, or float32.

        Raises:
            ValueError: naming the weight and its file, if its parts contradict each other.
        """
        try:
            return self.storage.decode({suffix: read(tensor) for suffix, tensor in self.parts.items()}, self.shape)
        except ValueError as error:
            raise ValueError(f"tensor {self.name} in {self.path}: {error}") from error
