"""Function-preserving rescaling of a block's weights before they are rounded.

Every function takes and returns a block: a dict of float32 arrays by Hugging Face name without
the layer prefix (``self_attn.q_proj.weight`` [out, in] ...). The float model computes the same
before and after; what changes is how well its weights and keys survive INT4.

FireQ (arXiv 2505.20839): channel-wise scaling (Lambda1-3) and RoPE-aware scaling (N, S).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fireq_jax.models.config import ModelConfig
from fireq_jax.quantization.config import ColumnStatistic, SmoothingConfig

Block = Mapping[str, Array]

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


class KeyStatistics(NamedTuple):
    """Largest magnitudes of a block's keys over the calibration tokens."""

    pair_max: Float[Array, "kv_heads half"]  # of sqrt(k_i^2 + k_{i + H/2}^2), before RoPE
    channel_max: Float[Array, "kv_heads H"]  # of |k_i|, after RoPE


def smooth_block(
    block: Block, keys: KeyStatistics | None, config: ModelConfig, smoothing: SmoothingConfig
) -> dict[str, Array]:
    """Apply every rescaling that ``smoothing`` asks for.

    Args:
        block: the weights.
        keys: key statistics; needed for pre- and post-RoPE scaling only.
        config: the architecture.
        smoothing: which rescalings, with their constants.

    Returns:
        The rescaled block; with post-RoPE scaling also ``self_attn.post_rope_scale``, float32
        [kv_heads, H], by which the layer multiplies rotated keys and divides queries.

    Raises:
        ValueError: if RoPE-aware scaling is asked for without ``keys``.
    """
    result = dict(block)
    if smoothing.qkv_input:
        result = balance_norm(result, "input_layernorm.weight", QKV, smoothing.column_statistic)
    if smoothing.gate_up_input:
        result = balance_norm(result, "post_attention_layernorm.weight", GATE_UP, smoothing.column_statistic)
    if smoothing.value_output:
        result = balance_value_output(result, config, smoothing.column_statistic)
    if smoothing.up_down:
        result = balance_up_down(result, smoothing.column_statistic)
    if not smoothing.pre_rope and smoothing.post_rope_channels == 0:
        return result
    if keys is None:
        raise ValueError("RoPE-aware scaling needs key statistics; calibrate first")
    post_rope, outlier_pairs = post_rope_scale(keys.channel_max, smoothing.post_rope_channels, smoothing.beta)
    if smoothing.pre_rope:
        pre_rope = pre_rope_scale(keys.pair_max, outlier_pairs, smoothing.alpha)
        result = fold_pre_rope(result, pre_rope, config)
    if smoothing.post_rope_channels:
        result["self_attn.post_rope_scale"] = post_rope
    return result


def key_scales(
    keys: KeyStatistics, smoothing: SmoothingConfig
) -> tuple[Float[Array, "kv_heads H"], Float[Array, "kv_heads H"]]:
    """N and S as :func:`smooth_block` applies them: factors of each channel of the rotated keys."""
    post_rope, outlier_pairs = post_rope_scale(keys.channel_max, smoothing.post_rope_channels, smoothing.beta)
    if not smoothing.pre_rope:
        return jnp.ones_like(post_rope), post_rope
    return jnp.tile(pre_rope_scale(keys.pair_max, outlier_pairs, smoothing.alpha), (1, 2)), post_rope


def column_scale(weight: Float[Array, "*rows K"], statistic: ColumnStatistic) -> Float[Array, " K"]:
    """lambda[k] = c / statistic of |weight[:, k]|, c their geometric mean; 1 for all-zero columns.

    FireQ's closed form. ``c`` keeps the overall magnitude, so that only the imbalance moves.
    """
    magnitude = jnp.abs(weight.astype(jnp.float32)).reshape(-1, weight.shape[-1])
    columns = jnp.mean(magnitude, axis=0) if statistic == "mean" else jnp.max(magnitude, axis=0)
    used = columns > 0
    logs = jnp.where(used, jnp.log(jnp.where(used, columns, 1.0)), 0.0)
    center = jnp.sum(logs) / jnp.maximum(jnp.sum(used), 1)
    return jnp.where(used, jnp.exp(center - logs), 1.0)


def balance_norm(block: Block, norm: str, linears: tuple[str, ...], statistic: ColumnStatistic) -> dict[str, Array]:
    """Balance the columns of ``linears``, which share an input, against the RMSNorm gain before them."""
    result = dict(block)
    scale = column_scale(jnp.concatenate([block[f"{name}.weight"] for name in linears]), statistic)
    result[norm] = block[norm] / scale
    for name in linears:
        result[f"{name}.weight"] = block[f"{name}.weight"] * scale
    return result


def balance_value_output(block: Block, config: ModelConfig, statistic: ColumnStatistic) -> dict[str, Array]:
    """Lambda1: balance o_proj's columns against v_proj's rows.

    All query heads of a kv head share its values, hence one factor for each kv head and channel.
    """
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    output = block["self_attn.o_proj.weight"]
    shared = output.reshape(-1, kv_heads, heads // kv_heads, head_dim)
    scale = column_scale(jnp.swapaxes(shared, 1, 2).reshape(-1, kv_heads * head_dim), statistic)
    spread = jnp.repeat(scale.reshape(kv_heads, head_dim), heads // kv_heads, axis=0).reshape(-1)
    return {
        **block,
        "self_attn.o_proj.weight": output * spread,
        **_scale_rows(block, "self_attn.v_proj", 1 / scale),
    }


def balance_up_down(block: Block, statistic: ColumnStatistic) -> dict[str, Array]:
    """Lambda3: balance down_proj's columns against up_proj's rows."""
    scale = column_scale(block["mlp.down_proj.weight"], statistic)
    return {
        **block,
        "mlp.down_proj.weight": block["mlp.down_proj.weight"] * scale,
        **_scale_rows(block, "mlp.up_proj", 1 / scale),
    }


def post_rope_scale(
    channel_max: Float[Array, "kv_heads H"], channels: int, beta: float
) -> tuple[Float[Array, "kv_heads H"], Bool[Array, "kv_heads half"]]:
    """S: scale of rotated keys, beta / absmax for outlier channels and their pair partners, else 1.

    Returns:
        The scale, and the rotary pairs that hold an outlier channel.
    """
    kv_heads, head_dim = channel_max.shape
    if channels > head_dim:
        raise ValueError(f"post_rope_channels is {channels}; head_dim is only {head_dim}")
    order = jnp.argsort(-channel_max, axis=1)
    rank = jnp.argsort(order, axis=1)
    pairs = jnp.any((rank < channels).reshape(kv_heads, 2, head_dim // 2), axis=1)
    usable = jnp.tile(pairs, (1, 2)) & (channel_max > 0)
    return jnp.where(usable, beta / jnp.where(usable, channel_max, 1.0), 1.0), pairs


def pre_rope_scale(
    pair_max: Float[Array, "kv_heads half"], excluded: Bool[Array, "kv_heads half"], alpha: float
) -> Float[Array, "kv_heads half"]:
    """N: alpha / largest norm of each rotary pair; 1 for excluded pairs and for pairs always 0."""
    usable = ~excluded & (pair_max > 0)
    return jnp.where(usable, alpha / jnp.where(usable, pair_max, 1.0), 1.0)


def fold_pre_rope(block: Block, scale: Float[Array, "kv_heads half"], config: ModelConfig) -> dict[str, Array]:
    """Multiply k_proj's rows by N and divide the rows of the queries that meet them.

    Both members of a pair get the same factor, so it commutes with the rotation.
    """
    keys = jnp.tile(scale, (1, 2))
    queries = jnp.repeat(keys, config.num_heads // config.num_kv_heads, axis=0)
    return {
        **block,
        **_scale_rows(block, "self_attn.k_proj", keys.reshape(-1)),
        **_scale_rows(block, "self_attn.q_proj", 1 / queries.reshape(-1)),
    }


def _scale_rows(block: Block, linear: str, scale: Float[Array, " N"]) -> dict[str, Array]:
    scaled = {f"{linear}.weight": block[f"{linear}.weight"] * scale[:, None]}
    if f"{linear}.bias" in block:
        scaled[f"{linear}.bias"] = block[f"{linear}.bias"] * scale
    return scaled
