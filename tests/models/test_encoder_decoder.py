"""The encoder-decoder."""

import pytest
import torch

from stabletx.functional import cross_entropy
from stabletx.models import EncoderDecoder, TransformerConfig
from stabletx.models._generation import DecoderCache
from stabletx.models._inputs import read_inputs

SOURCE = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(0))
KEEP = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]]).bool()
TARGET = torch.tensor([[5, 6, 7, 2], [8, 2, -100, -100], [9, 10, 2, -100]])


def model(dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = TransformerConfig(40, 16, 2, 4, n_kv_heads=2, bos_id=1, eos_id=2, **options)
    made = EncoderDecoder(config).to(dtype).eval()
    with torch.no_grad():
        for block in made.stack.blocks:  # let the source matter to what is written
            block.cross_attention.out.weight.mul_(16)
    return made


def test_options_of_both_halves_reach_both(same_function):
    options = {
        "share_embeddings": True, "n_decoder_layers": 3, "relative_buckets": 8,
        "relative_max_distance": 6, "position": "none", "qk_norm": False, "head_bias": True,
    }  # fmt: skip

    @torch.no_grad()
    def whole(dtype):
        made = varied(model(dtype, **options))
        return [made(SOURCE, KEEP, decoder_input_ids=written).logits]

    @torch.no_grad()
    def cached(dtype):
        made, scores = varied(model(dtype, **options)), []
        context, source = made._read(SOURCE, KEEP)
        like = made.stack.stem.embedding.tokens.weight
        cache = DecoderCache(made.config, 3, 5, like=like, context_len=6)
        for i in range(5):
            x = made.stack(
                read_inputs(written[:, i : i + 1], None),
                cache=cache, context=context, context_mask=source.key_mask,
            )  # fmt: skip
            scores.append(made.stack.scores(x))
        return [torch.cat(scores, dim=1)]

    def varied(made):
        for part in (made.encoder, made.stack):
            torch.manual_seed(1)
            torch.nn.init.normal_(part.places.relative.table.weight)
        return made

    written = torch.cat([torch.ones(3, 1, dtype=torch.long), TARGET.clamp(min=3)], dim=1)
    same_function(whole, cached)
    assert len(model(**options).stack.blocks) == 3


def test_scores_are_the_same_for_each_pair_alone(same_function):
    def together(dtype):
        made = model(dtype)
        out = made(SOURCE, KEEP, labels=TARGET)
        used = TARGET != -100
        return [out.logits[used], *torch.autograd.grad(out.loss, list(made.parameters()))]

    def alone(dtype):
        made, scores = model(dtype), []
        for source, real, target in zip(SOURCE, KEEP, TARGET, strict=True):
            target = target[target != -100]
            scores.append(made(source[real][None], labels=target[None]).logits[0])
        scores = torch.cat(scores)
        loss = cross_entropy(scores, TARGET[TARGET != -100])
        return [scores, *torch.autograd.grad(loss, list(made.parameters()))]

    same_function(together, alone)


def test_labels_shifted_by_hand_are_the_default():
    made = model()
    read = torch.tensor([[1, 5, 6, 7], [1, 8, 2, 0], [1, 9, 10, 2]])
    by_hand = made(SOURCE, KEEP, labels=TARGET, decoder_input_ids=read)
    by_default = made(SOURCE, KEEP, labels=TARGET)
    assert torch.equal(by_hand.loss, by_default.loss)
    assert torch.equal(by_hand.logits, by_default.logits)


@torch.no_grad()
def test_generate_writes_the_best_token_each_time():
    made = model()
    written = made.generate(SOURCE, KEEP, max_new_tokens=6)
    for source, real, new in zip(SOURCE, KEEP, written, strict=True):
        line = torch.tensor([[1]])
        for token in new.tolist():
            scores = made(source[real][None], decoder_input_ids=line).logits[0, -1]
            assert token == int(scores.argmax())
            line = torch.cat([line, torch.tensor([[token]])], dim=1)
            if token == 2:
                break
    assert len({tuple(row) for row in written.tolist()}) > 1


def test_source_padding_moves_no_bit():
    made = model()
    changed = torch.where(KEEP, SOURCE, 39)
    a, b = (made(x, KEEP, labels=TARGET).logits for x in (SOURCE, changed))
    assert torch.equal(a, b)


def test_encoder_decoder_refuses_what_it_cannot_begin():
    with pytest.raises(ValueError, match=r"config.bos_id must be given for an encoder-decoder"):
        EncoderDecoder(TransformerConfig(40, 16, 2, 4))
    with pytest.raises(ValueError, match=r"labels must be given, or decoder_input_ids"):
        model()(SOURCE)
    with pytest.raises(ValueError, match=r"same batch size"):
        model()(SOURCE, labels=TARGET[:2])
