"""What the benchmarks share: programs compiled side by side, measurements one at a time."""

import fcntl
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FILE = Path(__file__).parent.parent / "examples" / "benchmarks" / "timing.py"


@pytest.fixture
def timing(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("benchmark_timing", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_LOCK", tmp_path / "lock")
    return module


def is_free(timing, operation):
    """Whether another process could take the lock."""
    with timing._LOCK.open("w") as file:
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_programs_keep_their_keys_and_take_shapes(timing):
    functions = {"double": jax.jit(lambda x: 2 * x), ("add", 1): jax.jit(lambda x: x + 1)}
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    programs = timing.compile_all({key: (function, (shape,)) for key, function in functions.items()})
    assert list(programs) == list(functions)
    np.testing.assert_array_equal(programs["double"](jnp.arange(3.0)), [0, 2, 4])
    np.testing.assert_array_equal(programs["add", 1](jnp.arange(3.0)), [1, 2, 3])


def test_a_measurement_is_alone(timing):
    with timing.alone():
        assert not is_free(timing, fcntl.LOCK_SH)
        assert not is_free(timing, fcntl.LOCK_EX)
    assert is_free(timing, fcntl.LOCK_EX)


def test_others_compile_but_do_not_measure_while_one_compiles(timing):
    found = {}

    def traced(x):
        found.update({operation: is_free(timing, operation) for operation in (fcntl.LOCK_SH, fcntl.LOCK_EX)})
        return x

    timing.compile_all({0: (jax.jit(traced), (jnp.ones(3),))})
    assert found == {fcntl.LOCK_SH: True, fcntl.LOCK_EX: False}
