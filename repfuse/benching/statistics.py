"""The ratio of two medians, and how sure it is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0
OUTLIER = 1.4826 * 10  # hyperfine's: ten standard deviations, estimated by the median absolute deviation


@dataclass(frozen=True)
class Ratio:
    """The ratio of two medians and its bootstrap interval."""

    value: float
    low: float
    high: float


def ratio_of_medians(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """Return median(first) / median(second) with its percentile bootstrap interval.

    ``first`` and ``second`` are positive times of the same rounds, at least two. Rounds are drawn with
    replacement, both times of a round together, because what disturbs a round disturbs both; the interval
    holds the middle CONFIDENCE of the ratios of RESAMPLES draws. The draws are seeded: the same times give
    the same interval.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError("two times at least, in pairs")
    times = torch.tensor([list(first), list(second)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(SEED)
    rounds = torch.randint(len(first), (RESAMPLES, len(first)), generator=generator)
    medians = times[:, rounds].quantile(0.5, dim=-1)
    ratios = medians[0] / medians[1]
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(ratios, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Ratio(statistics.median(first) / statistics.median(second), low, high)


def outliers(times: Sequence[float]) -> int:
    """Return how many times lie more than OUTLIER median absolute deviations above the median."""
    middle = statistics.median(times)
    deviation = statistics.median(abs(time - middle) for time in times)
    return sum(time - middle > OUTLIER * deviation for time in times) if deviation else 0
