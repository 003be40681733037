"""Tensors in safetensors and PyTorch files: what a file holds, then its tensors one by one.

Nothing is ever unpickled: PyTorch's files go through torch's weights-only loader, and need torch installed.
"""

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import safe_open

from fireq_jax.config_fields import quote

# As safetensors spell them, which NumPy alone does not know all of.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_TORCH_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip


class StoredTensor(NamedTuple):
    """Where a tensor is, and what.

    Attributes:
        path: its file.
        name: in the file.
        shape: in elements.
        dtype: as safetensors spell it, "F32", "BF16" ...
        start: of its bytes in a safetensors file.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int = 0


def tensors_in(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, or of a PyTorch file (whatever else its name ends in), by name.

    Raises:
        ValueError: naming the file, if it is damaged, or a PyTorch file with anything but plain tensors.
    """
    if path.suffix != ".safetensors":
        tensors = _load_torch_file(path)
        return {
            name: StoredTensor(path, name, tuple(tensor.shape), _torch_dtype(tensor))
            for name, tensor in tensors.items()
        }
    try:
        with safe_open(path, framework="numpy") as file:  # checks the header, and the file's size by it
            file.keys()
        entries, start = _read_header(path)
    except Exception as error:  # safetensors has its own, and passes on others
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    found = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        if dtype == "F4" and shape and shape[-1] % 2 == 0:  # two to a byte, as most formats say of them
            shape, dtype = (*shape[:-1], shape[-1] // 2), "U8"
        found[name] = StoredTensor(path, name, shape, dtype, start + entry["data_offsets"][0])
    return found


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where their bytes begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


class TensorReader:
    """Reads tensors; of PyTorch files, which are opened as a whole, it keeps the last one."""

    def __init__(self) -> None:
        self._torch_file: tuple[Path, Mapping[str, Any]] | None = None

    def read(self, tensor: StoredTensor, rows: slice | None = None) -> np.ndarray:
        """A tensor, or some of its rows, in the dtype of the file."""
        path, name = tensor.path, tensor.name
        if path.suffix == ".safetensors":
            return _read_bytes(tensor, rows)
        if self._torch_file is None or self._torch_file[0] != path:
            self._torch_file = (path, _load_torch_file(path))
        values = self._torch_file[1][name]
        return _torch_to_numpy(values if rows is None else values[rows])


def _read_bytes(tensor: StoredTensor, rows: slice | None) -> np.ndarray:
    """From a safetensors file, whose own reader for NumPy does not know 8-bit floats."""
    if tensor.dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise ValueError(f"tensor {tensor.name} in {tensor.path} has dtype {tensor.dtype}; expected one of {known}")
    dtype, shape, start = DTYPES[tensor.dtype], tensor.shape, tensor.start
    if rows is not None:
        first, last, _ = rows.indices(shape[0])
        start += first * math.prod(shape[1:]) * dtype.itemsize
        shape = (max(last - first, 0), *shape[1:])
    try:
        values = np.fromfile(tensor.path, np.uint8, math.prod(shape) * dtype.itemsize, offset=start)
    except OSError as error:
        raise ValueError(f"{tensor.path} cannot be read: {error.strerror or error}") from error
    if values.size != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{tensor.path} is not a readable safetensors file: it ends inside tensor {tensor.name}")
    return values.view(dtype).reshape(shape)


def _load_torch_file(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a PyTorch file and torch is not installed; pip install 'fireq-jax[torch]', "
            "or convert the checkpoint to safetensors"
        ) from error
    try:
        # Files in the format of before torch 1.6 are not zip archives, and cannot be mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        reason = str(error).partition("\n")[0]  # advice follows, to load it and run its code
        raise ValueError(f"{path} cannot be read as plain PyTorch weights: {reason}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}; expected tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"{path} holds something under the key {quote(name)}; expected tensors by name")
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} in {path} is a {type(tensor).__name__}; expected a tensor")
        plain = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)
        if not plain:
            kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else "meta"
            kind = kind if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch.")
            raise ValueError(f"{name} in {path} is a {kind} tensor; expected a plain one")
    return tensors


def _torch_dtype(tensor: Any) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return _TORCH_DTYPES.get(name, name)


def _torch_to_numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().resolve_neg().contiguous()
    if _torch_dtype(tensor) not in DTYPES:
        return tensor.numpy()
    octets = tensor.reshape(-1).view(torch.uint8).numpy()
    return octets.view(DTYPES[_torch_dtype(tensor)]).reshape(tuple(tensor.shape))
