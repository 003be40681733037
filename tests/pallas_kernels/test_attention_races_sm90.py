"""The attention kernels in Pallas' GPU interpreter: their numbers, and that nothing is read or written too early."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from attention_cases import Case, assert_near, cases, operands, pages
from interpreted import interpreted, needs_interpreter, prepared

from pallas_kernels.sm90.decode_attention import launch as decode
from pallas_kernels.sm90.decode_attention.config import Config as DecodeConfig
from pallas_kernels.sm90.prefill_attention import launch as prefill
from pallas_kernels.sm90.prefill_attention.config import Config as PrefillConfig
from pallas_kernels.sm90.prefill_attention.config import default_config
from pallas_kernels.sm90.prefill_attention.mainloop import Tiles

PREFILL = {
    "more tiles than stages": Case(128, 2, 1, 64, slots=640, lengths=(640,), starts=(512,)),
    "ragged, and an empty one": Case(256, 1, 1, 64, slots=256, lengths=(256, 130, 0), starts=(0, 0, 0)),
    "chunk into a cache": Case(192, 1, 1, 64, slots=600, lengths=(600, 200), starts=(408, 8), outliers=True),
    "any length": Case(77, 2, 2, 64, slots=77, lengths=(77,), starts=(0,)),
    "not causal": Case(128, 1, 1, 64, slots=300, lengths=(300, 1), starts=(0, 0), causal=False),
    "window": Case(256, 1, 1, 64, slots=512, lengths=(512,), starts=(256,), window=100),
    "falling scores": Case(128, 1, 1, 64, slots=640, lengths=(640,), starts=(512,), falling=0.8),
    "head_dim 128": Case(128, 2, 1, 128, slots=512, lengths=(512,), starts=(384,)),
    "two stages": Case(128, 1, 1, 64, slots=640, lengths=(640,), starts=(512,), config=PrefillConfig(stages=2)),
    "soft cap, sinks": Case(128, 2, 1, 64, slots=512, lengths=(512,), starts=(384,), softcap=2.0, sinks=True),
    "pipeline 1, head_dim 256, sinks": Case(128, 1, 1, 256, slots=256, lengths=(256,), starts=(128,), sinks=True),
}


def run_prefill(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one multiprocessor, so that blocks of queries follow one another."""
    query, key, value, start, lengths = operands(case)
    config = case.config or default_config(case.head_dim)
    monkeypatch.setattr(prefill, "NUM_SMS", 1)
    arrays = prepared(key, value, lengths, sum_columns=config.sum_columns)
    values = jnp.pad(query.values, ((0, 0), (0, -case.length % 8), (0, 0), (0, 0)))
    with interpreted(monkeypatch):
        out = prefill.launch(
            values, query.scale[..., 0], *arrays, start, lengths, scale=case.scale, causal=case.causal,
            window=case.window, out_dtype=jnp.bfloat16, config=config, **case.softmax,
        ).block_until_ready()  # fmt: skip
    assert_near(out[:, : case.length], query, key, value, start, lengths, case)


@needs_interpreter
@cases(PREFILL)
def test_prefill_has_no_race(case, monkeypatch):
    run_prefill(case, monkeypatch)


def without_waiting(monkeypatch):
    """Tiles are read although they may not have arrived."""
    monkeypatch.setattr(Tiles, "wait", lambda tiles, tile: None)


def released_early(monkeypatch):
    """A tile is given back when its scores have been started."""
    release, start = Tiles.release, Tiles.start_scores

    def start_and_release(tiles, tile):
        release(tiles, tile)
        return start(tiles, tile)

    monkeypatch.setattr(Tiles, "start_scores", start_and_release)
    monkeypatch.setattr(Tiles, "release", lambda tiles, tile: None)


def not_committed(monkeypatch):
    """TMA reads an output that threads have written without a fence."""
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)


@needs_interpreter
@pytest.mark.parametrize("break_it", [without_waiting, released_early, not_committed])
def test_a_race_would_be_seen(break_it, monkeypatch):
    break_it(monkeypatch)
    with pytest.raises(Exception, match="RACE DETECTED"):
        run_prefill(PREFILL["more tiles than stages"], monkeypatch)


THREE = DecodeConfig(block_kv=128, warpgroups=3)
DECODE = {
    "one token": Case(1, 4, 1, 64, slots=1024, lengths=(1024, 130), config=THREE),
    "an empty sequence, a window and sinks": Case(
        2, 4, 2, 64, slots=512, lengths=(0, 300), window=150, config=THREE, sinks=True
    ),
    "pages": Case(1, 2, 1, 64, slots=512, lengths=(512, 257), page=256, config=THREE),
    "split over blocks": Case(1, 4, 1, 64, slots=1024, lengths=(1024,), config=DecodeConfig(128, 2, 2, 4)),
    "head_dim 128, 16 queries": Case(16, 2, 1, 128, slots=512, lengths=(500,)),
    "soft cap, sinks, split over blocks": Case(
        1, 4, 1, 64, slots=1024, lengths=(1024,), softcap=2.0, sinks=True, config=DecodeConfig(128, 2, 2, 4)
    ),
}


def run_decode(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, start, lengths = operands(case)
    *cache, table = pages(key, value, case.page) if case.page else (key, value, None)
    with interpreted(monkeypatch):
        # Not what jit keeps, which another test would find.
        out = decode.decode_attention.__wrapped__(
            query, *cache, query_start=start, kv_lengths=lengths, scale=case.scale, window=case.window,
            page_table=table, config=case.config, **case.softmax,
        ).block_until_ready()  # fmt: skip
    assert_near(out, query, key, value, start, lengths, case)


@needs_interpreter
@cases(DECODE)
def test_decode_has_no_race(case, monkeypatch):
    run_decode(case, monkeypatch)


@needs_interpreter
def test_a_race_of_decode_would_be_seen(monkeypatch):
    """Warpgroups wait for tiles alone, not for the queries or one another's results."""
    wait = plgpu.barrier_wait
    # Tiles' barriers are many, and so come with an index.
    monkeypatch.setattr(
        plgpu, "barrier_wait", lambda barrier: wait(barrier) if hasattr(barrier, "transforms") else None
    )
    with pytest.raises(Exception, match="RACE DETECTED"):
        run_decode(DECODE["one token"], monkeypatch)
