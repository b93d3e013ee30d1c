"""The ways in which data fails: it is wrong, it cannot be fetched, or a package is missing."""

import importlib
from typing import Any

from stabletx._checks import must


class DataError(ValueError):
    """A file or a set of texts that cannot be used as it is. The message says where and why."""


class NetworkNeeded(RuntimeError):
    """A named data set that is neither in the cache nor reachable."""


def optional(package: str) -> Any:
    """Import a package of the ``text`` extra, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        instead = 'Install it with: pip install "stabletx[text]".'
        raise ImportError(
            must(package, "be installed", f"no such package ({error})", instead)
        ) from error
