"""Warnings are errors where this project's code is warned, and nobody else's."""

import warnings

import pytest

from fireq_jax import json_files


def warned_in(module):
    """Call a deprecated function from a module."""
    names = {"__name__": module, "deprecated": lambda: warnings.warn("old", DeprecationWarning, stacklevel=2)}
    exec("deprecated()", names)


@pytest.mark.parametrize("module", [json_files.__name__, "pallas_kernels", "checkpoints_convert.conversion", __name__])
def test_a_warning_of_our_code_is_an_error(module):
    with pytest.raises(DeprecationWarning, match="old"):
        warned_in(module)


@pytest.mark.filterwarnings("ignore:old")
def test_a_warning_of_other_code_is_none():
    warned_in("pytest_plugin")
