"""How the decode kernel cuts its work, and which operands it takes."""

import dataclasses

import jax.experimental.pallas as pl
from jaxtyping import Array

from pallas_kernels.formats import ScaledArray
from pallas_kernels.sm90.attention.operands import Softmax, unsupported_operands
from pallas_kernels.sm90.common.hardware import NUM_SMS
from pallas_kernels.sm90.decode_attention.registers import TOKEN_BLOCK

PAGE_MULTIPLE = 256  # slots; so a page holds whole tiles of either size
# Most slots of a sequence for which many small blocks are faster than few that stream for long; where each
# multiprocessor has one block of work anyway, half as many.
SHORT = 4096


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile configuration of the decode kernel.

    Attributes:
        block_kv: slots of a tile; a multiple of 128.
        stages: tiles in each warpgroup's shared-memory ring, at least 2.
        warpgroups: warpgroups of a thread block, 1 to 4.
        residents: blocks that share a multiprocessor; sequences are split to occupy all of them evenly.
    """

    block_kv: int = 256
    stages: int = 2
    warpgroups: int = 3
    residents: int = 1

    def __post_init__(self):
        if self.block_kv <= 0 or self.block_kv % TOKEN_BLOCK:
            raise ValueError(f"block_kv is {self.block_kv}; expected a positive multiple of {TOKEN_BLOCK}")
        if self.stages < 2:
            raise ValueError(f"stages is {self.stages}; expected at least 2")
        if not 1 <= self.warpgroups <= 4:
            raise ValueError(f"warpgroups is {self.warpgroups}; expected 1 to 4")
        if self.residents < 1:
            raise ValueError(f"residents is {self.residents}; expected a positive number")

    def splits(self, rows: int, slots: int) -> int:
        """Ranges into which ``slots`` slots are split when the grid has ``rows`` other blocks.

        The fewest that leave at most one multiprocessor in 20 idle, or the best there is. Blocks that share
        a multiprocessor do not begin and end together: as many as find room at once.
        """
        most = max(1, pl.cdiv(slots, self.block_kv * self.warpgroups))
        if self.residents > 1:
            return max(1, min(most, NUM_SMS * self.residents // rows))

        def occupied(splits: int) -> float:
            waves = pl.cdiv(rows * splits, NUM_SMS)
            return rows * splits / (waves * NUM_SMS)

        enough = (splits for splits in range(1, most + 1) if occupied(splits) >= 0.95)
        return next(enough, None) or max(range(1, most + 1), key=occupied)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and options that the kernel is compiled for.

    A row is a query of one token and one of the kv head's ``group`` query heads.

    Attributes:
        slots: of a sequence, in all of its pages.
        page_size: slots of a page; None: the cache is in one piece.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    page_size: int | None
    softmax: Softmax

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Of a sequence and kv head."""
        return self.length * self.group

    @property
    def block_rows(self) -> int:
        """Rows that one pass over the cache serves: O^T of head_dim x rows float32 lies in registers, twice."""
        return min(pl.cdiv(self.rows, 8) * 8, 4096 // self.head_dim)

    @property
    def row_blocks(self) -> int:
        """Passes that serve all rows of a sequence and kv head."""
        return pl.cdiv(self.rows, self.block_rows)

    @property
    def blocks(self) -> int:
        """Thread blocks if no sequence is split."""
        return self.batch * self.kv_heads * self.row_blocks


def default_config(head_dim: int, block_rows: int, blocks: int, slots: int) -> Config:
    """Tiles that leave the accumulators of ``block_rows`` rows their registers and shared memory.

    ``blocks`` is how many there are if no sequence is split.
    """
    if head_dim <= 128 and block_rows == 8:
        # Few tiles each, so about four warpgroups a multiprocessor: in small blocks, unless it has just one or two.
        residents = pl.cdiv(blocks, NUM_SMS) if 0.75 * NUM_SMS <= blocks <= 2 * NUM_SMS else 4
        if slots > (SHORT if residents > 1 else SHORT // 2):
            return Config()
        return Config(block_kv=128, warpgroups=min(3, 4 // residents), residents=residents)
    if head_dim <= 128:
        return Config(block_kv=128, stages=3, warpgroups=3 if head_dim * block_rows <= 2048 else 2)
    return Config(block_kv=128, stages=2, warpgroups=2)


def unsupported(
    query: ScaledArray, key: ScaledArray, value: ScaledArray, page_table: Array | None = None
) -> str | None:
    """Why the kernel cannot run these operands, or None."""
    slots = key.values.shape[2]
    if page_table is not None and slots % PAGE_MULTIPLE:
        return f"a page has {slots} slots, not a multiple of {PAGE_MULTIPLE}"
    # TMA wants rows of a multiple of 16 bytes; the scales are rows of bf16.
    if slots % 8:
        return f"the cache has {slots} slots, not a multiple of 8"
    return unsupported_operands(query, key, value)
