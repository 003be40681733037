"""Small random checkpoints and blocks for the converter's tests, and what came of them."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from fireq_jax import LlamaForCausalLM, ModelConfig
from fireq_jax.models.architectures import checkpoint_shapes
from fireq_jax.models.block import block_shapes
from fireq_jax.models.parameters import parameters_of

TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def write_checkpoint(folder: Path, fields: dict[str, Any], std: float, **changes: np.ndarray) -> Path:
    """A checkpoint in Hugging Face form with weights of N(0, std^2); ``changes`` replace tensors by name."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    random = np.random.default_rng(0)
    tensors = {
        name: np.ones(shape, np.float32) if "norm" in name else random.normal(0, std, shape).astype(np.float32)
        for name, shape in checkpoint_shapes(fields).items()
    }
    save_file(tensors | changes, folder / "model.safetensors")
    return folder


def parameter_bytes(folder: Path) -> dict[str, bytes]:
    """A converted model's parameters, to be compared bit for bit."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=jnp.float32)
    leaves = jax.tree_util.tree_leaves_with_path(parameters_of(model))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def block_of(config: ModelConfig, seed: int = 0) -> dict[str, jax.Array]:
    """Random float32 weights of one block, by Hugging Face name without prefix."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.ones(shape) if "norm" in name else jnp.asarray(rng.normal(0, shape[-1] ** -0.5, shape), jnp.float32)
        for name, shape in block_shapes(config).items()
    }
