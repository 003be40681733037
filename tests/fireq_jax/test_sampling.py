"""Sampling against plain numpy: filters, penalty, and the distribution of what is drawn."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fireq_jax.generation.sampling import SamplingConfig, SamplingOptions, filter_logits, penalize, sample

jitted_filter = jax.jit(filter_logits)
jitted_sample = jax.jit(sample)

VOCAB = 12
# Few distinct values, so that ties are common.
rows_of_logits = st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=VOCAB, max_size=VOCAB)


def kept(logits, **options) -> np.ndarray:
    """Which tokens of each row [B, V] the filters leave."""
    filtered = np.asarray(jitted_filter(jnp.asarray(logits, jnp.float32), SamplingConfig(**options).arrays()))
    assert not np.isnan(filtered).any()
    return filtered > -np.inf


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def oracle(logits: list[float], temperature: float, top_k: int | None, top_p: float | None, min_p: float | None):
    """Tokens that stay, one filter after the other; skips inputs that rounding could decide."""
    scaled = np.array(logits) / temperature
    if top_k is not None and top_k < len(scaled):
        scaled = np.where(scaled >= np.sort(scaled)[-top_k], scaled, -np.inf)
    if top_p is not None and top_p < 1:
        probabilities = softmax(scaled)
        total, last = 0.0, np.inf
        for p in np.sort(probabilities)[::-1]:
            assume(abs(total - top_p) > 1e-5)
            if total >= top_p:
                break
            total, last = total + p, p
        scaled = np.where(probabilities >= last * (1 - 1e-12), scaled, -np.inf)
    if min_p is not None:
        ratio = np.exp(scaled - scaled.max())
        assume(min_p == 1 or np.abs(ratio - min_p).min() > 1e-5)
        scaled = np.where(ratio >= min_p, scaled, -np.inf)
    return scaled > -np.inf


@settings(max_examples=200, deadline=None)
@given(
    rows_of_logits,
    st.floats(0.1, 4),
    st.none() | st.integers(1, VOCAB + 3),
    st.none() | st.floats(0.01, 1),
    st.none() | st.floats(0, 1),
)
def test_filters_match_numpy(logits, temperature, top_k, top_p, min_p):
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    np.testing.assert_array_equal(kept([logits], **options)[0], oracle(logits, **options))


@settings(max_examples=50, deadline=None)
@given(rows_of_logits, st.integers(1, 5), st.floats(1e-30, 1), st.floats(0, 1))
def test_most_likely_token_always_stays(logits, top_k, top_p, min_p):
    assert kept([logits], top_k=top_k, top_p=top_p, min_p=min_p)[0, np.argmax(logits)]


def test_top_p_keeps_one_token_when_it_is_enough():
    logits = np.log([[0.6, 0.3, 0.1]])
    assert kept(logits, top_p=0.59).tolist() == [[True, False, False]]
    assert kept(logits, top_p=0.61).tolist() == [[True, True, False]]
    assert kept(logits, top_p=1.0).all()


def test_top_p_counts_what_top_k_left():
    # Of 0.4 0.3 0.2 0.1 top_k leaves 0.57 0.43: 0.5 is reached by one token, not by two.
    logits = np.log([[0.4, 0.3, 0.2, 0.1]])
    assert kept(logits, top_p=0.5).tolist() == [[True, True, False, False]]
    assert kept(logits, top_p=0.5, top_k=2).tolist() == [[True, False, False, False]]


def test_ties_stay_or_go_together():
    logits = [[1.0, 2.0, 2.0, 2.0, 0.0]]
    for options in ({"top_k": 2}, {"top_p": 0.01}, {"min_p": 1.0}):
        assert kept(logits, **options).tolist() == [[False, True, True, True, False]]


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert kept([[1.0, -50.0, 3.0]], top_k=10**12).all()


def test_filters_take_each_row_alone():
    rows = np.random.default_rng(0).normal(size=(5, VOCAB)) * 2
    together = kept(rows, top_k=6, top_p=0.8, min_p=0.05)
    assert (together == np.concatenate([kept(row[None], top_k=6, top_p=0.8, min_p=0.05) for row in rows])).all()
    assert len({tuple(row) for row in together}) == 5


def test_logits_of_minus_infinity_are_never_drawn():
    assert kept([[0.0, -np.inf, -1.0]], temperature=1.0).tolist() == [[True, False, True]]
    assert kept([[0.0, -np.inf, -1.0]], top_k=3, top_p=0.999).tolist() == [[True, False, True]]


@pytest.mark.parametrize("temperature", [1e-50, 1e-38, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = jnp.array([[80.0, 81.0, -90.0], [3e38, 0.0, -3e38]])
    drawn = jitted_sample(
        logits,
        SamplingConfig(temperature=temperature).arrays(),
        keys=jax.random.split(jax.random.key(0), 2),
        positions=jnp.zeros(2, jnp.int32),
        seen=None,
    )
    assert drawn.tolist() == [1, 0]


def test_temperature_divides_the_logits():
    logits = np.random.default_rng(1).normal(size=(2, VOCAB)).astype(np.float32)
    filtered = np.asarray(jitted_filter(jnp.asarray(logits), SamplingConfig(temperature=0.5).arrays()))
    np.testing.assert_allclose(filtered, (logits - logits.max(1, keepdims=True)) / 0.5, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(rows_of_logits, st.lists(st.booleans(), min_size=VOCAB, max_size=VOCAB), st.floats(0.25, 4, width=32))
def test_repetition_penalty_matches_numpy(logits, seen, penalty):
    expected = [
        x if not s else x / penalty if x > 0 else x * penalty for x, s in zip(logits, seen, strict=True)
    ]  # fmt: skip
    actual = jax.jit(penalize)(jnp.array([logits]), jnp.array([seen]), np.float32(penalty))[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_repetition_penalty_applies_to_greedy_choice():
    logits, seen = jnp.array([[2.0, 1.5, -1.0]]), jnp.array([[True, False, False]])
    choose = functools.partial(jitted_sample, logits, keys=None, positions=jnp.zeros(1, jnp.int32))
    assert choose(SamplingConfig(repetition_penalty=1.2).arrays(), seen=seen).tolist() == [0]
    assert choose(SamplingConfig(repetition_penalty=1.5).arrays(), seen=seen).tolist() == [1]


def draw(logits: np.ndarray, count: int, **options) -> np.ndarray:
    """``count`` tokens, each under a key of its own."""
    return np.asarray(
        jitted_sample(
            jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits))),
            SamplingConfig(**options).arrays(),
            keys=jax.random.split(jax.random.key(7), count),
            positions=jnp.zeros(count, jnp.int32),
            seen=None,
        )
    )


@pytest.mark.parametrize(
    ("options", "left"),
    [({"temperature": 0.7}, 6), ({"top_k": 4}, 4), ({"temperature": 2.0, "top_p": 0.8}, 4), ({"min_p": 0.3}, 3)],
)
def test_drawn_tokens_follow_the_filtered_distribution(options, left):
    logits = np.log([0.05, 0.4, 0.02, 0.25, 0.08, 0.2])
    temperature = options.get("temperature", 1.0)
    weights = np.where(np.argsort(np.argsort(-logits)) < left, np.exp(logits / temperature), 0)
    count = 20_000
    expected = weights / weights.sum() * count
    observed = np.bincount(draw(logits, count, **options), minlength=6)
    assert observed[expected == 0].sum() == 0
    likely = expected > 0
    chi_square = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    # The 99.99% quantile at 5 degrees of freedom; the draw is fixed by its key.
    assert chi_square < 25.7


def test_noise_depends_on_key_and_position_only():
    logits = jnp.zeros((1, 1000))
    sampling = SamplingConfig(temperature=1.0).arrays()
    first, second = jax.random.split(jax.random.key(3))
    keys = jnp.stack([first, first, second, second])
    positions = jnp.array([5, 6, 5, 6], jnp.int32)
    draw_rows = functools.partial(jitted_sample, sampling=sampling, seen=None)
    batch = draw_rows(jnp.repeat(logits, 4, 0), keys=keys, positions=positions).tolist()
    alone = [draw_rows(logits, keys=keys[i : i + 1], positions=positions[i : i + 1]).item() for i in range(4)]
    assert batch == alone
    assert len(set(batch)) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e39),
        ("top_k", 0),
        ("top_k", float("nan")),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 1e-50),
        ("min_p", True),
    ],
)
def test_values_out_of_range_are_quoted(field, value):
    with pytest.raises(ValueError, match=rf"{field} is {re.escape(str(value))}; expected"):
        SamplingConfig(**{field: value})


def test_greedy_unless_an_option_needs_sampling():
    assert SamplingConfig().greedy
    assert SamplingConfig(repetition_penalty=1.3).greedy
    assert SamplingConfig(temperature=0.0, top_k=5).greedy
    assert not SamplingConfig(top_k=5).greedy
    assert SamplingConfig(top_p=0.9).arrays().temperature == 1


def test_options_without_effect_are_not_compiled():
    assert (
        SamplingConfig(temperature=1.0, top_p=1.0, min_p=0.0, repetition_penalty=1.0).arrays()
        == SamplingConfig(temperature=1.0).arrays()
    )


def test_keyword_options_are_the_configuration_fields():
    assert list(SamplingOptions.__annotations__) == [field.name for field in dataclasses.fields(SamplingConfig)]
