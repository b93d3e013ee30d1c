"""``import stabletx`` costs little beside ``import torch`` and loads nothing that it need not."""

import subprocess
import sys

HEAVY = [
    "hypothesis", "pytest", "matplotlib", "tokenizers", "sklearn", "rich", "pyarrow",
    "tensorboard", "transformers", "torch._dynamo", "torch._inductor", "numpy.testing",
]  # fmt: skip


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout


def test_import_loads_no_heavy_package():
    before = run("import torch, sys; print(*sys.modules)").split()
    after = run("import torch, stabletx, sys; print(*sys.modules)").split()
    added = set(after) - set(before)
    assert not [name for name in HEAVY if name in added]


def test_import_adds_at_most_150_ms_to_torch():
    code = (
        "import torch, time; start = time.process_time(); import stabletx; "
        "print(time.process_time() - start)"
    )
    assert min(float(run(code)) for _ in range(3)) < 0.15


def test_command_help_does_not_import_torch():
    code = (
        "import sys, contextlib, io; from stabletx.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main(['--help'])\n"
        "print('torch' in sys.modules)"
    )
    assert run(code).strip() == "False"
