"""Where a model's tensors come from: what converting and loading ask of a checkpoint, whatever its files are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from fireq_jax.checkpoints.gguf import GGUFCheckpoint, read_gguf_config
from fireq_jax.checkpoints.gguf_file import find_gguf
from fireq_jax.checkpoints.huggingface import HuggingFaceCheckpoint, read_config
from fireq_jax.models.coded_weight import CodedKind, CodedWeight
from fireq_jax.models.config import ModelConfig


class CheckpointReader(Protocol):
    """A checkpoint that was checked against its config when it was opened, and is read a block at a time."""

    @property
    def config(self) -> ModelConfig:
        """The architecture, tied only if the stored tensors are."""
        ...

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        ...

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        ...

    @property
    def quantized(self) -> bool:
        """Whether the weights were quantized, whatever is handed out of them."""
        ...

    @property
    def coded(self) -> Mapping[str, CodedKind]:
        """The model's linear layers, as in ``models.block.linear_names``, of which ``block`` hands out codes.

        All parts of such a layer are coded alike; all others are floats. Empty for a float checkpoint.
        """
        ...

    def block(self, index: int) -> dict[str, np.ndarray | CodedWeight]:
        """All tensors of block ``index``, in the form that ``models.block`` describes.

        Who needs floats takes ``models.coded_weight.float32_block`` of it.
        """
        ...

    def global_names(self) -> list[str]:
        """Names, as in ``models.block.global_shapes``, of the tensors outside the blocks."""
        ...

    def global_tensor(self, name: str) -> np.ndarray:
        """One of ``global_names``."""
        ...

    def check_finite(self, *, progress: bool = True) -> None:
        """Read everything once; ValueError names the first tensor with a NaN or an infinity."""
        ...


def open_checkpoint(model: Path) -> CheckpointReader:
    """The reader of a folder with a ``config.json`` and weights, or of a GGUF file (``gguf_file.find_gguf``).

    Raises:
        ValueError: naming the file, if there is none for it, or its tensors do not fit its config.
    """
    file = find_gguf(model)
    return HuggingFaceCheckpoint(model) if file is None else GGUFCheckpoint(file)


def checkpoint_config(model: Path) -> ModelConfig:
    """The architecture of what :func:`open_checkpoint` opens, without its tensors.

    Raises:
        ValueError: naming the file, if it does not describe a model of a family that is here.
    """
    file = find_gguf(model)
    return read_config(model) if file is None else read_gguf_config(file)
