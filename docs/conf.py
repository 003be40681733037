"""How Sphinx builds the documents: ``sphinx-build -W -b html docs docs/_build/html``."""

import os
import re
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx

project = "fireq-jax"
author = "the fireq-jax authors"
release = version = metadata.version("fireq-jax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "measurements/README.md"]

html_theme = "furo"
html_title = f"fireq-jax {release}"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Notebooks run on the embedded model, once a build; an error in one is an error of the build.
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_display_short_literal_types = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
# What "Attributes" describes are fields, which autodoc would list a second time.
napoleon_use_ivar = True

# Notebooks find the embedded model, and what one has compiled no other compiles again.
os.environ["FIREQ_EXAMPLES"] = str(Path(__file__).parents[1] / "examples")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / "_build" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _as_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Shapes such as [*rows, K] and magnitudes such as |q| are text in docstrings, not reStructuredText's marks."""
    parts = re.split(r"(``.*?``|:\w+:`.*?`)", "\n".join(lines), flags=re.DOTALL)
    parts[::2] = [re.sub(r"(?<!\\)[*|]", r"\\\g<0>", part) for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")


def _short_arrays(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """``Float[Array, "B T"]`` as it is written in the code."""
    return tuple(text and text.replace("jaxlib._jax.Array", "Array") for text in (signature, returned))


def setup(app: Sphinx) -> None:
    """Docstrings before napoleon takes them apart."""
    app.connect("autodoc-process-signature", _short_arrays)
    app.connect("autodoc-process-docstring", _as_text, priority=400)
