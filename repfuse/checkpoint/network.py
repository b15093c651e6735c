"""From an opened file to a network that runs: its classes restored, or built by its source and filled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from repfuse.checkpoint import deploy
from repfuse.checkpoint.build import build
from repfuse.checkpoint.contents import no_network
from repfuse.checkpoint.fitting import Naming, fit, load_weights, match_dtype
from repfuse.checkpoint.inert import module_state, tensors_of_record
from repfuse.checkpoint.recipe import Recipe, check_buildable
from repfuse.checkpoint.recognise import damaged
from repfuse.checkpoint.revive import revive
from repfuse.checkpoint.source import FORMS, ModelSource
from repfuse.errors import RepfuseError
from repfuse.networks import in_training, set_eval
from repfuse.wording import listed

if TYPE_CHECKING:
    from collections import OrderedDict
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from repfuse.checkpoint.opening import Opened
    from repfuse.checkpoint.user_code import Named
    from repfuse.plans import Plan

    Replay = Callable[[nn.Module, Plan], nn.Module]


NESTED = 200  # modules in modules: Python itself runs no deeper network


@dataclass(frozen=True)
class Network:
    """A network in eval mode with its weights; ``source`` and ``plans`` say how it was built, where it was.

    ``naming`` is how the file names its weights.
    """

    module: nn.Module
    source: ModelSource | None = None
    plans: tuple[Plan, ...] = ()
    notes: tuple[str, ...] = ()
    naming: Naming = Naming()  # noqa: RUF009 - it is frozen


def built(opened: Opened, source: ModelSource | None, named: Named, replay: Replay, *, trust: bool) -> Network:
    """Return the network of the file.

    ``replay`` applies a plan to a network: a fused one is built by its source, and then fused as it was before.
    Raises RepfuseError where it cannot be built, or where its weights do not fit.
    """
    state = opened.contents.state
    if state is None:
        return _restored(opened, source, named, replay)
    recipe = opened.recipe
    plans = recipe.plans if recipe else ()
    return _filled(opened, state, source or _source_of(opened, recipe, named, trust=trust), replay, plans)


def _restored(opened: Opened, source: ModelSource | None, named: Named, replay: Replay) -> Network:
    try:
        module = revive(opened.contents.module, opened.path, named)
    except RepfuseError as refused:
        if source is None:
            if module_state(opened.contents.module) is not None:
                refused.hint += " Or give --model: then only the weights are taken from the file."
            raise
        tensors, hidden = tensors_of_record(opened.contents.module)
        for name in hidden:
            del tensors[name]
        note = f"only the weights are taken from the file, the network is {source}: {refused.why}"
        network = _filled(opened, tensors, source, replay)
        return replace(network, notes=(note, *network.notes))
    notes = (f"the file holds its network itself: {source.spec} is not used",) if source else ()
    if not isinstance(module, nn.Module):
        raise no_network(opened.path, f"It holds one object of type {type(module).__name__}.")
    if any(name.count(".") > NESTED for name, _ in module.named_modules()):
        raise damaged(opened.path, "its modules hold each other without end")
    before = in_training(module)
    set_eval(module)
    return Network(module, notes=(*notes, *_mode_notes(before, in_training(module))))


def _mode_notes(before: list[str], still: list[str]) -> Iterator[str]:
    """Say which modules were in training mode when they were saved, and which are in it whatever they are told."""
    if turned := [name or "the network" for name in before if name not in still]:
        was = f"{listed(turned)} {'was' if len(turned) == 1 else 'were'}"
        yield f"{was} in training mode: all of the network is used in eval mode"
    if still:
        yield f"in training mode, and staying in it after eval(): {listed([name or 'the network' for name in still])}"


def _filled(
    opened: Opened, state: OrderedDict[str, Tensor], source: ModelSource, replay: Replay, plans: tuple[Plan, ...] = ()
) -> Network:
    """Build the network, fuse it as it was fused before, and only then load the weights."""
    module = build(source, opened.path)
    set_eval(module)
    match_dtype(module, state)
    for plan in plans:
        module = replay(module, plan)
    naming = fit(state, module, opened.contents.chosen, f"{opened.path} holds")
    weights = naming.of_network(state)
    deploy.check(weights, module.state_dict(), source, str(opened.path))
    match_dtype(module, weights)
    notes = load_weights(module, weights, opened.path, str(source))
    return Network(module, source, plans, (*naming.notes(), *notes), naming)


def _source_of(opened: Opened, recipe: Recipe | None, named: Named, *, trust: bool) -> ModelSource:
    if recipe is None or recipe.source is None:
        names = list(opened.contents.state or ())
        made_of = recipe.made_of if recipe else ""
        raise RepfuseError(
            f"{opened.path} holds weights, and not the network that they belong to.",
            f"It is a state dict with {len(names)} entries: {', '.join(names[:4])}, ...",
            f"Say how to build the network: --model {made_of or FORMS}.",
        )
    if not trust:
        check_buildable(recipe.source, opened.path, named)
    return recipe.source
