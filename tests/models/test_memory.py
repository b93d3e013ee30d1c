"""What a long forward pass takes, measured from outside."""

import subprocess
import sys

import pytest

resource = pytest.importorskip("resource", reason="the peak of a process is asked of POSIX")

SCRIPT = """
import resource, sys, torch
from stabletx.models import Encoder, TransformerConfig
torch.set_num_threads(2)
config = TransformerConfig(vocab_size=100, d_model=384, n_layers=1, n_heads=12, d_ff=1536)
model, ids = Encoder(config).eval(), torch.zeros(BATCH, 65536 // BATCH, dtype=torch.int64)
with torch.inference_mode():
    assert model(ids).last_hidden_state.isfinite().all()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak * (1 if sys.platform == "darwin" else 1024))
"""


def peak_bytes(batch_size):
    script = SCRIPT.replace("BATCH", str(batch_size))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_65536_tokens_in_a_batch_fit_in_two_gigabytes():
    assert peak_bytes(256) <= 2e9


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_65536_tokens_of_one_sequence_fit_in_two_gigabytes():
    assert peak_bytes(1) <= 2e9
