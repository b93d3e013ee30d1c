"""Every code block of the documentation runs, page by page, in the order a reader meets it."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import stabletx

ROOT = Path(stabletx.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(stabletx.__path__, "stabletx.")
    if not module.name.endswith("__main__")
)


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, page_id(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page_id(page)} links to {target}"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    public = {"torch": torch, "stabletx": stabletx, "Mask": stabletx.Mask}
    result = doctest.testmod(module, extraglobs=public)
    assert result.failed == 0
