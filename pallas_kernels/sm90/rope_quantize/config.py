"""How the kernel cuts its work, what it is compiled for, and which operands it takes."""

import dataclasses

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.formats import ScaledArray
from pallas_kernels.head_norm import HeadNorm
from pallas_kernels.sm90.attention.operands import HEAD_DIMS, unsupported_cache
from pallas_kernels.sm90.common import split_k
from pallas_kernels.sm90.common.hardware import NUM_SMS
from pallas_kernels.split_k import SplitKPartials

# Warps for each multiprocessor. Up to FEW_WARPS of one group each wait for memory once and then for their own
# instructions, which are fewer with half the pairs a lane. Up to MANY_WARPS of one group each are faster than fewer
# that load the next group ahead; ENOUGH_WARPS of those load at the memory's speed.
FEW_WARPS, MANY_WARPS, ENOUGH_WARPS = 8, 80, 32


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        groups: groups of heads that a warp goes through, at most.
        warpgroups: warpgroups of a thread block.
        pairs: that a lane holds of a row, 4 or 8.
    """

    groups: int
    warpgroups: int = 1
    pairs: int = 8

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; expected a positive number")
        if self.pairs not in (4, 8):
            raise ValueError(f"pairs is {self.pairs}; expected 4 or 8")


@dataclasses.dataclass(frozen=True)
class Norm:
    """RMSNorm of a query's or key's row, of whose channels ``width`` count."""

    eps: float
    width: int
    after_rope: bool


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes; ``heads`` and ``kv_heads`` of ``head_dim`` for each of ``batch`` x ``length`` tokens.

    A lane holds ``pairs`` (i, i + H/2) of a row, four or eight.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    key_clip: float
    value_clip: float
    unbiased_keys: bool
    norm: Norm | None = None
    pairs: int = 8

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def lanes(self) -> int:
        """Lanes that share a row."""
        return self.head_dim // (2 * self.pairs)

    @property
    def rows(self) -> int:
        """Heads of a group."""
        return 32 // self.lanes

    @property
    def query_groups(self) -> int:
        return pl.cdiv(self.heads, self.rows)

    @property
    def kv_groups(self) -> int:
        return pl.cdiv(self.kv_heads, self.rows)

    @property
    def groups(self) -> int:
        """Groups of a token: first of its queries, then keys, then values."""
        return self.query_groups + 2 * self.kv_groups


def default_config(tokens: int, groups: int, *, unbiased_keys: bool = False) -> Config:
    """A group a warp as long as these fill a GPU a few times, then half of a token's ``groups``, then all.

    Half a group, if there would be few warps. ``unbiased_keys`` keep the order in which eight pairs are summed.
    """
    warps = tokens * groups / NUM_SMS  # with one group each
    if warps <= FEW_WARPS and not unbiased_keys:
        return Config(1, pairs=4)
    if warps <= MANY_WARPS:
        return Config(1)
    return Config(groups if warps >= ENOUGH_WARPS * groups else pl.cdiv(groups, 2))


def unsupported(
    packed: Array | SplitKPartials,
    cos: Array,
    sin: Array,
    key: ScaledArray,
    value: ScaledArray,
    quantize_query: bool,
    norm: HeadNorm | None = None,
) -> str | None:
    """Why the kernel cannot run these operands, or None."""
    if isinstance(packed, SplitKPartials):
        if packed.residual is not None:
            return "the sum has a residual"
        if reason := split_k.unsupported(packed):
            return reason
    elif packed.dtype != jnp.bfloat16:
        return f"packed is {packed.dtype}, not bfloat16"
    if cos.dtype != jnp.float32 or sin.dtype != jnp.float32:
        return f"cos is {cos.dtype} and sin {sin.dtype}, not float32"
    if 2 * cos.shape[-1] not in HEAD_DIMS:
        return f"head_dim is {2 * cos.shape[-1]}, not one of {HEAD_DIMS}"
    if not quantize_query:
        return "the query is not quantized"
    if norm is not None and norm.across_heads:
        return "the norm is over all heads together"
    return unsupported_cache(key, value)
