"""From texts to a trained classifier in Python: which library does a docstring come from?

Run it: ``python examples/text_classification.py [NAMED SET] [--rows N] [--epochs N]``
"""

import argparse

from stabletx.data import EncodedSet, Tokenizer, load_named, preflight
from stabletx.models import SequenceClassifier
from stabletx.training import TrainingConfig, default_model, evaluate, fit, predict


def main() -> None:
    """Load, look, train, measure, use."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", default="docstrings")
    parser.add_argument("--rows", type=int, default=None, help="train rows; the default is all")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()

    splits = load_named(arguments.data)
    print(splits.about)
    print(preflight(splits))
    # Rows lie as in their source, so a part is taken from everywhere.
    step = max(1, len(splits.train) // arguments.rows) if arguments.rows else 1
    train = list(splits.train)[::step]
    tokenizer = Tokenizer.train([example.text for example in train])

    def encode(examples):
        return EncodedSet.encode(examples, tokenizer, splits.labels, 256)

    model = SequenceClassifier(default_model(tokenizer.vocab_size, splits.labels))
    config = TrainingConfig(epochs=arguments.epochs)
    fit(model, encode(train), encode(splits.validation), config=config)

    measured = evaluate(model, encode(list(splits.test)[::step]))
    print(f"accuracy {measured.metrics.accuracy:.3f}, macro-F1 {measured.metrics.macro_f1:.3f}")
    text = "Return a graph whose edges are reversed."
    for guess in predict(model, tokenizer, [text]):
        print(f"{guess.probability:.2f}  {guess.label}  {text}")


if __name__ == "__main__":
    main()
