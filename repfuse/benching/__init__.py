"""Timing of any two networks against each other. It knows nothing of plans, checkpoints or the CLI."""

from repfuse.benching.benchmark import bench
from repfuse.benching.results import Benchmark

__all__ = ["Benchmark", "bench"]
