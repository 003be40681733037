"""Function-preserving rescaling of a block's weights before they are rounded.

Every function takes and returns a block: a dict of float32 arrays by Hugging Face name without
the layer prefix (``self_attn.q_proj.weight`` [out, in] ...). The float model computes the same
before and after; what changes is how well its weights and keys survive INT4.

FireQ (arXiv 2505.20839): channel-wise scaling (Lambda1-3) and RoPE-aware scaling (N, S). The
exponents, the key offset and the rotation of values are beyond it.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fireq_jax.models.config import ModelConfig
from fireq_jax.quantization.config import ColumnStatistic, SmoothingConfig

Block = Mapping[str, Array]

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


class KeyMoments(NamedTuple):
    """Means over the calibration tokens, after RoPE; of a kv head's queries over all its query heads."""

    mean: Float[Array, "kv_heads H"]  # of k_i
    square: Float[Array, "kv_heads H"]  # of k_i^2
    query_square: Float[Array, "kv_heads H"]  # of q_i^2


class KeyStatistics(NamedTuple):
    """Largest magnitudes of a block's keys over the calibration tokens, and their moments."""

    pair_max: Float[Array, "kv_heads half"]  # of sqrt(k_i^2 + k_{i + H/2}^2), before RoPE
    channel_max: Float[Array, "kv_heads H"]  # of |k_i|, after RoPE
    moments: KeyMoments | None = None


def smooth_block(
    block: Block,
    keys: KeyStatistics | None,
    config: ModelConfig,
    smoothing: SmoothingConfig,
    inputs: Mapping[str, Float[Array, " K"]] | None = None,
) -> dict[str, Array]:
    """Apply every rescaling that ``smoothing`` asks for.

    Args:
        block: the weights.
        keys: key statistics; needed for pre- and post-RoPE scaling and the key offset only.
        config: the architecture.
        smoothing: which rescalings, with their constants.
        inputs: mean magnitude of each input channel by ``qkv_input``, ``o_input``,
            ``gate_up_input`` and ``down_input``; needed for ``activation_exponent`` only.

    Returns:
        The rescaled block; with post-RoPE scaling also ``self_attn.post_rope_scale``, float32
        [kv_heads, H], by which the layer multiplies rotated keys and divides queries; with
        ``key_offset`` also ``self_attn.key_offset``, float32 [kv_heads, H], which it subtracts
        from the scaled keys.

    Raises:
        ValueError: if statistics are missing.
    """
    if smoothing.activation_exponent and inputs is None:
        raise ValueError("activation_exponent needs statistics of the inputs; calibrate first")

    def options(name: str) -> tuple[ColumnStatistic, Float[Array, " K"] | None, float]:
        return smoothing.column_statistic, None if inputs is None else inputs[name], smoothing.activation_exponent

    result = dict(block)
    if smoothing.qkv_input:
        result = balance_norm(result, "input_layernorm.weight", QKV, *options("qkv_input"))
    if smoothing.gate_up_input:
        result = balance_norm(result, "post_attention_layernorm.weight", GATE_UP, *options("gate_up_input"))
    if smoothing.value_output:
        result = balance_value_output(result, config, *options("o_input"))
    if smoothing.value_rotation:
        result = rotate_values(result, config)
    if smoothing.up_down:
        result = balance_up_down(result, *options("down_input"))
    return smooth_keys(result, keys, config, smoothing) if smoothing.measures_keys else result


def smooth_keys(
    block: Block, keys: KeyStatistics | None, config: ModelConfig, smoothing: SmoothingConfig
) -> dict[str, Array]:
    """N, S and the key offset; see :func:`smooth_block`."""
    if keys is None:
        raise ValueError("RoPE-aware scaling needs key statistics; calibrate first")
    result = dict(block)
    pre_rope, post_rope = key_scales(keys, smoothing)
    if smoothing.pre_rope:
        result = fold_pre_rope(result, pre_rope[:, : config.head_dim // 2], config)
    if smoothing.post_rope_channels:
        result["self_attn.post_rope_scale"] = post_rope
    if smoothing.key_offset:
        result["self_attn.key_offset"] = _moments(keys).mean * pre_rope * post_rope
    return result


def key_scales(
    keys: KeyStatistics, smoothing: SmoothingConfig
) -> tuple[Float[Array, "kv_heads H"], Float[Array, "kv_heads H"]]:
    """N and S as :func:`smooth_block` applies them: factors of each channel of the rotated keys."""
    post_rope, outlier_pairs = post_rope_scale(keys.channel_max, smoothing.post_rope_channels, smoothing.beta)
    if not smoothing.pre_rope:
        return jnp.ones_like(post_rope), post_rope
    pre_rope = pre_rope_scale(key_pair_magnitude(keys, smoothing), outlier_pairs, smoothing.alpha)
    if smoothing.query_exponent:
        pre_rope = favour_queries(pre_rope, outlier_pairs, _moments(keys), smoothing.query_exponent)
    return jnp.tile(pre_rope, (1, 2)), post_rope


def _moments(keys: KeyStatistics) -> KeyMoments:
    if keys.moments is None:
        raise ValueError("this smoothing needs the moments of the keys; calibrate first")
    return keys.moments


def column_scale(
    weight: Float[Array, "*rows K"],
    statistic: ColumnStatistic,
    inputs: Float[Array, " K"] | None = None,
    exponent: float = 0.0,
) -> Float[Array, " K"]:
    """lambda[k] = c * inputs[k]^exponent / (statistic of |weight[:, k]|)^(1 - exponent).

    ``c`` makes the geometric mean 1, so that only the imbalance moves; columns that are all zero
    (or, with ``inputs``, never read) keep 1. Exponent 0 is FireQ's closed form; AWQ (arXiv
    2306.00978) looks at the inputs. The exponents add up to 1, so that the balanced layer is the
    same however its channels were scaled before.
    """
    magnitude = jnp.abs(weight.astype(jnp.float32)).reshape(-1, weight.shape[-1])
    columns = jnp.mean(magnitude, axis=0) if statistic == "mean" else jnp.max(magnitude, axis=0)
    used = columns > 0
    if exponent and inputs is not None:
        used &= inputs > 0
    logs = (exponent - 1) * jnp.log(jnp.where(used, columns, 1.0))
    if exponent and inputs is not None:
        logs += exponent * jnp.log(jnp.where(used, inputs, 1.0))
    center = jnp.sum(jnp.where(used, logs, 0.0)) / jnp.maximum(jnp.sum(used), 1)
    return jnp.where(used, jnp.exp(logs - center), 1.0)


def balance_norm(
    block: Block,
    norm: str,
    linears: tuple[str, ...],
    statistic: ColumnStatistic,
    inputs: Float[Array, " K"] | None = None,
    exponent: float = 0.0,
) -> dict[str, Array]:
    """Balance the columns of ``linears``, which share an input, against the RMSNorm gain before them."""
    result = dict(block)
    weights = jnp.concatenate([block[f"{name}.weight"] for name in linears])
    scale = column_scale(weights, statistic, inputs, exponent)
    result[norm] = block[norm] / scale
    for name in linears:
        result[f"{name}.weight"] = block[f"{name}.weight"] * scale
    return result


def balance_value_output(
    block: Block,
    config: ModelConfig,
    statistic: ColumnStatistic,
    inputs: Float[Array, " K"] | None = None,
    exponent: float = 0.0,
) -> dict[str, Array]:
    """Lambda1: balance o_proj's columns against v_proj's rows.

    All query heads of a kv head share its values, hence one factor for each kv head and channel.
    """
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    output = block["self_attn.o_proj.weight"]
    shared = jnp.swapaxes(_by_kv_head(output, config), 1, 2).reshape(-1, kv_heads * head_dim)
    if inputs is not None:
        inputs = jnp.mean(_by_kv_head(inputs, config), axis=(0, 2)).reshape(-1)
    scale = column_scale(shared, statistic, inputs, exponent)
    spread = jnp.repeat(scale.reshape(kv_heads, head_dim), heads // kv_heads, axis=0).reshape(-1)
    return {
        **block,
        "self_attn.o_proj.weight": output * spread,
        **_scale_rows(block, "self_attn.v_proj", 1 / scale),
    }


def _by_kv_head(columns: Float[Array, "*rows K"], config: ModelConfig) -> Float[Array, "rows kv_heads group H"]:
    """Columns of o_proj (or its inputs) by the kv head whose values they read."""
    return columns.reshape(-1, config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)


def balance_up_down(
    block: Block, statistic: ColumnStatistic, inputs: Float[Array, " K"] | None = None, exponent: float = 0.0
) -> dict[str, Array]:
    """Lambda3: balance down_proj's columns against up_proj's rows."""
    scale = column_scale(block["mlp.down_proj.weight"], statistic, inputs, exponent)
    return {
        **block,
        "mlp.down_proj.weight": block["mlp.down_proj.weight"] * scale,
        **_scale_rows(block, "mlp.up_proj", 1 / scale),
    }


def rotate_values(block: Block, config: ModelConfig) -> dict[str, Array]:
    """Hadamard-rotate each head's values: v_proj's rows by R, o_proj's columns by its inverse.

    A rotated value is close to Gaussian: no channel stands out in the scale that its token shares
    (QuaRot, arXiv 2404.00456). Attention averages values linearly, so nothing is left to undo.
    """
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    rotation = hadamard(head_dim)

    def rotate_rows(rows: Float[Array, "*rest"]) -> Float[Array, "*rest"]:
        split = rows.reshape(kv_heads, head_dim, -1)
        return jnp.einsum("ij,kjd->kid", rotation, split).reshape(rows.shape)

    output = block["self_attn.o_proj.weight"]
    rotated = jnp.einsum("dhj,ij->dhi", output.reshape(-1, heads, head_dim), rotation)
    result = {
        **block,
        "self_attn.v_proj.weight": rotate_rows(block["self_attn.v_proj.weight"]),
        "self_attn.o_proj.weight": rotated.reshape(output.shape),
    }
    if "self_attn.v_proj.bias" in block:
        result["self_attn.v_proj.bias"] = rotate_rows(block["self_attn.v_proj.bias"])
    return result


def hadamard(size: int) -> Float[Array, "size size"]:
    """An orthogonal matrix of Sylvester-Hadamard blocks as large as the powers of two in ``size`` allow."""
    block = jnp.ones((1, 1), jnp.float32)
    while size % (2 * len(block)) == 0:
        block = jnp.kron(jnp.array([[1.0, 1.0], [1.0, -1.0]], jnp.float32), block)
    return jnp.kron(jnp.eye(size // len(block), dtype=jnp.float32), block / math.sqrt(len(block)))


def key_pair_magnitude(keys: KeyStatistics, smoothing: SmoothingConfig) -> Float[Array, "kv_heads half"]:
    """What N equalises: each rotary pair's largest norm, or its root mean square after the offset."""
    if smoothing.pair_statistic == "max":
        return keys.pair_max
    moments = _moments(keys)
    square = moments.square - jnp.square(moments.mean) if smoothing.key_offset else moments.square
    return pair_norm(jnp.maximum(square, 0.0))


def pair_norm(square: Float[Array, "kv_heads H"]) -> Float[Array, "kv_heads half"]:
    """Root of the summed squares of the two members of each rotary pair."""
    first, second = jnp.split(square, 2, axis=-1)
    return jnp.sqrt(first + second)


def favour_queries(
    scale: Float[Array, "kv_heads half"],
    excluded: Bool[Array, "kv_heads half"],
    moments: KeyMoments,
    exponent: float,
) -> Float[Array, "kv_heads half"]:
    """N = queries^exponent * scale^(1 - exponent): more of a token's INT4 range for pairs that are read."""
    queries = pair_norm(moments.query_square)
    usable = ~excluded & (queries > 0)
    return jnp.where(usable, jnp.where(usable, queries, 1.0) ** exponent * scale ** (1 - exponent), scale)


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
