"""What follows a model's blocks: the last norm and the head, for hidden states that calibration carries along."""

from collections.abc import Mapping

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fireq_jax.checkpoints.reader import CheckpointReader
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.layers import Norm
from fireq_jax.models.llama import apply_head
from fireq_jax.models.parameters import Parameter, with_parameters


def head_tensors(source: CheckpointReader) -> dict[str, np.ndarray]:
    """The last norm's gain, and the head [V, D] with the basis before it, if it has one; ``lm_head`` if tied, too."""
    own = {name: source.global_tensor(name) for name in source.global_names() if name != "embed_tokens"}
    return {"lm_head": source.global_tensor("embed_tokens"), **own} if source.config.tie_word_embeddings else own


def head_logits(
    parameters: Mapping[str, Parameter], config: ModelConfig, hidden: Float[Array, "T D"]
) -> Float[Array, "T V"]:
    """float32 logits of what left the last block; ``parameters`` are made of :func:`head_tensors`."""
    norm = nnx.eval_shape(lambda: Norm(config, "xla"))
    norm = with_parameters(norm, {"weight": parameters["norm.weight"]})
    return apply_head(config, norm, parameters["lm_head"], hidden, parameters.get("head_basis"))
