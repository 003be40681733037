"""Which thread block computes what of a chain of matmuls: static arithmetic, without device code.

The weights of a link are cut into tiles of 64 output channels, and these into chunks of ``CHUNK`` x 128 inputs.
Counting chunks tile after tile, every thread block takes an equal run of them, which its consumers compute in turns.
A tile whose chunks several thread blocks have is left as split-K partials.
"""

import dataclasses
from typing import Literal

import jax.experimental.pallas as pl

from pallas_kernels import formats, layouts
from pallas_kernels.matmul_epilogue import Activation, width_out
from pallas_kernels.sm90.common.hardware import NUM_SMS, SMEM_BYTES
from pallas_kernels.sm90.matmul.config import CHUNK, Problem

WARPGROUPS = 4
THREADS = 128 * WARPGROUPS
TILE_M = 8  # tokens: the least that WGMMA multiplies by
STAGES = 2  # chunks of weights that shared memory holds for each consumer
CHUNK_K = CHUNK * layouts.TILE_K
TILE_BYTES = layouts.TILE_N * layouts.TILE_K // 2  # of a packed tile
SUMS = 2  # buffers for a tile's sums in shared memory: one is read while the next is written

Source = Literal["rows", "norm", "hidden"]


@dataclasses.dataclass(frozen=True)
class Link:
    """One matmul of a chain.

    Attributes:
        n: output channels, a multiple of 64.
        k: inputs, a multiple of 128.
        groups: groups in 128 inputs (1 or 2).
        source: what its input is. "rows": FP8 rows in memory. "norm": RMSNorm of the link before's partials plus a
            residual, or of rows in memory. "hidden": the bf16 rows of the link before, one with an activation.
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
        """Whether it leaves bf16 rows, activation(gate) * up, and not split-K partials."""
        return self.activation != "none"

    @property
    def tiles_n(self) -> int:
        """Tiles of output channels."""
        return self.n // layouts.TILE_N

    @property
    def tiles_k(self) -> int:
        """Tiles of 128 inputs."""
        return self.k // layouts.TILE_K

    @property
    def chunks(self) -> int:
        """Chunks of a tile; the last may be partly empty."""
        return pl.cdiv(self.tiles_k, CHUNK)

    @property
    def total(self) -> int:
        """Chunks of all tiles."""
        return self.tiles_n * self.chunks

    @property
    def per_block(self) -> int:
        """Chunks of a thread block: those of whole tiles where the activation needs whole sums."""
        if self.gated:
            return pl.cdiv(self.tiles_n, NUM_SMS) * self.chunks
        return pl.cdiv(self.total, NUM_SMS)

    @property
    def blocks(self) -> int:
        """Thread blocks that have work."""
        return pl.cdiv(self.total, self.per_block)

    @property
    def parts(self) -> int:
        """The most thread blocks that share a tile, and so the partials of the result."""
        first = (tile * self.chunks // self.per_block for tile in range(self.tiles_n))
        last = ((tile * self.chunks + self.chunks - 1) // self.per_block for tile in range(self.tiles_n))
        return max(b - a + 1 for a, b in zip(first, last, strict=True))

    @property
    def whole_rows(self) -> bool:
        """Whether a thread block makes all columns of its input, and not just those it multiplies."""
        return self.source == "norm" or self.per_block >= self.chunks

    @property
    def held_chunks(self) -> int:
        """Chunks of input columns that a thread block has in shared memory."""
        return self.chunks if self.whole_rows else self.per_block

    @property
    def waits_for_input(self) -> bool:
        """Whether its weights are copied after its input's loads, and not already under the link before.

        The grid barrier and the input's loads would queue behind the weights. Where each block loads whole rows (a
        norm), waiting for that costs more than the early copy saves.
        """
        return self.source != "hidden"

    def problem(self, m: int) -> Problem:
        """The link in the terms of ``sm90.matmul``."""
        n_out = width_out(self.n, self.activation)
        return Problem(m, self.n, self.k, n_out, self.groups, "e4m3", True, self.activation, self.codebook)


def held_tiles(links: tuple[Link, ...]) -> int:
    """Tiles of 128 input columns that the largest input of a chain takes in shared memory."""
    return CHUNK * max(link.held_chunks for link in links)


def smem_bytes(links: tuple[Link, ...]) -> int:
    """Shared memory of a thread block; an upper bound, alignment included."""
    x = held_tiles(links) * TILE_M * layouts.TILE_K
    words = WARPGROUPS * STAGES * CHUNK * TILE_BYTES
    scales = WARPGROUPS * STAGES * CHUNK * max(link.groups for link in links) * layouts.TILE_N
    sums = SUMS * WARPGROUPS * layouts.TILE_N * TILE_M * 4
    return x + words + scales + sums + 4096


def unsupported(links: tuple[Link, ...]) -> str | None:
    """Why the kernel cannot run such a chain, or None."""
    for link in links:
        if link.source == "norm" and link.k % CHUNK_K:
            return f"a norm has {link.k} columns, not a multiple of {CHUNK_K}"
    needed = smem_bytes(links)
    return f"it needs {needed} bytes of shared memory, not {SMEM_BYTES} or less" if needed > SMEM_BYTES else None
