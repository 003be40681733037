"""The import of transformers, which says that it found no PyTorch: tokenizers, all that is used of it, need none."""

import logging
from types import ModuleType


def import_transformers() -> ModuleType:
    """The package, without that line on stderr. The import takes seconds, so call this where there is text."""
    logger = logging.getLogger("transformers")
    logger.addFilter(_needed)
    try:
        import transformers
    finally:
        logger.removeFilter(_needed)
    return transformers


def _needed(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("PyTorch was not found")
