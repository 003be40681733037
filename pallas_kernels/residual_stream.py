"""A decoder's residual stream between its layers' ops, as far as it has been computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.formats import ScaledArray
from pallas_kernels.norm import Norm
from pallas_kernels.row_quantize import add_post_norm
from pallas_kernels.split_sum import SplitSum, finished


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("value", "residual", "post_norm", "normalized", "barrier"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class ResidualStream:
    """Hidden states [*rows, D]: ``value``, or with a ``post_norm`` residual + post_norm(value).

    The ops of ``decoder_layer`` hand it on to one another, and only they look inside: what a matmul left undone the
    next op does on its way. ``ResidualStream(x)`` begins one, and ``finish`` ends it.

    Attributes:
        value: x [*rows, D], or what it is to be summed from.
        residual: what the normalized value is added to.
        post_norm: of the branch that ``value`` is then.
        normalized: rows that attention's branch and the MLP's both begin with (a parallel block).
        barrier: where the kernel after attention counts its blocks, made by the kernel before it for one use.
    """

    value: Float[Array, "*rows D"] | SplitSum
    residual: Float[Array, "*rows D"] | None = None
    post_norm: Norm | None = None
    normalized: ScaledArray | Float[Array, "*rows D"] | None = None
    barrier: Int[Array, "1"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x."""
        return (*self.value.rows, self.value.n) if isinstance(self.value, SplitSum) else self.value.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of x."""
        array = self.value if self.residual is None else self.residual
        return jnp.dtype(jnp.bfloat16) if isinstance(array, SplitSum) else array.dtype

    def finish(self) -> Float[Array, "*rows D"]:
        """x, by XLA."""
        if self.post_norm is None:
            return finished(self.value)
        assert self.residual is not None
        return add_post_norm(self.value, self.post_norm.weight, self.residual, self.post_norm.eps)
