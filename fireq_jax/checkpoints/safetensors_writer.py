"""Writes safetensors files tensor by tensor: what goes into them is planned first, and never in memory as a whole."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from fireq_jax.checkpoints.tensor_files import DTYPES
from fireq_jax.json_files import write_json
from fireq_jax.whole_files import write_whole

# Of a file, as transformers cuts them.
LARGEST_FILE = 5 * 10**9
_CODES = {dtype: name for name, dtype in DTYPES.items()}


class TensorSpec(NamedTuple):
    """What a tensor is going to be."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def shards_of(planned: Mapping[str, TensorSpec], largest: int = LARGEST_FILE) -> dict[str, dict[str, TensorSpec]]:
    """File name -> its tensors, in order: no file has more than ``largest`` bytes, unless of one tensor."""
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in planned.items():
        if shards[-1] and size + spec.nbytes > largest:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def write_shards(
    folder: Path, shards: Mapping[str, Mapping[str, TensorSpec]], tensors: Iterator[tuple[str, np.ndarray]]
) -> None:
    """Write files, and their index if they are several.

    Args:
        folder: an existing one.
        shards: file name -> its tensors.
        tensors: all of them, in the same order; taken one by one.

    Raises:
        ValueError: for a tensor that is none of those planned.
        OSError: naming the file that cannot be written.
    """
    for file, planned in shards.items():
        write_whole(folder / file, lambda out, planned=planned: _write(out, planned, tensors))
    if len(shards) > 1:
        total = sum(spec.nbytes for planned in shards.values() for spec in planned.values())
        weight_map = {name: file for file, planned in shards.items() for name in planned}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _write(out: IO[bytes], planned: Mapping[str, TensorSpec], tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without which transformers refuses a file
    start = 0
    for name, spec in planned.items():
        end = start + spec.nbytes
        header[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at whole words
    out.write(len(text).to_bytes(8, "little") + text)
    for name, spec in planned.items():
        found, array = next(tensors)
        if (found, array.shape, array.dtype) != (name, *spec):
            raise ValueError(f"tensor {found} is {array.dtype}{list(array.shape)}; expected {name}, {spec}")
        out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
