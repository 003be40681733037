"""RoPE-aware scaling of keys: what makes them survive INT4 rows with one scale a token and head.

N scales each rotary pair (folded into q_proj and k_proj, because it commutes with RoPE), S scales
outlier channels after RoPE, and an offset moves all keys of a head. N and S are FireQ's (arXiv
2505.20839); balancing N against the queries, searching or fitting it and the offset are beyond it.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from fireq_jax.models.config import ModelConfig
from fireq_jax.quantization.config import SmoothingConfig

# Adam on the logarithms of N and on the angles: steps, and the first step's size.
FIT_STEPS = 300
FIT_RATE = 0.03

# Tried by ``search_keys``: exponents, numbers of outlier channels (up to the config's) and multiples of beta.
QUERY_EXPONENTS = (0.0, 0.25, 0.5, 0.75)
OUTLIER_CHANNELS = (0, 1, 2, 4, 8)
BETA_RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)


class KeyMoments(NamedTuple):
    """Means over the calibration tokens, after RoPE; of a kv head's queries over all its query heads."""

    mean: Float[Array, "kv_heads H"]  # of k_i
    square: Float[Array, "kv_heads H"]  # of k_i^2
    query_square: Float[Array, "kv_heads H"]  # of q_i^2


class KeySample(NamedTuple):
    """Some of the keys, after RoPE, and what an error in them costs the block's output.

    An error e of a pair of key s moves the score of a query t by q_t e, and the output (through
    softmax, to first order) by weight_ts |o_proj (v_s - output_t)| times that. ``reads`` is the sum
    over the sequence's queries of the squares, for e = 1: (weight_ts |..| |q_t|)^2 by pair.
    """

    keys: Float[Array, "tokens kv_heads H"]
    reads: Float[Array, "tokens kv_heads half"]


class KeyStatistics(NamedTuple):
    """Largest magnitudes of a block's keys over the calibration tokens, their moments, and some keys."""

    pair_max: Float[Array, "kv_heads half"]  # of sqrt(k_i^2 + k_{i + H/2}^2), which RoPE keeps
    channel_max: Float[Array, "kv_heads H"]  # of |k_i|, after RoPE
    moments: KeyMoments | None = None
    sample: KeySample | None = None


class PairTransform(NamedTuple):
    """What happens to each rotary pair of the keys before RoPE: times ``scale``, turned by ``angle``."""

    scale: Float[Array, "kv_heads half"]
    angle: Float[Array, "kv_heads half"] | None = None

    def apply(self, keys: Float[Array, "*rows kv_heads H"]) -> Float[Array, "*rows kv_heads H"]:
        """The transformed keys; it commutes with RoPE, so they may be rotated ones."""
        if self.angle is None:
            return keys * jnp.tile(self.scale, (1, 2))
        first, second = jnp.split(keys, 2, axis=-1)
        cos, sin = self.scale * jnp.cos(self.angle), self.scale * jnp.sin(self.angle)
        return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)

    def for_queries(self) -> "PairTransform":
        """What the queries need for the same scores."""
        return PairTransform(1 / self.scale, self.angle)


class KeyTransform(NamedTuple):
    """What :func:`smooth_keys` does to the keys: N before RoPE, S after it, and what is then subtracted."""

    pairs: PairTransform
    post_rope_scale: Float[Array, "kv_heads H"]
    offset: Float[Array, "kv_heads H"] | None


def smooth_keys(
    block: Mapping[str, Array], transform: KeyTransform, config: ModelConfig, smoothing: SmoothingConfig
) -> dict[str, Array]:
    """N, S and the key offset; see :func:`~checkpoints_convert.algorithms.smoothing.smooth_block`."""
    result = dict(block)
    if smoothing.pre_rope:
        result = fold_pairs(result, transform.pairs, config)
    if smoothing.post_rope_channels:
        result["self_attn.post_rope_scale"] = transform.post_rope_scale
    if transform.offset is not None:
        result["self_attn.key_offset"] = transform.offset
    return result


def key_transform(keys: KeyStatistics | None, smoothing: SmoothingConfig, *, turn: bool = True) -> KeyTransform:
    """N (with the angles, if these are fitted), S and the offset.

    Args:
        keys: what was measured.
        smoothing: which of them, with their constants.
        turn: whether pairs may be turned, as those of a normed head may not: its gains come after the projection.

    Raises:
        ValueError: if statistics are missing.
    """
    if keys is None:
        raise ValueError("RoPE-aware scaling needs key statistics; calibrate first")
    heads, head_dim = keys.channel_max.shape
    if smoothing.post_rope_channels > head_dim:
        raise ValueError(f"post_rope_channels is {smoothing.post_rope_channels}; head_dim is only {head_dim}")
    if smoothing.search_keys:
        strength = search_strength(keys, smoothing)
    else:
        given = (smoothing.post_rope_channels, smoothing.beta, smoothing.query_exponent)
        strength = KeyStrength(*(jnp.full((heads,), x, jnp.float32) for x in given))
    pre_rope, post_rope = _scales(keys, smoothing, strength)
    pairs = PairTransform(pre_rope)
    if smoothing.fit_pairs:
        pairs = fit_pairs(pre_rope, _centered_sample(keys, smoothing), turn=turn)
    offset = pairs.apply(_moments(keys).mean) * post_rope if smoothing.key_offset else None
    return KeyTransform(pairs, post_rope, offset)


class KeyStrength(NamedTuple):
    """How far N and S go, for each kv head."""

    channels: Float[Array, " kv_heads"]  # that S scales
    beta: Float[Array, " kv_heads"]
    query_exponent: Float[Array, " kv_heads"]


def search_strength(keys: KeyStatistics, smoothing: SmoothingConfig) -> KeyStrength:
    """The strength under which INT4 keys change the block's output least, as :func:`fit_pairs` counts it.

    Raises:
        ValueError: without a sample of the keys.
    """
    sample = _centered_sample(keys, smoothing)
    channels = [n for n in OUTLIER_CHANNELS if n <= smoothing.post_rope_channels]
    tried = [(0, 1.0)] + [(n, ratio) for n in channels if n for ratio in BETA_RATIOS]
    exponents = QUERY_EXPONENTS if smoothing.pre_rope else (0.0,)
    grid = jnp.asarray([(n, smoothing.beta * ratio, e) for n, ratio in tried for e in exponents], jnp.float32)
    every = jnp.broadcast_to(grid[:, :, None], (*grid.shape, len(keys.channel_max)))

    def cost(strength: Float[Array, "3 kv_heads"]) -> Float[Array, " kv_heads"]:
        return key_cost(sample, *_scales(keys, smoothing, KeyStrength(*strength)))

    best = jnp.argmin(jax.lax.map(cost, every), axis=0)
    return KeyStrength(*grid[best].T)


def key_cost(
    sample: KeySample, pre_rope: Float[Array, "kv_heads half"], post_rope: Float[Array, "kv_heads H"]
) -> Float[Array, " kv_heads"]:
    """What INT4 keys cost the block's output under N and S: see :func:`fit_pairs`."""
    largest = jnp.max(jnp.abs(PairTransform(pre_rope).apply(sample.keys) * post_rope), axis=-1)
    # An error of a channel is what rounding does to the stored key, over S and N.
    first, second = jnp.split(1 / jnp.square(post_rope), 2, axis=-1)
    read = jnp.sum(sample.reads / jnp.square(pre_rope) * (first + second) / 2, axis=-1)
    return jnp.mean(jnp.square(largest) * read, axis=0)


def _scales(
    keys: KeyStatistics, smoothing: SmoothingConfig, strength: KeyStrength
) -> tuple[Float[Array, "kv_heads half"], Float[Array, "kv_heads H"]]:
    """N and S."""
    post_rope, outlier_pairs = post_rope_scale(keys.channel_max, strength.channels[:, None], strength.beta[:, None])
    if not smoothing.pre_rope:
        return jnp.ones_like(keys.pair_max), post_rope
    pre_rope = pre_rope_scale(key_pair_magnitude(keys, smoothing), outlier_pairs, smoothing.alpha)
    if smoothing.query_exponent or smoothing.search_keys:
        pre_rope = favour_queries(pre_rope, outlier_pairs, _moments(keys), strength.query_exponent[:, None])
    return pre_rope, post_rope


def _centered_sample(keys: KeyStatistics, smoothing: SmoothingConfig) -> KeySample:
    if keys.sample is None:
        raise ValueError("fit_pairs and search_keys need a sample of the keys; calibrate first")
    if not smoothing.key_offset:
        return keys.sample
    return keys.sample._replace(keys=keys.sample.keys - _moments(keys).mean)


@functools.partial(jax.jit, static_argnames="turn")
def fit_pairs(start: Float[Array, "kv_heads half"], sample: KeySample, *, turn: bool = True) -> PairTransform:
    """N and angles of the pairs for the least error of the block's output, by gradient descent.

    A token's key is rounded in steps of its largest magnitude, so that the cost of token s is
    max_i |k_si|^2 * sum_p reads_sp / N_p^2. A turn spreads a pair with one large member over both;
    RoPE commutes with it.

    Args:
        start: N to start from.
        sample: some of the rotated keys, less their offset.
        turn: whether to fit angles too.
    """
    tiny = jnp.finfo(jnp.float32).tiny

    def cost(fitted: tuple[Array, Array]) -> Float[Array, ""]:
        scale = jnp.exp(fitted[0])
        largest = jnp.max(jnp.abs(PairTransform(scale, fitted[1] if turn else None).apply(sample.keys)), axis=-1)
        read = jnp.sum(sample.reads / jnp.square(scale), axis=-1)
        mean = jnp.mean(jnp.square(largest) * read, axis=0)
        # A head that nobody reads has no error, whose logarithm's gradient would overflow.
        return jnp.sum(jnp.log(jnp.where(mean > tiny, mean, 1.0)))

    optimizer = optax.adam(optax.cosine_decay_schedule(FIT_RATE, FIT_STEPS))

    def descend(_: Array, state: tuple[tuple[Array, Array], optax.OptState]) -> tuple:
        fitted, optimizer_state = state
        updates, optimizer_state = optimizer.update(jax.grad(cost)(fitted), optimizer_state)
        return optax.apply_updates(fitted, updates), optimizer_state

    fitted = jnp.log(start), jnp.zeros_like(start)
    (logs, angle), _ = jax.lax.fori_loop(0, FIT_STEPS, descend, (fitted, optimizer.init(fitted)))
    return PairTransform(jnp.exp(logs), angle if turn else None)


def _moments(keys: KeyStatistics) -> KeyMoments:
    if keys.moments is None:
        raise ValueError("this smoothing needs the moments of the keys; calibrate first")
    return keys.moments


def key_pair_magnitude(keys: KeyStatistics, smoothing: SmoothingConfig) -> Float[Array, "kv_heads half"]:
    """What N equalises: each rotary pair's largest norm, or its root mean square after the offset."""
    if smoothing.pair_statistic == "max":
        return keys.pair_max
    moments = _moments(keys)
    square = moments.square - jnp.square(moments.mean) if smoothing.key_offset else moments.square
    return pair_norm(jnp.maximum(square, 0.0))


def pair_norm(square: Float[Array, "kv_heads H"]) -> Float[Array, "kv_heads half"]:
    """Root of the summed squares of the two members of each rotary pair."""
    first, second = jnp.split(square, 2, axis=-1)
    return jnp.sqrt(first + second)


def favour_queries(
    scale: Float[Array, "kv_heads half"],
    excluded: Bool[Array, "kv_heads half"],
    moments: KeyMoments,
    exponent: float | Float[Array, "kv_heads 1"],
) -> Float[Array, "kv_heads half"]:
    """N = queries^exponent * scale^(1 - exponent): more of a token's INT4 range for pairs that are read."""
    queries = pair_norm(moments.query_square)
    usable = ~excluded & (queries > 0)
    return jnp.where(usable, jnp.where(usable, queries, 1.0) ** exponent * scale ** (1 - exponent), scale)


def post_rope_scale(
    channel_max: Float[Array, "kv_heads H"],
    channels: int | Float[Array, "kv_heads 1"],
    beta: float | Float[Array, "kv_heads 1"],
) -> tuple[Float[Array, "kv_heads H"], Bool[Array, "kv_heads half"]]:
    """S: scale of rotated keys, beta / absmax for outlier channels and their pair partners, else 1.

    Returns:
        The scale, and the rotary pairs that hold an outlier channel.
    """
    kv_heads, head_dim = channel_max.shape
    order = jnp.argsort(-channel_max, axis=1)
    rank = jnp.argsort(order, axis=1)
    pairs = jnp.any((rank < channels).reshape(kv_heads, 2, head_dim // 2), axis=1)
    usable = jnp.tile(pairs, (1, 2)) & (channel_max > 0)
    return jnp.where(usable, beta / jnp.where(usable, channel_max, 1.0), 1.0), pairs


def pre_rope_scale(
    pair_max: Float[Array, "kv_heads half"], excluded: Bool[Array, "kv_heads half"], alpha: float
) -> Float[Array, "kv_heads half"]:
    """N: alpha / largest norm of each rotary pair; 1 for excluded pairs and for pairs always 0."""
    usable = ~excluded & (pair_max > 0)
    return jnp.where(usable, alpha / jnp.where(usable, pair_max, 1.0), 1.0)


def fold_pairs(block: Mapping[str, Array], pairs: PairTransform, config: ModelConfig) -> dict[str, Array]:
    """Transform the pairs of k_proj's rows, and the rows of the queries that meet them the other way.

    A norm of each head undoes what its rows are multiplied by; there the factors go into its gains.
    """
    result = dict(block)
    group = config.num_heads // config.num_kv_heads
    if config.head_norm != "none":
        assert pairs.angle is None
        scale = jnp.tile(pairs.scale, (1, 2))
        result["self_attn.k_norm"] = block["self_attn.k_norm"] * scale
        result["self_attn.q_norm"] = block["self_attn.q_norm"] / jnp.repeat(scale, group, axis=0)
        return result
    for linear, heads, transform in (("k_proj", 1, pairs), ("q_proj", group, pairs.for_queries())):
        for kind in ("weight", "bias"):
            if (rows := block.get(f"self_attn.{linear}.{kind}")) is not None:
                split = rows.reshape(config.num_kv_heads, heads, config.head_dim, -1)
                turned = transform.apply(split.transpose(1, 3, 0, 2))
                result[f"self_attn.{linear}.{kind}"] = turned.transpose(2, 0, 3, 1).reshape(rows.shape)
    return result
