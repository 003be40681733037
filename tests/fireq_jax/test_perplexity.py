"""Perplexity against float64 numpy, window by window."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fireq_jax import LlamaForCausalLM, ModelConfig, recipes
from fireq_jax.evaluation.perplexity import count_windows, perplexity, scored_range
from fireq_jax.generation.likelihood import token_nll
from fireq_jax.models.config import RopeConfig

VOCAB = 61


def small_model(recipe, rope=None):
    config = ModelConfig(
        VOCAB, 64, 96, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, max_position_embeddings=32,
        rope=rope or RopeConfig(),
    )  # fmt: skip
    model = LlamaForCausalLM(config, recipe, dtype=jnp.float32)
    assert model.lm_head is not None
    # Peaked distributions: with the initial 0.02 every model has a perplexity of about VOCAB.
    model.lm_head.set_value(model.lm_head.get_value() * 20)
    return model


@pytest.fixture(scope="module")
def model():
    return small_model(recipes.none())


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, VOCAB, 150).astype(np.int32)


@nnx.jit
def logits_of(model, input_ids):
    return model(input_ids)


def float64_nll(model, window):
    """-log p of tokens 1.. of one window, without padding or batching."""
    logits = np.asarray(logits_of(model, jnp.asarray(window[None])))[0].astype(np.float64)
    log_probability = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    return -log_probability[np.arange(len(window) - 1), window[1:]]


def test_non_overlapping_windows_with_a_ragged_last_one(model, tokens):
    result = perplexity(model, tokens, window=32, progress=False)
    expected = np.concatenate([float64_nll(model, tokens[i : i + 32]) for i in range(0, 150, 32)])
    assert len(expected) == result.tokens == 4 * 31 + 21
    assert result.nll == pytest.approx(expected.sum(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    assert result.perplexity > 2 * VOCAB  # far from the uniform distribution, so the comparison says something


def test_quantized_model(tokens):
    model = small_model(recipes.rtn())
    result = perplexity(model, tokens[:64], window=32, progress=False)
    expected = np.concatenate([float64_nll(model, tokens[i : i + 32]) for i in (0, 32)])
    # An activation that lies between two FP8 values may round either way under another compilation.
    assert result.nll == pytest.approx(expected.sum(), rel=1e-3)


@pytest.mark.parametrize("stride", [1, 7, 31])
def test_sliding_windows_equal_brute_force(model, tokens, stride):
    tokens = tokens[:70]
    result = perplexity(model, tokens, window=32, stride=stride, batch_size=8, progress=False)
    expected = float64_nll(model, tokens[:32]).tolist()
    start = 0
    while start + 32 < len(tokens):
        start += stride
        seen = len(expected) + 1
        expected += float64_nll(model, tokens[start : start + 32])[seen - start - 1 :].tolist()
    assert result.tokens == len(expected) == 69
    assert result.nll == pytest.approx(sum(expected), rel=1e-5)


def test_batch_size_does_not_change_the_result(model, tokens):
    results = [perplexity(model, tokens, window=32, batch_size=size, progress=False) for size in (1, 2, 5, 100)]
    assert {result.tokens for result in results} == {145}
    for result in results[1:]:
        assert result.nll == pytest.approx(results[0].nll, rel=1e-6)


def test_max_windows_is_the_beginning_of_the_stream(model, tokens):
    limited = perplexity(model, tokens, window=32, max_windows=2, progress=False)
    assert limited == perplexity(model, tokens[:64], window=32, progress=False)
    assert limited.tokens == 62


def test_text_shorter_than_a_window(model, tokens):
    short = perplexity(model, tokens[:10], window=32, progress=False)
    assert short.tokens == 9
    assert short.nll == pytest.approx(float64_nll(model, tokens[:10]).sum(), rel=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(rope_type="dynamic", factor=2.0),
        RopeConfig(
            rope_type="longrope", short_factor=(1.0,) * 16, long_factor=(8.0,) * 16,
            original_max_position_embeddings=48,
        ),
    ],
    ids=["dynamic", "longrope"],
)  # fmt: skip
def test_padding_does_not_count_where_rotations_depend_on_the_length(tokens, rope):
    """The last of these windows is longer than the model's positions, and shorter than the others."""
    dynamic = small_model(recipes.none(), rope)
    packed = dynamic.layers[0].self_attn.qkv_proj.weight
    packed.set_value(packed.get_value() * 20)  # so that where a token stands matters
    result = perplexity(dynamic, tokens[:104], window=64, progress=False)
    expected = [float64_nll(dynamic, part) for part in (tokens[:64], tokens[64:104])]
    assert result.nll == pytest.approx(np.concatenate(expected).sum(), rel=1e-5)


def test_a_window_beyond_the_models_positions_is_logged(model, tokens, caplog):
    perplexity(model, tokens, window=32, max_windows=1, progress=False)
    assert not caplog.messages
    perplexity(model, tokens, window=33, max_windows=1, progress=False)
    assert caplog.messages == ["a window of 33 exceeds the model's 32 positions"]


def test_all_batches_share_one_compilation(model, tokens):
    token_nll.clear_cache()
    for _ in range(2):
        perplexity(model, tokens, window=32, batch_size=3, progress=False)
    assert token_nll._cache_size() == 1


@pytest.mark.parametrize("window", [2, 3, 8, 200])
@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 16, 17, 41])
def test_windows_score_each_token_once(length, window):
    for stride in range(1, window + 1):
        scored = [
            index * stride + position
            for index in range(count_windows(length, window, stride))
            for position in range(*scored_range(index, length, window, stride))
        ]
        skipped = set(range(0, length, window)) if stride == window else {0}
        assert scored == [token for token in range(length) if token not in skipped]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, r"window is 1; expected at least 2"),
        ({"window": 8, "stride": 9}, r"stride is 9; expected 1 to 8"),
        ({"window": 8, "stride": 0}, r"stride is 0; expected 1 to 8"),
        ({"batch_size": 0}, r"batch_size is 0"),
        ({"max_windows": 0}, r"max_windows is 0"),
        ({"tokens": np.zeros(1, np.int32)}, r"shape \(1,\); expected one stream of at least 2"),
        ({"tokens": np.asarray([3, VOCAB])}, rf"reach from 3 to {VOCAB}; expected 0 to {VOCAB - 1}"),
    ],
)
def test_errors_quote_the_value(model, tokens, arguments, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, **{"tokens": tokens, "window": 32, "progress": False, **arguments})


def test_a_model_with_nan_weights_is_an_error(tokens):
    config = ModelConfig(VOCAB, 32, 32, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32)
    model = LlamaForCausalLM(config, dtype=jnp.float32)
    model.norm.weight.set_value(jnp.full((32,), jnp.nan))
    with pytest.raises(ValueError, match=r"window 0: the negative log-likelihood is nan"):
        perplexity(model, tokens, window=32, progress=False)


def test_divergence_from_a_reference(model, tokens):
    """Against float64, over a batch with a ragged window and a stride; of itself a model has none."""
    other = small_model(recipes.none())
    assert other.lm_head is not None
    other.lm_head.set_value(other.lm_head.get_value() * 1.3 + 0.1 * np.random.default_rng(0).normal(size=(VOCAB, 64)))
    alone = perplexity(other, tokens, window=32, stride=20, progress=False)
    result = perplexity(other, tokens, reference=model, window=32, stride=20, batch_size=3, progress=False)
    assert (result.tokens, result.windows) == (alone.tokens, alone.windows) == (149, 7)
    assert (alone.divergence, alone.agreement) == (None, None)
    assert result.nll == pytest.approx(alone.nll, rel=1e-5)
    divergence, agree = [], []
    for index in range(7):
        window = tokens[20 * index :][:32]
        begin, end = scored_range(index, len(tokens), 32, 20)
        logits = [np.asarray(logits_of(m, jnp.asarray(window[None])))[0].astype(np.float64) for m in (model, other)]
        exact, own = (x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True)) for x in logits)
        each = np.sum(np.exp(exact) * (exact - own), axis=-1)
        divergence += each[begin - 1 : end - 1].tolist()
        agree += (exact.argmax(-1) == own.argmax(-1))[begin - 1 : end - 1].tolist()
    assert 0.01 < result.divergence == pytest.approx(np.mean(divergence), rel=1e-4)
    assert 0 < result.agreement == np.mean(agree) < 1
    itself = perplexity(model, tokens[:40], reference=model, window=32, progress=False)
    assert (itself.divergence, itself.agreement) == (0, 1)


def test_a_reference_of_another_vocabulary_is_refused(model, tokens):
    config = ModelConfig(VOCAB + 3, 32, 32, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32)
    with pytest.raises(ValueError, match=rf"vocabulary has {VOCAB + 3} entries; expected {VOCAB}"):
        perplexity(model, tokens, reference=LlamaForCausalLM(config, dtype=jnp.float32), progress=False)
