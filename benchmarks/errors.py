"""What the benchmarks raise where the command line should say it in a line."""


class BenchmarkError(ValueError):
    """Something asked for that cannot be measured."""
