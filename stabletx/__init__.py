"""Transformers in pure PyTorch whose numbers are right."""

__version__ = "0.1.0.dev0"
