"""The Hopper attention kernels: their numbers on a GPU, their lowering for CUDA and their host code anywhere."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, assert_near, cases, operands, pages, rows
from poisoned_memory import poison

from pallas_kernels import formats
from pallas_kernels.decode_attention import decode_attention, gather_pages
from pallas_kernels.formats import ScaledArray
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.sm90.common.hardware import NUM_SMS
from pallas_kernels.sm90.decode_attention import launch as decode
from pallas_kernels.sm90.decode_attention.combine import combine_splits
from pallas_kernels.sm90.decode_attention.config import Config as DecodeConfig
from pallas_kernels.sm90.decode_attention.config import default_config as default_decode_config
from pallas_kernels.sm90.decode_attention.config import unsupported as decode_unsupported
from pallas_kernels.sm90.prefill_attention import launch as prefill
from pallas_kernels.sm90.prefill_attention.config import Config as PrefillConfig
from pallas_kernels.sm90.prefill_attention.config import unsupported as prefill_unsupported
from pallas_kernels.sm90.prefill_attention.prepare import prepare
from pallas_kernels.sm90.prefill_attention.schedule import Schedule, causal_schedule
from pallas_kernels.sm90.row_quantize import launch as row_quantize

DECODE = {
    "one token": Case(heads=4, kv_heads=1, slots=128, lengths=(1,)),
    "lengths around a tile": Case(slots=1024, lengths=(127, 128, 129, 255, 256, 257, 1024)),
    "an empty sequence": Case(lengths=(0, 300)),
    "outliers": Case(lengths=(512, 129), outliers=True),
    "slots not a multiple of the tile": Case(length=4, slots=1000, lengths=(1000, 5)),
    "16 queries": Case(length=16, heads=32, kv_heads=8, slots=1024, lengths=(1024, 600)),
    "more query heads than a row block": Case(length=3, heads=48, kv_heads=2, lengths=(512, 3)),
    "head_dim 64": Case(heads=8, kv_heads=8, head_dim=64, lengths=(512, 77)),
    "head_dim 256": Case(length=2, heads=16, kv_heads=2, head_dim=256, lengths=(512, 300), outliers=True),
    "window": Case(slots=4096, lengths=(4096, 200), window=300),
    "window, five queries": Case(length=5, slots=4096, lengths=(4096, 200), window=100),
    "pages": Case(slots=1024, lengths=(1024, 257), page=256),
    "pages and a window": Case(length=4, slots=1024, lengths=(1023, 255), page=512, window=77),
    "split over blocks": Case(heads=4, kv_heads=1, slots=65536, lengths=(65536,)),
    "four warpgroups": Case(lengths=(512, 129), config=DecodeConfig(128, 3, 4)),
    "one warpgroup": Case(lengths=(512, 129), config=DecodeConfig(128, 2, 1)),
    "long tiles": Case(lengths=(512, 129), config=DecodeConfig()),
    "enough sequences for every multiprocessor": Case(heads=32, kv_heads=8, lengths=tuple(range(440, 505))),
    "soft cap": Case(lengths=(512, 129), softcap=2.0),
    "soft cap, window, pages, three queries": Case(
        length=3, slots=1024, lengths=(1023, 255), page=512, window=77, softcap=1.0
    ),
    "sinks, an empty sequence": Case(lengths=(0, 300), sinks=True),
    "sinks, split over blocks": Case(heads=4, kv_heads=1, slots=65536, lengths=(65536,), sinks=True),
    "sinks, soft cap, head_dim 64, five queries": Case(
        length=5, heads=9, kv_heads=3, head_dim=64, lengths=(512, 77), window=128, softcap=3.0, sinks=True
    ),
    "soft cap, head_dim 256": Case(length=2, heads=16, kv_heads=2, head_dim=256, lengths=(512, 300), softcap=2.0),
}
PREFILL = {
    "one block": Case(128, 4, 1, slots=128, lengths=(128,), starts=(0,)),
    "ragged": Case(512, lengths=(512, 511), starts=(0, 0)),
    "chunk into a cache": Case(300, slots=1000, lengths=(1000, 129), starts=(700, 1), outliers=True),
    "a prompt of any length": Case(77, slots=77, lengths=(77, 30), starts=(0, 0)),
    "one query": Case(1, lengths=(512, 1), starts=(511, 0)),
    "not causal": Case(256, slots=640, lengths=(640, 1, 0), starts=(0, 0, 0), causal=False),
    "window": Case(512, slots=1024, lengths=(1024, 500), starts=(512, 0), window=100),
    "one kv head a query head": Case(256, 4, 4, slots=256, lengths=(256,), starts=(0,)),
    "head_dim 64": Case(512, 8, 8, 64, lengths=(512,), starts=(0,)),
    "head_dim 64, chunk": Case(300, 8, 2, 64, slots=1000, lengths=(1000, 129), starts=(700, 1), outliers=True),
    "head_dim 64, window": Case(512, 8, 2, 64, slots=1024, lengths=(1024, 500), starts=(512, 0), window=100),
    "head_dim 256": Case(300, 4, 1, 256, lengths=(500,), starts=(200,)),
    "head_dim 256, chunk": Case(300, 8, 2, 256, slots=1000, lengths=(1000, 129), starts=(700, 1), outliers=True),
    "head_dim 256, not causal": Case(256, 8, 2, 256, slots=640, lengths=(640, 1, 0), starts=(0, 0, 0), causal=False),
    "head_dim 256, window": Case(512, 8, 2, 256, slots=1024, lengths=(1024, 500), starts=(512, 0), window=100),
    "eight tiles, outliers": Case(128, slots=1024, lengths=(1024,), starts=(896,), outliers=True),
    "many tiles, outliers": Case(128, 4, 1, slots=16384, lengths=(16384,), starts=(16256,), outliers=True),
    "falling scores": Case(256, slots=1024, lengths=(1024,), starts=(768,), falling=0.8),
    "falling scores, pipeline 1": Case(
        256, slots=1024, lengths=(1024,), starts=(768,), falling=0.8, config=PrefillConfig(pipeline=1)
    ),
    "eight tiles": Case(128, slots=1024, lengths=(1024,), starts=(896,)),
    "slots not a multiple of the tile": Case(256, slots=1000, lengths=(1000, 300), starts=(744, 44)),
    "more blocks than multiprocessors": Case(512, 32, 8, lengths=(512, 0, 300), starts=(0, 0, 0)),
    "two stages": Case(512, lengths=(512, 511), starts=(0, 0), config=PrefillConfig(stages=2)),
    "pipeline 1": Case(512, lengths=(512, 511), starts=(0, 0), config=PrefillConfig(pipeline=1)),
    "pipeline 1, many tiles, outliers": Case(
        128, slots=1024, lengths=(1024,), starts=(896,), outliers=True, config=PrefillConfig(pipeline=1)
    ),
    "soft cap": Case(512, lengths=(512, 511), starts=(0, 0), softcap=2.0),
    "soft cap, head_dim 256": Case(300, 8, 2, 256, slots=1000, lengths=(1000, 129), starts=(700, 1), softcap=2.0),
    "sinks": Case(300, slots=1000, lengths=(1000, 129), starts=(700, 1), outliers=True, sinks=True),
    "sinks, empty sequences, not causal": Case(
        256, slots=640, lengths=(640, 1, 0), starts=(0, 0, 0), causal=False, sinks=True
    ),
    "sinks, falling scores": Case(256, slots=1024, lengths=(1024,), starts=(768,), falling=0.8, sinks=True),
    "sinks, soft cap, window, head_dim 64": Case(
        512, 8, 2, 64, slots=1024, lengths=(1024, 500), starts=(512, 0), window=128, softcap=3.0, sinks=True
    ),
    "sinks, pipeline 1": Case(512, lengths=(512, 511), starts=(0, 0), sinks=True, config=PrefillConfig(pipeline=1)),
}

# Attentions whose output is wanted in FP8, and how many kernels that takes.
FP8 = {
    "no split": (Case(), 2),
    "a few splits": (Case(heads=32, kv_heads=8, slots=4096, lengths=(4096,)), 2),
    "odd heads, three queries": (Case(length=3, heads=9, kv_heads=3, head_dim=64, slots=2048, lengths=(2048, 5)), 2),
    "many splits, for a cluster": (Case(heads=32, kv_heads=8, slots=16384, lengths=(16384,)), 2),
    "more splits than a thread holds": (Case(slots=65536, lengths=(65536,)), 3),
    "sinks, a few splits": (Case(heads=32, kv_heads=8, slots=4096, lengths=(4096,), sinks=True), 2),
}
# (batch, queries, heads, kv_heads, head_dim, splits)
SPLIT_SHAPES = [
    (1, 1, 32, 8, 128, 2),
    (2, 1, 32, 8, 128, 8),
    (3, 2, 5, 1, 64, 5),
    (2, 3, 9, 3, 64, 2),
    (2, 16, 8, 2, 256, 3),
    (1, 1, 128, 8, 128, 2),
]


# A row in one block, in clusters that it fills and, some of these, in clusters that have more threads than it needs.
COMBINE_CONFIGS = [
    None,
    row_quantize.Config(8),
    *(row_quantize.Config(n, c) for n, c in ((1, 8), (1, 4), (3, 2), (4, 8))),
]


@pytest.mark.gpu
@cases(DECODE)
def test_decode_kernel_is_as_near_to_float32_as_the_reference(case):
    query, key, value, start, lengths = operands(case)
    cache, table = (key, value), None
    if case.page is not None:
        *cache, table = pages(key, value, case.page)
    poison(query.values.shape)
    out = decode.decode_attention(
        query, *cache, query_start=start, kv_lengths=lengths, scale=case.scale, window=case.window, page_table=table,
        config=case.config, **case.softmax,
    )  # fmt: skip
    assert_near(out, query, key, value, start, lengths, case)


@pytest.mark.gpu
@cases(PREFILL)
def test_prefill_kernel_is_as_near_to_float32_as_the_reference(case):
    query, key, value, start, lengths = operands(case)
    poison(query.values.shape)
    out = prefill.prefill_attention(
        query, key, value, query_start=start, kv_lengths=lengths, scale=case.scale, causal=case.causal,
        window=case.window, config=case.config, **case.softmax,
    )  # fmt: skip
    assert_near(out, query, key, value, start, lengths, case)


@pytest.mark.gpu
def test_a_prompt_in_a_longer_cache_is_what_it_is_in_its_own():
    query, key, value, _, lengths = operands(Case(300, slots=1000, lengths=(300, 129)))
    options = {"query_start": None, "kv_lengths": lengths, "scale": 0.1, "implementation": "mosaic_gpu"}
    own = prefill_attention(query, *jax.tree.map(lambda x: x[:, :, :300], (key, value)), **options)
    np.testing.assert_array_equal(
        *(np.asarray(out, np.float32) for out in (prefill_attention(query, key, value, **options), own))
    )


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case, _ in FP8.values()], ids=FP8)
def test_fp8_output_is_the_bf16_one_quantized(case):
    query, key, value, start, lengths = operands(case)
    options = {"query_start": start, "kv_lengths": lengths, "scale": case.scale, **case.softmax}
    floats = decode.decode_attention(query, key, value, **options)
    expected = row_quantize.quantize_rows(floats.reshape(case.batch, case.length, -1))
    poison(expected.values.shape)
    assert_same_rows(decode.decode_attention(query, key, value, **options, out_dtype=formats.E4M3), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SPLIT_SHAPES)
@pytest.mark.parametrize("special", [None, 0.0, np.nan, np.inf, 1e38])
def test_combined_rows_are_quantized_as_the_format_does(shape, special):
    """One number of the first token in all splits, or (0) all of its numbers, are ``special``."""
    partials, expected = combined_and_quantized(shape, special)
    poison(expected.values.shape)
    assert_same_rows(row_quantize.combine_quantize(*partials, group=shape[2] // shape[3]), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SPLIT_SHAPES)
@pytest.mark.parametrize("config", COMBINE_CONFIGS)
def test_combined_rows_are_the_same_in_every_configuration(shape, config):
    partials, expected = combined_and_quantized(shape)
    poison(expected.values.shape)
    assert_same_rows(row_quantize.combine_quantize(*partials, group=shape[2] // shape[3], config=config), expected)


def combined_and_quantized(shape, special=None):
    """What ``splits_of`` leaves, and FP8 rows of its combination in bf16."""
    partials = splits_of(shape, special)
    batch, length, heads, _, head_dim, _ = shape
    out_type = jax.ShapeDtypeStruct((batch, length, heads, head_dim), jnp.bfloat16)
    combined = jax.jit(functools.partial(combine_splits, out_type=out_type))(*partials)
    # The reference on a CPU, whose reciprocals are exact.
    on_cpu = jnp.asarray(np.asarray(combined.reshape(batch, length, -1)), device=jax.devices("cpu")[0])
    return partials, jax.jit(formats.quantize_fp8)(on_cpu)


def splits_of(shape, special=None):
    """What decode attention leaves: the second of the splits has seen nothing."""
    batch, length, heads, kv_heads, head_dim, splits = shape
    keys = jax.random.split(jax.random.key(splits), 3)
    numbers = (batch, kv_heads, splits, length * heads // kv_heads)
    partial = 300 * rows(keys[0], (*numbers[:3], 1, numbers[3], head_dim), outliers=True)
    if special is not None:
        partial = partial.at[0, 0, :, 0, 0, 3].set(special)
    if special == 0:
        partial = partial.at[0, :, :, 0, : heads // kv_heads].set(0)
    row_max, row_sum = 3 * jax.random.normal(keys[1], numbers), jnp.exp(jax.random.normal(keys[2], numbers))
    return partial.at[:, :, 1].set(0), row_max.at[:, :, 1].set(-jnp.inf), row_sum.at[:, :, 1].set(0)


def assert_same_rows(actual, expected):
    for ours, wanted in zip(actual, expected, strict=True):
        assert ours.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(wanted, np.float32))


@pytest.mark.gpu
def test_auto_runs_the_kernels():
    case = Case(length=128, lengths=(512,))
    query, key, value, start, lengths = operands(case)
    options = {"query_start": start, "kv_lengths": lengths, "scale": case.scale}
    for op in (decode_attention, prefill_attention):
        automatic, named = (op(query, key, value, **options, implementation=name) for name in ("auto", "mosaic_gpu"))
        np.testing.assert_array_equal(np.asarray(automatic, np.float32), np.asarray(named, np.float32))


# --- lowering for CUDA, on any machine ------------------------------------------------------------


@cases(DECODE)
def test_decode_kernel_lowers_for_cuda(case):
    query, key, value, lengths = abstract_operands(case)
    table = None
    if case.page is not None:
        table = jax.ShapeDtypeStruct((case.batch, case.slots // case.page), jnp.int32)
        pages_shape = (case.batch * case.slots // case.page, case.kv_heads, case.page)
        key = value = abstract_cache(pages_shape, case.head_dim)

    @jax.jit
    def run(query, key, value, start, lengths, table):
        return decode.decode_attention(
            query, key, value, query_start=start, kv_lengths=lengths, scale=case.scale, window=case.window,
            page_table=table, config=case.config, **case.softmax,
        )  # fmt: skip

    exported = jax.export.export(run, platforms=["cuda"])(query, key, value, lengths, lengths, table)
    assert exported.out_avals[0].shape == query.values.shape


@pytest.mark.parametrize(("case", "kernels"), FP8.values(), ids=FP8)
def test_fp8_output_lowers_for_cuda(case, kernels):
    """One kernel less than attention, combination and quantization, unless a block would read too much."""
    query, key, value, lengths = abstract_operands(case)

    @jax.jit
    def run(query, key, value, start, lengths):
        return decode.decode_attention(
            query,
            key,
            value,
            query_start=start,
            kv_lengths=lengths,
            scale=case.scale,
            out_dtype=formats.E4M3,
            **case.softmax,
        )

    exported = jax.export.export(run, platforms=["cuda"])(query, key, value, lengths, lengths)
    values, scale = exported.out_avals
    rows = (case.batch, case.length)
    assert (values.shape, values.dtype) == ((*rows, case.heads * case.head_dim), formats.E4M3)
    assert (scale.shape, scale.dtype) == ((*rows, 1), jnp.float32)
    assert exported.mlir_module().count("stablehlo.custom_call @mosaic_gpu") == kernels


@pytest.mark.parametrize("shape", SPLIT_SHAPES)
@pytest.mark.parametrize("config", COMBINE_CONFIGS)
def test_combination_in_fp8_lowers_for_cuda(shape, config):
    batch, length, heads, kv_heads, head_dim, _ = shape
    run = jax.jit(functools.partial(row_quantize.combine_quantize, group=heads // kv_heads, config=config))
    exported = jax.export.export(run, platforms=["cuda"])(*jax.eval_shape(lambda: splits_of(shape)))
    assert [aval.shape for aval in exported.out_avals] == [(batch, length, heads * head_dim), (batch, length, 1)]


@cases(PREFILL)
def test_prefill_kernel_lowers_for_cuda(case):
    query, key, value, lengths = abstract_operands(case)

    @jax.jit
    def run(query, key, value, start, lengths):
        return prefill.prefill_attention(
            query, key, value, query_start=start, kv_lengths=lengths, scale=case.scale, causal=case.causal,
            window=case.window, config=case.config, **case.softmax,
        )  # fmt: skip

    exported = jax.export.export(run, platforms=["cuda"])(query, key, value, lengths, lengths)
    assert exported.out_avals[0].shape == query.values.shape


def abstract_operands(case: Case):
    shape = (case.batch, case.length, case.heads, case.head_dim)
    query = ScaledArray(
        jax.ShapeDtypeStruct(shape, formats.E4M3), jax.ShapeDtypeStruct((*shape[:-1], 1), jnp.float32)
    )  # fmt: skip
    cache = abstract_cache((case.batch, case.kv_heads, case.slots), case.head_dim)
    return query, cache, cache, jax.ShapeDtypeStruct((case.batch,), jnp.int32)


def abstract_cache(shape: tuple[int, ...], head_dim: int) -> ScaledArray:
    return ScaledArray(
        jax.ShapeDtypeStruct((*shape, head_dim // 2), jnp.uint8),
        jax.ShapeDtypeStruct((*shape, 1), jnp.bfloat16),
        "int4",
    )


# --- host code ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "slots"), [(8, 65536), (128, 4096), (512, 16384), (160, 4096), (1, 128), (3, 1)])
def test_splits_occupy_the_device(rows, slots):
    config = DecodeConfig()
    splits = config.splits(rows, slots)
    most = max(1, -(-slots // (config.block_kv * config.warpgroups)))
    assert 1 <= splits <= most
    waves = -(-rows * splits // NUM_SMS)
    assert splits == most or rows * splits >= 0.9 * waves * NUM_SMS


@pytest.mark.parametrize("blocks", [1, 131, 132, 133, 300, 4096])
@pytest.mark.parametrize("shift", [0, 1, 7])
def test_prefill_visits_every_block_of_queries_once(blocks, shift):
    schedule = Schedule(blocks, min(NUM_SMS, blocks), shift)
    assert sorted(np.concatenate(list(visited(schedule)))) == list(range(blocks))


@pytest.mark.parametrize(
    ("batch", "length", "most"),
    [(16, 1024, 1.01), (8, 2048, 1.01), (4, 4096, 1.01), (1, 16384, 1.01), (1, 1024, 1.035)],
)
def test_prefill_gives_all_thread_blocks_as_many_keys(batch, length, most):
    """Causal, 32 heads. With all rows of blocks in one direction, one has 1.03 times its share, and 1.3 of the last."""
    row_blocks = length // 128
    costs = row_blocks - np.arange(row_blocks * batch * 32) // (batch * 32) + 1.25
    shares = [costs[indices].sum() for indices in visited(causal_schedule(row_blocks, batch * 32, NUM_SMS))]
    assert max(shares) <= most * np.mean(shares)


def visited(schedule: Schedule):
    """Indices of the blocks that each thread block visits."""
    for cta in range(schedule.ctas):
        yield np.asarray(schedule.visited(jnp.int32(cta), jnp.arange(int(schedule.visits(jnp.int32(cta))))))


@pytest.mark.parametrize(("blocks", "splits"), [(8, 9), (64, 8), (128, 1), (256, 1), (512, 1), (2048, 1)])
def test_short_sequences_are_split_only_until_every_multiprocessor_has_its_blocks(blocks, splits):
    config = default_decode_config(128, 8, blocks, 1088)
    assert config.block_kv == 128
    assert config.splits(blocks, 1088) == splits
    assert blocks * splits * config.warpgroups >= min(0.9 * 3 * NUM_SMS, blocks * 9)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(DecodeConfig, block_kv=64),
        functools.partial(DecodeConfig, stages=1),
        functools.partial(DecodeConfig, warpgroups=5),
        functools.partial(DecodeConfig, residents=0),
        functools.partial(PrefillConfig, block_kv=96),
        functools.partial(PrefillConfig, block_kv=64),
        functools.partial(PrefillConfig, stages=1),
        functools.partial(PrefillConfig, pipeline=3),
    ],
)
def test_configs_quote_what_is_wrong(make):
    (name, value), *_ = make.keywords.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        make()


def test_only_slots_that_are_seen_are_prepared():
    _, key, value, lengths = abstract_operands(Case(slots=1000))
    for slots, columns in ((None, 1024), (300, 384)):
        preparation = functools.partial(prepare, slots=slots)
        assert {
            x.shape[axis] for x, axis in zip(jax.eval_shape(preparation, key, value, lengths), (2, 3, 3), strict=True)
        } == {columns}


def test_a_kernel_wants_what_was_prepared_for_it():
    """The denominators' columns of V, and a head_dim for which there are registers."""

    def run(head_dim: int, prepared: PrefillConfig, config: PrefillConfig):
        query, cache, _, lengths = abstract_operands(Case(128, head_dim=head_dim))

        def attend(q, q_scale, key, value, lengths):
            operands = prepare(key, value, lengths, prepared)
            return prefill.launch(
                q, q_scale[..., 0], *operands, lengths, lengths, scale=0.1, causal=True, window=None,
                out_dtype=jnp.bfloat16, config=config,
            )  # fmt: skip

        jax.eval_shape(attend, query.values, query.scale, cache, cache, lengths)

    one_by_one = PrefillConfig(pipeline=1)
    run(128, one_by_one, one_by_one)
    with pytest.raises(ValueError, match="v has 128 rows; expected 136"):
        run(128, one_by_one, PrefillConfig())
    with pytest.raises(ValueError, match="v has 136 rows; expected 128"):
        run(128, PrefillConfig(), one_by_one)
    with pytest.raises(ValueError, match="head_dim is 256"):
        run(256, PrefillConfig(), PrefillConfig())


def test_unsupported_operands_have_a_reason():
    query, key, value, *_ = operands(Case())
    assert decode_unsupported(query, key, value) is None
    assert prefill_unsupported(query, key, value, 0.1, jnp.bfloat16) is None
    table = jnp.zeros((1, 1), jnp.int32)
    short = dataclasses.replace(key, values=key.values[:, :, :4])
    assert "4 slots" in str(decode_unsupported(query, short, value))
    assert prefill_unsupported(query, short, value, 0.1, jnp.bfloat16) is None
    assert "page" in str(
        decode_unsupported(query, dataclasses.replace(key, values=key.values[:, :, :128]), value, table)
    )
    assert "E4M3" in str(decode_unsupported(ScaledArray(formats.dequantize(query), None, "none"), key, value))
    for scale in (query.scale.astype(jnp.bfloat16), jnp.tile(query.scale, (1, 1, 1, 2)), query.scale[:, :, :1]):
        assert "not one float32 a token" in str(decode_unsupported(ScaledArray(query.values, scale), key, value))
    empty = jax.tree.map(lambda x: x[:, :0], query)
    assert "nothing to attend to" in str(decode_unsupported(empty, key, value))
    fp8 = formats.quantize_kv(formats.dequantize(key), "fp8")
    assert "INT4" in str(decode_unsupported(query, fp8, fp8))
    grouped = formats.quantize_kv(formats.dequantize(key), "int4", group_size=64)
    assert "scales" in str(decode_unsupported(query, grouped, grouped))
    assert "scale is -1" in str(prefill_unsupported(query, key, value, -1.0, jnp.bfloat16))
    assert "float32" in str(prefill_unsupported(query, key, value, 0.1, jnp.float32))


@pytest.mark.parametrize("op", [decode_attention, prefill_attention])
def test_a_named_kernel_never_falls_back(op):
    query, key, value, start, lengths = operands(Case())
    plain = ScaledArray(formats.dequantize(query), None, "none")
    with pytest.raises(NotImplementedError, match="not E4M3"):
        op(plain, key, value, query_start=start, kv_lengths=lengths, scale=0.1, implementation="mosaic_gpu")


def test_paged_reference_is_the_consecutive_one():
    case = Case(slots=512, lengths=(512, 257))
    query, key, value, start, lengths = operands(case)
    options = {"query_start": start, "kv_lengths": lengths, "scale": case.scale, "implementation": "xla"}
    *paged, table = pages(key, value, 256)
    gathered = gather_pages(*paged, table)
    np.testing.assert_array_equal(gathered[0].values, key.values)
    np.testing.assert_array_equal(
        np.asarray(decode_attention(query, *paged, page_table=table, **options), np.float32),
        np.asarray(decode_attention(query, key, value, **options), np.float32),
    )
