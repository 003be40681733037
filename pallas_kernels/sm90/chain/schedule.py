"""Which thread block computes what of a chain of matmuls: static arithmetic, without device code.

The weights of a link are cut into tiles of 64 output channels and these into chunks of ``CHUNK`` x 128
inputs. Counted tile after tile, every thread block takes an equal run of consecutive chunks, whose
warpgroups take turns. So a tile whose chunks lie in several thread blocks is computed in parts.
"""

import dataclasses
from typing import Literal

from pallas_kernels import formats, layouts
from pallas_kernels.matmul_epilogue import Activation, width_out
from pallas_kernels.sm90.common.hardware import NUM_SMS, SMEM_BYTES
from pallas_kernels.sm90.matmul.config import CHUNK, Problem

WARPGROUPS = 4
THREADS = 128 * WARPGROUPS
TILE_M = 8  # tokens: the least that WGMMA multiplies by
AHEAD = 2  # chunks of weights that a warpgroup has in flight
CHUNK_K = CHUNK * layouts.TILE_K
TILE_BYTES = layouts.TILE_N * layouts.TILE_K // 2  # of a packed tile
SUMS = 2  # sets of a tile's sums in shared memory, so that one is read while the next is written

Source = Literal["rows", "norm", "hidden"]


@dataclasses.dataclass(frozen=True)
class Link:
    """One matmul of a chain.

    Attributes:
        n: output channels, a multiple of 64.
        k: inputs, a multiple of 128.
        groups: groups in 128 inputs (1 or 2).
        source: what its input is. "rows": FP8 rows in memory; "norm": RMSNorm of what the link
            before left in parts plus a residual, or of rows in memory; "hidden": what the link
            before, one with an activation, left.
        activation: of the gate, if gate and up channels alternate in blocks of 8.
        codebook: what the weight's codes stand for.
    """

    n: int
    k: int
    groups: int
    source: Source
    activation: Activation = "none"
    codebook: formats.Codebook = "int4"

    @property
    def gated(self) -> bool:
        """Whether it leaves what an activation made of gates and ups, in bf16, and not parts of sums."""
        return self.activation != "none"

    @property
    def tiles_n(self) -> int:
        """Tiles of output channels."""
        return self.n // layouts.TILE_N

    @property
    def tiles_k(self) -> int:
        """Packed tiles of a tile of output channels."""
        return self.k // layouts.TILE_K

    @property
    def chunks(self) -> int:
        """Chunks of a tile; the last may be partly empty."""
        return -(-self.tiles_k // CHUNK)

    @property
    def total(self) -> int:
        """Chunks of all tiles."""
        return self.tiles_n * self.chunks

    @property
    def per_block(self) -> int:
        """Chunks of a thread block: whole tiles where the activation needs whole sums."""
        if self.gated:
            return -(-self.tiles_n // NUM_SMS) * self.chunks
        return -(-self.total // NUM_SMS)

    @property
    def blocks(self) -> int:
        """Thread blocks that have work."""
        return -(-self.total // self.per_block)

    @property
    def parts(self) -> int:
        """Parts of the tile that is in most."""
        first = (tile * self.chunks // self.per_block for tile in range(self.tiles_n))
        last = ((tile * self.chunks + self.chunks - 1) // self.per_block for tile in range(self.tiles_n))
        return max(b - a + 1 for a, b in zip(first, last, strict=True))

    @property
    def whole_rows(self) -> bool:
        """Whether a thread block holds all of its input's columns, rather than those it needs."""
        return self.source == "norm" or self.per_block >= self.chunks

    @property
    def held_chunks(self) -> int:
        """Chunks of input columns that a thread block holds."""
        return self.chunks if self.whole_rows else self.per_block

    @property
    def waits_for_input(self) -> bool:
        """Whether weights are copied after the input's loads, and not already under the link before.

        The input's bytes, and the grid's barrier before them, would queue behind the weights. For a
        norm, which all of its row goes through, that costs more than it saves.
        """
        return self.source != "hidden"

    def problem(self, m: int) -> Problem:
        """The link as the matmul kernels' pieces know it."""
        n_out = width_out(self.n, self.activation)
        return Problem(m, self.n, self.k, n_out, self.groups, "e4m3", True, self.activation, self.codebook)


def held_tiles(links: tuple[Link, ...]) -> int:
    """Tiles of 128 input columns that a thread block has room for."""
    return CHUNK * max(link.held_chunks for link in links)


def smem_bytes(links: tuple[Link, ...]) -> int:
    """Shared memory of a thread block, with what the allocator may add."""
    x = held_tiles(links) * TILE_M * layouts.TILE_K
    words = WARPGROUPS * AHEAD * CHUNK * TILE_BYTES
    scales = WARPGROUPS * AHEAD * CHUNK * max(link.groups for link in links) * layouts.TILE_N
    sums = SUMS * WARPGROUPS * layouts.TILE_N * TILE_M * 4
    return x + words + scales + sums + 4096


def unsupported(links: tuple[Link, ...]) -> str | None:
    """Why the kernel cannot run such a chain, or None."""
    for link in links:
        if link.source == "norm" and link.k % CHUNK_K:
            return f"a norm has {link.k} columns, not a multiple of {CHUNK_K}"
    needed = smem_bytes(links)
    return f"it needs {needed} bytes of shared memory, not {SMEM_BYTES} or less" if needed > SMEM_BYTES else None
