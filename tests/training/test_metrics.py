import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stabletx.training import classification_metrics
from stabletx.training.metrics import N_BINS

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")


@st.composite
def scored_rows(draw):
    n_rows = draw(st.integers(1, 40), label="rows")
    n_classes = draw(st.integers(1, 6), label="classes")
    seed = draw(st.integers(0, 2**31), label="seed")
    scale = draw(st.sampled_from([0.0, 1.0, 100.0]), label="scale")
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n_rows, n_classes, generator=generator)
    truth = torch.randint(0, n_classes, (n_rows,), generator=generator)
    return logits.softmax(1), truth, [f"class {i}" for i in range(n_classes)]


def close_to_rounding(a, b, n):
    """Agree up to the rounding of a float64 sum of n shares, which are at most 1 each."""
    return abs(a - b) <= 4 * (n + 1) * torch.finfo(torch.float64).eps


@given(case=scored_rows())
def test_metrics_agree_with_scikit_learn(case):
    probabilities, truth, labels = case
    metrics = classification_metrics(probabilities, truth, labels)
    places, predicted = list(range(len(labels))), probabilities.argmax(1)
    precision, recall, f1, support = sklearn_metrics.precision_recall_fscore_support(
        truth, predicted, labels=places, zero_division=0
    )
    n = len(truth) + len(labels)
    assert metrics.confusion == tuple(
        tuple(row)
        for row in sklearn_metrics.confusion_matrix(truth, predicted, labels=places).tolist()
    )
    assert close_to_rounding(metrics.accuracy, sklearn_metrics.accuracy_score(truth, predicted), n)
    assert close_to_rounding(metrics.macro_f1, float(f1.mean()), n)
    for i, score in enumerate(metrics.classes):
        assert close_to_rounding(score.precision, float(precision[i]), n)
        assert close_to_rounding(score.recall, float(recall[i]), n)
        assert close_to_rounding(score.f1, float(f1[i]), n)
        assert score.support == support[i]


@given(case=scored_rows())
def test_calibration_error_is_that_of_a_plain_loop(case):
    probabilities, truth, labels = case
    metrics = classification_metrics(probabilities, truth, labels)
    rows = [(float(p.max()), int(p.argmax()) == int(y)) for p, y in zip(probabilities, truth)]  # noqa: B905
    error = 0.0
    for i in range(N_BINS):
        own = [r for r in rows if i / N_BINS < r[0] <= (i + 1) / N_BINS or (i == 0 and r[0] == 0)]
        own = [r for r in rows if bin_of(r[0]) == i]
        if own:
            gap = sum(r[0] for r in own) / len(own) - sum(r[1] for r in own) / len(own)
            error += abs(gap) * len(own) / len(rows)
    assert close_to_rounding(metrics.calibration_error, error, len(rows) + N_BINS)
    assert sum(own.n for own in metrics.bins) == len(rows)


def bin_of(confidence: float) -> int:
    return next(i for i in range(N_BINS) if confidence <= (i + 1) / N_BINS or i == N_BINS - 1)


@given(case=scored_rows())
def test_majority_is_the_most_frequent_class(case):
    probabilities, truth, labels = case
    metrics = classification_metrics(probabilities, truth, labels)
    counts = [int((truth == i).sum()) for i in range(len(labels))]
    assert metrics.majority == max(counts) / len(truth)
    assert counts[labels.index(metrics.majority_label)] == max(counts)


def test_loss_is_finite_when_a_right_class_has_probability_zero():
    metrics = classification_metrics(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), ["a", "b"])
    assert metrics.loss == -float(torch.tensor(torch.finfo(torch.float32).tiny).double().log())


def test_metrics_survive_json():
    import json

    metrics = classification_metrics(torch.tensor([[0.25, 0.75]]), torch.tensor([1]), ["a", "b"])
    read = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert read["classes"][1] == {
        "label": "b", "precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1,
    }  # fmt: skip
    assert read["n_rows"] == 1


def test_metrics_print_one_line_a_class():
    metrics = classification_metrics(torch.eye(2), torch.tensor([0, 1]), ["ham", "spam"])
    assert [line.split()[0] for line in str(metrics).splitlines()] == ["class", "ham", "spam"]


@pytest.mark.parametrize(
    ("probabilities", "truth", "labels", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "ab", r"at least one row"),
        (torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64), "ab", r"truth=\(3,\)"),
        (torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), "abc", r"3 names"),
    ],
)
def test_metrics_refuse_what_does_not_fit(probabilities, truth, labels, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(probabilities, truth, list(labels))
