"""Codes of four bits out of the words that checkpoint formats pack them into, less zero points, and into words again.

Work is cut into pieces that stay in a core's cache, a piece to a thread: NumPy lets other threads run meanwhile.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

# The column of nibble 0, 1, ... of a word of AutoAWQ's, in its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
WORD = 8  # codes of a 32-bit word
_IN_ORDER = tuple(range(8))
_PIECE = 2**20  # codes
_WORDS, _COLUMNS = 128, 4096  # of a tile that is turned over in the cache


class Zeros(NamedTuple):
    """What is subtracted from codes 0..15.

    Attributes:
        points: uint8 [N, ceil(K / group_size)], or one number for all.
        group_size: neighbouring columns that share one; None means all K.
    """

    points: np.ndarray | int
    group_size: int | None = None

    def subtract(self, codes: np.ndarray, rows: slice) -> None:
        """From uint8 codes [rows, K], in place and modulo 256."""
        if isinstance(self.points, int):
            np.subtract(codes, np.uint8(self.points), out=codes)
            return
        points, size = self.points[rows], self.group_size or codes.shape[1]
        whole = codes.shape[1] // size
        groups = codes[:, : whole * size].reshape(len(codes), whole, size)  # a view: the axis that is cut is the last
        np.subtract(groups, points[:, :whole, None], out=groups)
        rest = codes[:, whole * size :]
        np.subtract(rest, points[:, whole:], out=rest)


NO_ZEROS, MIDDLE = Zeros(0), Zeros(8)


def unpack_nibbles(packed: np.ndarray, zeros: Zeros = NO_ZEROS) -> np.ndarray:
    """[N, 2 B] of bytes [N, B], or of whole words: the low nibble of each byte comes first."""
    octets = np.ascontiguousarray(packed).view(np.uint8)
    codes = np.empty((octets.shape[0], 2 * octets.shape[1]), np.uint8)

    def unpack(rows: slice) -> None:
        _spread(octets[rows], codes[rows].view(np.uint16))
        zeros.subtract(codes[rows], rows)

    _in_pieces(unpack, len(codes), max(1, _PIECE // max(1, codes.shape[1])))
    return codes.view(np.int8)


def pack_words(codes: np.ndarray) -> np.ndarray:
    """int32 [N, ceil(K / 8)] of codes -8..7 [N, K], plus 8: what :func:`unpack_nibbles` less ``MIDDLE`` takes apart."""
    nibbles = np.pad((codes + np.int8(8)).view(np.uint8), ((0, 0), (0, -codes.shape[1] % WORD)))
    return np.ascontiguousarray(nibbles[:, ::2] | nibbles[:, 1::2] << 4).view(np.int32)


def unpack_columns(packed: np.ndarray, zeros: Zeros = NO_ZEROS) -> np.ndarray:
    """[N, 8 R] of 32-bit words [R, N]: nibble i of word r is column 8 r + i (GPTQ)."""
    words = packed.view(np.uint32)
    codes = np.empty((packed.shape[1], 8 * packed.shape[0]), np.uint8)

    def unpack(rows: slice) -> None:
        _spread(np.ascontiguousarray(words[:, rows].T).view(np.uint8), codes[rows].view(np.uint16))
        zeros.subtract(codes[rows], rows)

    _in_pieces(unpack, len(codes), max(1, _PIECE // max(1, codes.shape[1])))
    return codes.view(np.int8)


def unpack_rows(packed: np.ndarray, order: tuple[int, ...] = _IN_ORDER, zeros: Zeros = NO_ZEROS) -> np.ndarray:
    """[8 C, K] of 32-bit words [K, C]: nibble i of word c is row 8 c + order[i] (AWQ; GPTQ's zeros in order)."""
    columns, count = packed.shape
    words = np.pad(packed.view(np.uint32), ((0, -columns % 8), (0, 0))) if columns % 8 else packed.view(np.uint32)
    codes = np.empty((count, 8, len(words)), np.uint8)
    pairs = codes.view(np.uint16)

    def unpack(part: slice) -> None:
        for start in range(0, len(words), _COLUMNS):
            rows = words[start : start + _COLUMNS, part]
            turned = _turn(rows)
            for i in range(8):
                octets = np.ascontiguousarray(turned[i].T).view(np.uint8)
                _spread(octets, pairs[part, order[i], start // 2 : start // 2 + octets.shape[1]])
        zeros.subtract(codes[part].reshape(-1, len(words))[:, :columns], slice(8 * part.start, 8 * part.stop))

    _in_pieces(unpack, count, _WORDS)
    return codes.reshape(8 * count, len(words))[:, :columns].view(np.int8)


def _turn(words: np.ndarray) -> np.ndarray:
    """[8, R, C] of words [8 R, C]: the nibbles of each 8 words of a column, turned over like a matrix of 8 x 8."""
    # Halves of words are exchanged first, then quarters, then single nibbles.
    turned = np.ascontiguousarray(words.reshape(-1, 8, words.shape[1]).transpose(1, 0, 2))
    for distance, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        pairs = turned.reshape(-1, 2, distance * turned[0].size)
        low, high = pairs[:, 0], pairs[:, 1]
        exchanged = low >> 4 * distance
        exchanged ^= high
        exchanged &= mask
        high ^= exchanged
        exchanged <<= 4 * distance
        low ^= exchanged
    return turned


def _spread(octets: np.ndarray, pairs: np.ndarray) -> None:
    """Both nibbles of each byte to a byte each, of uint16 ``pairs``."""
    wide = octets.astype(np.uint16)
    wide |= wide << 4
    np.bitwise_and(wide, 0x0F0F, out=pairs)


def _in_pieces(work: Callable[[slice], None], rows: int, step: int) -> None:
    pieces = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    with ThreadPoolExecutor(max(1, min(len(pieces), os.cpu_count() or 1))) as pool:
        list(pool.map(work, pieces))
