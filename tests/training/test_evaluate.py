import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stabletx.data import Tokenizer, collate
from stabletx.functional.softmax import softmax
from stabletx.models import SequenceClassifier
from stabletx.training import default_model, evaluate, predict
from tests.training.standins import TinyModel, TinyRows

TEXTS = ["a good film", "a very bad film indeed", "", "good good good " * 30, "bad"]


@pytest.fixture(scope="module")
def trained():
    tokenizer = Tokenizer.train(TEXTS)
    torch.manual_seed(0)
    config = default_model(tokenizer.vocab_size, ["no", "yes"], max_seq_len=16)
    return SequenceClassifier(config), tokenizer


@given(n_rows=st.integers(1, 60), seed=st.integers(0, 1000))
def test_evaluate_gives_each_row_its_own_probabilities(n_rows, seed):
    model, rows = TinyModel(seed), TinyRows(n_rows, seed)
    found = evaluate(model, rows)
    model.eval()
    for i in range(n_rows):
        batch = collate([rows.rows[i]])
        own = softmax(model(batch.input_ids, batch.attention_mask).logits)[0].detach()
        # The same numbers in another order: a mean of at most 8 tokens, a product of 8 terms.
        bound = 64 * torch.finfo(torch.float32).eps * (1 + float(own.log().abs().max()))
        assert float((found.probabilities[i] - own).abs().max()) <= bound
    assert found.truth.tolist() == list(rows.labels)


def test_evaluate_leaves_the_mode_of_the_model_as_it_was():
    for training in (True, False):
        model = TinyModel().train(training)
        evaluate(model, TinyRows(4, 0))
        assert model.training is training


def test_evaluate_refuses_no_rows():
    with pytest.raises(ValueError, match="examples must hold at least one row, got examples=none"):
        evaluate(TinyModel(), TinyRows(0, 0))


def test_predict_answers_in_the_order_of_the_texts(trained):
    together = list(predict(*trained, TEXTS))
    alone = [next(predict(*trained, [text])) for text in TEXTS]
    assert [p.label for p in together] == [p.label for p in alone]
    assert [p.was_cut for p in together] == [False, False, False, True, False]


def test_predict_answers_before_the_next_text_is_read_when_asked_to(trained):
    read = []

    def texts():
        for text in TEXTS:
            read.append(text)
            yield text

    answers = predict(*trained, texts(), at_once=1)
    next(answers)
    assert len(read) == 1


def test_prediction_is_the_most_probable_label(trained):
    for p in predict(*trained, TEXTS):
        assert p.probability == max(p.probabilities.values()) == p.probabilities[p.label]
        total = sum(p.probabilities.values())
        assert abs(total - 1) <= len(p.probabilities) * torch.finfo(torch.float32).eps
