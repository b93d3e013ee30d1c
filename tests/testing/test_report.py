"""A report is text, JSON and one page that needs nothing else."""

import json
import xml.etree.ElementTree as ET

import pytest
import torch

from stabletx.testing.conformance import check_attention
from stabletx.testing.report import ConformanceReport, name_of, picture
from tests.correct_attentions import in_float32
from tests.mutants import MUTANTS

WRONG = next(mutant for mutant in MUTANTS if mutant.name == "twice the answer")


@pytest.fixture(scope="module")
def broken():
    return check_attention(
        WRONG, dtypes=[torch.float32, torch.float16], effort="quick", max_examples=1
    )


@pytest.fixture(scope="module")
def held():
    return check_attention(in_float32, dtypes=[torch.float32], effort="quick", max_examples=1)


def test_the_text_names_what_broke_with_its_code(broken, held):
    text = str(broken)
    assert "FAILED" in text
    assert "✗ agreement (float32, float16)" in text
    assert "replay(" in text
    assert "passed" in held.summary()
    assert repr(held) == str(held)


def test_json_holds_everything(broken):
    whole = json.loads(broken.to_json())
    assert whole["passed"] is False
    assert whole["versions"]["torch"] == torch.__version__
    assert len(whole["verdicts"]) == len(broken.verdicts)
    assert {"law", "dtype", "status", "occupancy", "code"} <= set(whole["verdicts"][0])


def test_the_page_is_self_contained(broken, tmp_path):
    path = broken.save_html(tmp_path / "report.html")
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "<svg" in page
    assert "<script" not in page
    for outside in ("src=", "href=", "@import", "url("):
        assert outside not in page


def test_names_are_escaped_in_the_page(held):
    named = ConformanceReport("<b>bold</b>", held.verdicts)
    assert "<b>bold" not in named._repr_html_()
    assert "&lt;b&gt;bold" in named._repr_html_()


def test_the_picture_has_a_cell_for_each_law_and_dtype(broken, held):
    drawn = ET.fromstring(picture([broken, held]))
    cells = [x for x in drawn.iter() if x.tag.endswith("rect") and len(x)]
    assert len(cells) == len(broken.laws) * 3


def test_an_empty_report_has_not_passed():
    assert not ConformanceReport("nothing", ()).passed


def test_a_callable_has_a_name():
    assert name_of(in_float32) == "in_float32"
    assert name_of(WRONG) == "twice the answer"
    assert name_of(object()) == "object"
