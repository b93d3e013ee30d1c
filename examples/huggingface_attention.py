"""A Hugging Face model with this library's attention: one call, and then a name.

Run it: ``python examples/huggingface_attention.py``, or with the folder of a model of your own
behind it. Without one, a small random Llama is made; nothing is fetched.
"""

import sys
import tempfile

import torch
from transformers import AutoModel, LlamaConfig, LlamaModel

from stabletx.interop.huggingface import register


def small_llama(folder: str) -> str:
    """Save a model as anyone's would be."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(folder)
    return folder


def main() -> None:
    """Run one batch through eager attention and through ours."""
    folder = sys.argv[1] if len(sys.argv) > 1 else small_llama(tempfile.mkdtemp())
    register()
    eager = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ours = AutoModel.from_pretrained(folder, attn_implementation="stabletx").eval()

    ids = torch.randint(5, 100, (3, 12), generator=torch.Generator().manual_seed(0))
    real = torch.ones(3, 12, dtype=torch.long)
    real[1, :5] = 0  # padded on the left
    real[2] = 0  # an empty text
    with torch.no_grad():
        a = eager(input_ids=ids, attention_mask=real).last_hidden_state
        b = ours(input_ids=ids, attention_mask=real).last_hidden_state
    print(f"largest difference at real tokens: {(a - b)[real.bool()].abs().max():.1e}")

    # In float64, eager attention turns the padding on the left into NaN, which then spreads.
    with torch.no_grad():
        a = eager.double()(input_ids=ids, attention_mask=real).last_hidden_state
        b = ours.double()(input_ids=ids, attention_mask=real).last_hidden_state
    print(f"NaN in float64: eager {int(a.isnan().sum())}, stabletx {int(b.isnan().sum())}")

    weights = ours(input_ids=ids, attention_mask=real, output_attentions=True).attentions
    sums = weights[0][:, 0, -1].sum(-1)
    print(f"weights of a layer: {tuple(weights[0].shape)}; a row of the first two texts sums to")
    print(f"{sums[0]:.3f} and {sums[1]:.3f}, one of the empty text to {sums[2]:.3f}")


if __name__ == "__main__":
    main()
