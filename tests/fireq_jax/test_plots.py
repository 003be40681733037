"""The figures are written, show their data, and refuse arrays that are no magnitudes."""

import zipfile

import numpy as np
import pytest
from matplotlib.image import imread

from fireq_jax.evaluation.plots import plot_channel_absmax, plot_keys, plot_smoothing, read_smoothing


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


LINEAR = {f"layers.0.mlp.down_proj.{moment}": np.ones(4, np.float32) for moment in ("before", "after")}
KEYS = {f"layers.1.keys.{moment}": np.ones((1, 4), np.float32) for moment in ("before", "pre_rope", "post_rope")}


def test_what_smoothing_did_is_drawn(tmp_path):
    np.savez(tmp_path / "smoothing.npz", **LINEAR, **KEYS)
    paths = plot_smoothing(read_smoothing(tmp_path), tmp_path / "figures")
    assert [path.name for path in paths] == ["layers.0.mlp.down_proj.png", "layers.1.keys.png"]
    assert set((tmp_path / "figures").iterdir()) == set(paths)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"../../outside.before": np.ones(4)}, "holds '../../outside.before'; expected names such as"),
        ({"/tmp/outside.before": np.ones(4)}, "holds '/tmp/outside.before'"),
        ({"layers.0.mlp.down_proj/../x.before": np.ones(4)}, "holds 'layers.0.mlp.down_proj/../x.before'"),
        ({"layers.\u0661.keys.before": np.ones(4)}, "expected names such as"),
        ({"layers.0.mlp.down_proj.before": np.ones(4)}, "expected before, after"),
        ({**LINEAR, "layers.0.mlp.down_proj.between": np.ones(4)}, "expected before, after"),
        ({**LINEAR, "layers.0.mlp.down_proj.after": np.ones(5)}, r"expected the same"),
        ({**LINEAR, "layers.0.mlp.down_proj.after": np.ones((4, 1))}, r"has shape \(4, 1\); expected \[K\]"),
        ({**LINEAR, "layers.0.mlp.down_proj.after": np.full(4, "a")}, "could not convert"),
        ({**KEYS, "layers.1.keys.before": np.ones(4)}, r"has shape \(4,\); expected \[kv_heads, H\]"),
        ({**LINEAR, "layers.0.mlp.down_proj.after": np.asarray([{}] * 4)}, "cannot be read: Object arrays"),
    ],
)
def test_other_arrays_are_refused_by_the_file_s_name(tmp_path, arrays, message):
    np.savez(tmp_path / "smoothing.npz", **arrays)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/smoothing\.npz.*{message}"):
        read_smoothing(tmp_path)


def test_broken_files_are_named(tmp_path):
    file = tmp_path / "smoothing.npz"
    with pytest.raises(ValueError, match=f"{file} is missing"):
        read_smoothing(tmp_path)
    np.savez(file, **LINEAR)
    whole = file.read_bytes()
    for content in (b"", b"text", whole[:-40], whole[:60] + bytes(40) + whole[100:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file} cannot be read"):
            read_smoothing(tmp_path)
    huge = np.lib.format.magic(1, 0) + b"\x76\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (10**15,)}"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("layers.0.mlp.down_proj.before.npy", huge.ljust(128))
    with pytest.raises(ValueError, match=f"{file} cannot be read"):
        read_smoothing(tmp_path)
