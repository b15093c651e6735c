"""Which of a file's names are those of a network: the reading of the names with which the network fits exactly.

Readings are tried from the plainest to the furthest: the names as they are, without a prefix, and without the wrappers
inside them. What no reading fits is an error later, said of the nearest one; nothing is dropped to make it fit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from repfuse.checkpoint.choice import Chosen
from repfuse.checkpoint.naming import WRAPPERS, Naming, without, wrapped_in
from repfuse.checkpoint.weights import ties
from repfuse.errors import RepfuseError

LEVELS = ((), ("_orig_mod",), WRAPPERS)  # that is no name which people give; `module` may be one
AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged?)([._]|$)")
COUNTER = "n_averaged"  # what AveragedModel adds to the state dict
ANCHORS = 4  # names of the network whose place in the file says what the prefix is
PREFIXES = 64  # more than any file has networks; each is compared name by name


class Expected(NamedTuple):
    """What a network's own state dict holds: names with shapes (None: no tensor), and names that share a tensor."""

    shapes: dict[str, tuple[int, ...] | None]
    ties: list[list[str]]

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Say whether ``state`` has these names with these shapes and no others; of a tie one name will do."""
        missing = self.shapes.keys() - state.keys()
        tied = {name for group in self.ties if state.keys() & group for name in group}
        if state.keys() - self.shapes.keys() or missing - tied:
            return False
        return all(_shape(state[name]) == shape for name, shape in self.shapes.items() if name in state)


def expected_of(network: nn.Module) -> Expected:
    """Return what the state dict of ``network`` holds."""
    return Expected({name: _shape(value) for name, value in network.state_dict().items()}, ties(network))


def fit(state: Mapping[str, Any], network: nn.Module, chosen: Chosen, about: str) -> Naming:
    """Return how ``state`` names the weights of ``network``; where nothing fits exactly, the nearest reading.

    Raises RepfuseError, which begins with ``about``, where several of its networks fit, and where ``chosen`` asks for
    one of them that is not there.
    """
    expected = expected_of(network)
    for wrappers in LEVELS:
        readings = list(_readings(state, expected, wrappers))
        fitting = [naming for naming in readings if expected.fits(naming.of_network(state))]
        wanted = [naming for naming in fitting if _is_wanted(naming, state, chosen)]
        if len(wanted) > 1:
            raise _ambiguous(wanted, chosen, about)
        if wanted:
            return _with_rest(wanted[0], state, fitting)
        if fitting:
            raise _not_there(fitting, chosen, about)
    return _nearest(state, expected, chosen, about)


def _readings(state: Mapping[str, Any], expected: Expected, wrappers: tuple[str, ...]) -> Iterator[Naming]:
    wrapped = wrapped_in(state, wrappers)
    if wrapped is None or bool(wrappers) != bool(wrapped):
        return
    names = [without(name, wrappers) for name in state]
    for prefix in _prefixes(names, expected):
        yield Naming(prefix, wrapped)


def _prefixes(names: list[str], expected: Expected) -> list[str]:
    """Return what may stand before the network's names: nothing, else what stands before most of the anchors."""
    every = list(expected.shapes)
    found: Counter[str] = Counter()
    for anchor in {*every[:ANCHORS], *every[-ANCHORS:]}:
        found.update(name[: -len(anchor)] for name in names if name.endswith(f".{anchor}"))
    return ["", *sorted(prefix for prefix, _ in found.most_common(PREFIXES))]


def _is_wanted(naming: Naming, state: Mapping[str, Any], chosen: Chosen) -> bool:
    before = naming.in_file("")
    if chosen.kind == "auto":
        return before.startswith(chosen.prefix)
    counters = (name.removesuffix(COUNTER) for name in state if name.endswith(COUNTER))
    averaged = bool(AVERAGED.search(before)) or any(before.startswith(counter) for counter in counters)
    return averaged == (chosen.kind == "ema")


def _with_rest(naming: Naming, state: Mapping[str, Any], fitting: list[Naming]) -> Naming:
    """Return ``naming`` with the entries that are no part of the network, less the other copies of it."""
    copies = tuple(other.in_file("") for other in fitting if other != naming)
    own = {naming.in_file(name) for name in naming.of_network(state)}
    rest = {name: held for name, held in state.items() if name not in own and not name.startswith(copies)}
    return replace(naming, extras=rest, copies=copies)


def _nearest(state: Mapping[str, Any], expected: Expected, chosen: Chosen, about: str) -> Naming:
    readings = [naming for wrappers in LEVELS for naming in _readings(state, expected, wrappers)]
    wanted = [naming for naming in readings if _is_wanted(naming, state, chosen)]
    if not wanted:
        raise _not_there([], chosen, about)
    best = max(wanted, key=lambda naming: len(expected.shapes.keys() & naming.of_network(state).keys()))
    return _with_rest(best, state, [])


def _ambiguous(fitting: list[Naming], chosen: Chosen, about: str) -> RepfuseError:
    return RepfuseError(
        f"{about} several networks that fit.",
        f"Their names begin with {' and '.join(repr(naming.in_file('')) for naming in fitting)}.",
        f"Choose one: {_options(fitting, chosen)}.",
    )


def _not_there(fitting: list[Naming], chosen: Chosen, about: str) -> RepfuseError:
    asked = f"names that begin with {chosen.prefix!r}" if chosen.kind == "auto" else f"--weights {chosen.kind}"
    found = " or ".join(repr(naming.in_file("")) for naming in fitting)
    why = f"What fits the network has names that begin with {found}." if fitting else ""
    return RepfuseError(
        f"{about} no weights for {asked}.", why, f"Leave --weights out, or give {_options(fitting, chosen)}."
    )


def _options(fitting: list[Naming], chosen: Chosen) -> str:
    keys = (".".join((*chosen.way, naming.in_file("")[:-1])) for naming in fitting)
    return " or ".join(f"--weights {key}" for key in keys if key) or "--weights auto"


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if hasattr(value, "shape") else None
