"""The version of this project that is installed."""

from importlib import metadata


def _installed() -> str:
    try:
        return metadata.version("fireq-jax")
    except metadata.PackageNotFoundError:  # a checkout on the path
        return "0+unknown"


__version__ = _installed()
