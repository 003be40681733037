"""Bit packing: canonical INT4 codes <-> the order in which Hopper's tensor cores want them.

A weight is cut into tiles of 64 output channels x 128 inputs. The kernel computes y^T = W x^T
with W as WGMMA's A operand in registers, so a tile is stored as each of the 128 threads of a
warpgroup will hold it: 64 weights, 32 contiguous-per-load bytes, two conflict-free 16-byte loads.

For thread t = 32 * warp + lane, load i (0, 1), word w = 2 * j + r (j, r in 0, 1) and element e:

    row    n = 16 * warp + 8 * r + lane // 4
    column k = 64 * i + 32 * j + 16 * half + 4 * (lane % 4) + e     (half 0, 1; e 0..3)

which is PTX's A fragment of ``wgmma.m64nNk32`` for 8-bit types: step 2 * i + j, register r + 2 * half.

A 32-bit word holds eight weights (half, e). The magnitude of (half, e) is nibble 4 * half + e
(bits 0-2), ready to be a selector of ``prmt``. The sign of (0, e) is bit 8 e + 7 and that of
(1, e) bit 8 e + 3: where the four signs of a half land on bit 7 of the four FP8 bytes, after a
shift by 0 or 4.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

TILE_N = 64
TILE_K = 128
# gate and up rows alternate in blocks of 8, so that the two accumulators of a thread (rows r and
# r + 8 of a fragment) are a gate and its up: SiLU(gate) * up needs no exchange between threads.
INTERLEAVE = 8

# [tiles_n, warp, r, lane // 4] rows and [tiles_k, i, j, half, lane % 4, e] columns, in that order.
_TILED = (4, 2, 8), (2, 2, 2, 4, 4)
# -> [tiles_n, tiles_k, i, warp, lane // 4, lane % 4, j, r, half, e]
_TO_FRAGMENT = (0, 4, 5, 1, 3, 8, 6, 2, 7, 9)
_FROM_FRAGMENT = tuple(sorted(range(10), key=_TO_FRAGMENT.__getitem__))


def padded_shape(n: int, k: int) -> tuple[int, int]:
    """(N, K) rounded up to whole tiles."""
    return -(-n // TILE_N) * TILE_N, -(-k // TILE_K) * TILE_K


def packed_shape(n: int, k: int) -> tuple[int, int, int, int, int]:
    """Shape of the uint32 array that holds an [N, K] weight: [tiles_n, tiles_k, 2, 128, 4]."""
    n, k = padded_shape(n, k)
    return n // TILE_N, k // TILE_K, 2, 128, 4


def pack_weight(codes: Int[Array, "N K"]) -> UInt32[Array, "tiles_n tiles_k 2 128 4"]:
    """INT4 codes (int8, -7..7) in fragment order; partial tiles are filled with zeros."""
    n, k = codes.shape
    padded_n, padded_k = padded_shape(n, k)
    codes = jnp.pad(codes, ((0, padded_n - n), (0, padded_k - k)))
    tiled = codes.reshape(padded_n // TILE_N, *_TILED[0], padded_k // TILE_K, *_TILED[1])
    fragments = jnp.transpose(tiled, _TO_FRAGMENT)  # [..., half, e]
    magnitude = jnp.abs(fragments).astype(jnp.uint32)
    sign = (fragments < 0).astype(jnp.uint32)
    bits = (magnitude << _magnitude_shift()) | (sign << _sign_shift())
    # The fields do not overlap, so the sum is the bitwise or.
    return jnp.sum(bits, axis=(-2, -1), dtype=jnp.uint32).reshape(packed_shape(n, k))


def unpack_weight(packed: UInt32[Array, "tiles_n tiles_k 2 128 4"], n: int, k: int) -> Int[Array, "N K"]:
    """int8 codes [N, K]: the exact inverse of :func:`pack_weight`.

    Raises:
        ValueError: if ``packed`` is not the packed form of an [n, k] weight.
    """
    if packed.shape != packed_shape(n, k):
        raise ValueError(f"packed weight has shape {packed.shape}; expected {packed_shape(n, k)} for [{n}, {k}]")
    tiles_n, tiles_k = packed.shape[:2]
    words = packed.reshape(tiles_n, tiles_k, 2, 4, 8, 4, 2, 2, 1, 1)
    magnitude = ((words >> _magnitude_shift()) & 7).astype(jnp.int8)
    sign = ((words >> _sign_shift()) & 1).astype(jnp.int8)
    fragments = magnitude * (1 - 2 * sign)
    codes = jnp.transpose(fragments, _FROM_FRAGMENT).reshape(tiles_n * TILE_N, tiles_k * TILE_K)
    return codes[:n, :k]


def _magnitude_shift() -> UInt32[Array, "1 1 1 1 1 1 1 1 2 4"]:
    half, e = _half_and_element()
    return 4 * (4 * half + e)


def _sign_shift() -> UInt32[Array, "1 1 1 1 1 1 1 1 2 4"]:
    half, e = _half_and_element()
    return 8 * e + 7 - 4 * half


def _half_and_element() -> tuple[UInt32[Array, "1 1 1 1 1 1 1 1 2 1"], UInt32[Array, "1 1 1 1 1 1 1 1 1 4"]]:
    """The last two indices of fragments."""
    ones = (1,) * 8
    return jnp.arange(2, dtype=jnp.uint32).reshape(*ones, 2, 1), jnp.arange(4, dtype=jnp.uint32).reshape(*ones, 1, 4)


def interleaved_rows(rows: int) -> int:
    """Rows of the interleaved [gate; up] weight for ``rows`` gate rows: twice a multiple of 8."""
    return 2 * (-(-rows // INTERLEAVE) * INTERLEAVE)


def interleave_gate_up(gate: Array, up: Array) -> Array:
    """Alternate blocks of 8 rows of ``gate`` and ``up`` ([I, ...] each) into one [2 I', ...].

    I' is I rounded up to a multiple of 8; the added rows are zeros, and SiLU(0) * 0 = 0.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate has shape {gate.shape} and up {up.shape}; expected the same shape")
    pad = [(0, interleaved_rows(gate.shape[0]) // 2 - gate.shape[0])] + [(0, 0)] * (gate.ndim - 1)
    blocks = [jnp.pad(x, pad).reshape(-1, INTERLEAVE, *x.shape[1:]) for x in (gate, up)]
    return jnp.stack(blocks, axis=1).reshape(-1, *gate.shape[1:])


def split_gate_up(y: Array) -> tuple[Array, Array]:
    """Gate and up columns [..., I'] of an interleaved output [..., 2 I']."""
    blocks = y.reshape(*y.shape[:-1], -1, 2, INTERLEAVE)
    halves = jnp.moveaxis(blocks, -2, 0)
    gate, up = halves.reshape(2, *y.shape[:-1], -1)
    return gate, up
