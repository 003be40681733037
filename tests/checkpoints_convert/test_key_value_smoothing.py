"""Keys and values before INT4: the float model's attention is unchanged, the quantized one closer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert.algorithms.keys import (
    QUERY_EXPONENTS,
    KeyMoments,
    KeySample,
    KeyStatistics,
    PairTransform,
    fit_pairs,
    key_cost,
    key_transform,
)
from checkpoints_convert.algorithms.smoothing import column_scale, smooth_block
from checkpoints_convert.algorithms.values import balance_values, hadamard, rotate_values
from checkpoints_convert.calibrate import BlockStatistics, Calibrator, abstract_layer, run_layer
from fireq_jax import ModelConfig, QuantizationConfig
from fireq_jax.models.llama import DecoderLayer
from fireq_jax.models.parameters import layer_parameters, with_parameters
from fireq_jax.quantization import SmoothingConfig
from pallas_kernels import formats

CONFIG = ModelConfig(
    vocab_size=16, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16
)
NOTHING = SmoothingConfig(
    qkv_input=False, value_output=False, gate_up_input=False, up_down=False, pre_rope=False, post_rope_channels=0
)
HIDDEN = jax.random.normal(jax.random.key(0), (2, 24, 32))


def block_of() -> dict[str, jax.Array]:
    """A block whose keys have a large mean (a bias that slow rotations keep) and uneven pairs."""
    keys = iter(jax.random.split(jax.random.key(1), 20))

    def linear(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, columns)) / np.sqrt(columns)

    block = {
        "input_layernorm.weight": jnp.ones(32),
        "post_attention_layernorm.weight": jnp.ones(32),
        "self_attn.q_proj.weight": linear(64, 32),
        "self_attn.k_proj.weight": linear(32, 32) * jnp.exp(jax.random.normal(next(keys), (32, 1))),
        "self_attn.v_proj.weight": linear(32, 32).at[3].multiply(8.0),
        "self_attn.o_proj.weight": linear(32, 64),
        "mlp.gate_proj.weight": linear(64, 32),
        "mlp.up_proj.weight": linear(64, 32),
        "mlp.down_proj.weight": linear(32, 64),
    }
    sizes = {"q": 64, "k": 32, "v": 32, "o": 32}
    for part, size in sizes.items():
        block[f"self_attn.{part}_proj.bias"] = jnp.zeros(size)
    # The slowest pairs: channels 7 and 15 of each head turn by 0.003 radians a token.
    return {**block, "self_attn.k_proj.bias": jnp.zeros(32).at[jnp.array([6, 7, 14, 15, 22, 23, 30, 31])].set(6.0)}


ATTENTION_CONFIG = dataclasses.replace(CONFIG, attention_bias=True, output_bias=True)
BOUNDED = dataclasses.replace(ATTENTION_CONFIG, attention_softcap=2.0, window=9)


def layer_of(block: dict[str, jax.Array], quantization: QuantizationConfig) -> DecoderLayer:
    abstract = abstract_layer(ATTENTION_CONFIG, quantization, 0)
    parameters = layer_parameters(block, 0, quantization, jnp.float32)
    return with_parameters(abstract, {name.removeprefix("layers.0."): value for name, value in parameters.items()})


def run(block: dict[str, jax.Array], smoothing: SmoothingConfig | None, kv_format: formats.KVFormat, clip: float = 1.0):
    """Output and taps of the block with float weights."""
    taps: dict[str, jax.Array] = {}
    quantization = QuantizationConfig(
        weight_format="none",
        activation_format="none",
        query_format="none",
        kv_format=kv_format,
        key_clip=clip,
        value_clip=clip,
        smoothing=smoothing,
    )
    output = run_layer(layer_of(block, quantization), ATTENTION_CONFIG, HIDDEN, taps.__setitem__)
    return output, taps


def statistics_of(block: dict[str, jax.Array], config: ModelConfig = ATTENTION_CONFIG) -> BlockStatistics:
    return Calibrator(config, 2).run(block, 0, np.asarray(HIDDEN))[1]


PIECES = {
    "offset": {"key_offset": True},
    "balanced": {"pre_rope": True, "pair_statistic": "rms", "query_exponent": 0.25},
    "balanced, offset": {"pre_rope": True, "pair_statistic": "rms", "query_exponent": 0.25, "key_offset": True},
    "offset after S": {"post_rope_channels": 3, "key_offset": True},
    "fitted": {"pre_rope": True, "pair_statistic": "rms", "fit_pairs": True},
    "fitted, offset": {"pre_rope": True, "pair_statistic": "rms", "fit_pairs": True, "key_offset": True},
    "searched": {"pre_rope": True, "pair_statistic": "rms", "post_rope_channels": 4, "search_keys": True},
    "searched, fitted": {"pre_rope": True, "search_keys": True, "fit_pairs": True, "key_offset": True},
    "rotated values": {"value_basis": "hadamard"},
    "balanced values": {"value_basis": "balanced", "value_output": True},
}


@pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES)
def test_float_attention_is_unchanged_and_int4_attention_is_closer(piece: dict[str, object]) -> None:
    block, smoothing = block_of(), SmoothingConfig(**{**dataclasses.asdict(NOTHING), **piece})
    statistics = statistics_of(block)
    smoothed = smooth_block(block, statistics.keys, ATTENTION_CONFIG, smoothing, values=statistics.values)
    exact, _ = run(block, None, "none")
    same, _ = run(smoothed, smoothing, "none")
    np.testing.assert_allclose(same, exact, atol=2e-4)
    plain, _ = run(block, None, "int4")
    better, _ = run(smoothed, smoothing, "int4")
    assert jnp.linalg.norm(better - exact) < 0.95 * jnp.linalg.norm(plain - exact)


def test_offset_is_the_mean_of_the_keys_that_are_stored() -> None:
    block = block_of()
    smoothing = dataclasses.replace(NOTHING, key_offset=True, post_rope_channels=3, pre_rope=True)
    smoothed = smooth_block(block, statistics_of(block).keys, ATTENTION_CONFIG, smoothing)
    _, taps = run(smoothed, smoothing, "none")
    stored = taps["key_after_rope"] * smoothed["self_attn.post_rope_scale"] - smoothed["self_attn.key_offset"]
    np.testing.assert_allclose(stored.mean(axis=(0, 1)), 0, atol=1e-4)


@pytest.mark.parametrize("fitted", [False, True])
def test_balanced_keys_do_not_depend_on_how_pairs_were_scaled_before(fitted: bool) -> None:
    """What makes a model with injected key outliers quantize as the plain one."""
    statistics = statistics_of(block_of()).keys
    smoothing = dataclasses.replace(
        NOTHING, pre_rope=True, pair_statistic="rms", query_exponent=0.25, fit_pairs=fitted, key_offset=True
    )
    assert statistics.moments is not None
    assert statistics.sample is not None
    factor = jnp.exp(jax.random.normal(jax.random.key(5), (2, 8)))
    both = jnp.tile(factor, (1, 2))
    outliers = KeyStatistics(
        statistics.pair_max * factor,
        statistics.channel_max * both,
        KeyMoments(
            statistics.moments.mean * both,
            statistics.moments.square * both**2,
            statistics.moments.query_square / both**2,
        ),
        KeySample(statistics.sample.keys * both, statistics.sample.reads / factor**2),
    )
    plain, scaled = (key_transform(keys, smoothing)[0].scale for keys in (statistics, outliers))
    ratio = np.asarray(scaled * factor / plain)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=2e-2 if fitted else 1e-4)


def test_fitted_pairs_cost_less_than_what_they_started_from() -> None:
    statistics = statistics_of(block_of()).keys
    assert statistics.sample is not None
    sample = statistics.sample
    start = 1 / statistics.pair_max

    def cost(pairs: PairTransform) -> np.ndarray:
        step = jnp.max(jnp.abs(pairs.apply(sample.keys)), axis=-1)
        return np.asarray(jnp.mean(jnp.square(step) * jnp.sum(sample.reads / pairs.scale**2, axis=-1), axis=0))

    assert (cost(fit_pairs(start, sample)) < 0.8 * cost(PairTransform(start))).all()


@pytest.mark.parametrize("largest", [2.0, 30.0, 60.0])
def test_a_head_that_nobody_reads_is_left_as_it_is(largest: float) -> None:
    keys = largest * jax.random.normal(jax.random.key(0), (8, 2, 16))
    reads = jnp.ones((8, 2, 8)).at[:, 1].set(0.0)
    pairs = fit_pairs(jnp.ones((2, 8)), KeySample(keys, reads))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(pairs))
    np.testing.assert_array_equal(pairs.scale[1], 1.0)


@pytest.mark.parametrize("config", [ATTENTION_CONFIG, BOUNDED], ids=["plain", "soft cap, window"])
def test_reads_predict_what_an_error_in_a_key_does_to_the_output(config: ModelConfig) -> None:
    """To first order: the output moves as the sampled sensitivities say, averaged over random errors."""
    block = block_of()
    sample = statistics_of(block, config).keys.sample
    assert sample is not None
    _, taps = run(block, None, "none")
    key = taps["key_after_rope"]
    columns = block["self_attn.o_proj.weight"].reshape(32, 2, 2, 16)
    query, value = taps["query_after_rope"].reshape(2, 24, 2, 2, 16), taps["value"]
    visible = jnp.tril(jnp.ones((24, 24), bool))
    if config.window is not None:
        visible &= ~jnp.tril(visible, -config.window)

    def attention(key: jax.Array) -> jax.Array:
        scores = jnp.einsum("btkgh,bskh->bkgts", query, key) / 4
        if (cap := config.attention_softcap) is not None:
            scores = cap * jnp.tanh(scores / cap)
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bkgts,bskh,dkgh->btkgd", weights, value, columns)

    size, position = 1e-3, 1  # the second sequence's first sampled position
    errors = jax.random.normal(jax.random.key(8), (256, 2, 16)) * size
    moved = jax.vmap(lambda error: attention(key.at[1, position].add(error)) - attention(key))(errors)
    measured = jnp.mean(jnp.sum(jnp.square(moved), axis=(1, 2, 4, 5)), axis=0)
    rows = len(sample.reads) // 2
    # |q . e|^2 averages to |q|^2 size^2, and a score is divided by sqrt(H) = 4.
    predicted = jnp.sum(sample.reads[rows], axis=-1) * size**2 / 16
    np.testing.assert_allclose(sample.keys[rows], key[1, position], atol=1e-5)
    np.testing.assert_allclose(measured, predicted, rtol=0.3)


def test_balanced_values_and_their_readers_are_alike() -> None:
    """The basis is a balanced one: values and o_proj have the same second moments, equal on the diagonal."""
    block = block_of()
    values = statistics_of(block).values
    balanced = balance_values(block, ATTENTION_CONFIG, values)
    after = statistics_of(balanced).values
    columns = balanced["self_attn.o_proj.weight"].reshape(32, 2, 2, 16)
    readers = jnp.einsum("dkgi,dkgj->kij", columns, columns)
    np.testing.assert_allclose(after, readers, rtol=2e-2, atol=2e-2 * float(jnp.abs(readers).max()))
    diagonal = np.einsum("kii->ki", np.asarray(after))
    np.testing.assert_allclose(diagonal, np.broadcast_to(diagonal[:, :1], diagonal.shape), rtol=2e-2)


def test_balanced_values_do_not_depend_on_how_channels_were_scaled_before() -> None:
    """What makes a model with injected value outliers quantize as the plain one."""
    block, factor = block_of(), jnp.exp(2 * jax.random.normal(jax.random.key(9), (32,)))
    outliers = {
        **block,
        "self_attn.v_proj.weight": block["self_attn.v_proj.weight"] * factor[:, None],
        "self_attn.o_proj.weight": block["self_attn.o_proj.weight"]
        / jnp.repeat(factor.reshape(2, 1, 16), 2, axis=1).reshape(-1),
    }
    costs = []
    for unbalanced in (block, outliers):
        balanced = balance_values(unbalanced, ATTENTION_CONFIG, statistics_of(unbalanced).values)
        costs.append(np.einsum("kii->k", np.asarray(statistics_of(balanced).values)))
    np.testing.assert_allclose(costs[1], costs[0], rtol=1e-2)


def test_searched_strength_costs_least_for_each_head() -> None:
    keys = statistics_of(block_of()).keys
    assert keys.sample is not None
    smoothing = dataclasses.replace(NOTHING, pre_rope=True, pair_statistic="rms", post_rope_channels=4)
    found = key_transform(keys, dataclasses.replace(smoothing, search_keys=True))
    cost = key_cost(keys.sample, found.pairs.scale, found.post_rope_scale)
    for channels in (0, 1, 2, 4):
        for exponent in QUERY_EXPONENTS:
            given = dataclasses.replace(smoothing, post_rope_channels=channels, query_exponent=exponent)
            other = key_transform(keys, given)
            assert np.all(cost <= 1.001 * key_cost(keys.sample, other.pairs.scale, other.post_rope_scale))


def test_statistics_are_asked_for() -> None:
    statistics = statistics_of(block_of()).keys._replace(moments=None)
    with pytest.raises(ValueError, match="moments"):
        smooth_block(block_of(), statistics, ATTENTION_CONFIG, dataclasses.replace(NOTHING, key_offset=True))
    with pytest.raises(ValueError, match="second moments of the values"):
        smooth_block(block_of(), None, ATTENTION_CONFIG, dataclasses.replace(NOTHING, value_basis="balanced"))
    fitted = dataclasses.replace(NOTHING, pre_rope=True, fit_pairs=True)
    with pytest.raises(ValueError, match="sample of the keys"):
        smooth_block(block_of(), statistics._replace(sample=None), ATTENTION_CONFIG, fitted)
    searched = dataclasses.replace(NOTHING, pre_rope=True, search_keys=True)
    with pytest.raises(ValueError, match="sample of the keys"):
        smooth_block(block_of(), statistics_of(block_of()).keys._replace(sample=None), ATTENTION_CONFIG, searched)
    with pytest.raises(ValueError, match="statistics of the inputs"):
        smooth_block(block_of(), None, ATTENTION_CONFIG, dataclasses.replace(NOTHING, search_columns=True))
    with pytest.raises(ValueError, match="statistics of the inputs"):
        smooth_block(
            block_of(), None, ATTENTION_CONFIG, dataclasses.replace(NOTHING, up_down=True, activation_exponent=0.5)
        )


@pytest.mark.parametrize("size", [1, 12, 64, 96])
def test_hadamard_is_orthogonal(size: int) -> None:
    matrix = hadamard(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    assert len(np.unique(np.abs(np.asarray(matrix)).round(6))) <= 2  # 0 and one magnitude


def test_rotation_spreads_an_outlier_over_its_head() -> None:
    rotated = rotate_values(block_of(), ATTENTION_CONFIG)
    norms = jnp.linalg.norm(rotated["self_attn.v_proj.weight"], axis=1).reshape(2, 16)
    before = jnp.linalg.norm(block_of()["self_attn.v_proj.weight"], axis=1).reshape(2, 16)
    assert before.max() / before.min() > 5
    assert norms[0].max() / norms[0].min() < 2


def test_activation_exponent_balances_inputs_and_weights() -> None:
    weight = jax.random.normal(jax.random.key(2), (8, 6))
    inputs = jnp.exp(jax.random.normal(jax.random.key(3), (6,))).at[4].set(0)
    factor = jnp.exp(jax.random.normal(jax.random.key(4), (6,)))
    scale = column_scale(weight, "mean", inputs, 0.5)
    moved = column_scale(weight / factor, "mean", inputs * factor, 0.5)
    assert float(scale[4]) == float(moved[4]) == 1.0
    used = np.array([0, 1, 2, 3, 5])
    ratio = np.asarray(moved / scale / factor)[used]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    np.testing.assert_allclose(column_scale(weight, "mean", inputs, 0.0), column_scale(weight, "mean"), rtol=1e-6)


def test_clip_shrinks_the_scale_and_only_that() -> None:
    rows = jax.random.normal(jax.random.key(6), (64, 128))
    plain, clipped = (formats.quantize_kv(rows, "int4", clip=clip) for clip in (1.0, 0.93))
    assert plain.scale is not None
    assert clipped.scale is not None
    ratio = np.asarray(clipped.scale.astype(jnp.float32) / plain.scale.astype(jnp.float32))
    np.testing.assert_allclose(ratio, 0.93, rtol=0.01)
    errors = [float(jnp.linalg.norm(formats.dequantize(x) - rows)) for x in (plain, clipped)]
    assert errors[1] < errors[0]
    fp8 = [formats.quantize_kv(rows, "fp8", clip=clip).scale for clip in (1.0, 0.93)]
    np.testing.assert_array_equal(fp8[0], fp8[1])


def test_unbiased_rows_keep_their_product_with_themselves() -> None:
    rows = jax.random.normal(jax.random.key(6), (64, 128)).at[3].set(0.0).at[4, 5].set(jnp.inf).at[6].multiply(1e25)
    plain, unbiased = (formats.quantize_kv(rows, "int4", clip=0.93, unbiased=on) for on in (False, True))
    np.testing.assert_array_equal(unbiased.values, plain.values)
    usual = np.delete(np.arange(64), [3, 4, 6])
    kept = [np.sum(np.asarray(formats.dequantize(x) * rows)[usual], axis=1) for x in (plain, unbiased)]
    exact = np.sum(np.square(np.asarray(rows)[usual]), axis=1)
    assert np.mean(kept[0] / exact) < 0.995
    np.testing.assert_allclose(kept[1], exact, rtol=2**-8)  # a bf16 scale
    assert bool(jnp.all(jnp.isfinite(formats.dequantize(unbiased))))
    assert not formats.dequantize(unbiased)[3].any()
