"""Where processes keep compiled programs, and that lowered ones are made once."""

import os
import stat
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireq_jax import LlamaForCausalLM, ModelConfig, compilation, generate, recipes
from fireq_jax.compilation import cached_export, keep_programs
from fireq_jax.quantization import QuantizationConfig

OPTIONS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache"


@pytest.fixture(autouse=True)
def unset() -> Iterator[None]:
    before = {name: jax.config.values[name] for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "default_device", lambda: types.SimpleNamespace(platform="gpu"))


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    compilation._warn.cache_clear()
    return tmp_path / "home"


@pytest.mark.parametrize("variable", [None, "", "elsewhere"])
def test_a_gpu_keeps_programs_where_only_this_user_looks(on_gpu, monkeypatch, home, tmp_path, variable):
    if variable is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", variable and str(tmp_path / variable))
    keep_programs()
    expected = (tmp_path / variable if variable else home / ".cache") / "fireq-jax"
    assert jax.config.values["jax_compilation_cache_dir"] == str(expected)
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0.0
    assert stat.S_IMODE(expected.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_left_alone(on_gpu, home, caplog, mode):
    cache = home / ".cache" / "fireq-jax"
    cache.mkdir(parents=True)
    cache.chmod(mode)
    for _ in range(2):
        keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    [message] = caplog.messages
    assert f"{cache} can be written to by others (mode {mode:04o}; expected 0700)" in message


def test_a_folder_of_another_user_is_left_alone(on_gpu, home, caplog, monkeypatch):
    (home / ".cache" / "fireq-jax").mkdir(parents=True)
    owner = (home / ".cache" / "fireq-jax").stat()
    monkeypatch.setattr(Path, "stat", lambda self, **_: os.stat_result((*owner[:4], 4321, *owner[5:])))
    assert not compilation._is_private(home / ".cache" / "fireq-jax")
    assert "belongs to user 4321" in caplog.text


def test_a_cache_that_cannot_be_made_is_said(on_gpu, home, caplog):
    home.write_text("a file")
    keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    assert "compiled programs cannot be kept" in caplog.text


def test_a_configured_folder_stays(on_gpu):
    jax.config.update("jax_compilation_cache_dir", "/mine")
    keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == "/mine"


def test_a_cpu_s_programs_are_for_those_with_its_instructions(monkeypatch, home):
    """A home folder may be on several machines."""
    monkeypatch.setattr(compilation, "default_device", lambda: types.SimpleNamespace(platform="cpu"))
    folders, (cache, listed) = set(), (home / ".cache" / "fireq-jax", Path.read_text)
    for features in ("avx2", "avx2 avx512f", "avx2"):
        cpu = f"model name: some\nflags\t\t: {features}\n"
        monkeypatch.setattr(Path, "read_text", lambda self, cpu=cpu: cpu if self.name == "cpuinfo" else listed(self))
        jax.config.update("jax_compilation_cache_dir", None)
        keep_programs()
        folders.add(Path(jax.config.values["jax_compilation_cache_dir"]))
    assert {folder.parent for folder in folders} == {cache}
    assert len(folders) == 2
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (cache, *folders)} == {0o700}
    cache.chmod(0o777)
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of lowered programs."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    return tmp_path / "lowered"


class Double:
    """A function that counts how often it is traced; after ``jax.clear_caches`` it is called as in a new process."""

    def __init__(self, code=lambda x: 2 * x) -> None:
        self.code, self.traced = code, 0

    def __call__(self, x, static=("a", 1)):
        @cached_export("static")
        def double(x, static):
            self.traced += 1
            return {"result": self.code(x)}

        return jax.jit(double, static_argnames="static")(x, static)["result"]


def test_a_lowered_program_is_made_once(folder):
    double = Double()
    for _ in range(2):  # processes
        np.testing.assert_array_equal(double(jnp.arange(3)), [0, 2, 4])
        jax.clear_caches()
    assert double.traced == 1
    assert [file.name.split("-")[0] for file in folder.iterdir()] == ["double"]


def test_a_lowered_program_is_not_read_where_others_write(folder, caplog):
    double = Double()
    double(jnp.arange(3))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    jax.clear_caches()
    np.testing.assert_array_equal(double(jnp.arange(3)), [0, 2, 4])
    assert double.traced == 2
    assert f"{folder} can be written to by others" in caplog.text


def test_another_program_is_not_mistaken_for_it(folder, monkeypatch):
    double = Double()
    double(jnp.arange(3))
    double(jnp.arange(4))
    double(jnp.arange(3.0))
    double(jnp.arange(3), static=("a", 2))
    with jax.default_matmul_precision("highest"):
        double(jnp.arange(3))
    monkeypatch.setattr(compilation, "_sources", lambda: "other code")
    double(jnp.arange(3))
    assert double.traced == len(list(folder.iterdir())) == 6


def test_code_is_part_of_the_name(tmp_path, monkeypatch):
    digests = []
    for code in ("x = 1", "x = 2"):
        for package in ("fireq_jax", "pallas_kernels"):
            (tmp_path / package).mkdir(exist_ok=True)
            (tmp_path / package / "module.py").write_text(code)
        monkeypatch.setattr(compilation, "__file__", str(tmp_path / "fireq_jax" / "compilation.py"))
        digests.append(compilation._sources.__wrapped__())
    assert digests[0] != digests[1]


def test_what_cannot_be_exported_runs_all_the_same(folder, caplog):
    seen = []
    double = Double(lambda x: jax.pure_callback(lambda y: seen.append(1) or 2 * y, x, x))
    with caplog.at_level("INFO"):
        np.testing.assert_array_equal(double(jnp.arange(3)), [0, 2, 4])
    assert seen
    assert not folder.exists()
    assert "double is lowered by each process anew" in caplog.text


def test_what_is_given_functions_is_traced_by_each_process(folder, caplog):
    """Their code may change, and their names say nothing of it."""
    double = Double()
    with caplog.at_level("INFO"):
        assert double(3, static=("a", (abs,))) == 6
    assert "double is lowered by each process anew: the code of <built-in function abs> may change" in caplog.messages
    assert not folder.exists()


def test_a_broken_file_is_made_again(folder, caplog):
    double = Double()
    double(jnp.arange(3))
    [file] = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    jax.clear_caches()
    np.testing.assert_array_equal(double(jnp.arange(3)), [0, 2, 4])
    assert f"{file} cannot be read" in caplog.text
    assert len(file.read_bytes()) == len(whole)


@pytest.mark.parametrize(
    "setting", [("jax_compilation_cache_dir", "gs://bucket"), ("jax_enable_compilation_cache", False)]
)
def test_without_a_folder_nothing_is_kept(folder, setting):
    name, value = setting
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        assert compilation._folder() is None
    finally:
        jax.config.update(name, before)


def small_model(quantization: QuantizationConfig, cls: type[LlamaForCausalLM] = LlamaForCausalLM) -> LlamaForCausalLM:
    config = ModelConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16
    )
    return cls(config, quantization)


def test_a_model_with_code_of_its_own_is_traced_by_each_process(folder, caplog):
    class Own(LlamaForCausalLM):
        pass

    with caplog.at_level("INFO"):
        assert len(generate(small_model(recipes.none(), Own), [[5, 6, 7]], max_new_tokens=2).sequences[0]) == 5
    assert not folder.exists()
    assert "Own" in caplog.text


def test_generation_is_that_of_another_process_without_its_model_code(folder, monkeypatch):
    model = small_model(recipes.fireq())
    options = {"temperature": 0.9, "top_k": 5, "key": jax.random.key(7), "repetition_penalty": 1.2}

    def tokens() -> list[list[int]]:
        return generate(model, [[5, 6, 7], [8, 9, 10]], max_new_tokens=6, **options).sequences.tolist()

    jax.config.update("jax_enable_compilation_cache", False)
    expected = tokens()
    jax.config.update("jax_enable_compilation_cache", True)
    jax.clear_caches()
    assert tokens() == expected
    assert sorted(file.name.split("-")[0] for file in folder.iterdir()) == ["decode", "prefill"]
    jax.clear_caches()

    def forbidden(*_, **__):
        raise AssertionError("the model is traced")

    monkeypatch.setattr(LlamaForCausalLM, "_forward", forbidden)
    assert tokens() == expected
