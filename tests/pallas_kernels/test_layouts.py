"""Fragment-order packing against the documented formula, Mosaic GPU's own layout, and itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.mosaic.gpu import fragmented_array

from pallas_kernels import layouts


def random_codes(n, k, seed=0):
    return np.random.default_rng(seed).integers(-7, 8, (n, k)).astype(np.int8)


def registers_of(packed):
    """Plain Python reading of one tile: codes [thread][step of 16 columns][r][e] from the bits of its words."""
    codes = np.zeros((128, 8, 2, 4), np.int8)
    for (i, thread, word), bits in np.ndenumerate(np.asarray(packed)):
        j, r = divmod(word, 2)
        for half in range(2):
            for e in range(4):
                magnitude = int(bits) >> (4 * (4 * half + e)) & 7
                sign = int(bits) >> (8 * e + (7 if half == 0 else 3)) & 1
                codes[thread, 4 * i + 2 * j + half, r, e] = -magnitude if sign else magnitude
    return codes


@jax.jit
def round_trip(codes):
    packed = layouts.pack_weight(codes)
    return packed, layouts.unpack_weight(packed, *codes.shape)


@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 150), k=st.integers(1, 300), seed=st.integers(0, 99))
def test_round_trip_for_any_shape(n, k, seed):
    codes = random_codes(n, k, seed)
    packed, again = round_trip(codes)
    assert packed.shape == (-(-n // 64), -(-k // 128), 2, 128, 4)
    # Exactly 4 bits for each weight of a whole tile.
    assert packed.nbytes * 2 == 64 * 128 * packed.shape[0] * packed.shape[1]
    np.testing.assert_array_equal(again, codes)


def test_every_word_is_a_weight_tile():
    """The other way: any bits that are not a negative zero come back."""
    bits = np.random.default_rng(1).integers(0, 1 << 32, layouts.packed_shape(128, 128), dtype=np.uint32)
    again = np.asarray(layouts.pack_weight(layouts.unpack_weight(jnp.asarray(bits), 128, 128)))
    for word, other in zip(bits.ravel()[:512].tolist(), again.ravel()[:512].tolist(), strict=True):
        for half in range(2):
            for e in range(4):
                sign = 1 << (8 * e + 7 - 4 * half)
                if not word >> (16 * half + 4 * e) & 7:
                    word &= ~sign
        assert word == other


def test_padding_is_zero():
    packed = layouts.pack_weight(jnp.full((65, 129), -7, jnp.int8))
    codes = np.asarray(layouts.unpack_weight(packed, 128, 256))
    assert np.all(codes[:65, :129] == -7)
    assert not codes[65:].any()
    assert not codes[:, 129:].any()


def test_bits_are_where_the_documentation_says():
    """Thread t, load i, word 2 j + r, nibble (half, e) of every tile holds the documented (n, k)."""
    codes = random_codes(128, 256)
    packed = np.asarray(layouts.pack_weight(jnp.asarray(codes)))
    for tile_n, tile_k in np.ndindex(2, 2):
        held = registers_of(packed[tile_n, tile_k])
        for thread in range(128):
            warp, lane = divmod(thread, 32)
            for i, j, half, r, e in np.ndindex(2, 2, 2, 2, 4):
                n = 64 * tile_n + 16 * warp + 8 * r + lane // 4
                k = 128 * tile_k + 64 * i + 32 * j + 16 * half + 4 * (lane % 4) + e
                assert held[thread, 4 * i + 2 * j + half, r, e] == codes[n, k]


def test_threads_hold_what_mosaic_gpus_wgmma_layout_gives_them():
    """The registers of WGMMA_LAYOUT_8BIT (A operand of 8-bit types), in its order."""
    layout = fragmented_array.WGMMA_LAYOUT_8BIT
    codes = tiled = random_codes(64, 128)
    for tile in layout.tiling.tiles:
        outer, inner = tiled.shape[: -len(tile)], tiled.shape[-len(tile) :]
        split = tiled.reshape(*outer, *(x for size, t in zip(inner, tile, strict=True) for x in (size // t, t)))
        first = len(outer)
        order = [*range(first), *range(first, split.ndim, 2), *range(first + 1, split.ndim, 2)]
        tiled = split.transpose(order)
    threads = (*layout.warp_dims, *layout.lane_dims)
    registers = np.moveaxis(tiled, threads, range(len(threads))).reshape(128, 8, 2, 4)
    np.testing.assert_array_equal(registers_of(layouts.pack_weight(jnp.asarray(codes))[0, 0]), registers)


def test_unpack_refuses_another_shape():
    packed = layouts.pack_weight(jnp.zeros((64, 128), jnp.int8))
    with pytest.raises(ValueError, match=r"\(1, 1, 2, 128, 4\); expected \(2, 1, 2, 128, 4\) for \[65, 128\]"):
        layouts.unpack_weight(packed, 65, 128)


@pytest.mark.parametrize("rows", [1, 8, 11, 24])
def test_interleaved_rows_split_back(rows):
    """Gate and up alternate in blocks of 8; rows added to fill a block are zeros and come last."""
    gate = np.arange(1.0, rows + 1)
    up = -gate
    both = np.asarray(layouts.interleave_gate_up(gate, up))
    assert both.shape == (layouts.interleaved_rows(rows),)
    for row in range(rows):
        block, offset = divmod(row, 8)
        assert both[16 * block + offset] == row + 1
        assert both[16 * block + 8 + offset] == -row - 1
    first, second = map(np.asarray, layouts.split_gate_up(np.stack([both, 2 * both])))
    np.testing.assert_array_equal(first[:, :rows], np.stack([gate, 2 * gate]))
    np.testing.assert_array_equal(second[:, :rows], np.stack([up, 2 * up]))
    assert not first[:, rows:].any()
    assert not second[:, rows:].any()


def test_interleave_of_matrices_and_of_unequal_shapes():
    gate = jax.random.normal(jax.random.key(0), (11, 3))
    both = layouts.interleave_gate_up(gate, -gate)
    np.testing.assert_array_equal(both[:8], gate[:8])
    np.testing.assert_array_equal(both[24:27], -gate[8:])
    with pytest.raises(ValueError, match=r"\(11, 3\) and up \(10, 3\)"):
        layouts.interleave_gate_up(gate, gate[:10])
