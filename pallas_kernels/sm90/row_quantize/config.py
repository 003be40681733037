"""How the row kernels cut a row, and which rows they take."""

import dataclasses

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.sm90.common import split_k
from pallas_kernels.sm90.common.hardware import NUM_SMS
from pallas_kernels.sm90.common.ptx import WARPGROUP
from pallas_kernels.split_k import SplitKPartials

CHUNK = 8  # bf16 elements of a 16-byte load
MAX_WARPGROUPS = 8
CLUSTERS = (8, 4, 2)
MAX_CLUSTERED = 4  # warpgroups of a block in a cluster
# Blocks of a cluster wait for each other at the start and for their partial results, about 0.2 us in all. In that time
# a multiprocessor reads this many bytes, so a cluster must relieve it of at least as many.
MIN_SPARED = 22 << 10
MAX_CHUNKS = 8  # that a thread holds, in 64 float32 registers
POST_NORM_CHUNKS = 4  # the same where a thread holds the elements of two rows
MAX_WIDTH = CHUNK * WARPGROUP * MAX_WARPGROUPS * MAX_CHUNKS


@dataclasses.dataclass(frozen=True)
class Config:
    """Which threads share a row.

    Attributes:
        warpgroups: of a block, 1 to 8; up to 4 in a cluster.
        cluster: blocks that share a row, 1, 2, 4 or 8; more than one only for rows that come in parts.

    Raises:
        ValueError: for other numbers.
    """

    warpgroups: int
    cluster: int = 1

    def __post_init__(self):
        most = MAX_WARPGROUPS if self.cluster == 1 else MAX_CLUSTERED
        if not 1 <= self.warpgroups <= most:
            raise ValueError(f"warpgroups is {self.warpgroups}; expected 1 to {most}")
        if self.cluster not in (1, *CLUSTERS):
            raise ValueError(f"cluster is {self.cluster}; expected 1 or one of {CLUSTERS}")

    @property
    def threads(self) -> int:
        """Threads that share a row."""
        return WARPGROUP * self.warpgroups * self.cluster

    @property
    def chunk(self) -> int:
        """Elements that a thread takes at once."""
        return CHUNK if self.cluster == 1 else CHUNK // 2


def default_config(width: int, *, chunks: int = MAX_CHUNKS) -> Config:
    """The fewest warpgroups that hold a row of ``width`` elements with up to ``chunks`` a thread, or the most."""
    warpgroups = pl.cdiv(width, CHUNK * WARPGROUP * chunks)
    return Config(min(warpgroups, MAX_WARPGROUPS))


def parts_config(rows: int, width: int, parts: int) -> Config:
    """For rows that come in ``parts``: the largest cluster that pays, else one block.

    A cluster pays if each of its blocks gets a multiprocessor of its own and work for a warpgroup, and if there are
    enough bytes (``MIN_SPARED``).
    """
    for cluster in CLUSTERS:
        one, spared = Config(1, cluster), 4 * parts * width * (cluster - 1) // cluster
        if rows * cluster <= NUM_SMS and width >= one.threads * one.chunk and spared >= MIN_SPARED:
            return Config(min(pl.cdiv(width, one.threads * one.chunk), MAX_CLUSTERED), cluster)
    return default_config(width, chunks=1)


def unsupported(x: Array | SplitKPartials) -> str | None:
    """Why the kernel cannot run these rows, or None."""
    if isinstance(x, SplitKPartials):
        return _unsupported_sum(x)
    if x.dtype != jnp.bfloat16:
        return f"x has dtype {x.dtype}, not bfloat16"
    if x.size == 0:
        return "x is empty"
    return _unsupported_width(x.shape[-1])


def unsupported_branch(branch: Array | SplitKPartials, residual: Array) -> str | None:
    """Why the kernel cannot normalize these rows and add them to that, or None."""
    if residual.dtype != jnp.bfloat16:
        return f"the residual has dtype {residual.dtype}, not bfloat16"
    if not isinstance(branch, SplitKPartials):
        return unsupported(branch)
    if branch.residual is not None:
        return "the branch has a residual of its own"
    return split_k.unsupported(branch) or _unsupported_width(branch.n)


def _unsupported_sum(y: SplitKPartials) -> str | None:
    if y.residual is None or y.residual.dtype != jnp.bfloat16:
        return "the partials have no bfloat16 residual"
    return split_k.unsupported(y) or _unsupported_width(y.n)


def _unsupported_width(width: int) -> str | None:
    if width % CHUNK or width > MAX_WIDTH:
        return f"rows have {width} elements, not a multiple of {CHUNK} up to {MAX_WIDTH}"
    return None
