"""Sentiment from nothing: train on film reviews, then ask about sentences of your own.

Run it: ``python examples/sentiment_analysis.py ["a sentence" ...]``  (fetches 13 MB once)
"""

import argparse

from stabletx.data import EncodedSet, Tokenizer, load_named
from stabletx.models import SequenceClassifier
from stabletx.training import TrainingConfig, default_model, evaluate, fit, predict

ASKED = ["a wonderful, moving film", "dull and far too long", "not bad at all"]


def main() -> None:
    """Train for about a minute, then answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sentences", nargs="*", default=ASKED)
    parser.add_argument("--rows", type=int, default=None, help="train rows; the default is all")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()

    splits = load_named("rotten-tomatoes")
    # Rows lie as in their source, so a part is taken from everywhere.
    step = max(1, len(splits.train) // arguments.rows) if arguments.rows else 1
    train = list(splits.train)[::step]
    tokenizer = Tokenizer.train([example.text for example in train])

    def encode(examples):
        return EncodedSet.encode(examples, tokenizer, splits.labels, 64)

    model = SequenceClassifier(default_model(tokenizer.vocab_size, splits.labels, max_seq_len=64))
    config = TrainingConfig(epochs=arguments.epochs)
    fit(model, encode(train), encode(splits.validation), config=config)
    measured = evaluate(model, encode(splits.test)).metrics
    print(f"accuracy on the test split: {measured.accuracy:.3f} (majority {measured.majority:.3f})")
    guesses = predict(model, tokenizer, arguments.sentences)
    for text, guess in zip(arguments.sentences, guesses, strict=True):
        print(f"{guess.probability:.2f}  {guess.label:8}  {text}")


if __name__ == "__main__":
    main()
