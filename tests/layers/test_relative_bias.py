"""The bias for distances: buckets as defined, one value per head, no preference at the start."""

import math

import pytest
import torch

from stabletx.layers.embeddings import RelativeBias, TokenEmbedding


def bucket(distance, n_buckets, max_distance):
    """Give the bucket of a distance of at least 0, by the definition, number by number."""
    exact = n_buckets // 2
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return min(exact + int(share * (n_buckets - exact) + 1e-6), n_buckets - 1)


@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 20), (5, 9)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_every_distance_has_the_value_of_its_bucket(n_buckets, max_distance, is_causal):
    layer = RelativeBias(2, n_buckets=n_buckets, max_distance=max_distance, is_causal=is_causal)
    table = torch.arange(float(n_buckets))
    with torch.no_grad():
        layer.table.weight.copy_(torch.stack([table, -table], dim=1))
    places = torch.arange(200)
    bias = layer(places, places)[0]
    assert torch.equal(bias[0], -bias[1])
    each = n_buckets if is_causal else n_buckets // 2
    for query, key in [(150, k) for k in range(200)]:
        if is_causal:
            wanted = bucket(max(query - key, 0), each, max_distance)
        else:
            wanted = bucket(abs(query - key), each, max_distance) + (key > query) * each
        assert bias[0, query, key] == wanted, (query, key)


def test_the_bias_starts_at_0_and_takes_each_rows_own_positions():
    layer = RelativeBias(3, n_buckets=8, max_distance=10)
    assert not layer(torch.arange(4), torch.arange(4)).any()
    torch.nn.init.normal_(layer.table.weight)
    positions = torch.tensor([[0, 1, 1, 2], [0, 0, 0, 0]])
    whole = layer(positions, positions)
    assert whole.shape == (2, 3, 4, 4)
    for row, own in zip(whole, positions, strict=True):
        assert torch.equal(row, layer(own, own)[0])


def test_buckets_that_cannot_hold_a_distance_are_refused():
    with pytest.raises(ValueError, match=r"n_buckets must give at least 2 to each side, got .*=2"):
        RelativeBias(2, n_buckets=2)
    with pytest.raises(ValueError, match="max_distance must be above 8, got max_distance=8"):
        RelativeBias(2, max_distance=8)
    with pytest.raises(ValueError, match="n_heads must be positive, got n_heads=0"):
        RelativeBias(0)


def test_waves_are_sines_and_then_cosines_of_the_position():
    layer = TokenEmbedding(5, 6, is_sinusoidal=True, scale=2.0).double()
    ids, positions = torch.tensor([3, 3]), torch.tensor([0, 7])
    waves = layer(ids, positions) - 2 * layer.tokens.weight[3]
    for i in range(3):
        phase = 7 * 10000 ** (-2 * i / 6)
        wanted = torch.tensor([[0.0, math.sin(phase)], [1.0, math.cos(phase)]])
        torch.testing.assert_close(waves[:, [i, i + 3]].T.float(), wanted)
    with pytest.raises(ValueError, match="d_model must be even"):
        TokenEmbedding(5, 7, is_sinusoidal=True)
