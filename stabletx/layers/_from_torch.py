"""Read torch's own layers: what to build, and which weight goes where."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn import functional

from stabletx._checks import must
from stabletx.layers.normalization import NormSettings

_Built = TypeVar("_Built", bound=nn.Module)


class Converted(NamedTuple):
    """A layer of torch, said in our terms."""

    settings: dict[str, Any]  # arguments of our constructor
    weights: dict[str, Tensor]  # our state_dict


def read_attention(module: nn.MultiheadAttention) -> Converted:
    """Read an attention with its projections.

    Raises:
        TypeError: for another kind of module.
        ValueError: for widths of keys or values of their own, or keys that it adds.
    """
    check_kind("module", module, nn.MultiheadAttention)
    instead = "stabletx.interop.torch.MultiheadAttention takes it as it is."
    for argument, odd in (
        ("kdim and vdim", not module._qkv_same_embed_dim),
        ("add_bias_kv", module.bias_k is not None),
        ("add_zero_attn", module.add_zero_attn),
    ):
        if odd:
            raise ValueError(must(argument, "be left at their defaults", "others", instead))
    settings = {
        "d_model": module.embed_dim, "n_heads": module.num_heads, "qk_norm": False,
        "use_bias": module.in_proj_bias is not None, "dropout_p": module.dropout,
    }  # fmt: skip
    weights = {
        "qkv.weight": module.in_proj_weight, "qkv.bias": module.in_proj_bias,
        "out.weight": module.out_proj.weight, "out.bias": module.out_proj.bias,
    }  # fmt: skip
    return Converted(settings, {name: x for name, x in weights.items() if x is not None})


def read_block(layer: nn.TransformerEncoderLayer) -> Converted:
    """Read a layer of an encoder.

    Raises:
        TypeError: for another kind of layer, or one whose norms are not ``nn.LayerNorm``.
        ValueError: for an activation without a name here, or norms that differ in eps.
    """
    check_kind("layer", layer, nn.TransformerEncoderLayer)
    norms: list[Any] = [layer.norm1, layer.norm2]
    for name, norm in zip(("layer.norm1", "layer.norm2"), norms, strict=True):
        check_kind(name, norm, nn.LayerNorm)
    if norms[0].eps != norms[1].eps:
        pair = f"{norms[0].eps} and {norms[1].eps}"
        raise ValueError(must("eps", "be the same in both norms", pair, "Convert by hand."))
    attention = read_attention(layer.self_attn)
    has_bias = norms[0].bias is not None
    position = "pre" if layer.norm_first else "post"
    settings = {
        "d_model": attention.settings["d_model"], "n_heads": attention.settings["n_heads"],
        "d_ff": layer.linear1.out_features, "activation": _activation(layer.activation),
        "norm_position": position, "norm": NormSettings("layer", norms[0].eps, has_bias),
        "qk_norm": False, "use_bias": layer.linear1.bias is not None,
        "dropout_p": layer.dropout1.p, "attention_dropout_p": attention.settings["dropout_p"],
    }  # fmt: skip
    weights = {f"attention.{name}": x for name, x in attention.weights.items()}
    norm = "norm_in" if layer.norm_first else "norm_out"
    for ours, theirs in (
        (f"attention_shortcut.{norm}", norms[0]),
        (f"feed_forward_shortcut.{norm}", norms[1]),
        ("feed_forward.widen", layer.linear1),
        ("feed_forward.out", layer.linear2),
    ):
        weights |= {f"{ours}.{name}": x for name, x in theirs.state_dict().items()}
    return Converted(settings, weights)


def fill(built: _Built, weights: dict[str, Tensor], like: nn.Module) -> _Built:
    """Put copies of the weights in a module; dtype, device and mode become those of ``like``."""
    example = next(iter(weights.values()))
    built.to(device=example.device, dtype=example.dtype)
    built.load_state_dict(weights, strict=True)
    built.train(like.training)
    return built


def _activation(activation: object) -> str:
    if isinstance(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    names: dict[Any, str] = {
        functional.relu: "relu", functional.gelu: "gelu", functional.silu: "silu",
        nn.ReLU: "relu", nn.SiLU: "silu",
    }  # fmt: skip
    known = names.get(activation, names.get(type(activation)))
    if known is None:
        rule = "be relu, gelu or silu, of torch.nn or torch.nn.functional"
        instead = "stabletx.interop.torch.TransformerEncoderLayer takes any."
        raise ValueError(must("activation", rule, activation, instead))
    return known


def check_kind(argument: str, value: object, kind: type) -> None:
    """Refuse anything but one kind of torch's modules."""
    if not isinstance(value, kind):
        rule = f"be a torch.nn.{kind.__name__}"
        raise TypeError(must(argument, rule, type(value).__name__))
