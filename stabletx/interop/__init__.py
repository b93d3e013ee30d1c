"""Other people's weights, models and formats.

Each neighbour has a module of its own, loaded only when it is imported: ``checkpoints``,
``huggingface``, ``torch``, ``sklearn``, ``export``, ``parity``.
"""
