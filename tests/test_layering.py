"""Imports point down: a module imports only from lower layers and from its own folder."""

import ast
from pathlib import Path

import pytest

import stabletx

PACKAGE = Path(stabletx.__file__).parent
LAYERS = {
    "_precision": 0,
    "_checks": 0,
    "_mask_rules": 1,
    "masks": 1,
    "packing": 1,
    "functional": 2,
    "layers": 3,
    "models": 4,
    "data": 5,
    "training": 6,
    "interop": 7,
    "cli": 8,
}
SAME_FOLDER_OR_LAYER = {"masks", "_mask_rules", "packing", "_precision", "_checks"}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported_parts(path: Path) -> list[str]:
    """List the first part below ``stabletx`` of everything that a file imports."""
    parts = []
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("stabletx."):
                parts.append(name.split(".")[1])
    return parts


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = part_of(path)
    for there in imported_parts(path):
        if here == "testing":
            assert there == "testing", f"{path} imports stabletx.{there}"
        elif there == "testing":
            assert here == "cli", f"{path} imports stabletx.testing"
        elif here in LAYERS and there in LAYERS:
            same = here == there or {here, there} <= SAME_FOLDER_OR_LAYER
            lower = LAYERS[there] < LAYERS[here]
            assert lower or (same and LAYERS[there] <= LAYERS[here]), f"{path} imports {there}"


def test_every_part_has_a_layer():
    parts = {part_of(path) for path in SOURCES} - {"__init__", "testing"}
    assert parts <= set(LAYERS), parts - set(LAYERS)


def test_files_stay_small():
    long = {path.name: n for path in SOURCES if (n := len(path.read_text().splitlines())) > 400}
    assert not long, long
