"""No right conversion is flagged: neither by its own proof, nor by a verdict that knows no plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from blocks import CASES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import opaque
from support.agreement import image, outputs, randomised
from support.programs import EXAMPLES, STEPS, program
from torch import Tensor, nn

from repfuse.checking.verification import verify
from repfuse.converting import convert
from repfuse.loading import Checkpoint
from repfuse.plans import Policy

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPE = pytest.mark.parametrize("dtype", DTYPES)
Built = tuple[nn.Module, list[Tensor], Policy]


def judged(built: Built) -> str:
    """Convert a network, and return the verdict on it; "untouched" where nothing of it is fused.

    "refused" where the network hands one of its parts other settings for other inputs: only those that cannot be traced
    may do that.
    """
    original, example, policy = built
    found = convert(checkpoint(original, example), policy)
    if found.proof is None:
        return "untouched"
    if "the original runs, the fused network does not" in found.proof.reason:
        return "refused"  # a rewrite holds for the path that the example takes: nothing is written
    assert found.proof.passed, found.proof.reason
    assert found.passed, found.drift
    seen = verify(original, found.module, example)
    assert seen.verdict != "different", seen.reason
    return seen.verdict


BROADCAST = "a scale of tokens, averaged, into a layer"
"""Of one feature it makes as many as it has scales, which a layer does not."""


def blocks(dtype: torch.dtype, seeds: range) -> Iterator[Built]:
    """Every block of the zoo, with other numbers for each seed."""
    for seed in seeds:
        for row in (row for row in CASES if row.name != BROADCAST):
            torch.default_generator.manual_seed(seed)
            yield randomised(row.make(), seed, dtype), [x.to(dtype) for x in row.at(row.side, seed)], row.policy


def untraceable(dtype: torch.dtype, seeds: range) -> Iterator[Built]:
    """Networks that decide by the values they see, or keep something from call to call."""
    for seed in seeds:
        yield opaque.network(seed).to(dtype), [image(2, 4, 6, 7, seed=seed, dtype=dtype)], Policy.COST


def drawn(dtype: torch.dtype, count: int, seed: int) -> Iterator[Built]:
    """Random programs: the same ones every time."""
    for steps, shapes, policy in _programs(count, seed):
        examples = [image(*shape, seed=number, dtype=dtype) for number, shape in enumerate(shapes)]
        yield randomised(program(steps, examples), seed, dtype), examples, policy


def _programs(count: int, seed: int) -> list[Any]:
    found: list[Any] = []

    @hypothesis.seed(seed)
    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.tuples(STEPS, st.sampled_from(EXAMPLES), st.sampled_from(Policy)))
    def collect(made: Any) -> None:
        found.append(made)

    collect()
    return found


def counted(networks: Iterator[Built]) -> Counter[str]:
    """Count the verdicts on all that run in their dtype on this machine and do not return 0 for whatever there is."""
    return Counter(judged(built) for built in networks if runs(built))


def runs(built: Built) -> bool:
    try:
        return any(bool(x.any()) for x in outputs(built[0], *built[1]))
    except (NotImplementedError, RuntimeError) as error:
        assert "not implemented for" in str(error)
        return False


def checkpoint(module: nn.Module, example: list[Tensor]) -> Checkpoint:
    return Checkpoint(module, tuple(example), "pt", Path(), "", None, "given", ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_of_random_networks(dtype: torch.dtype) -> None:
    seen = counted(drawn(dtype, 4, seed=0))
    assert seen["same"] > 1 and not seen["refused"], seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sample_of_the_blocks(dtype: torch.dtype) -> None:
    number = DTYPES.index(dtype)
    seen = counted(islice(blocks(dtype, range(1)), number, None, 76))
    assert seen["same"] > 1 and not seen["refused"], seen  # for one the gain may be too small in another dtype


@pytest.mark.slow
@DTYPE
@pytest.mark.parametrize("seed", range(6))
def test_a_thousand_random_networks(dtype: torch.dtype, seed: int, record_property: Callable[..., None]) -> None:
    """Of each dtype; on what is told of them there is a bound too, since who never tells is never wrong."""
    seen = counted(drawn(dtype, 170, seed=1 + seed))
    record_property("verdicts", dict(seen))
    assert seen["could-not-tell"] <= seen["same"] / 10 and not seen["refused"], seen


@pytest.mark.slow
@DTYPE
@pytest.mark.parametrize("seed", range(3))
def test_all_blocks(dtype: torch.dtype, seed: int, record_property: Callable[..., None]) -> None:
    seen = counted(blocks(dtype, range(seed, seed + 1)))
    record_property("verdicts", dict(seen))
    assert seen["same"] > 150 and seen["could-not-tell"] <= seen["same"] / 20 and not seen["refused"], seen


@pytest.mark.slow
def test_untraceable_networks(record_property: Callable[..., None]) -> None:
    seen = counted(untraceable(torch.float64, range(100)))
    record_property("verdicts", dict(seen))
    assert seen["same"] > 50, seen
