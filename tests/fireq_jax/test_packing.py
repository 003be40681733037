"""Four-bit codes out of other formats' words."""

import numpy as np
import pytest
import quantized_files as files
from hypothesis import given, settings
from hypothesis import strategies as st

from fireq_jax.checkpoints import packing


@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1), st.sampled_from([16, 2**20]), st.integers(1, 40)
)
@settings(max_examples=20, deadline=None)
def test_unpacking_is_the_inverse_of_packing(n, words, seed, piece, group):
    """In one piece and in many, less zero points of groups that need not divide the columns."""
    codes = np.random.default_rng(seed).integers(0, 16, (8 * n, 8 * words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_PIECE", piece)
        patch.setattr(packing, "_WORDS", 3)
        patch.setattr(packing, "_COLUMNS", 8)
        np.testing.assert_array_equal(packing.unpack_nibbles(files.pack(codes)), codes)
        np.testing.assert_array_equal(packing.unpack_columns(files.pack(codes).T), codes)
        np.testing.assert_array_equal(packing.unpack_rows(files.pack(codes.T)), codes)
        awq = packing.unpack_rows(files.pack(codes.T, files.AWQ_ORDER), packing.AWQ_ORDER)
        np.testing.assert_array_equal(awq, codes)
        points = np.random.default_rng(seed).integers(0, 17, (8 * n, -(-8 * words // group))).astype(np.uint8)
        expected = codes - np.repeat(points.astype(int), group, axis=1)[:, : 8 * words]
        for zeros, less in ((packing.Zeros(points, group), expected), (packing.MIDDLE, codes - 8)):
            np.testing.assert_array_equal(packing.unpack_nibbles(files.pack(codes), zeros), less)
            np.testing.assert_array_equal(packing.unpack_columns(files.pack(codes).T, zeros), less)
            np.testing.assert_array_equal(packing.unpack_rows(files.pack(codes.T), zeros=zeros), less)
