"""A layer's parameters as the tensors of a block in its family's checkpoints."""

from collections.abc import Mapping

import numpy as np

from fireq_jax.models.block import split_block
from fireq_jax.models.coded_weight import HostTensor
from fireq_jax.models.config import ModelConfig
from fireq_jax.models.tensor_source import TensorTable, written

# What a layer does at run time and changes no score.
ONLINE = ("post_rope_scale", "key_offset")
_QUERY_GAINS, _KEY_GAINS = "self_attn.q_norm", "self_attn.k_norm"
_TOLERANCE = 1e-5  # of gains, float32, that went through a factor and its reciprocal


def exported_block(fused: Mapping[str, HostTensor], config: ModelConfig, table: TensorTable) -> dict[str, HostTensor]:
    """A layer's tensors, by the checkpoint's names without the block's prefix.

    Args:
        fused: the layer's parameters, by name without prefix: arrays, or codes that stay codes.
        config: the architecture.
        table: the family's names.

    Raises:
        ValueError: for parameters that such a checkpoint cannot hold.
    """
    block = split_block({name: tensor for name, tensor in fused.items() if not name.endswith(ONLINE)}, config)
    if is_shared(config):
        block |= shared_gains(np.asarray(block[_QUERY_GAINS]), np.asarray(block[_KEY_GAINS]), config)
    return written(table.block, block)


def is_shared(config: ModelConfig) -> bool:
    """Whether all heads have the same gains of their norm in a checkpoint."""
    return config.head_norm in ("before_rope", "after_rope")


def shared_gains(queries: np.ndarray, keys: np.ndarray, config: ModelConfig) -> dict[str, np.ndarray]:
    """Gains for all heads that give the same scores: the first head's.

    N multiplies the rotary pairs of each head's keys, and divides those of its queries (``keys.fold_pairs``), so that
    N of the other heads over the first's can be taken out again.

    Args:
        queries: float32 [heads, H].
        keys: float32 [kv_heads, H].
        config: the architecture.

    Raises:
        ValueError: if heads differ by more than that.
    """
    used = keys[:1] != 0  # but for padding
    ratio = np.where(used, keys, 1) / np.where(used, keys[:1], 1)
    first, second = np.split(ratio, 2, axis=1)
    undone = queries * np.repeat(ratio, config.num_heads // config.num_kv_heads, axis=0)
    turned = config.head_norm == "before_rope"
    if (turned and not np.allclose(first, second, rtol=_TOLERANCE, atol=0)) or not np.allclose(
        undone, undone[:1], rtol=_TOLERANCE, atol=_TOLERANCE
    ):
        raise ValueError("norms of queries and keys have gains for each head, and the checkpoint one for all")
    return {
        _QUERY_GAINS: np.broadcast_to(undone[:1], queries.shape),
        _KEY_GAINS: np.broadcast_to(keys[:1], keys.shape),
    }
