"""The ratio of two medians, or their difference, and how sure it is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from repfuse.benching.results import Gain, Ratio

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0
OUTLIER = 1.4826 * 10  # hyperfine's: ten standard deviations, estimated by the median absolute deviation


def ratio_of_medians(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """Return median(first) / median(second) with its percentile bootstrap interval.

    ``first`` and ``second`` are positive times of the same rounds, at least two. Rounds are drawn with
    replacement, both times of a round together, because what disturbs a round disturbs both; the interval
    holds the middle CONFIDENCE of the ratios of RESAMPLES draws. The draws are seeded: the same times give
    the same interval.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError("two times at least, in pairs")
    rounds = _draws(len(first), torch.Generator().manual_seed(SEED))
    return _ratio(first, rounds, second, rounds)


def difference_of_medians(first: Sequence[float], second: Sequence[float]) -> Gain:
    """Return median(first) - median(second) with the same interval."""
    rounds = _draws(len(first), torch.Generator().manual_seed(SEED))
    drawn = _medians(first, rounds) - _medians(second, rounds)
    return Gain(statistics.median(first) - statistics.median(second), *_middle(drawn))


def ratio_of_samples(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """Return the same of times of two runs, which nothing pairs: each is drawn from by itself."""
    if min(len(first), len(second)) < 2:
        raise ValueError("two times at least, of each run")
    generator = torch.Generator().manual_seed(SEED)
    return _ratio(first, _draws(len(first), generator), second, _draws(len(second), generator))


def _draws(length: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(length, (RESAMPLES, length), generator=generator)


def _ratio(first: Sequence[float], of_first: torch.Tensor, second: Sequence[float], of_second: torch.Tensor) -> Ratio:
    drawn = _medians(first, of_first) / _medians(second, of_second)
    return Ratio(statistics.median(first) / statistics.median(second), *_middle(drawn))


def _medians(times: Sequence[float], drawn: torch.Tensor) -> torch.Tensor:
    return torch.tensor(times, dtype=torch.float64)[drawn].quantile(0.5, dim=-1)


def _middle(drawn: torch.Tensor) -> list[float]:
    tail = (1 - CONFIDENCE) / 2
    ends: list[float] = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return ends


def outliers(times: Sequence[float]) -> int:
    """Return how many times lie more than OUTLIER median absolute deviations above the median."""
    middle = statistics.median(times)
    deviation = statistics.median(abs(time - middle) for time in times)
    return sum(time - middle > OUTLIER * deviation for time in times) if deviation else 0


def drift(times: Sequence[float]) -> float:
    """Return how many times as slow the second half of the rounds was as the first."""
    half = len(times) // 2
    return statistics.median(times[-half:]) / statistics.median(times[:half]) if half else 1.0
