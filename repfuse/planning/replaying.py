"""plan + module -> the edits again: from the planner that made the plan, or from a new recording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from repfuse.errors import RepfuseError
from repfuse.globs import ROOT
from repfuse.networks import is_plain, named_modules, own_tensors
from repfuse.planning.edits import Candidate, Layout, owner_of, place_of
from repfuse.planning.planner import Planner
from repfuse.plans import AGAIN, Key, Plan, Site
from repfuse.recording.arguments import Arguments, recreate
from repfuse.recording.recording import record
from repfuse.recording.stock import hooks_of

# Which of the places in a network a plan still holds: whoever edits a plan may drop sites, and nothing else.


def kept(planner: Planner, sites: list[Site]) -> list[Candidate]:
    """Return the candidates that a plan with these sites still holds. Raises RepfuseError where it holds others.

    A plan names a site once; in the other calls of its owner it stands at the same place. Several sites of one sum
    stand and fall together: each is written as a part of it.
    """
    wanted = {site.key for site in sites}
    known = {key for candidate in planner.candidates for key in _keys(planner, candidate)}
    if unknown := [site for site in sites if site.key not in known]:
        raise other_sites(unknown)
    for candidate in planner.candidates:
        if 0 < len(_keys(planner, candidate) & wanted) < len(candidate.groups):
            raise _half_a_sum(planner, candidate, wanted)
    places = {_place(planner, candidate) for candidate in planner.candidates if _keys(planner, candidate) <= wanted}
    return [candidate for candidate in planner.candidates if _place(planner, candidate) in places]


def other_sites(sites: Sequence[Site]) -> RepfuseError:
    """Return the error for sites of a plan that the model does not have."""
    return RepfuseError(
        f"The plan names {len(sites)} sites that this model does not have, such as {sites[0].path or ROOT}.",
        "The model is another one, or the plan was edited by more than dropping sites.",
        AGAIN,
    )


def _half_a_sum(planner: Planner, candidate: Candidate, wanted: set[Key]) -> RepfuseError:
    kept, _, _ = next(iter(_keys(planner, candidate) & wanted))
    return RepfuseError(
        f"The plan holds only some of the sites of one sum, {planner.recording.where(candidate.region.root)}.",
        f"Several convolutions are written there, one for each tensor that the sum reads; that of {kept!r} is kept.",
        "Keep all sites with this output, or leave all of them out.",
    )


def _keys(planner: Planner, candidate: Candidate) -> set[Key]:
    names = planner.recording.names
    root = names[candidate.region.root]
    return {(names[group.source], root, frozenset(names[node] for node in group.nodes)) for group in candidate.groups}


def _place(planner: Planner, candidate: Candidate) -> tuple[str, tuple[int, ...]]:
    region = candidate.region
    return owner_of(planner.recording, region).path, place_of(planner.recording, region)


@dataclass(frozen=True)
class Replayed:
    """A network with a planner of it, or of one like it, and the edits that the sites of a plan are."""

    module: nn.Module
    planner: Planner
    layout: Layout


def replay(module: nn.Module, plan: Plan) -> Replayed:
    """Return the edits of ``module`` that a plan stands for. Raises RepfuseError where the plan does not fit."""
    planner = _live(module, plan)
    if planner is not None:
        return Replayed(module, planner, planner.lay_out(kept(planner, list(plan.sites))))
    misfit: RepfuseError | None = None
    for fill in (Tensor.zero_, _ones, _noise):
        try:
            planner = _made_again(module, plan, fill)
            return Replayed(module, planner, planner.lay_out(kept(planner, list(plan.sites))))
        except RepfuseError as error:
            misfit = misfit or error
            if planner is None or not planner.recording.depends_on_weights:
                break  # other numbers make no difference
    assert misfit is not None
    raise misfit


def _ones(x: Tensor) -> None:
    x.fill_(1)


def _noise(x: Tensor) -> None:
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))


def _live(module: nn.Module, plan: Plan) -> Planner | None:
    """Return the planner that made the plan, where there is one and the module is still what it planned."""
    planner: Planner | None = plan.live
    if planner is None or planner.keep_affine is not plan.keep_affine:
        return None
    if planner.recording.depends_on_weights and planner.recording.module is not module:
        return None
    planned = planner.recording.module
    return planner if planned is module or _structure(planned) == _structure(module) else None


def _made_again(module: nn.Module, plan: Plan, fill: Callable[[Tensor], object]) -> Planner:
    try:
        recording = record(module, _arguments(module, plan, fill))
    except RepfuseError as error:
        raise _misfit(f"It was made for another model, or one with other shapes: {error.why}") from error
    if recording.fingerprint() != plan.fingerprint:
        raise _misfit("It was made for another model: with other modules or shapes.")
    kept = {"keep_class": plan.keep_class, "keep_affine": plan.keep_affine}
    return Planner(recording, plan.policy, plan.matching_borders, measured=plan.measured, **kept)


def _misfit(why: str) -> RepfuseError:
    return RepfuseError("The plan does not fit this model.", why, AGAIN)


def _arguments(module: nn.Module, plan: Plan, fill: Callable[[Tensor], object]) -> Arguments:
    """Return numbers in the shapes of the plan's example, its floats as the module holds them now."""
    held = next((x for x in chain(module.parameters(), module.buffers()) if x.is_floating_point()), None)
    try:
        args = recreate(plan.arguments, torch.empty(0) if held is None else held, fill)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise RepfuseError("The plan cannot be replayed.", f"Its example is not known: {error}.", AGAIN) from error
    return Arguments(args)


def _structure(module: nn.Module) -> list[tuple[Any, ...]]:
    """Return what a graph of the module depends on, its weights apart: classes, shapes and settings such as strides."""
    return [
        (
            name,
            type(child),
            [(key, tensor.shape) for key, tensor in own_tensors(child).items()],
            {key: value for key, value in vars(child).items() if is_plain(value)},
            len(hooks_of(child)),
        )
        for name, child in named_modules(module)
    ]
