"""Hold stabletx, as the attention of transformers' models, to their own eager attention.

Each architecture is built tiny and at random and run in both, with left and right padding, forward
and backward, and decoders generate with a cache. The judge is eager attention in float64 with
every detour over float32 taken out of the model.

Write the table of the documentation: ``python -m tests.interop.architectures``
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stabletx.interop import huggingface

TABLE = Path(__file__).parents[2] / "docs" / "huggingface-backend-table.md"
# Same mathematics in float64: what is left is rounding, 1e-16 a step, through two small layers.
EXACT = 1e-12
# Two float32 runs round the same sums in another order. Each one's largest error over a few
# thousand numbers is a draw from one distribution; 4 leaves two bits for the draw, and a mistake
# shows as thousands.
ROUNDING = 4.0
N_TOKENS, N_NEW = 11, 5
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Architecture:
    """One model of transformers: how to build it small, and what it takes."""

    name: str
    model: str  # a class of transformers
    kind: str  # "encoder", "decoder", "encoder-decoder", "vision" or "speech"
    sizes: dict[str, Any] = field(default_factory=dict)
    cannot: str = ""  # why it does not use the backend

    def build(self, implementation: str, dtype: torch.dtype) -> Any:
        """Build the model with weights that depend on nothing but the architecture."""
        make = getattr(transformers, self.model)
        common = {} if self.kind in ("encoder-decoder", "vision", "speech") else SIZES
        sizes = {name: size for name, size in (common | self.sizes).items() if size is not None}
        config = make.config_class(**copy.deepcopy(sizes))
        torch.manual_seed(0)
        settings = {"attn_implementation": implementation, "experts_implementation": "eager"}
        model = make._from_config(config, **settings)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                # Scores of the order of 1, so that who attends to whom matters.
                size = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise * size + (1.0 if _is_gain(parameter) else 0.0))
        model.tie_weights()
        return model.to(dtype).eval()

    def inputs(self, side: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor | None]:
        """Draw inputs, padded on one side, and say which places of the output are real."""
        generator = torch.Generator().manual_seed(2)
        keep = torch.ones(3, N_TOKENS, dtype=torch.long)
        keep[1, :4] = keep[2, :9] = 0
        keep = keep if side == "left" else keep.flip(1)
        ids = torch.randint(3, 60, (3, N_TOKENS), generator=generator) * keep
        if self.kind == "vision":
            return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator).to(dtype)}, None
        if self.kind == "speech":
            return {"input_values": torch.randn(3, 400, generator=generator).to(dtype)}, None
        given = {"input_ids": ids, "attention_mask": keep}
        if self.kind == "encoder-decoder":
            given |= {"decoder_input_ids": ids.flip(1), "decoder_attention_mask": keep.flip(1)}
            keep = keep.flip(1)
            if "Whisper" in self.model:
                sound = torch.randn(3, 8, 32, generator=generator).to(dtype)
                given = {"input_features": sound} | {
                    name: x for name, x in given.items() if name.startswith("decoder")
                }
        return given, keep.bool()


def _is_gain(parameter: Tensor) -> bool:
    return parameter.ndim == 1 and bool((parameter == 1).all())


class KeepDouble(TorchFunctionMode):
    """Let no float64 tensor be rounded to float32: models do so inside, for half precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Run:
    """What one model made of one batch."""

    out: Tensor
    gradients: dict[str, Tensor]


def run(architecture: Architecture, implementation: str, side: str, dtype: torch.dtype) -> Run:
    """Run a model forward and backward; padding takes no part in the loss."""
    model = architecture.build(implementation, dtype)
    given, real = architecture.inputs(side, dtype)
    with KeepDouble() if dtype == torch.float64 else contextlib.nullcontext():
        out = output(model(**given))
        out = out if real is None else out[real]
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        (out * weights).mean().backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return Run(out.detach(), gradients)


def output(result: Any) -> Tensor:
    """Pick what a model computes for each place."""
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def distance(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Give the largest error, in units of the largest number; NaN and nothing are far away."""
    if actual.keys() != exact.keys():
        return math.inf
    scale = max(float(x.abs().max()) for x in exact.values())
    errors = [float((actual[name].double() - exact[name]).abs().max()) for name in exact]
    return math.inf if any(math.isnan(x) for x in errors) else max(errors) / scale


def generate(architecture: Architecture, implementation: str, cache: str | None) -> Tensor:
    """Let a decoder go on from a left-padded batch, greedily, in float64."""
    model = architecture.build(implementation, torch.float64)
    given, _ = architecture.inputs("left", torch.float64)
    given = {name: x for name, x in given.items() if not name.startswith("decoder")}
    settings = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    with KeepDouble():
        return model.generate(
            **given, max_new_tokens=N_NEW, min_new_tokens=N_NEW, do_sample=False, **settings,
        )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """How one architecture stands."""

    architecture: Architecture
    calls: int = 0
    exact: float = 0.0  # float64, output: ours against eager
    exact_gradient: float = 0.0
    rounding: float = 0.0  # float32: our distance to the float64 result over eager's, both kinds
    generates: str = ""
    carries: str = ""
    refusal: str = ""

    @property
    def holds(self) -> bool:
        """Tell whether everything is within its bound."""
        near = max(self.exact, self.exact_gradient) <= EXACT and self.rounding <= ROUNDING
        return self.calls > 0 and near and "differs" not in self.generates


@contextlib.contextmanager
def counted() -> Iterator[list[dict[str, Any]]]:
    """Note what models hand to the backend, under the name ``counted``."""
    calls: list[dict[str, Any]] = []

    def attend(*arguments: Any, **named: Any) -> Any:
        module, queries, keys, values = arguments[:4]
        chunks = bool(getattr(module.config, "attention_chunk_size", None))
        own = {"queries": queries, "keys": keys, "values": values, "chunks": chunks}
        calls.append(named | own)
        return huggingface.attend(*arguments, **named)

    transformers.AttentionInterface.register("counted", attend)
    transformers.AttentionMaskInterface.register("counted", huggingface.make_mask)
    yield calls


def measure(architecture: Architecture) -> Row:
    """Run one architecture through everything."""
    try:
        with counted() as calls:
            ours = {
                (side, dtype): run(architecture, "counted", side, dtype)
                for side in architecture_sides(architecture)
                for dtype in (torch.float64, torch.float32)
            }
    except (ValueError, KeyError) as error:
        if not architecture.cannot:
            raise
        return Row(
            architecture, refusal=f"{type(error).__name__}: {error}".replace("counted", "stabletx")
        )
    if not calls:
        return Row(architecture, refusal="runs on its own eager attention")
    carries = ", ".join(_features(architecture, calls))
    n_calls = len(calls)
    exact = exact_gradient = rounding = 0.0
    for side in architecture_sides(architecture):
        judge = run(architecture, "eager", side, torch.float64)
        eager = run(architecture, "eager", side, torch.float32)
        wide, narrow = ours[side, torch.float64], ours[side, torch.float32]
        exact = max(exact, distance({"out": wide.out}, {"out": judge.out}))
        exact_gradient = max(exact_gradient, distance(wide.gradients, judge.gradients))
        for of in (lambda x: {"out": x.out}, lambda x: x.gradients):
            mine, theirs = (distance(of(x), of(judge)) for x in (narrow, eager))
            rounding = max(rounding, mine / theirs)
    return Row(
        architecture, n_calls, exact, exact_gradient, rounding, _generates(architecture), carries
    )


def architecture_sides(architecture: Architecture) -> tuple[str, ...]:
    """Say on which sides a batch of this architecture can be padded."""
    return ("left",) if architecture.kind in ("vision", "speech") else ("left", "right")


def _features(architecture: Architecture, calls: list[dict[str, Any]]) -> Iterator[str]:
    names = {"softcap": "soft-cap", "s_aux": "sinks", "position_bias": "position bias"}
    for argument, name in names.items():
        if any(call.get(argument) is not None for call in calls):
            yield name
    if len(calls) == 16 and "encoder-" in architecture.kind:
        yield "its decoder alone"
    if any(call["queries"].shape[1] != call["keys"].shape[1] for call in calls):
        yield "grouped heads"
    if any(call.get("sliding_window") for call in calls):
        yield "window"
    if any(call["chunks"] for call in calls):
        yield "chunks"
    if any(call["queries"].shape[3] != call["values"].shape[3] for call in calls):
        yield "values of another width"
    if any(call.get("indices") is not None for call in calls):
        yield "picked keys"


def _generates(architecture: Architecture) -> str:
    if "decoder" not in architecture.kind:
        return ""
    said = []
    for name, cache in (("dynamic", None), ("static", "static")):
        try:
            expected = generate(architecture, "eager", cache)
        except (ValueError, NotImplementedError) as error:
            said.append(f"{name}: not offered ({type(error).__name__})")
            continue
        same = torch.equal(generate(architecture, "counted", cache), expected)
        said.append(name if same else f"{name} differs")
    return ", ".join(said)


def _encoder(name: str, *, cannot: str = "", **sizes: Any) -> Architecture:
    return Architecture(name, f"{name}Model", "encoder", sizes, cannot)


def _decoder(name: str, *, cannot: str = "", **sizes: Any) -> Architecture:
    return Architecture(name, f"{name}ForCausalLM", "decoder", sizes, cannot)


_OWN = "computes attention itself and asks no backend"


_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_WINDOW = {"sliding_window": 4}
_PAIR = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
_IMAGE = {"image_size": 16, "patch_size": 4} | {
    name: SIZES[name]
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
}
_SPEECH = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
    "num_feat_extract_layers": 2,
}  # fmt: skip
_NARROW = {name: SIZES[name] for name in SIZES if name not in ("head_dim", "num_key_value_heads")}

_LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "head_dim": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
_T5GEMMA = {name: SIZES[name] for name in SIZES if name != "vocab_size"} | {
    "layer_types": MIXED,
    "sliding_window": 4,
    "attn_logit_softcapping": 2.0,
    "vocab_size": 64,
}

ARCHITECTURES = [
    _encoder("Bert"),
    _encoder("Albert", embedding_size=16),
    _encoder("DistilBert", dim=32, n_heads=4, n_layers=2, hidden_dim=48),
    _encoder("Electra", embedding_size=16),
    _encoder("Roberta", max_position_embeddings=40),
    _encoder("XLMRoberta", max_position_embeddings=40),
    _encoder("Camembert", max_position_embeddings=40),
    _encoder("ModernBert", local_attention=4, layer_types=MIXED, cls_token_id=1, sep_token_id=2),
    _encoder("EuroBert"),
    Architecture("GPT2", "GPT2LMHeadModel", "decoder", {"n_positions": 64}),
    _decoder("GPTBigCode", n_positions=64),
    _decoder("GPTNeoX", max_position_embeddings=64),
    _decoder("OPT", ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    _decoder("BioGpt", max_position_embeddings=64),
    _decoder("Llama"),
    _decoder("Mistral", **_WINDOW),
    _decoder("Ministral", layer_types=MIXED, **_WINDOW),
    _decoder("Mixtral", **_EXPERTS),
    _decoder("Qwen2", use_sliding_window=True, max_window_layers=1, **_WINDOW),
    _decoder("Qwen3"),
    _decoder("Qwen3Moe", moe_intermediate_size=16, **_EXPERTS),
    _decoder("Gemma"),
    _decoder("Gemma2", layer_types=MIXED, attn_logit_softcapping=2.0, **_WINDOW),
    _decoder("Gemma3", layer_types=MIXED, **_WINDOW),
    _decoder("Phi", max_position_embeddings=64),
    _decoder("Phi3", max_position_embeddings=64, **_WINDOW),
    _decoder("Olmo"),
    _decoder("Olmo2"),
    _decoder("Olmo3", layer_types=MIXED, **_WINDOW),
    _decoder("GptOss", layer_types=MIXED, **_EXPERTS, **_WINDOW),
    _decoder("Granite"),
    _decoder("Starcoder2", **_WINDOW),
    _decoder("Cohere"),
    _decoder("Cohere2", layer_types=MIXED, **_WINDOW),
    _decoder("StableLm"),
    _decoder("SmolLM3", no_rope_layers=[1, 0]),
    _decoder("Helium"),
    _decoder("Glm"),
    _decoder("Glm4"),
    _decoder("Exaone4", layer_types=MIXED, **_WINDOW),
    _decoder("Ernie4_5"),
    _decoder("Persimmon"),
    _decoder("Nemotron"),
    _decoder("SeedOss"),
    _decoder("HunYuanDenseV1"),
    _decoder("Arcee"),
    Architecture(
        "Llama4", "Llama4ForCausalLM", "decoder",
        {"attention_chunk_size": 4, "layer_types": ["chunked_attention", "full_attention"],
         "intermediate_size_mlp": 48, "no_rope_layers": [1, 0]} | _EXPERTS,
    ),
    _decoder("DeepseekV3", **_LATENT),
    _decoder("DeepseekV32", index_n_heads=2, index_head_dim=16, index_topk=4, **_LATENT),
    Architecture("T5", "T5ForConditionalGeneration", "encoder-decoder", _T5),
    Architecture("MT5", "MT5ForConditionalGeneration", "encoder-decoder", _T5),
    Architecture(
        "T5Gemma", "T5GemmaForConditionalGeneration", "encoder-decoder",
        {"encoder": _T5GEMMA, "decoder": _T5GEMMA | {"is_decoder": True}, "vocab_size": 64,
         "decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": None},
    ),
    Architecture("Bart", "BartForConditionalGeneration", "encoder-decoder", _PAIR),
    Architecture("MBart", "MBartForConditionalGeneration", "encoder-decoder", _PAIR),
    Architecture("Marian", "MarianMTModel", "encoder-decoder", _PAIR),
    Architecture("Pegasus", "PegasusForConditionalGeneration", "encoder-decoder", _PAIR),
    Architecture("Whisper", "WhisperForConditionalGeneration", "encoder-decoder",
                 _PAIR | {"num_mel_bins": 8, "max_source_positions": 16,
                          "max_target_positions": 32, "suppress_tokens": None,
                          "begin_suppress_tokens": None}),
    Architecture("CLIP text", "CLIPTextModel", "encoder", {"eos_token_id": 2}),
    Architecture("CLIP vision", "CLIPVisionModel", "vision", _IMAGE),
    Architecture("SigLIP vision", "SiglipVisionModel", "vision", _IMAGE),
    Architecture("ViT", "ViTModel", "vision", _IMAGE),
    Architecture("DeiT", "DeiTModel", "vision", _IMAGE),
    Architecture("DINOv2", "Dinov2Model", "vision", _IMAGE),
    Architecture("BEiT", "BeitModel", "vision", _IMAGE),
    Architecture("Wav2Vec2", "Wav2Vec2Model", "speech", _SPEECH),
    Architecture("HuBERT", "HubertModel", "speech", _SPEECH),
    _encoder("Splinter"),
    _encoder("Esm", max_position_embeddings=40, mask_token_id=5),
    _encoder("JinaEmbeddingsV3"),
    _encoder("MobileBert"),
    _encoder("XLMRobertaXL", max_position_embeddings=40),
    _decoder("Apertus"),
    _decoder("Phimoe", **_EXPERTS),
    Architecture(
        "Swin", "SwinModel", "vision",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1],
         "num_heads": [2, 4], "window_size": 4},
    ),
    Architecture("SEW", "SEWModel", "speech", _SPEECH | {"squeeze_factor": 2}),
    _encoder("MarkupLM"),
    _encoder("LayoutLM"),
    _decoder("VaultGemma", layer_types=MIXED, attn_logit_softcapping=2.0, **_WINDOW),
    Architecture(
        "SwitchTransformers", "SwitchTransformersForConditionalGeneration", "encoder-decoder",
        _T5 | {"num_experts": 4, "num_decoder_layers": 2, "router_jitter_noise": 0.0},
    ),
    Architecture("M2M100", "M2M100ForConditionalGeneration", "encoder-decoder", _PAIR),
    Architecture(
        "NLLB-MoE", "NllbMoeForConditionalGeneration", "encoder-decoder",
        _PAIR | {"num_experts": 4, "expert_capacity": 64},
    ),
    # The encoders of these three compute attention themselves, and read our mask as eager's.
    Architecture(
        "LongT5", "LongT5ForConditionalGeneration", "encoder-decoder", _T5 | {"local_radius": 3}
    ),
    Architecture(
        "PegasusX", "PegasusXForConditionalGeneration", "encoder-decoder",
        _PAIR | {"block_size": 4, "num_global_tokens": 4},
    ),
    Architecture(
        "BigBirdPegasus", "BigBirdPegasusForConditionalGeneration", "encoder-decoder",
        _PAIR | {"attention_type": "original_full"},
    ),
    _encoder("MPNet", cannot=_OWN),
    _encoder("Deberta", cannot=_OWN),
    _encoder("XLNet", d_head=8, cannot=_OWN),
    _decoder("Bloom", cannot=_OWN),
    Architecture("Falcon", "FalconForCausalLM", "decoder", {"head_dim": None}, cannot=_OWN),
    _decoder("GPTJ", rotary_dim=4, cannot=_OWN),
]  # fmt: skip


def line(row: Row) -> str:
    """Write a row of the table."""
    name = f"{row.architecture.name} (`{row.architecture.model}`)"
    numbers = f"{row.exact:.0e} | {row.exact_gradient:.0e} | {row.rounding:.1f}"
    return f"| {name} | {row.carries} | {numbers} | {row.generates} |"


def table(rows: list[Row]) -> str:
    """Write the page."""
    can = [line(row) for row in rows if not row.architecture.cannot]
    cannot = [
        f"| {row.architecture.name} (`{row.architecture.model}`) | {row.architecture.cannot} | "
        f"{row.refusal} |"
        for row in rows
        if row.architecture.cannot
    ]
    head = "| architecture | carries | output | gradient | float32 | generates with cache |"
    return "\n".join(
        [
            "# Architectures behind the backend",
            "",
            f"Written by `python -m tests.interop.architectures`, transformers "
            f"{transformers.__version__}, torch {torch.__version__.split('+')[0]}.",
            "Each model is built tiny and at random, and padded on the left and on the right.",
            "*output* and *gradient*: largest difference from the model's own eager attention in",
            f"float64, over the largest number; at most {EXACT:.0e} is asked. *float32*: our",
            "distance to that float64 result over eager's own, the larger of output and gradients;",
            f"at most {ROUNDING:.0f} is asked. *generates*: greedy tokens after a left-padded",
            "prompt are those of eager attention, with these caches.",
            "",
            head,
            "|---" * 6 + "|",
            *can,
            "",
            f"{len(can)} architectures; these cannot:",
            "",
            "| architecture | why | what happens |",
            "|---|---|---|",
            *cannot,
            "",
        ]
    )


def main() -> None:
    """Measure every architecture and write the table."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = []
    for architecture in ARCHITECTURES:
        rows.append(measure(architecture))
        print(rows[-1].refusal or line(rows[-1]), flush=True)
    TABLE.write_text(table(rows))
    print(f"{TABLE}: {sum(row.holds for row in rows)} of {len(rows)} hold")


if __name__ == "__main__":
    main()
