"""Codes of four bits out of the words that checkpoint formats pack them into: uint8 numbers 0..15, [N, K].

Each is cut into pieces that stay in a core's cache, a piece to a thread: NumPy lets other threads run meanwhile.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# The column of nibble 0, 1, ... of a word of AutoAWQ's, in its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PIECE = 2**20  # codes


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [N, 2 B] of bytes [N, B], or of whole words: the low nibble of each byte comes first."""
    octets = np.ascontiguousarray(packed).view(np.uint8)
    codes = np.empty((octets.shape[0], 2 * octets.shape[1]), np.uint8)

    def unpack(rows: slice) -> None:
        _spread(octets[rows], codes[rows])

    _in_pieces(unpack, *codes.shape)
    return codes


def unpack_columns(packed: np.ndarray) -> np.ndarray:
    """uint8 [N, 8 R] of 32-bit words [R, N]: nibble i of word r is column 8 r + i (GPTQ)."""
    words, rows = packed.view(np.uint32), packed.shape[1]
    codes = np.empty((rows, 8 * packed.shape[0]), np.uint8)

    def unpack(part: slice) -> None:
        _spread(np.ascontiguousarray(words[:, part].T).view(np.uint8), codes[part])

    _in_pieces(unpack, *codes.shape)
    return codes


def unpack_rows(packed: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """uint8 [8 C, K] of 32-bit words [K, C]: nibble i of word c is row 8 c + order[i] (AWQ; GPTQ's zeros in order)."""
    words, (columns, count) = packed.view(np.uint32), packed.shape
    codes = np.empty((count, 8, columns), np.uint8)

    def unpack(part: slice) -> None:
        octets = np.ascontiguousarray(words[:, part].T).view(np.uint8).reshape(-1, columns, 4)
        for i in range(4):
            pair = np.ascontiguousarray(octets[:, :, i])
            np.bitwise_and(pair, 15, out=codes[part, order[2 * i]])
            np.right_shift(pair, 4, out=codes[part, order[2 * i + 1]])

    _in_pieces(unpack, count, 8 * columns)
    return codes.reshape(8 * count, columns)


def _spread(octets: np.ndarray, codes: np.ndarray) -> None:
    """Both nibbles of each byte to a byte each."""
    pairs = octets.astype(np.uint16)
    pairs |= pairs << 4
    np.bitwise_and(pairs, 0x0F0F, out=codes.view(np.uint16))


def _in_pieces(work: Callable[[slice], None], rows: int, width: int) -> None:
    step = max(1, _PIECE // max(1, width))
    pieces = [slice(start, start + step) for start in range(0, rows, step)]
    if len(pieces) < 2:
        for piece in pieces:
            work(piece)
        return
    with ThreadPoolExecutor(min(len(pieces), os.cpu_count() or 1)) as pool:
        list(pool.map(work, pieces))
