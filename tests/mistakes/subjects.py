"""Networks with the plan and the right rewrite of each, and the wrong ones made of them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from blocks import CASES, Case
from support.agreement import randomised
from torch import Tensor, nn

from mistakes.damage import DAMAGES, STORED, Damage, Unfit
from mistakes.kernels import FLOOR, Kernel, kernel
from mistakes.making import SLIPS, misread
from repfuse.checking.places import places
from repfuse.errors import RepfuseError
from repfuse.fusing import fuse
from repfuse.plans import Plan, Policy

KINDS = (*DAMAGES, *SLIPS)
"""What may go wrong with what is computed."""

SAMPLES = Path(__file__).parents[2] / "sample_checkpoints"


@dataclass(frozen=True)
class Wrong:
    """A network with one mistake of this ``kind``; ``sites`` are those that compute something else for it.

    None do where it is no mistake: a symmetric kernel may be flipped. ``touched`` are also those that differ by less
    than ``FLOOR``, which a check may or may not see.
    """

    kind: str
    sites: frozenset[str]
    touched: frozenset[str]
    network: nn.Module


@dataclass(frozen=True)
class Subject:
    """A network, its plan and the right rewrite; ``layers`` are the paths of each site's layers, by its name.

    ``make`` makes the same network again.
    """

    name: str
    make: Callable[[], nn.Module]
    original: nn.Module
    example: Sequence[Tensor]
    policy: Policy
    plan: Plan
    fused: nn.Module
    layers: Mapping[str, tuple[str, ...]]

    def paths(self, sites: Collection[str]) -> tuple[str, ...]:
        """Return the paths of the layers of these sites."""
        return tuple(path for site in sites for path in self.layers[site])

    def mistakes(self, kinds: Collection[str] = KINDS) -> Iterator[Wrong]:
        """Yield every mistake of these kinds, in each layer that was written and each that was read."""
        yield from self._damaged({kind: STORED[kind] for kind in kinds if kind in STORED})
        yield from self._misread({kind for kind in kinds if kind in SLIPS})

    def _damaged(self, damages: Mapping[str, Damage]) -> Iterator[Wrong]:
        for path, kind in itertools.product(itertools.chain(*self.layers.values()), damages):
            network = copy.deepcopy(self.fused)
            try:
                network = _put(network, path, damages[kind](network.get_submodule(path)))
            except Unfit:
                continue
            yield self._wrong(kind, network)

    def _misread(self, kinds: Collection[str]) -> Iterator[Wrong]:
        """Yield what a rewrite makes that reads one thing of the original wrongly."""
        for kind, original in misread(self.make, kinds):
            try:
                network = fuse(original, self.example, self.policy).module
                yield self._wrong(kind, network)
            except (RepfuseError, AttributeError, RuntimeError):  # that original is refused, or becomes another network
                continue

    def _wrong(self, kind: str, network: nn.Module) -> Wrong:
        return Wrong(kind, self._differing(network, FLOOR), self._differing(network, 0.0), network)

    def _differing(self, network: nn.Module, floor: float) -> frozenset[str]:
        """Return the sites that compute something else in ``network`` than in the right rewrite."""
        return frozenset(
            site
            for site, paths in self.layers.items()
            if any(_kernel(self.fused, path).differs(_kernel(network, path), floor) for path in paths)
        )


def _kernel(network: nn.Module, path: str) -> Kernel:
    return kernel(network.get_submodule(path))


def _put(network: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Return the network with ``module`` at ``path``."""
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)
    return network


def subject(
    name: str, make: Callable[[], nn.Module], example: Sequence[Tensor], policy: Policy = Policy.COST
) -> Subject:
    """Plan and rewrite the network that is made."""
    original = make()
    made = fuse(original, example, policy)
    found = places(original, made.plan)
    layers = {place.path: tuple(written.path for written in place.written.values()) for place in found}
    return Subject(name, make, original, example, policy, made.plan, made.module, layers)


def block(row: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Subject:
    """Return a block of the zoo, with random numbers."""

    def make() -> nn.Module:
        torch.default_generator.manual_seed(seed)
        return randomised(row.make(), seed, dtype)

    return subject(row.name, make, [x.to(dtype) for x in row.at(row.side)], row.policy)


def sample(name: str, dtype: torch.dtype = torch.float64) -> Subject:
    """Return the network of a sample checkpoint."""

    def make() -> nn.Module:
        return torch.load(SAMPLES / f"{name}.pt", weights_only=False).eval().to(dtype)

    return subject(name, make, [torch.rand(make().input_shape, dtype=dtype)])


CHECKPOINTS = ("notebook_block", "repvgg_digits")
BLOCKS = {row.name: row for row in CASES}
