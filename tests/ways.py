"""Attention by every way that it can take: short rows go to torch's kernel as well."""

from unittest.mock import patch

import stabletx
from stabletx.functional import _kernels

METHODS = ("auto", "kernel", "tiled", "exact")


def attention(*args, **options):
    """Attend as stabletx does; "kernel" is "auto" with no row short enough for plain products."""
    return _by(stabletx.attention, args, options)


def attention_details(*args, **options):
    """Attend and say what happened, by the same ways."""
    return _by(stabletx.attention_details, args, options)


def _by(function, args, options):
    if options.get("method") != "kernel":
        return function(*args, **options)
    with patch.object(_kernels, "takes_products", lambda n_queries, n_keys: False):
        return function(*args, **options | {"method": "auto"})
