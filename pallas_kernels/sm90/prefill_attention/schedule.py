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
    """A fixed assignment of ``blocks`` blocks of queries, the longest first, to ``ctas`` thread blocks.

    A row is as many blocks as there are thread blocks, which take one row in order and the next in reverse, so that
    each gets about as much work though blocks become shorter. Where lengths fall in steps, or the last row is not
    full, some would still get more in each row; so the order is rotated by ``shift`` from one row to the next.
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
    """The schedule whose slowest thread block is fastest, for causal attention of whole sequences.

    Each of ``copies`` heads and sequences has ``row_blocks`` blocks of queries, which see 1, 2, ... ``row_blocks``
    tiles. There are at least ``ctas`` blocks.
    """
    costs = np.repeat(np.arange(row_blocks, 0, -1) + _VISIT_COST, copies)
    rows = pl.cdiv(costs.size, ctas)
    costs = np.pad(costs, (0, rows * ctas - costs.size)).reshape(rows, ctas)
    costs[1::2] = costs[1::2, ::-1]
    row, cta = np.indices(costs.shape)

    def slowest(shift: int) -> float:
        return costs[row, (cta + row * shift) % ctas].sum(axis=0).max()

    return Schedule(row_blocks * copies, ctas, min(range(16), key=slowest))
