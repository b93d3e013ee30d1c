"""Read torch's own encoder: the configuration of ours, and which weight goes where."""

from __future__ import annotations

from torch import Tensor, nn

from stabletx._checks import check_axes, must
from stabletx.layers._from_torch import check_kind, read_block
from stabletx.models.config import TransformerConfig


def read_encoder(
    encoder: nn.TransformerEncoder,
    embedding: nn.Embedding,
    positions: Tensor | None,  # (n, m)
    embedding_scale: float,
) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """Read an encoder with the tables that feed it.

    Raises:
        TypeError: for another kind of module.
        ValueError: for layers that differ, or a last norm where ours has none, or the reverse.
    """
    check_kind("encoder", encoder, nn.TransformerEncoder)
    check_kind("embedding", embedding, nn.Embedding)
    blocks = [read_block(layer) for layer in encoder.layers]
    settings = dict(blocks[0].settings)
    if any(block.settings != settings for block in blocks):
        raise ValueError(must("encoder", "have layers of one kind", "layers that differ"))
    norm = settings.pop("norm")
    is_pre = settings["norm_position"] == "pre"
    if (encoder.norm is not None) != is_pre:
        rule = "end with a norm where norm_first=True, and with none where it is False"
        instead = "Convert its layers one by one with EncoderBlock.from_torch."
        found = f"norm={encoder.norm} and norm_first={is_pre}"
        raise ValueError(must("encoder", rule, found, instead))
    tables = {"stem.embedding.tokens.weight": embedding.weight}
    if positions is not None:
        check_axes("positions", positions, "n m", "Pass a row for each position.")
        tables["stem.embedding.positions.weight"] = positions
    config = TransformerConfig(
        embedding.num_embeddings,
        n_layers=len(blocks),
        max_seq_len=512 if positions is None else len(positions),
        position="none" if positions is None else "learned",
        norm_eps=norm.eps,
        norm_bias=norm.use_bias,
        embedding_norm=False,
        embedding_scale=embedding_scale,
        pad_id=embedding.padding_idx or 0,
        **settings,
    )
    weights = {
        f"blocks.{i}.{name}": x
        for i, block in enumerate(blocks)
        for name, x in block.weights.items()
    }
    if encoder.norm is not None:
        check_kind("encoder.norm", encoder.norm, nn.LayerNorm)
        weights |= {f"norm.{name}": x for name, x in encoder.norm.state_dict().items()}
    return config, weights | tables
