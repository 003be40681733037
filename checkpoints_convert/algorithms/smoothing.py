"""Function-preserving rescaling of a block's weights before they are rounded.

Every function takes and returns a block: a dict of float32 arrays by Hugging Face name without
the layer prefix (``self_attn.q_proj.weight`` [out, in] ...). The float model computes the same
before and after; what changes is how well its weights and keys survive INT4.

Here is FireQ's channel-wise scaling (arXiv 2505.20839, Lambda1-3), with exponents and their search
beyond it; keys are in ``keys``, values in ``values``.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from checkpoints_convert.algorithms.keys import KeyStatistics, KeyTransform, key_transform, smooth_keys
from checkpoints_convert.algorithms.values import balance_values, rotate_values
from fireq_jax.models.block import Block, mlp_name, norm_names
from fireq_jax.models.config import ModelConfig
from fireq_jax.quantization.config import ColumnStatistic, SmoothingConfig
from pallas_kernels import formats, layouts
from pallas_kernels.quantized_tensor import over_stack

# Tried by ``search_columns``, besides no balance at all.
EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def smooth_block(
    block: Block,
    keys: KeyStatistics | None,
    config: ModelConfig,
    smoothing: SmoothingConfig,
    inputs: Mapping[str, Float[Array, " K"]] | None = None,
    values: Float[Array, "kv_heads H H"] | None = None,
) -> dict[str, Array]:
    """Apply every rescaling that ``smoothing`` asks for.

    Args:
        block: the weights.
        keys: key statistics; needed for pre- and post-RoPE scaling and the key offset only.
        config: the architecture.
        smoothing: which rescalings, with their constants.
        inputs: mean magnitude of each input channel by ``qkv_input``, ``o_input``, ``gate_up_input`` and
            ``down_input`` ([experts, K] of experts, up to a factor); needed for ``activation_exponent``
            and ``search_columns`` only.
        values: second moments of each head's values; needed for ``value_basis`` "balanced" only.

    Returns:
        The rescaled block; with post-RoPE scaling also ``self_attn.post_rope_scale``, float32
        [kv_heads, H], by which the layer multiplies rotated keys and divides queries; with
        ``key_offset`` also ``self_attn.key_offset``, float32 [kv_heads, H], which it subtracts
        from the scaled keys.

    Raises:
        ValueError: if statistics are missing.
    """
    return smooth_with_keys(block, keys, config, smoothing, inputs, values)[0]


def smooth_with_keys(
    block: Block,
    keys: KeyStatistics | None,
    config: ModelConfig,
    smoothing: SmoothingConfig,
    inputs: Mapping[str, Float[Array, " K"]] | None,
    values: Float[Array, "kv_heads H H"] | None,
) -> tuple[dict[str, Array], KeyTransform | None]:
    """:func:`smooth_block`, and what it did to the keys; None without key statistics."""
    if (smoothing.activation_exponent or smoothing.search_columns) and inputs is None:
        raise ValueError("activation_exponent and search_columns need statistics of the inputs; calibrate first")
    rescaled, transform = _rescale(dict(block), keys, config, smoothing, None if inputs is None else dict(inputs))
    if smoothing.value_basis == "hadamard":
        rescaled = rotate_values(rescaled, config)
    if smoothing.value_basis == "balanced":
        if values is None:
            raise ValueError("value_basis 'balanced' needs second moments of the values; calibrate first")
        rescaled = balance_values(rescaled, config, values)
    return rescaled, transform


def leaving(smoothing: SmoothingConfig, linears: Collection[str], config: ModelConfig) -> SmoothingConfig:
    """The rescalings that change none of a block's ``linears``, which go by their names in a layer.

    S and the offset of keys change no weight, and N none where heads are normed.
    """
    mlp = mlp_name(config)
    qkv, output, gate_up, down = (
        name in linears
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", f"{mlp}.gate_up_proj", f"{mlp}.down_proj")
    )
    parallel = config.norm_order == "parallel"
    pre_rope = smoothing.pre_rope and not (qkv and config.head_norm == "none")
    return dataclasses.replace(
        smoothing,
        qkv_input=smoothing.qkv_input and not (qkv or (parallel and gate_up)),
        value_output=smoothing.value_output and not (qkv or output),
        value_basis="channels" if qkv or output else smoothing.value_basis,
        gate_up_input=smoothing.gate_up_input and not gate_up,
        up_down=smoothing.up_down and not (gate_up or down),
        pre_rope=pre_rope,
        fit_pairs=smoothing.fit_pairs and pre_rope,
        search_keys=smoothing.search_keys and (pre_rope or smoothing.post_rope_channels > 0),
    )


# One program instead of a hundred small ones, each of which a GPU would compile by itself.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _rescale(
    block: Block,
    keys: KeyStatistics | None,
    config: ModelConfig,
    smoothing: SmoothingConfig,
    inputs: Mapping[str, Float[Array, " K"]] | None,
) -> tuple[dict[str, Array], KeyTransform | None]:
    def options(name: str) -> tuple[ColumnStatistic, Float[Array, " K"] | None, float | None]:
        exponent = None if smoothing.search_columns else smoothing.activation_exponent
        return smoothing.column_statistic, None if inputs is None else inputs[name], exponent

    result, norms, mlp = dict(block), norm_names(config), mlp_name(config)
    gate_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
    # Where one norm feeds both, their columns are balanced together.
    readers = QKV + gate_up if config.norm_order == "parallel" else QKV
    if smoothing.qkv_input and "input_layernorm" in norms:
        result = balance_norm(result, "input_layernorm.weight", readers, *options("qkv_input"))
    if smoothing.gate_up_input and "post_attention_layernorm" in norms:
        result = balance_norm(result, "post_attention_layernorm.weight", gate_up, *options("gate_up_input"))
    if smoothing.value_output and smoothing.value_basis != "balanced":
        result = balance_value_output(result, config, *options("o_input"))
    if smoothing.up_down and config.activation != "clamped_silu":  # which is not proportional to up
        result = balance_up_down(result, mlp, *options("down_input"))
    if keys is None and not smoothing.measures_keys:
        return result, None
    if not config.ignores_offsets:
        smoothing = dataclasses.replace(smoothing, key_offset=False)
    transform = key_transform(keys, smoothing, turn=config.head_norm == "none")
    return smooth_keys(result, transform, config, smoothing), transform


def column_scale(
    weight: Float[Array, "*rows K"],
    statistic: ColumnStatistic,
    inputs: Float[Array, " K"] | None = None,
    exponent: float | None = 0.0,
) -> Float[Array, " K"]:
    """lambda[k] = c * inputs[k]^exponent / (statistic of |weight[:, k]|)^(1 - exponent).

    ``c`` makes the geometric mean 1, so that only the imbalance moves; columns that are all zero
    (or, with ``inputs``, never read) keep 1. Exponent 0 is FireQ's closed form; AWQ (arXiv
    2306.00978) looks at the inputs. The exponents add up to 1, so that the balanced layer is the
    same however its channels were scaled before. Exponent None is :func:`searched_column_scale`.
    """
    if exponent is None:
        assert inputs is not None
        return searched_column_scale(weight, statistic, inputs)
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


def searched_column_scale(
    weight: Float[Array, "*rows K"], statistic: ColumnStatistic, inputs: Float[Array, " K"]
) -> Float[Array, " K"]:
    """The :func:`column_scale` of ``EXPONENTS``, or ones, under which INT4 changes the outputs least (AWQ's search).

    The change is the sum of the weights' squared errors, each times its input's squared magnitude.
    """
    weight = weight.astype(jnp.float32).reshape(-1, weight.shape[-1])
    k = weight.shape[-1]
    padding = layouts.padded_shape(*weight.shape)[1] - k

    def error(scale: Float[Array, " K"]) -> Float[Array, ""]:
        scaled = jnp.pad(weight * scale, ((0, 0), (0, padding)))
        rounded = formats.dequantize_weight(formats.quantize_weight(scaled))
        return jnp.sum(jnp.square((rounded - scaled)[:, :k] * (inputs / scale)))

    scales = [column_scale(weight, statistic, inputs, exponent) for exponent in EXPONENTS]
    scales = jnp.stack([jnp.ones_like(inputs), *scales])
    return scales[jnp.argmin(jax.lax.map(error, scales))]


def balance_norm(
    block: Block,
    norm: str,
    linears: tuple[str, ...],
    statistic: ColumnStatistic,
    inputs: Float[Array, " K"] | None = None,
    exponent: float | None = 0.0,
) -> dict[str, Array]:
    """Balance the columns of ``linears``, which share an input, against the RMSNorm gain before them.

    A router of experts among them reads the same input: it is not rounded, and only follows.
    """
    result = dict(block)
    weights = [block[f"{name}.weight"] for name in linears]
    columns = jnp.concatenate([weight.reshape(-1, weight.shape[-1]) for weight in weights])
    scale = column_scale(columns, statistic, inputs, exponent)
    result[norm] = block[norm] / scale
    routed = any(".experts." in name for name in linears)
    for name in (*linears, "mlp.router") if routed else linears:
        result[f"{name}.weight"] = block[f"{name}.weight"] * scale
    return result


def balance_value_output(
    block: Block,
    config: ModelConfig,
    statistic: ColumnStatistic,
    inputs: Float[Array, " K"] | None = None,
    exponent: float | None = 0.0,
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
    block: Block,
    mlp: str,
    statistic: ColumnStatistic,
    inputs: Float[Array, "*experts K"] | None = None,
    exponent: float | None = 0.0,
) -> dict[str, Array]:
    """Lambda3: balance down_proj's columns against up_proj's rows, of each expert if ``mlp`` names those."""
    down = block[f"{mlp}.down_proj.weight"]

    def scale_of(weight: Float[Array, "N K"], inputs: Float[Array, " K"] | None) -> Float[Array, " K"]:
        return column_scale(weight, statistic, inputs, exponent)

    scale = over_stack(scale_of)(down, inputs)
    return {
        **block,
        f"{mlp}.down_proj.weight": down * scale[..., None, :],
        **_scale_rows(block, f"{mlp}.up_proj", 1 / scale),
    }


def _scale_rows(block: Block, linear: str, scale: Float[Array, "*experts N"]) -> dict[str, Array]:
    scaled = {f"{linear}.weight": block[f"{linear}.weight"] * scale[..., None]}
    if f"{linear}.bias" in block:
        scaled[f"{linear}.bias"] = block[f"{linear}.bias"] * scale
    return scaled
