"""RMSNorm of a token's queries and keys, which many families put before RoPE and some behind it."""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Placement = Literal["before_rope", "after_rope"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("query", "key"),
    meta_fields=("eps", "placement", "across_heads", "width"),
)
@dataclasses.dataclass(frozen=True)
class HeadNorm:
    """x / sqrt(mean(x^2) + eps) * weight, in float32.

    The weights are each head's own: FireQ's factors of a kv head's channels (arXiv 2505.20839) fold into them. In the
    rows of the projections, where they are without a norm, it would undo them.

    Attributes:
        query: float32 [heads, H].
        key: float32 [kv_heads, H].
        eps: added to the mean square, positive.
        placement: "before_rope" (Qwen3, Gemma3, EXAONE 4) or "after_rope" (Hunyuan).
        across_heads: the mean is over all heads of a token (OLMo 2), else over each head's channels.
        width: channels of a head that the mean counts, where the others are zeros that pad it; None: all.

    Raises:
        ValueError: if ``eps`` or ``width`` is not positive, or for an unknown placement.
    """

    query: Float[Array, "heads H"]
    key: Float[Array, "kv_heads H"]
    eps: float
    placement: Placement = "before_rope"
    across_heads: bool = False
    width: int | None = None

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise ValueError(f"eps is {self.eps}; expected a positive number")
        if self.placement not in get_args(Placement):
            raise ValueError(f"placement is {self.placement!r}; expected one of {get_args(Placement)}")
        if self.width is not None and self.width < 1:
            raise ValueError(f"width is {self.width}; expected a positive number of channels or None")

    def validate(self, heads: int, kv_heads: int, head_dim: int) -> None:
        """Raise ValueError unless it is of so many heads of that size."""
        for name, weight, count in (("query", self.query, heads), ("key", self.key, kv_heads)):
            if weight.shape != (count, head_dim):
                raise ValueError(f"the {name} norm's weight has shape {weight.shape}; expected {(count, head_dim)}")
        if self.width is not None and self.width > head_dim:
            raise ValueError(f"the norm's width is {self.width}; expected at most head_dim {head_dim}")

    def __call__(
        self, queries: Float[Array, "B T heads H"], keys: Float[Array, "B T kv_heads H"]
    ) -> tuple[Float[Array, "B T heads H"], Float[Array, "B T kv_heads H"]]:
        """Both normalized, float32. A row with Inf or NaN, or whose squares overflow, becomes NaN."""
        return self._normalize(queries, self.query), self._normalize(keys, self.key)

    def _normalize(self, x: Float[Array, "B T n H"], weight: Float[Array, "n H"]) -> Float[Array, "B T n H"]:
        x = x.astype(jnp.float32)
        heads, head_dim = weight.shape
        count = (self.width or head_dim) * (heads if self.across_heads else 1)
        axes = (-2, -1) if self.across_heads else -1
        mean_square = jnp.sum(jnp.square(x), axis=axes, keepdims=True) * (1 / count)
        # Inf's reciprocal is 0, which would hide it.
        inverse = jnp.where(jnp.isfinite(mean_square), jax.lax.rsqrt(mean_square + self.eps), jnp.nan)
        return x * inverse * weight.astype(jnp.float32)[None, None]
