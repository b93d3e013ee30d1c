"""Does a classifier answer alike wherever it runs: the dtypes, batches and runtimes compared.

``compare`` runs the same rows through several environments; ``check_parity`` does so for a trained
model's folder, as ``stabletx parity`` does.
"""

from stabletx.interop.parity.command import check_parity
from stabletx.interop.parity.compare import Comparison, Finding, compare
from stabletx.interop.parity.environments import NotHere, Subject

__all__ = ["Comparison", "Finding", "NotHere", "Subject", "check_parity", "compare"]
