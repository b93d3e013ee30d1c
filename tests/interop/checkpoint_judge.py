"""Tiny models made by transformers, and transformers itself as a judge in float64."""

import json
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

from stabletx.functional.positions import rotary_tables

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 100,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODERS = {
    "Bert": {},
    "DistilBert": None,
    "Roberta": {"type_vocab_size": 1, "pad_token_id": 1},
    "Electra": {"embedding_size": 8},
    "Albert": {"embedding_size": 8, "num_hidden_groups": 2},
    "MPNet": {"pad_token_id": 1},
    "ModernBert": {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2, **IDS},
}
HEADS = ("Model", "ForSequenceClassification", "ForMaskedLM")
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 4}
MARIAN = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 100, "pad_token_id": 0,
    "decoder_start_token_id": 0, "eos_token_id": 2, "scale_embedding": True,
    "activation_function": "swish",
}  # fmt: skip
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 100, **IDS}
OTHERS = {
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
    "LlamaForCausalLM": ("LlamaConfig", {**SIZES, **IDS, "num_key_value_heads": 2, "head_dim": 6}),
    "LlamaForCausalLM-tied-with-biases": (
        "LlamaConfig",
        {**SIZES, **IDS, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "MistralForCausalLM": (
        "MistralConfig",
        {**SIZES, **IDS, "num_key_value_heads": 2, "sliding_window": 7},
    ),
    "T5ForConditionalGeneration": ("T5Config", {**T5, "num_decoder_layers": 3}),
    "T5ForConditionalGeneration-gated": (
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "MarianMTModel": ("MarianConfig", MARIAN),
}
NAMES = [*(name + head for name in ENCODERS for head in HEADS), *OTHERS]


def tiny(name, **settings):
    """Build a tiny random model of transformers, with norms and biases that matter."""
    import transformers

    family = next((x for x in ENCODERS if name.startswith(x)), None)
    if family is None:
        config, own = OTHERS[name]
    elif family == "DistilBert":
        keys = ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "max_position_embeddings")
        config, own = "DistilBertConfig", dict(zip(keys, SIZES.values(), strict=True))
    else:
        config, own = f"{family}Config", {**SIZES, **ENCODERS[family]}
    made = getattr(transformers, config)(**{**own, **settings})
    if family != "MPNet":  # whose own attention is exact in float64, and the only one it has
        made._attn_implementation = "sdpa"
    torch.manual_seed(7)
    model = getattr(transformers, name.split("-")[0])(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        if name.endswith("gated"):  # as in T5 1.1, whose head is its own
            own_head = torch.randn_like(model.lm_head.weight) / 4
            model.lm_head.weight = torch.nn.Parameter(own_head)
            model.config.tie_word_embeddings = False
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


def batch(pad_id=0, lengths=(30, 3, 17, 1), vocab_size=50):
    """Give a ragged batch: ids and which of them are real."""
    torch.manual_seed(3)
    longest = max(lengths)
    keep = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, vocab_size, keep.shape).masked_fill(~keep, pad_id)
    return ids, keep


class _NoNarrowing(TorchFunctionMode):
    """Keep float64 where a model casts to float32 whatever it was given."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        is_double = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype.itemsize == 8
        if is_double and args[0].is_floating_point():
            if func is torch.Tensor.float:
                return args[0]
            if func is torch.Tensor.to and torch.float32 in (*args[1:], kwargs.get("dtype")):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def judging(model):
    """Let a model of transformers compute in the dtype that it has.

    Some norms and rotations go through float32 in every dtype, and phases are float32 products.
    Both are lifted, the phases by tables from float64 angles, rounded to float32 as ours are.
    """
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = _phases(module.config)
    with _NoNarrowing():
        yield


def _phases(config):
    def forward(x, position_ids, layer_type=None):
        found = config.rope_parameters
        base = (found if layer_type is None else found[layer_type])["rope_theta"]
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        with torch._C.DisableTorchFunction():
            tables = rotary_tables(position_ids, size, base=base)
        return tuple(torch.cat([table, table], dim=-1).to(x.dtype) for table in tables)

    return forward


def stored(model, folder):
    model.save_pretrained(folder)
    return folder


def edit(folder, drop=(), **changes):
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in drop}))


def rewrite(folder, tensors):
    from safetensors.torch import save_file

    held = {name: x.clone().contiguous() for name, x in tensors.items()}
    save_file(held, folder / "model.safetensors")
