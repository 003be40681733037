"""A decoder's residual stream between its layers' ops, as far as it has been computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.formats import ScaledArray
from pallas_kernels.norm import Norm
from pallas_kernels.row_quantize import add_post_norm
from pallas_kernels.split_k import SplitKPartials, reduced


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("value", "residual", "post_norm", "normalized", "barrier"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class ResidualStream:
    """Hidden states [*rows, D]: ``value``, or with a ``post_norm`` residual + post_norm(value).

    The ops of ``decoder_layer`` hand it to one another, and only they look inside: what one leaves unreduced, the next
    reduces as it reads it. ``ResidualStream(x)`` begins one, and ``finish`` ends it.

    Attributes:
        value: x [*rows, D] or its split-K partials; with a ``post_norm`` a branch's output.
        residual: what the normalized branch is added to.
        post_norm: norm of that branch.
        normalized: the rows that both attention and the MLP begin with in a parallel block.
        barrier: state of the grid barrier of the chain after attention; made by the chain before it, for one use.
    """

    value: Float[Array, "*rows D"] | SplitKPartials
    residual: Float[Array, "*rows D"] | None = None
    post_norm: Norm | None = None
    normalized: ScaledArray | Float[Array, "*rows D"] | None = None
    barrier: Int[Array, "1"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of x."""
        return (*self.value.rows, self.value.n) if isinstance(self.value, SplitKPartials) else self.value.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of x."""
        array = self.value if self.residual is None else self.residual
        return jnp.dtype(jnp.bfloat16) if isinstance(array, SplitKPartials) else array.dtype

    def finish(self) -> Float[Array, "*rows D"]:
        """x, by XLA."""
        if self.post_norm is None:
            return reduced(self.value)
        assert self.residual is not None
        return add_post_norm(self.value, self.post_norm.weight, self.residual, self.post_norm.eps)
