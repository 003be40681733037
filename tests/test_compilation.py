"""Where commands keep compiled programs."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from fireq_jax.compilation import keep_programs

OPTIONS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture(autouse=True)
def unset() -> Iterator[None]:
    before = {name: jax.config.values[name] for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize("variable", [None, "", "/somewhere/else"])
def test_a_gpu_keeps_programs(on_gpu, monkeypatch, variable):
    if variable is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", variable)
    keep_programs()
    expected = Path(variable) if variable else Path.home() / ".cache"
    assert jax.config.values["jax_compilation_cache_dir"] == str(expected / "fireq-jax")
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0.0


def test_a_configured_folder_stays(on_gpu):
    jax.config.update("jax_compilation_cache_dir", "/mine")
    keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == "/mine"


def test_a_cpu_keeps_none(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None
