"""The two ways in which data fails: it is wrong, or it cannot be fetched."""


class DataError(ValueError):
    """A file or a set of texts that cannot be used as it is. The message says where and why."""


class NetworkNeeded(RuntimeError):
    """A named data set that is neither in the cache nor reachable."""
