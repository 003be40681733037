"""Which blocks of queries each thread block of the prefill kernel visits, and in which order."""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np

_VISIT_COST = 1.25  # what a visit costs besides its tiles, in tiles (measured)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A fixed assignment of ``blocks`` blocks, the longest first, to ``ctas`` thread blocks.

    These take a row of blocks forth and the next one back: of blocks that become shorter, all get as much. Where
    lengths fall in steps, or the last row is not full, the same ones would often get more; so they move on by
    ``shift`` in each row.
    """

    blocks: int
    ctas: int
    shift: int = 0

    def visited(self, cta: Any, i: Any) -> Any:
        """Index of the i-th block that a thread block visits."""
        cta = (cta + i * self.shift) % self.ctas
        return i * self.ctas + jnp.where(i % 2 == 0, cta, self.ctas - 1 - cta)

    def visits(self, cta: Any) -> jax.Array:
        """How many a thread block visits."""
        rows = self.blocks // self.ctas
        return rows + (self.visited(cta, jnp.int32(rows)) < self.blocks).astype(jnp.int32)


@functools.cache
def causal_schedule(row_blocks: int, copies: int, ctas: int) -> Schedule:
    """That which leaves the least to the slowest thread block.

    Of ``row_blocks`` rows of ``copies`` blocks, together at least ``ctas``, the last sees as many tiles, and each one
    before it a tile less.
    """
    costs = np.repeat(np.arange(row_blocks, 0, -1) + _VISIT_COST, copies)
    rows = pl.cdiv(costs.size, ctas)
    costs = np.pad(costs, (0, rows * ctas - costs.size)).reshape(rows, ctas)
    costs[1::2] = costs[1::2, ::-1]
    row, cta = np.indices(costs.shape)

    def slowest(shift: int) -> float:
        return costs[row, (cta + row * shift) % ctas].sum(axis=0).max()

    return Schedule(row_blocks * copies, ctas, min(range(16), key=slowest))
