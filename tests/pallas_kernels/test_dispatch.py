"""Which implementation runs: "auto" may fall back and says why once, a named one never does."""

import logging
from types import SimpleNamespace

import jax
import pytest

from pallas_kernels import dispatch, jax_compat


@pytest.fixture(autouse=True)
def _fresh_caches():
    """Each reason is logged once a process; here once a test."""
    for once in (dispatch._log_fallback, dispatch._warn_once):
        once.cache_clear()
    yield
    for once in (dispatch._log_fallback, dispatch._warn_once):
        once.cache_clear()


@pytest.fixture
def device(monkeypatch):
    """Pretend that JAX's first device is another."""

    def pretend(**attributes):
        monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(**attributes)])

    return pretend


HOPPER = {"platform": "gpu", "compute_capability": "9.0"}


def test_auto_takes_the_kernel_on_hopper_if_it_can_run(device):
    device(**HOPPER)
    assert dispatch.resolve("op", "auto", None) == "mosaic_gpu"
    assert dispatch.resolve("op", "mosaic_gpu", None) == "mosaic_gpu"
    assert dispatch.resolve("op", "auto", "K is odd") == "xla"


@pytest.mark.parametrize("slow", ["take jax<0.12", None])
def test_a_jax_whose_kernels_are_slow_is_named_once(device, monkeypatch, caplog, slow):
    device(**HOPPER)
    monkeypatch.setattr(jax_compat, "SLOW_KERNELS", slow)
    for op in ("one", "other"):
        assert dispatch.resolve(op, "auto", None) == "mosaic_gpu"
    assert caplog.messages == ([] if slow is None else [slow])


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"platform": "cpu"}, "'cpu'"),
        ({"platform": "gpu", "compute_capability": "8.9"}, "8.9"),
        ({"platform": "gpu", "compute_capability": "10.0"}, "10.0"),
        ({"platform": "gpu"}, "unknown"),
    ],
)
def test_elsewhere_auto_falls_back_and_a_named_kernel_refuses(device, attributes, reason):
    device(**attributes)
    assert dispatch.resolve("op", "auto", None) == "xla"
    with pytest.raises(NotImplementedError, match=f"op.*{reason}"):
        dispatch.resolve("op", "mosaic_gpu", None)


@pytest.mark.parametrize("chosen", ["cpu", jax.devices("cpu")[-1]], ids=["name", "device"])
def test_a_default_device_of_the_caller_counts(monkeypatch, chosen):
    hopper, cpu = SimpleNamespace(**HOPPER), jax.devices("cpu")[-1]
    monkeypatch.setattr(jax, "devices", lambda *backend: [cpu] if backend == ("cpu",) else [hopper])
    assert dispatch.default_device() is hopper
    with jax.default_device(chosen):
        assert dispatch.default_device() is cpu
        assert dispatch.resolve("op", "auto", None) == "xla"
    assert dispatch.resolve("op", "auto", None) == "mosaic_gpu"


@pytest.mark.parametrize(
    ("text", "numbers"), [("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx90a", ()), ("unknown", ()), (None, ())]
)
def test_capability(device, text, numbers):
    device(platform="gpu", **({} if text is None else {"compute_capability": text}))
    assert dispatch.compute_capability() == numbers


def test_a_named_kernel_says_what_it_cannot_run(device):
    device(**HOPPER)
    with pytest.raises(NotImplementedError, match=r"op.*K is odd"):
        dispatch.resolve("op", "mosaic_gpu", "K is odd")


def test_the_reason_is_logged_once_for_each_op(device, caplog):
    device(platform="cpu")
    with caplog.at_level(logging.INFO, logger=dispatch.logger.name):
        for op in ("first", "first", "second"):
            dispatch.resolve(op, "auto", None)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["first", "second"]
    assert "'cpu'" in caplog.text


def test_xla_is_never_logged_and_asks_for_no_device(monkeypatch, caplog):
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("asked for devices"))
    with caplog.at_level(logging.INFO):
        assert dispatch.resolve("op", "xla", "no kernel") == "xla"
    assert not caplog.records


def test_unknown_implementation():
    with pytest.raises(ValueError, match=r"'cuda'.*mosaic_gpu"):
        dispatch.resolve("op", "cuda", None)
