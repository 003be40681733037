"""From the qkv matmul's output to queries and cache: the reference, and the Hopper kernel against it."""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from poisoned_memory import poison
from random_partials import random_partials
from simulated import can_simulate, simulated

from pallas_kernels import formats
from pallas_kernels.formats import ScaledArray
from pallas_kernels.head_norm import HeadNorm, Placement
from pallas_kernels.rope_quantize import rope_quantize, rope_quantize_reference
from pallas_kernels.sm90.rope_quantize import launch as sm90
from pallas_kernels.sm90.rope_quantize.config import Config, default_config, unsupported
from pallas_kernels.split_k import reduced


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and options.

    ``quarter_turns``: cos and sin are 0 and 1, so that no rotation rounds. ``parts``: so many are left to add up.
    ``norm``, ``width``: a HeadNorm's.
    """

    length: int = 1
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    slots: int = 40
    starts: tuple[int, ...] = (0, 17)
    lengths: tuple[int, ...] = (1, 1)
    scaled: bool = False
    centered: bool = False
    clips: tuple[float, float] = (1.0, 1.0)
    unbiased: bool = False
    quarter_turns: bool = False
    parts: int = 0
    norm: Placement | None = None
    width: int | None = None
    factor: bool = False
    config: Config | None = None

    @property
    def batch(self) -> int:
        return len(self.starts)

    @property
    def options(self) -> dict[str, Any]:
        names = {"post_rope_scale": self.scaled, "key_offset": self.centered}
        scales, random = (self.kv_heads, self.head_dim), np.random.default_rng(7)
        # Powers of two for S where nothing is to be rounded.
        made = {"post_rope_scale": 2.0 ** random.integers(-3, 4, scales), "key_offset": random.integers(-2, 3, scales)}
        if not self.quarter_turns:
            made = {"post_rope_scale": random.uniform(0.1, 3, scales), "key_offset": random.standard_normal(scales)}
        wanted = {name: jnp.asarray(made[name], jnp.float32) for name, given in names.items() if given}
        if self.norm is not None:
            wanted["norm"] = random_norm(self.heads, self.kv_heads, self.head_dim, self.norm, width=self.width)
        if self.factor:
            wanted["query_factor"] = jnp.asarray(random.uniform(1, 2, (self.batch, self.length)), jnp.float32)
        return {
            **wanted,
            "key_clip": self.clips[0],
            "value_clip": self.clips[1],
            "unbiased_keys": self.unbiased,
        }


def random_norm(heads: int, kv_heads: int, head_dim: int, placement: Placement = "before_rope", **options: Any):
    random = np.random.default_rng(11)
    query, key = (
        jnp.asarray(random.normal(1, 0.5, (count, head_dim)).astype(np.float32)) for count in (heads, kv_heads)
    )
    return HeadNorm(query, key, 1e-6, placement, **options)


CASES = {
    "decode, Llama 3 8B": Case(heads=32, kv_heads=8, starts=(0, 39, 5), lengths=(1, 1, 1)),
    "one sequence": Case(heads=4, kv_heads=1, starts=(3,), lengths=(1,)),
    "idle and full sequences": Case(starts=(4, 40, 39, 100), lengths=(0, 1, 1, 1)),
    "a chunk": Case(length=9, starts=(0, 20, 36, 39), lengths=(9, 5, 9, 0)),
    "head_dim 64, odd heads": Case(5, heads=9, kv_heads=3, head_dim=64, starts=(0, 1), lengths=(5, 4)),
    "head_dim 256": Case(3, heads=6, kv_heads=3, head_dim=256, starts=(0, 1), lengths=(3, 2)),
    "S": Case(4, scaled=True, lengths=(4, 3)),
    "offset, clips": Case(4, centered=True, clips=(0.97, 0.91), lengths=(4, 3)),
    "unbiased keys": Case(4, centered=True, clips=(0.97, 0.91), unbiased=True, lengths=(4, 3)),
    "S and offset, all groups in a warp": Case(4, scaled=True, centered=True, lengths=(4, 3), config=Config(99)),
    "three groups a warp": Case(7, heads=32, kv_heads=8, lengths=(7, 6), config=Config(3)),
    "six groups a warp": Case(7, heads=32, kv_heads=8, lengths=(7, 6), scaled=True, config=Config(6)),
    "eight pairs a lane": Case(heads=32, kv_heads=8, starts=(0, 39, 5), lengths=(1, 1, 1), config=Config(1)),
    "four pairs a lane, three groups a warp": Case(
        7, heads=32, kv_heads=8, lengths=(7, 6), scaled=True, unbiased=True, config=Config(3, pairs=4)
    ),
    "prompts": Case(700, slots=720, starts=(0, 0, 30), lengths=(700, 12, 699), clips=(0.97, 0.91), unbiased=True),
    "a sum": Case(heads=32, kv_heads=8, starts=(0, 39, 5), lengths=(1, 1, 1), parts=2),
    "a sum, S and offset": Case(5, 9, 3, 64, scaled=True, centered=True, lengths=(5, 4), parts=8, quarter_turns=True),
    "a sum, eight pairs a lane, S, offset": Case(
        5, scaled=True, centered=True, lengths=(5, 4), parts=3, quarter_turns=True, config=Config(1)
    ),
    "a sum, three groups a warp": Case(7, heads=32, kv_heads=8, lengths=(7, 6), parts=4, config=Config(3)),
    "quarter turns": Case(64, slots=64, starts=(0, 0), lengths=(64, 64), quarter_turns=True),
    "quarter turns, S, offset": Case(
        64, slots=64, starts=(0, 0), lengths=(64, 64), scaled=True, centered=True, quarter_turns=True
    ),
    "norm, Qwen3 8B": Case(heads=32, kv_heads=8, starts=(0, 39, 5), lengths=(1, 1, 1), norm="before_rope"),
    "norm behind RoPE": Case(4, lengths=(4, 3), norm="after_rope"),
    "norm, a chunk": Case(length=9, starts=(0, 20, 36, 39), lengths=(9, 5, 9, 0), norm="before_rope", factor=True),
    "norm, head_dim 64, odd heads": Case(5, 9, 3, 64, starts=(0, 1), lengths=(5, 4), norm="before_rope"),
    "norm, head_dim 256": Case(3, 6, 3, 256, starts=(0, 1), lengths=(3, 2), norm="before_rope"),
    "norm, padded heads": Case(4, lengths=(4, 3), norm="before_rope", width=80),
    "norm, S, offset, factor, eight pairs": Case(
        4, scaled=True, centered=True, lengths=(4, 3), norm="before_rope", factor=True, config=Config(1)
    ),
    "norm, unbiased keys, three groups a warp": Case(
        7, 32, 8, centered=True, unbiased=True, lengths=(7, 6), norm="before_rope", config=Config(3)
    ),
    "norm behind RoPE, a sum, factor": Case(
        5, scaled=True, lengths=(5, 4), parts=3, norm="after_rope", factor=True, config=Config(99)
    ),
    "norm, prompts": Case(700, slots=720, starts=(0, 0, 30), lengths=(700, 12, 699), norm="before_rope"),
    "factor": Case(5, lengths=(5, 4), factor=True),
}  # fmt: skip
SIMULATED = (
    "decode, Llama 3 8B", "norm, Qwen3 8B", "norm, head_dim 64, odd heads", "norm, head_dim 256", "norm, padded heads",
    "norm, S, offset, factor, eight pairs", "norm, unbiased keys, three groups a warp",
    "norm behind RoPE, a sum, factor",
)  # fmt: skip
cases = functools.partial(pytest.mark.parametrize, "case", ids=CASES)


def operands(case: Case, kv_format: formats.KVFormat = "int4", group: int | None = None, dtype: Any = jnp.bfloat16):
    """packed, cos, sin, a cache full of other numbers, start and lengths."""
    keys = jax.random.split(jax.random.key(zlib.crc32(repr(case).encode())), 5)
    columns = (case.heads + 2 * case.kv_heads) * case.head_dim
    packed = jax.random.normal(keys[0], (case.batch, case.length, columns)).astype(dtype)
    angles = jax.random.uniform(keys[1], (case.batch, case.length, case.head_dim // 2), maxval=100.0)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if case.quarter_turns:
        turned = jnp.arange(case.length)[:, None] % 2 > 0
        cos, sin = (jnp.broadcast_to(x, angles.shape).astype(jnp.float32) for x in (~turned, turned))
    shape = (case.batch, case.kv_heads, case.slots, case.head_dim)
    cache = [formats.quantize_kv(jax.random.normal(key, shape, dtype), kv_format, group) for key in keys[2:4]]
    if case.parts:
        packed = random_partials((case.batch, case.length), columns, columns + 64, case.parts)
    return packed, cos, sin, *cache, jnp.asarray(case.starts, jnp.int32), jnp.asarray(case.lengths, jnp.int32)


def run(function: Any, packed: Any, cos: Any, sin: Any, key: Any, value: Any, start: Any, lengths: Any, **options: Any):
    return function(packed, cos, sin, key, value, start=start, lengths=lengths, **options)


def arrays(tree: Any) -> list[np.ndarray]:
    """Leaves as numpy arrays: codes as they are, all else as float32."""
    return [np.asarray(x if x.dtype == jnp.uint8 else x.astype(jnp.float32)) for x in jax.tree.leaves(tree)]


# --- the reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize_query", [True, False])
@pytest.mark.parametrize(("kv_format", "group"), [("int4", None), ("int4", 32), ("fp8", None), ("none", None)])
def test_reference_is_the_composition_of_formats(kv_format, group, quantize_query):
    """Rows of a numpy rotation, quantized by ``formats`` and written slot by slot; all other slots stay."""
    case = Case(4, starts=(0, 38, 7), lengths=(4, 4, 0), scaled=True, centered=True, clips=(0.93, 0.9), unbiased=True)
    packed, cos, sin, key, value, start, lengths = operands(case, kv_format, group)
    query, *cache = run(
        rope_quantize, packed, cos, sin, key, value, start, lengths, quantize_query=quantize_query,
        implementation="xla", **case.options,
    )  # fmt: skip

    rows = np.asarray(packed, np.float32).reshape(3, 4, 12, 128)
    turned = (rows[..., :64] + 1j * rows[..., 64:]) * (np.asarray(cos) + 1j * np.asarray(sin))[:, :, None]
    turned = np.concatenate([turned.real, turned.imag], axis=-1).astype(np.float32)
    scale, offset = (np.asarray(case.options[name]) for name in ("post_rope_scale", "key_offset"))
    expected_query = jnp.asarray(turned[:, :, :8] / np.repeat(scale, 4, axis=0))
    if quantize_query:
        expected_query = formats.dequantize(formats.quantize_fp8(expected_query))
    # A float32 rounding may move an element over a rounding boundary: a step of E4M3 or bf16.
    np.testing.assert_allclose(formats.dequantize(query), expected_query, rtol=0.07, atol=1e-3)

    for entry, old, new, clip, unbiased in zip(
        cache, (key, value), (turned[:, :, 8:10] * scale - offset, rows[:, :, 10:]), (0.93, 0.9), (True, False),
        strict=True,
    ):  # fmt: skip
        stored = formats.quantize_kv(jnp.asarray(new).swapaxes(1, 2), kv_format, group, clip, unbiased=unbiased)
        stored = jax.tree.map(lambda x, like: x.astype(like.dtype), stored, old)
        for after, before, added in zip(*map(arrays, (entry, old, stored)), strict=True):
            expected = before.copy()
            expected[0, :, 0:4] = added[0]
            expected[1, :, 38:40] = added[1, :, :2]
            assert np.mean(~np.isclose(after, expected, rtol=1e-6, atol=1e-6)) < 1e-3
            untouched = np.ones((3, 40), bool)
            untouched[0, :4] = untouched[1, 38:] = False
            for b in range(3):
                np.testing.assert_array_equal(after[b][:, untouched[b]], before[b][:, untouched[b]])


def test_rows_in_front_of_the_cache_are_not_stored():
    case = Case(4, starts=(-2, 0), lengths=(4, 0))
    packed, cos, sin, key, value, start, lengths = operands(case)
    _, *cache = run(rope_quantize, packed, cos, sin, key, value, start, lengths, implementation="xla")
    for after, before in zip(arrays(cache), arrays((key, value)), strict=True):
        changed = (after != before).reshape(*after.shape[:3], -1).any(axis=(1, 3))
        assert changed[0, :2].all()
        assert not changed[0, 2:].any()
        assert not changed[1].any()


def test_nothing_is_rounded_between_the_steps():
    """bf16 input, plain float32 cache: rotated, scaled and shifted in float32."""
    case = Case(scaled=True, centered=True)
    packed, cos, sin, *_, start, lengths = operands(case)
    empty = ScaledArray(jnp.zeros((2, 2, 40, 128)), None, "none")
    options = {**case.options, "implementation": "xla", "quantize_query": False}
    fine, coarse = (
        run(rope_quantize, x, cos, sin, empty, empty, start, lengths, **options)[1].values
        for x in (packed.astype(jnp.float32), packed)
    )
    np.testing.assert_array_equal(fine, coarse)
    assert jnp.any(fine != fine.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("placement", ["before_rope", "after_rope"])
@pytest.mark.parametrize("factor", [False, True])
def test_norm_and_factor_against_float64(placement, across_heads, factor):
    """Heads of 80 channels, each half padded to 64, with outlying channels and tokens; nothing is quantized."""
    batch, length, heads, kv_heads, half, real = 2, 3, 6, 2, 64, 40
    random = np.random.default_rng(0)
    rows = random.standard_normal((batch, length, heads + 2 * kv_heads, 2, half))
    rows *= np.exp(2 * random.standard_normal((*rows.shape[:3], 1, 1))) * np.where(random.random(half) < 0.1, 20, 1)
    rows[..., real:] = 0
    rows = rows.reshape(*rows.shape[:3], 2 * half).astype(np.float32)
    angles = random.uniform(0, 100, (batch, length, half))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    norm = random_norm(heads, kv_heads, 2 * half, placement, across_heads=across_heads, width=2 * real)
    factors = random.uniform(1, 2, (batch, length)).astype(np.float32) if factor else None
    empty = ScaledArray(jnp.zeros((batch, kv_heads, length, 2 * half)), None, "none")
    query, key, value = rope_quantize(
        jnp.asarray(rows.reshape(batch, length, -1)), jnp.asarray(cos), jnp.asarray(sin), empty, empty,
        start=jnp.zeros(batch, jnp.int32), lengths=jnp.full(batch, length), norm=norm,
        query_factor=factors, quantize_query=False, implementation="xla",
    )  # fmt: skip

    def turned(x):
        x = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin.astype(np.float64))[:, :, None]
        return np.concatenate([x.real, x.imag], axis=-1)

    def normalized(x, weight):
        axes, count = ((2, 3), 2 * real * x.shape[2]) if across_heads else (3, 2 * real)
        return x / np.sqrt((x**2).sum(axes, keepdims=True) / count + 1e-6) * np.asarray(weight, np.float64)

    wide = rows.astype(np.float64)
    for ours, x, weight, factor_of in (
        (query.values, wide[:, :, :heads], norm.query, 1 if factors is None else factors[..., None, None]),
        (key.values.swapaxes(1, 2), wide[:, :, heads : heads + kv_heads], norm.key, 1),
    ):
        expected = turned(normalized(x, weight)) if placement == "before_rope" else normalized(turned(x), weight)
        np.testing.assert_allclose(ours, expected * factor_of, rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(value.values.swapaxes(1, 2), rows[:, :, heads + kv_heads :])


def test_a_factor_is_in_the_scale_of_a_quantized_query():
    case = Case(3, factor=True, lengths=(3, 3))
    inputs, options = operands(case), case.options
    factor = options.pop("query_factor")
    plain, scaled = (
        jax.jit(functools.partial(run, rope_quantize, implementation="xla", **options, **more))(*inputs)[0]
        for more in ({}, {"query_factor": factor})
    )
    np.testing.assert_array_equal(*(np.asarray(x.values, np.float32) for x in (plain, scaled)))
    np.testing.assert_array_equal(scaled.scale, plain.scale * factor[..., None, None])


def test_factors_of_keys_fold_into_the_norm():
    """FireQ's N, one factor for both channels of a pair: smaller keys, and the scores that they had."""
    case = Case(4, lengths=(4, 4), starts=(0, 0), slots=4, norm="before_rope")
    packed, cos, sin, *_, start, lengths = operands(case)
    empty = ScaledArray(jnp.zeros((2, 2, 4, 128)), None, "none")
    n = jnp.tile(2.0 ** np.random.default_rng(0).integers(-3, 4, (2, 64)), (1, 2)).astype(jnp.float32)
    norm = random_norm(8, 2, 128)
    folded = dataclasses.replace(norm, query=norm.query / jnp.repeat(n, 4, axis=0), key=norm.key * n)

    def query_and_key(norm):
        options = {"quantize_query": False, "implementation": "xla", "norm": norm}
        inputs = packed.astype(jnp.float32), cos, sin, empty, empty, start, lengths
        query, key, _ = jax.jit(functools.partial(run, rope_quantize, **options))(*inputs)
        return query.values.reshape(2, 4, 2, 4, 128), key.values

    (query, key), (new_query, new_key) = map(query_and_key, (norm, folded))
    np.testing.assert_array_equal(new_key, key * n[:, None])
    scores = functools.partial(jnp.einsum, "btkgh,bksh->btkgs", precision="highest")
    np.testing.assert_allclose(scores(new_query, new_key), scores(query, key), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e30])
def test_a_broken_row_stays_broken_behind_a_norm(broken):
    """And leaves the other rows alone."""
    norm = random_norm(3, 2, 8)
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 8)).astype(np.float32)
    x[0, 1, 2, 5] = broken
    query, _ = norm(jnp.asarray(x), jnp.asarray(x[:, :, :2]))
    assert np.isnan(query[0, 1, 2]).all()
    assert np.isfinite(np.asarray(query).reshape(6, 8)[:5]).all()


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [({"eps": 0.0}, r"eps is 0\.0"), ({"placement": "behind"}, "placement is 'behind'"), ({"width": 0}, "width is 0")],
)
def test_norms_quote_what_is_wrong(changes, quoted):
    with pytest.raises(ValueError, match=quoted):
        dataclasses.replace(random_norm(1, 1, 8), **changes)


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"packed": (2, 1536)}, r"\(2, 1536\)"),
        ({"packed": (2, 1, 1000)}, r"1000 columns; expected \(n \+ 2\) \* 256"),
        ({"packed": (2, 1, 512)}, "512 columns"),
        ({"packed": (2, 1, 7 * 128)}, "896 columns"),
        ({"cos": (2, 1, 32)}, r"cos has shape \(2, 1, 32\)"),
        ({"key": (3, 2, 40, 64)}, r"key has shape \(3, 2, 40, 64\)"),
        ({"key": (2, 2, 40, 128)}, r"\(2, 2, 40, 128\).*\[2, kv_heads, S, 64\]"),
        ({"value": (2, 2, 39, 64)}, r"\(2, 2, 39, 64\)"),
        ({"start": (3,)}, r"start has shape \(3,\); expected \(2,\)"),
        ({"lengths": (2, 1)}, r"lengths has shape \(2, 1\)"),
        ({"post_rope_scale": (2, 64)}, r"post_rope_scale has shape \(2, 64\)"),
        ({"key_offset": (8, 128)}, r"key_offset has shape \(8, 128\)"),
        ({"query_factor": (2, 2)}, r"query_factor has shape \(2, 2\); expected \(2, 1\)"),
        ({"norm": random_norm(2, 2, 128)}, r"query norm's weight has shape \(2, 128\); expected \(8, 128\)"),
        ({"norm": random_norm(8, 8, 128)}, r"key norm's weight has shape \(8, 128\); expected \(2, 128\)"),
        ({"norm": random_norm(8, 2, 128, width=129)}, "width is 129; expected at most head_dim 128"),
        ({"key_clip": 0.0}, r"key_clip is 0\.0"),
        ({"value_clip": -1.0}, r"value_clip is -1\.0"),
        ({"implementation": "cuda"}, "'cuda'"),
    ],
)  # fmt: skip
def test_errors_quote_the_offending_value(changes, quoted):
    shapes = {"packed": (2, 1, 12 * 128), "cos": (2, 1, 64), "sin": (2, 1, 64), "start": (2,), "lengths": (2,)}
    shapes |= {"key": (2, 2, 40, 64), "value": (2, 2, 40, 64)}
    arguments = {}
    for name, shape in (shapes | {name: x for name, x in changes.items() if isinstance(x, tuple)}).items():
        if name in ("key", "value"):
            scale = jnp.ones((*shape[:3], 1), jnp.bfloat16)
            arguments[name] = ScaledArray(jnp.zeros(shape, jnp.uint8), scale, "int4")
        else:
            arguments[name] = jnp.zeros(shape, jnp.bfloat16 if name == "packed" else jnp.float32)
    arguments |= {name: x for name, x in changes.items() if not isinstance(x, tuple)}
    with pytest.raises(ValueError, match=quoted):
        rope_quantize(**arguments)


# --- the kernel without a GPU -------------------------------------------------------------------------


@cases(CASES.values())
def test_kernel_lowers_for_cuda_and_writes_into_the_caches_it_is_given(case):
    abstract = jax.eval_shape(lambda: operands(case))
    function = functools.partial(run, sm90.rope_quantize, config=case.config, **case.options)
    module = jax.export.export(jax.jit(function, donate_argnums=(3, 4)), platforms=["cuda"])(*abstract).mlir_module()
    assert module.count("stablehlo.custom_call @mosaic_gpu") == 1
    # Codes and scales of keys and values: the kernel's results lie in its operands, and these in the arguments.
    assert module.count("#stablehlo.output_operand_alias") == 4
    assert module.count("tf.aliasing_output") == 4


def test_unsupported_operands_have_a_reason():
    packed, cos, sin, key, value, *_ = operands(Case())
    assert unsupported(packed, cos, sin, key, value, True) is None
    assert "float32" in str(unsupported(packed.astype(jnp.float32), cos, sin, key, value, True))
    assert "head_dim is 96" in str(unsupported(packed, cos[..., :48], sin[..., :48], key, value, True))
    assert "query" in str(unsupported(packed, cos, sin, key, value, False))
    for across_heads, reason in ((False, "None"), (True, "all heads together")):
        norm = random_norm(8, 2, 128, across_heads=across_heads)
        assert reason in str(unsupported(packed, cos, sin, key, value, True, norm))
    assert "sin bfloat16" in str(unsupported(packed, cos, sin.astype(jnp.bfloat16), key, value, True))
    for kv_format, group, reason in (("fp8", None, "INT4"), ("none", None, "INT4"), ("int4", 64, "scales")):
        _, _, _, key, value, *_ = operands(Case(), kv_format, group)
        assert reason in str(unsupported(packed, cos, sin, key, value, True))


def test_a_sum_is_read_as_what_it_adds_up_to():
    packed, *others = operands(CASES["a sum"])
    whole, parts = (run(rope_quantize, x, *others, implementation="xla") for x in (packed.reduce(), packed))
    for one, two in zip(*map(arrays, (whole, parts)), strict=True):
        np.testing.assert_array_equal(one, two)


def test_sums_that_the_kernel_cannot_add_up_have_a_reason():
    packed, cos, sin, key, value, *_ = operands(CASES["a sum"])
    assert unsupported(packed, cos, sin, key, value, True) is None
    for changes, reason in (
        ({"x_scale": None}, "FP8"),
        ({"bias": cos.astype(jnp.float16)}, "bias"),
        ({"residual": cos}, "residual"),
    ):
        assert reason in str(unsupported(dataclasses.replace(packed, **changes), cos, sin, key, value, True))


def test_a_named_kernel_never_falls_back():
    with pytest.raises(NotImplementedError, match="not INT4"):
        run(rope_quantize, *operands(Case(), "fp8"), implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("tokens", "groups", "pairs"), [(1, 1, 4), (64, 1, 4), (256, 1, 8), (768, 1, 8), (1024, 6, 8), (16384, 12, 8)]
)
def test_a_warp_takes_more_where_there_are_many_tokens(tokens, groups, pairs):
    assert default_config(tokens, 12) == Config(groups, pairs=pairs)
    assert default_config(tokens, 12, unbiased_keys=True) == Config(groups)


@pytest.mark.parametrize("make", [functools.partial(Config, 0), functools.partial(Config, 1, warpgroups=0)])
def test_configs_quote_what_is_wrong(make):
    with pytest.raises(ValueError, match="is 0; expected a positive number"):
        make()


def test_configs_quote_pairs_that_make_no_whole_word():
    with pytest.raises(ValueError, match="pairs is 6; expected 4 or 8"):
        Config(1, pairs=6)


# --- the kernel in numpy, and on a GPU ------------------------------------------------------------------------------


def jitted(function: Any, *inputs: Any) -> Any:
    return jax.jit(function)(*inputs)


def compare(case: Case, inputs: Any, runner: Any = jitted) -> None:
    """Kernel and compiled reference on the same cache; bit for bit where no step before rounds.

    XLA may fuse other multiplications into sums: float32 ulps, which take a few elements over a
    rounding boundary (a code, a step of E4M3) and a few maxima to the next scale. On GPUs its reciprocals
    may be off by one too, so what must be equal is compared with the reference on the CPU.
    """
    packed, *others = inputs
    given = (reduced(packed), *others)
    if case.quarter_turns:
        given = jax.device_put(given, jax.devices("cpu")[0])
    reference = jax.jit(functools.partial(run, rope_quantize_reference, **case.options))(*given)
    poison((case.batch, case.length, case.heads, case.head_dim))
    kernel = runner(functools.partial(run, sm90.rope_quantize, config=case.config, **case.options), *inputs)
    for ours, expected in zip(*map(arrays, (kernel, reference)), strict=True):
        if case.quarter_turns:
            np.testing.assert_array_equal(ours, expected)
        same = ours == expected if ours.dtype == np.uint8 else np.isclose(ours, expected, 1e-6, 0, equal_nan=True)
        assert np.sum(~same) <= max(3, 1e-3 * same.size), (np.sum(~same), ours[~same][:9], expected[~same][:9])
    for ours, expected in zip(kernel, reference, strict=True):
        ours, expected = (np.asarray(formats.dequantize(x), np.float64) for x in (ours, expected))
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(expected))
        finite = np.isfinite(expected)
        # A code of a thousand off by one: 0.03 of a scale where an element's rms is about 3 of them.
        assert np.linalg.norm((ours - expected)[finite]) <= 1e-2 * np.linalg.norm(expected[finite])


@pytest.mark.parametrize("name", SIMULATED)
@can_simulate
def test_lowered_kernel_run_in_numpy_equals_reference(name):
    compare(CASES[name], operands(CASES[name]), simulated)


@pytest.mark.parametrize("norm", ["before_rope", "after_rope"])
@can_simulate
def test_a_norm_is_the_same_however_many_pairs_a_lane_has(norm):
    """So that a prompt's keys are those of the same tokens one by one."""
    case = Case(2, lengths=(2, 2), norm=norm)
    few, many = (
        simulated(functools.partial(run, sm90.rope_quantize, config=config, **case.options), *operands(case))
        for config in (Config(1, pairs=4), Config(1, pairs=8))
    )
    for one, two in zip(*map(arrays, (few, many)), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.gpu
@cases(CASES.values())
def test_kernel_equals_reference(case):
    compare(case, operands(case))


@can_simulate
def test_broken_rows_in_numpy_follow_the_rules_of_formats():
    compare_broken_rows("norm, a chunk", simulated)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["a chunk", "quarter turns", "quarter turns, S, offset", "norm, a chunk"])
def test_broken_rows_follow_the_rules_of_formats(name):
    compare_broken_rows(name)


def compare_broken_rows(name: str, runner: Any = jitted) -> None:
    """Rows of zeros, NaN, infinities, tiny and huge numbers; NaN in the slots and scales that are not written."""
    case = CASES[name]
    packed, cos, sin, key, value, start, lengths = operands(case)
    random = np.random.default_rng(3)
    rows = np.asarray(packed, np.float32).reshape(case.batch, case.length, -1, case.head_dim)
    kinds = random.integers(0, 7, rows.shape[:3])
    rows[kinds == 0] = 0
    rows[kinds == 1] *= 1e-30
    rows[kinds == 2] *= 1e30
    for kind, number in ((3, np.nan), (4, np.inf), (5, -np.inf)):
        rows[np.where((kinds == kind)[..., None], random.random(rows.shape) < 0.02, False)] = number
    packed = jnp.asarray(rows.reshape(packed.shape), jnp.bfloat16)
    key, value = (dataclasses.replace(x, scale=jnp.full_like(x.scale, jnp.nan)) for x in (key, value))
    compare(case, (packed, cos, sin, key, value, start, lengths), runner)


@pytest.mark.gpu
def test_a_donated_cache_is_updated_where_it_lies():
    packed, cos, sin, key, value, start, lengths = operands(CASES["decode, Llama 3 8B"])
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((key, value))]
    step = jax.jit(functools.partial(run, rope_quantize, implementation="mosaic_gpu"), donate_argnums=(3, 4))
    _, *cache = step(packed, cos, sin, key, value, start, lengths)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)] == before
