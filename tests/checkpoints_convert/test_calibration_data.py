"""Calibration windows: which ones, always the same ones, and enough of them."""

import numpy as np
import pytest

from checkpoints_convert.calibration_data import (
    calibration_and_held_out,
    calibration_batches,
    held_out_windows,
    sample_windows,
)


class ByteTokenizer:
    def __call__(self, texts, **_):
        return {"input_ids": [list(text.encode()) for text in texts]}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(32, 127)) * 4)  # 380 tokens
    return path


def test_windows_are_parts_of_the_text_and_all_different():
    tokens = np.arange(1003, dtype=np.int32)
    batch = sample_windows(tokens, samples=60, sequence_length=16, seed=0)
    assert batch.shape == (60, 16)
    assert batch.dtype == np.int32
    starts = batch[:, 0]
    np.testing.assert_array_equal(batch, starts[:, None] + np.arange(16))
    assert len(set(starts.tolist())) == 60
    assert set(starts % 16) == {0}


def test_all_windows_are_a_permutation():
    batch = sample_windows(np.arange(103, dtype=np.int32), samples=25, sequence_length=4, seed=3)
    np.testing.assert_array_equal(np.sort(batch[:, 0]), np.arange(0, 100, 4))
    assert not np.array_equal(batch[:, 0], np.arange(0, 100, 4))


def test_the_seed_decides(text):
    def batch(seed):
        return calibration_batches(text, ByteTokenizer(), samples=8, sequence_length=16, seed=seed)

    np.testing.assert_array_equal(batch(1), batch(1))
    assert not np.array_equal(batch(1), batch(2))


def test_seed_0_means_these_windows_everywhere():
    batch = sample_windows(np.arange(80, dtype=np.int32), samples=5, sequence_length=8, seed=0)
    assert (batch[:, 0] // 8).tolist() == [3, 2, 1, 8, 6]


def test_more_samples_keep_the_earlier_ones():
    tokens = np.arange(640, dtype=np.int32)
    few, many = (sample_windows(tokens, samples=n, sequence_length=8, seed=5) for n in (10, 40))
    np.testing.assert_array_equal(few, many[:10])


def test_too_short_text_is_an_error_with_numbers(text):
    message = r"text.txt: the text has 380 tokens; 8 samples of 48 tokens need 384"
    with pytest.raises(ValueError, match=message):
        calibration_batches(text, ByteTokenizer(), samples=8, sequence_length=48)


@pytest.mark.parametrize("arguments", [{"samples": 0}, {"sequence_length": 0}, {"seed": -1}])
def test_sizes_out_of_range(arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=rf"{name} is {value}; expected"):
        sample_windows(np.arange(9, dtype=np.int32), **{"samples": 1, "sequence_length": 2, "seed": 0, **arguments})


@pytest.mark.parametrize(
    ("windows", "samples", "length", "count"),
    [(80, 64, 128, 16), (99, 80, 256, 10), (200, 160, 256, 16), (40, 16, 512, 4), (18, 16, 512, 2), (16, 16, 512, 0)],
)
def test_held_out_windows_are_others_of_the_same_text(windows, samples, length, count):
    sizes = {"samples": samples, "sequence_length": length, "seed": 7}
    tokens = np.arange(windows * length + 3, dtype=np.int32)
    held_out = held_out_windows(tokens, **sizes)
    assert (held_out.shape, held_out.dtype) == ((count, length), np.int32)
    taken = np.concatenate([sample_windows(tokens, **sizes), held_out])
    assert len(np.unique(taken)) == taken.size


def test_both_kinds_of_windows_of_a_file(text):
    sizes = {"samples": 8, "sequence_length": 16, "seed": 1}
    calibration, held_out = calibration_and_held_out(text, ByteTokenizer(), **sizes)
    np.testing.assert_array_equal(calibration, calibration_batches(text, ByteTokenizer(), **sizes))
    assert held_out.shape == (15, 16)
