"""Timing of any two networks against each other. It knows nothing of plans, checkpoints or the CLI."""

from repfuse.bench.benchmark import bench
from repfuse.bench.results import Benchmark

__all__ = ["Benchmark", "bench"]
