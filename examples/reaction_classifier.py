"""What kind of chemical reaction is it? rxnfp's published classifier of 50 kinds, in our model.

Run it: ``python examples/reaction_classifier.py ["reactants>>product" ...]``  (fetches 75 MB once)
"""

import argparse
import re
import tempfile
import zipfile
from pathlib import Path

import torch

from stabletx.data.wheels import Wheel, fetch
from stabletx.interop import checkpoints

RXNFP = Wheel(
    "rxnfp",
    "0.1.0",
    "rxnfp-0.1.0-py3-none-any.whl",
    "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
)
ATOMS = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|.")  # of SMILES, a way to write molecules
ASKED = {
    "amide from an acid chloride": "CC(=O)Cl.NCc1ccccc1>>CC(=O)NCc1ccccc1",
    "another such amide": "CCC(=O)Cl.Nc1ccccc1>>CCC(=O)Nc1ccccc1",
    "Suzuki coupling": "OB(O)c1ccccc1.Brc1ccncc1>>c1ccc(-c2ccncc2)cc1",
    "another Suzuki coupling": "OB(O)c1ccc(F)cc1.Brc1ccccn1>>Fc1ccc(-c2ccccn2)cc1",
    "nitro group to amine": "O=[N+]([O-])c1ccccc1>>Nc1ccccc1",
}


def padded(rows):
    """Lay rows of ids side by side, with 0 and a mask where they end."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def main() -> None:
    """Print the kind of each reaction, a number below 50, and how sure the model is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reactions", nargs="*")
    own = parser.parse_args().reactions
    asked = dict(zip(own, own, strict=True)) or ASKED
    inside = "rxnfp/models/transformers/bert_ft_10k_25s"
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(fetch(RXNFP)) as wheel:
        folder = Path(temporary)
        for name in ("config.json", "pytorch_model.bin", "vocab.txt"):
            (folder / name).write_bytes(wheel.read(f"{inside}/{name}"))
        model = checkpoints.load(folder)
        words = (folder / "vocab.txt").read_text().splitlines()
    number = {word: i for i, word in enumerate(words)}

    def encode(reaction):
        atoms = [number.get(atom, number["[UNK]"]) for atom in ATOMS.findall(reaction)]
        return [number["[CLS]"], *atoms, number["[SEP]"]]

    ids, keep = padded([encode(reaction) for reaction in asked.values()])
    with torch.inference_mode():
        sure, kind = model(ids, keep).logits.softmax(-1).max(-1)
    for name, p, k in zip(asked, sure, kind, strict=True):
        print(f"kind {k:2d}  p {p:.3f}  {name}")


if __name__ == "__main__":
    main()
