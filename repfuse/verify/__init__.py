"""Comparison of any two networks. It knows nothing of plans, checkpoints or the command line.

``compare`` and ``drift`` are what ``convert`` proves itself by; ``verify`` gives a verdict on any two
networks.
"""

from repfuse.verify.comparison import compare
from repfuse.verify.drift import drift
from repfuse.verify.inputs import Trial, input_variants
from repfuse.verify.results import Comparison, Drift, Verification
from repfuse.verify.verification import verify

__all__ = ["Comparison", "Drift", "Trial", "Verification", "compare", "drift", "input_variants", "verify"]
