"""Which modules of a model cannot be traced and are convolutions all the same."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from repfuse.errors import RepfuseError
from repfuse.globs import as_globs, first_match, names_of
from repfuse.planning.choosing import Choice, choose
from repfuse.plans import Plan
from repfuse.probing import Refused
from repfuse.rewriting.stand_ins import Opened, StandIn, opened, put, read
from repfuse.tracing.arguments import Arguments
from repfuse.tracing.leaves import hooks_of
from repfuse.tracing.parts import trace_parts
from repfuse.verifying.copies import as_stored, copy_with
from repfuse.wording import described


def open_and_choose(module: nn.Module, example: Sequence[Any], choice: Choice, *, probe: bool) -> tuple[Opened, Plan]:
    """Return what is wanted of a model, and the model that it is planned for: with stand-ins, if ``probe`` asks so.

    Those are the plan's, where one is given, else all that there can be. Raises RepfuseError where the plan does not
    fit, or has stand-ins and nobody asked for them.
    """
    given = choice.plan
    if given is not None and given.probed and not probe:
        raise RepfuseError(
            f"The plan replaces {given.probed[0].path!r}, which cannot be traced.",
            "Probing alone vouches for the convolution in its place, and you did not ask for that.",
            "Say --probe (probe=True), or make the plan again.",
        )
    if given is not None:
        model = opened(module, given.probed)
    else:
        model = open_up(module, example, as_globs(choice.exclude)) if probe else Opened(module)
    return model, _noted(choose(model.module, example, choice), model)


def open_up(module: nn.Module, example: Sequence[Any], exclude: Collection[str] = ()) -> Opened:
    """Return ``module`` with a stand-in for each module that cannot be traced and is a convolution, by all evidence.

    The outermost first, but not the model itself; not those that a glob of ``exclude`` names, nor those for which one
    convolution would take more multiply-accumulates. ``module`` is unchanged.
    """
    accepted: list[StandIn] = []
    refused: dict[str, str] = {}
    for path, call in _calls(module, example, exclude):
        if any(path.startswith(f"{one.probed.path}.") for one in accepted):
            continue
        try:
            accepted.append(_judged(module, path, call, accepted, example))
        except Refused as error:
            refused[path] = str(error)
    return replace(put(module, accepted), refused=refused) if accepted else Opened(module, refused=refused)


def _noted(plan: Plan, opened: Opened) -> Plan:
    """Return the plan of an opened model with its stand-ins, and what probing found of other untraceable modules."""

    def reason(where: str, why: str) -> str:
        return f"{why}; probed, it is no convolution: {opened.refused[where]}" if where in opened.refused else why

    refusals = tuple(
        replace(one, reason=reason(one.where, one.reason)) if one.code == "untraceable" else one
        for one in plan.refusals
    )
    return replace(plan, refusals=refusals, probed=opened.probed)


Call = list[tuple[tuple[Any, ...], dict[str, Any]]]


def _calls(module: nn.Module, example: Sequence[Any], exclude: Collection[str]) -> Iterator[tuple[str, Call]]:
    """Yield the modules that cannot be traced, the outermost first, with the arguments of each call."""
    found = trace_parts(module, Arguments(tuple(example)))
    exported = {part.path for part in found.exports}
    paths = [path for path in found.opaque if path and path not in exported]
    paths = [path for path in paths if first_match(names_of(path), exclude) is None]
    if not paths:
        return
    copied = copy_with(module, as_stored)
    calls: dict[str, Call] = {path: [] for path in paths}
    for path, seen in calls.items():
        hook = copied.get_submodule(path).register_forward_pre_hook
        hook(lambda _m, args, kwargs, seen=seen: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        copied(*(x.clone() if isinstance(x, Tensor) else x for x in example))
    yield from sorted(calls.items(), key=lambda call: call[0].count("."))


def _judged(module: nn.Module, path: str, call: Call, accepted: Sequence[StandIn], example: Sequence[Any]) -> StandIn:
    """Return the stand-in for one module. Raises Refused with the reason why there is none."""
    block = module.get_submodule(path)
    x = _input(call)
    if any(map(hooks_of, block.modules())):
        raise Refused("it has hooks")
    found = read(block, path, x.shape[1], x.dim() - 2)
    if _multiplications(found, x) > _multiplications_of(block, x):
        raise Refused("one convolution would take more multiply-accumulates")
    with torch.no_grad():
        try:
            put(module, [*accepted, found]).module(*(x.clone() if isinstance(x, Tensor) else x for x in example))
        except Exception as error:  # whatever a forward that reaches into the module may raise
            raise Refused(f"the model does not run without it ({described(error)})") from error
    return found


def _input(call: Call) -> Tensor:
    """Return the one tensor that the module is called with."""
    given = [[*args, *kwargs.values()] for args, kwargs in call]
    if not given or any(len(values) != 1 for values in given):
        raise Refused("it is not called with one tensor")
    x = given[0][0]
    if not isinstance(x, Tensor) or not x.is_floating_point() or not 2 <= x.dim() <= 5:
        raise Refused("it is not called with a map of channels")
    return x


def _multiplications(found: StandIn, x: Tensor) -> int:
    geometry = found.geometry
    output = (x.shape[0], geometry.out_channels, *geometry.output_size(tuple(x.shape[2:])))
    return geometry.macs(tuple(x.shape), output)


def _multiplications_of(block: nn.Module, x: Tensor) -> int:
    """Return the multiply-accumulates of one call, a multiplication counted per element where there is no product."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = copy_with(block, as_stored)(x.clone())
    return int(counter.get_total_flops()) // 2 + (int(y.numel()) if isinstance(y, Tensor) else 0)
