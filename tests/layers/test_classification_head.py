import pytest
import torch

from stabletx.layers import ClassificationHead
from stabletx.packing import Packed

POOLINGS = ["mean", "first", "attention"]
every_pooling = pytest.mark.parametrize("pooling", POOLINGS)
KEEP = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()


def head(pooling, dtype=torch.float64):
    torch.manual_seed(0)
    made = ClassificationHead(6, 3, pooling=pooling).to(dtype)
    if made.attend is not None:
        torch.nn.init.normal_(made.attend.weight)
    return made


def tokens(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 4, 6, generator=generator, dtype=torch.float64).to(dtype)


@every_pooling
def test_head_pools_real_tokens_as_if_there_were_no_others(same_function, pooling):
    def padded(dtype):
        x = torch.where(KEEP[..., None], tokens(dtype), torch.nan)
        return [head(pooling, dtype)(x, keep=KEEP)]

    def alone(dtype):
        made, x = head(pooling, dtype), tokens(dtype)
        return [torch.cat([made(row[keep][None]) for row, keep in zip(x, KEEP, strict=True)])]

    def packed(dtype):
        x = tokens(dtype)[KEEP]
        return [head(pooling, dtype)(Packed(x, KEEP.sum(1)))]

    same_function(padded, alone)
    same_function(padded, packed)


@every_pooling
def test_head_gives_its_bias_for_a_row_without_tokens(pooling):
    made, x = head(pooling), tokens().requires_grad_()
    with torch.no_grad():
        made.out.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    scores = made(x, keep=KEEP)
    assert torch.equal(scores[2], made.out.bias)
    scores.square().sum().backward()
    assert x.grad.isfinite().all()
    assert torch.equal(x.grad[~KEEP], torch.zeros_like(x.grad[~KEEP]))
    assert made(torch.zeros(2, 0, 6, dtype=x.dtype)).shape == (2, 3)


@every_pooling
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_head_pools_large_16_bit_values_without_overflow(pooling, dtype):
    made = head(pooling, dtype)
    x = torch.full((1, 4, 6), torch.finfo(dtype).max, dtype=dtype)
    torch.nn.init.constant_(made.out.weight, 2.0**-4)
    assert made(x).isfinite().all()


def test_attention_pooling_starts_as_the_mean():
    torch.manual_seed(0)
    by_attention = ClassificationHead(6, 3, pooling="attention").double()
    by_mean = ClassificationHead(6, 3).double()
    by_mean.out.load_state_dict(by_attention.out.state_dict())
    x = torch.eye(6, dtype=torch.float64)[None, :4]  # quarters: exact in every order
    assert torch.equal(by_attention(x), by_mean(x))


def test_head_refuses_a_mask_of_another_kind_or_shape():
    made, x = head("mean"), tokens()
    with pytest.raises(TypeError, match=r"keep must be boolean .* got keep=torch.int64"):
        made(x, keep=KEEP.long())
    with pytest.raises(ValueError, match=r"shape of x, got keep with \(4, 3\)"):
        made(x, keep=KEEP[:, :3])
    with pytest.raises(ValueError, match=r"keep must be None beside x packed"):
        made(Packed(x[KEEP], KEEP.sum(1)), keep=KEEP)
    with pytest.raises(ValueError, match=r"pooling must be one of .*, got pooling='max'"):
        ClassificationHead(6, 3, pooling="max")
