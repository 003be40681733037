"""A mixture of experts in place of the MLP: a router sends each token to a few of many MLPs.

Mixtral (arXiv 2401.04088). Experts are visited one after the other, each with all tokens, so that a program is as
large as for one MLP. An expert that no token goes to is left out only where tokens have fewer choices than there are
experts, as when a sequence is generated.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fireq_jax.models.config import ExpertsConfig, ModelConfig
from fireq_jax.models.layers import MLP, LayerOptions, Tap, no_tap
from pallas_kernels.dispatch import Implementation
from pallas_kernels.projection import matmul_float
from pallas_kernels.row_quantize import quantize_rows


class Router(nnx.Module):
    """How much of each expert's output a token takes.

    Attributes:
        weight: float32 [experts, D] whatever the model's dtype: near a tie a rounding sends a token elsewhere.
        bias: float32 [experts], or None.
    """

    def __init__(self, hidden_size: int, config: ExpertsConfig, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (config.count, hidden_size)) * 0.02)
        self.bias = nnx.Param(jnp.zeros((config.count,), jnp.float32)) if config.router_bias else None
        self.config = config

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows experts"]:
        """float32 weights of all experts' outputs, 0 for those that a token does not go to."""
        logits = matmul_float(x.astype(jnp.float32), self.weight.get_value())
        if self.bias is not None:
            logits = logits + jnp.broadcast_to(self.bias.get_value(), logits.shape)
        largest, chosen = jax.lax.top_k(logits, self.config.per_token)
        if self.config.normalized:
            weights = jax.nn.softmax(largest, axis=-1)
        else:
            weights = jnp.exp(largest - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        places = jax.nn.one_hot(chosen, self.config.count, dtype=jnp.float32)  # [*rows, per_token, experts]
        return jnp.sum(places * weights[..., None], axis=-2)


class Experts(nnx.Module):
    """The sum of a few experts' outputs, weighted by the router.

    Attributes:
        experts: an MLP whose parameters have one more axis in front, the expert's.
    """

    def __init__(self, name: str, config: ModelConfig, options: LayerOptions) -> None:
        assert config.experts is not None

        @nnx.split_rngs(splits=config.experts.count)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> MLP:
            return MLP(f"{name}.experts", config, dataclasses.replace(options, rngs=rngs))

        self.router = Router(config.hidden_size, config.experts, options.rngs)
        self.experts = stacked(options.rngs)
        self.dtype = jnp.dtype(options.dtype)
        self.implementation: Implementation = options.implementation

    def __call__(
        self,
        x: Float[Array, "B T D"],
        residual: Float[Array, "B T D"] | None = None,
        tap: Tap = no_tap,
    ) -> Float[Array, "B T D"]:
        """The mixture for rows ``x``, which only experts round, plus ``residual``.

        ``tap`` sees "expert_weights" [B, T, experts], and "down_input" [experts, B, T, I] of all tokens, whether an
        expert's or not.
        """
        weights = self.router(x)
        takes_fp8 = self.experts.gate_up_proj.takes_fp8
        rows = quantize_rows(x, implementation=self.implementation) if takes_fp8 else x
        graph, state = nnx.split(self.experts)

        def add(total: Float[Array, "B T D"], expert: Array) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
            seen: dict[str, Array] = {}
            mlp = nnx.merge(graph, jax.tree.map(lambda stack: stack[expert], state))
            output = mlp(rows, tap=no_tap if tap is no_tap else seen.__setitem__)
            weight = weights[..., expert, None]
            # What an expert makes of others' tokens may be anything, NaN included, and 0 * NaN is NaN.
            return total + jnp.where(weight > 0, weight * output.astype(jnp.float32), 0.0), seen

        total = jnp.zeros(x.shape, jnp.float32) if residual is None else residual.astype(jnp.float32)
        total, seen = jax.lax.scan(add, total, self._visited(weights, everything=tap is not no_tap))
        tap("expert_weights", weights)
        for name, values in seen.items():
            tap(name, values)
        return total.astype(self.dtype)

    def _visited(self, weights: Float[Array, "B T experts"], *, everything: bool) -> Array:
        """Numbers of the experts to be visited, in order: those with tokens are among them."""
        count = weights.shape[-1]
        choices = weights[..., 0].size * self.router.config.per_token
        if everything or choices >= count:
            return jnp.arange(count)
        loads = jnp.max(weights.reshape(-1, count), axis=0)
        return jnp.sort(jax.lax.top_k(loads, choices)[1])
