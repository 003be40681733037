"""A checkpoint read in another basis of its residual stream: the same model, of tensors that round better."""

import dataclasses
import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_convert.algorithms.rotation import residual_rotation, rotate_block, rotate_rows
from fireq_jax.checkpoints.reader import CheckpointReader
from fireq_jax.models.config import ModelConfig


class RotatedCheckpoint:
    """A :class:`CheckpointReader` of what ``source`` holds, rotated (:mod:`~checkpoints_convert.algorithms.rotation`).

    A tied head is a matrix of its own here, for it takes over the last norm's gain and the embedding does not.

    Args:
        source: a checkpoint whose config ``can_rotate``.
    """

    def __init__(self, source: CheckpointReader) -> None:
        self.source = source
        self.config: ModelConfig = dataclasses.replace(source.config, tie_word_embeddings=False)

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return self.source.files

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        return self.source.nbytes

    def block(self, index: int) -> dict[str, np.ndarray]:
        """All tensors of block ``index`` in float32; gains of norms are 1."""
        block = {name: jnp.asarray(array) for name, array in self.source.block(index).items()}
        return {
            name: np.asarray(array) for name, array in rotate_block(block, self.source.config, self._rotation).items()
        }

    def global_names(self) -> list[str]:
        """Names of the tensors outside the blocks, the head among them."""
        names = self.source.global_names()
        return names if "lm_head" in names else [*names, "lm_head"]

    def global_tensor(self, name: str) -> np.ndarray:
        """One of ``global_names``, in float32."""
        if name == "norm.weight":
            return np.ones(self.config.hidden_size, np.float32)
        if name != "lm_head":
            return rotate_rows(self.source.global_tensor(name), self._rotation)
        tied = self.source.config.tie_word_embeddings
        gain = self.source.global_tensor("norm.weight").astype(np.float32)
        return rotate_rows(self.source.global_tensor("embed_tokens" if tied else name), self._rotation, gain)

    def check_finite(self, *, progress: bool = True) -> None:
        """Read everything once; ValueError names the first tensor with a NaN or an infinity."""
        self.source.check_finite(progress=progress)

    @functools.cached_property
    def _rotation(self) -> Float[Array, "D D"]:
        return jnp.asarray(residual_rotation(self.config.hidden_size))
