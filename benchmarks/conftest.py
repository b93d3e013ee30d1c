"""Options of ``python3 -m pytest benchmarks``, and one test a workload and contestant."""

from __future__ import annotations

import pytest
import torch

from benchmarks.contest import BenchmarkError, Settings
from benchmarks.parts import PARTS, chosen_cases

LONGEST = 3600  # seconds; the longest workload takes minutes on two threads


def pytest_addoption(parser):
    group = parser.getgroup("stabletx benchmarks")
    group.addoption(
        "--part", action="append", default=[], metavar="PART", help=f"one of {', '.join(PARTS)}"
    )
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure")
    group.addoption("--threads", type=int, default=None, help="of every contestant")
    group.addoption("--rounds", type=int, default=9, help="turns of each contestant")
    group.addoption("--quick", action="store_true", help="the smallest sizes, to see that all run")


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            "pytest-benchmark must be installed, got none. Run: pip install pytest-benchmark"
        )
    for name in ("threads", "rounds"):
        value = config.getoption(f"--{name}")
        if value is not None and value < 1:
            raise pytest.UsageError(f"{name} must be at least 1, got {name}={value}.")
    threads = config.getoption("--threads")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        chosen_cases(config.getoption("--part"), _settings(config))
    except BenchmarkError as error:
        raise pytest.UsageError(str(error)) from error


def _settings(config):
    return Settings(
        device=config.getoption("--device"),
        rounds=config.getoption("--rounds"),
        is_quick=config.getoption("--quick"),
    )


@pytest.fixture(scope="session")
def settings(request):
    return _settings(request.config)


@pytest.fixture(scope="session")
def outcomes():
    """Keep what each workload found: its contestants are measured together."""
    return {}


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    config = metafunc.config
    own = _settings(config)
    cases = chosen_cases(config.getoption("--part"), own)
    is_curve = "name" not in metafunc.fixturenames
    cases = [case for case in cases if (case.unit != "ms") == is_curve]
    titles = [f"{own.device}-{case.part}-{case.name}" for case in cases]
    if is_curve:
        metafunc.parametrize("case", cases, ids=titles)
        return
    pairs = [
        pytest.param(case, name, id=f"{title}-{name}")
        for case, title in zip(cases, titles, strict=True)
        for name in case.names
    ]
    metafunc.parametrize(("case", "name"), pairs)


def pytest_collection_modifyitems(config, items):
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            item.add_marker(pytest.mark.timeout(LONGEST))
