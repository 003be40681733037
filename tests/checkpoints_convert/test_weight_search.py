"""Searched scales: never worse than absmax scales, and better where it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_convert.algorithms.weight_search import search_channel_scale, search_group_scale, search_weight
from pallas_kernels import formats

ROWS, INPUTS = 48, 256


def weight_of(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (ROWS, INPUTS)) * 0.02


def importance_of(seed: int = 1) -> jax.Array:
    """A few inputs carry most of the energy."""
    return jnp.exp(2 * jax.random.normal(jax.random.key(seed), (INPUTS,)))


def row_errors(codes: formats.WeightCodes, weight: jax.Array, importance: jax.Array) -> np.ndarray:
    return np.asarray(jnp.sum(importance * jnp.square(formats.dequantize_weight(codes) - weight), axis=1))


@pytest.mark.parametrize("scale_dtype", ["e4m3", "bf16"])
@pytest.mark.parametrize("rounding", ["nearest", "table"])
def test_no_group_is_worse_than_under_its_absmax_scale(
    scale_dtype: formats.ScaleDtype, rounding: formats.Rounding
) -> None:
    scaled = (weight_of() / formats.weight_channel_scale(weight_of(), "per_channel")[:, None]).reshape(ROWS, 2, 128)
    importance = importance_of().reshape(2, 128)
    scale, error = search_group_scale(scaled, importance, scale_dtype, rounding)

    def error_under(scale: jax.Array) -> jax.Array:
        codes = formats.encode_weight(scaled, scale, rounding).reshape(ROWS, INPUTS)
        values = formats.decode_weight(codes, scale).reshape(scaled.shape)
        return jnp.sum(importance * jnp.square(values - scaled), axis=-1)

    plain = formats.round_group_scale(formats.finite_absmax(scaled) / 7, scale_dtype)
    assert scale.dtype == plain.dtype
    np.testing.assert_allclose(error, error_under(scale), rtol=1e-5)
    # Both are sums of 128 float32 terms, in orders of their own.
    assert np.all(np.asarray(error) <= np.asarray(error_under(plain)) * (1 + 1e-5))
    assert float(jnp.sum(error)) < 0.8 * float(jnp.sum(error_under(plain)))


def test_table_rounding_is_never_worse_than_nearest() -> None:
    weight, ones = weight_of(), jnp.ones(INPUTS)
    nearest, table = (
        row_errors(formats.quantize_weight(weight, rounding=r), weight, ones) for r in ("nearest", "table")
    )
    assert np.all(table <= nearest * (1 + 1e-6))
    assert table.sum() < nearest.sum()


def test_importance_moves_the_error_to_where_it_is_cheap() -> None:
    weight, importance = weight_of(), importance_of()
    blind, aware = (search_weight(weight, x) for x in (jnp.ones(INPUTS), importance))
    assert row_errors(aware, weight, importance).sum() < 0.9 * row_errors(blind, weight, importance).sum()
    assert row_errors(blind, weight, jnp.ones(INPUTS)).sum() < row_errors(aware, weight, jnp.ones(INPUTS)).sum()


def test_channel_scale_stays_in_range_and_helps() -> None:
    weight, importance = weight_of(), importance_of()
    base = formats.weight_channel_scale(weight, "per_channel")
    found = search_channel_scale(weight, importance, group_size=128, scale_dtype="e4m3", rounding="table")
    assert np.all((np.asarray(found / base) >= 1) & (np.asarray(found / base) < 2))

    def total(channel: jax.Array) -> float:
        scaled = (weight / channel[:, None]).reshape(ROWS, 2, 128)
        _, errors = search_group_scale(scaled, importance.reshape(2, 128), "e4m3", "table")
        return float(jnp.sum(jnp.sum(errors, axis=1) * jnp.square(channel)))

    assert total(found) < total(base)


def test_zero_rows_and_groups_stay_zero() -> None:
    weight = weight_of().at[3].set(0).at[5, :128].set(0)
    codes = search_weight(weight, importance_of())
    values = np.asarray(formats.dequantize_weight(codes))
    assert not values[3].any()
    assert not values[5, :128].any()
    assert np.isfinite(values).all()
    assert np.all(np.asarray(codes.group_scale, np.float32) > 0)
