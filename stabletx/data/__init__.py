"""Text in: tables, named data sets, a tokenizer, batches, and checks before training."""
