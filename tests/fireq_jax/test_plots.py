"""The figures are written, show their data, and refuse arrays that are no magnitudes."""

import numpy as np
import pytest
from matplotlib.image import imread

from fireq_jax.evaluation.plots import plot_channel_absmax, plot_keys


def magnitudes(*shape):
    return np.random.default_rng(0).uniform(0.1, 2, shape)


def drawn_pixels(path, color):
    image = np.asarray(imread(path))[..., :3]
    wanted = np.asarray([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(image - wanted).max(axis=-1) < 0.02).sum())


def test_channel_figure_shows_both_series(tmp_path):
    before = magnitudes(200)
    plot_channel_absmax(before * np.where(np.arange(200) == 50, 100, 1), before, "layer", tmp_path / "a.png")
    image = imread(tmp_path / "a.png")
    assert image.shape[0] > 300
    assert image.shape[1] > 800
    for color in ("#0072B2", "#E69F00"):
        assert drawn_pixels(tmp_path / "a.png", color) > 500
    assert drawn_pixels(tmp_path / "a.png", "#009E73") == 0


def test_keys_have_one_panel_a_head(tmp_path):
    keys = magnitudes(2, 64)
    plot_keys(keys * 9, keys * 3, keys, "layer", tmp_path / "two.png")
    plot_keys(keys[:1] * 9, keys[:1] * 3, keys[:1], "layer", str(tmp_path / "one.png"))
    assert imread(tmp_path / "two.png").shape[0] > 1.5 * imread(tmp_path / "one.png").shape[0]
    for color in ("#0072B2", "#E69F00", "#009E73"):
        assert drawn_pixels(tmp_path / "two.png", color) > 1.5 * drawn_pixels(tmp_path / "one.png", color) > 0


def test_zero_channels_can_be_drawn(tmp_path):
    plot_channel_absmax(np.asarray([0.0, 1.0, 2.0]), np.zeros(3), "some", tmp_path / "some.png")
    plot_channel_absmax(np.zeros(3), np.zeros(3), "none", tmp_path / "none.svg")
    assert (tmp_path / "none.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (np.ones((2, 3)), np.ones(3), r"before has shape \(2, 3\); expected \[K\]"),
        (np.ones(3), np.ones(4), r"shapes \[\(3,\), \(4,\)\]; expected the same"),
        (np.ones(3), np.asarray([1, -1, 1]), r"after has negative or non-finite values"),
        (np.asarray([1, np.nan, 1]), np.ones(3), r"before has negative or non-finite values"),
    ],
)
def test_errors(tmp_path, before, after, message):
    with pytest.raises(ValueError, match=message):
        plot_channel_absmax(before, after, "", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_key_errors(tmp_path):
    with pytest.raises(ValueError, match=r"after_pre_rope has shape \(4,\); expected \[kv_heads, H\]"):
        plot_keys(np.ones((1, 4)), np.ones(4), np.ones((1, 4)), "", tmp_path / "a.png")
