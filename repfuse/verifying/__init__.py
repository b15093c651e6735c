"""Comparison of any two networks. It knows nothing of plans, checkpoints or the command line.

``compare`` and ``drift`` are what ``convert`` proves itself by; ``verify`` gives a verdict on any two
networks.
"""

from repfuse.verifying.comparison import compare
from repfuse.verifying.drift import drift
from repfuse.verifying.inputs import Effort, Trial, input_variants
from repfuse.verifying.results import Comparison, Drift, Verification
from repfuse.verifying.verification import verify

__all__ = ["Comparison", "Drift", "Effort", "Trial", "Verification", "compare", "drift", "input_variants", "verify"]
