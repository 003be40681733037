"""A checkpoint read in another basis of its residual stream: the same model, of tensors that round better."""

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_convert.algorithms.rotation import can_rotate, residual_rotation, rotate_block, rotate_rows
from fireq_jax.checkpoints.reader import CheckpointReader
from fireq_jax.models.coded_weight import CodedKind, CodedWeight, float32_block
from fireq_jax.models.config import ModelConfig
from fireq_jax.quantization.config import QuantizationConfig

logger = logging.getLogger(__name__)


def in_its_basis(
    source: CheckpointReader, quantization: QuantizationConfig, kept: Collection[str]
) -> tuple[CheckpointReader, QuantizationConfig]:
    """A checkpoint in the basis that the recipe asks for, and the recipe.

    It asks for no rotation any more where the family cannot have one, or where layers ``kept`` are to stay as they are.
    """
    if not quantization.rotates:
        return source, quantization
    if not kept and can_rotate(source.config):
        return RotatedCheckpoint(source, quantization), quantization
    family = source.config.model_type
    why = f"{len(kept)} layers keep their codes" if kept else f"a {family} has norms that do not allow it"
    logger.info("the residual stream is not rotated: %s", why)
    assert quantization.smoothing is not None
    smoothing = dataclasses.replace(quantization.smoothing, residual_basis="channels")
    return source, dataclasses.replace(quantization, smoothing=smoothing)


class RotatedCheckpoint:
    """A :class:`CheckpointReader` of what ``source`` holds, rotated (:mod:`~checkpoints_convert.algorithms.rotation`).

    A head takes over the last norm's gain. The embedding cannot, so a tied head becomes a matrix of its own where it
    is quantized, and stays tied otherwise, behind a ``head_basis`` Q^T diag(gain) Q.

    Args:
        source: a checkpoint whose config ``can_rotate``.
        quantization: says whether the head is quantized.
    """

    def __init__(self, source: CheckpointReader, quantization: QuantizationConfig) -> None:
        self.source = source
        tied = source.config.tie_word_embeddings and quantization.lm_head_format == "none"
        self.config: ModelConfig = dataclasses.replace(source.config, tie_word_embeddings=tied)

    @property
    def quantized(self) -> bool:
        """Whether the weights were quantized before."""
        return self.source.quantized

    @property
    def coded(self) -> Mapping[str, CodedKind]:
        """None: what codes stand for is rotated."""
        return {}

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return self.source.files

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        return self.source.nbytes

    def block(self, index: int) -> dict[str, np.ndarray | CodedWeight]:
        """All tensors of block ``index`` in float32; gains of norms are 1."""
        rotated = rotate_block(float32_block(self.source.block(index)), self.source.config, self._rotation)
        return {name: np.asarray(array) for name, array in rotated.items()}

    def global_names(self) -> list[str]:
        """Names of the tensors outside the blocks, ``head_basis`` or ``lm_head`` among them."""
        last = "head_basis" if self.config.tie_word_embeddings else "lm_head"
        return [*(name for name in self.source.global_names() if name != last), last]

    def global_tensor(self, name: str) -> np.ndarray:
        """One of ``global_names``, in float32."""
        if name == "norm.weight":
            return np.ones(self.config.hidden_size, np.float32)
        if name == "embed_tokens":
            return rotate_rows(self.source.global_tensor(name), self._rotation)
        gain = self.source.global_tensor("norm.weight").astype(np.float32)
        if name == "head_basis":  # [out, in], as all matrices, and symmetric
            return rotate_rows(np.asarray(self._rotation).T, self._rotation, gain)
        tied = self.source.config.tie_word_embeddings
        return rotate_rows(self.source.global_tensor("embed_tokens" if tied else name), self._rotation, gain)

    def check_finite(self, *, progress: bool = True) -> None:
        """Read everything once; ValueError names the first tensor with a NaN or an infinity."""
        self.source.check_finite(progress=progress)

    @functools.cached_property
    def _rotation(self) -> Float[Array, "D D"]:
        return jnp.asarray(residual_rotation(self.config.hidden_size))
