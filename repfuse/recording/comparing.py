"""Runs of one network at several sizes, held against each other call by call.

What is the same in all of them holds for all sizes, as far as no finite number of sizes can prove otherwise: a forward
that decides by a size always the same way is told by that it asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx, nn

from repfuse.recording.run import ModuleCall, Run, Step
from repfuse.recording.sizes import PIECES, SIZE, Decision
from repfuse.recording.stock import is_stock

Mark = tuple[str, str]
"""Why the own operations of a call are left alone: a code of ``repfuse.explanations`` and a reason."""


@dataclass
class _Asked:
    """What a call asked at one place: the decisions of all runs, the answers after which a network ``refused`` its
    input, and how many ``times`` runs of as many axes got there.
    """

    answers: set[Decision] = field(default_factory=set)
    refused: set[bool | None] = field(default_factory=set)
    times: int = 0


class SizeComparison:
    """What other runs say of the ``first``.

    ``alike`` are, for each of its nodes, those of other runs that are the same operation. ``marks`` are the calls that
    did other things at other sizes; ``uneven`` nodes were given other numbers there, and in the place of their
    ``foreign`` operands others. ``at_other_ranks`` and ``uneven_by_rank`` are the same for inputs of another number of
    axes; there, modules of PyTorch's own do as they say, by other functions if need be. ``elsewhere`` are tensors of
    the network that something else reads there.
    """

    def __init__(self, first: Run, module: nn.Module) -> None:
        self.first = first
        self.module = module
        self.alike: dict[fx.Node, list[tuple[Run, Step]]] = defaultdict(list)
        self.marks: dict[ModuleCall, Mark] = {}
        self.uneven: set[fx.Node] = set()
        self.uneven_by_rank: set[fx.Node] = set()
        self.at_other_ranks: dict[fx.Node, list[tuple[Run, Step]]] = defaultdict(list)
        self.foreign: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        self.elsewhere: set[str] = set()
        self.outside: set[int] = set()
        """Tensors from nowhere that other runs met, too: nothing that ran made them."""
        self._asked: dict[tuple[str, int, int], _Asked] = defaultdict(_Asked)
        """By the path and the number of a call, and the place among what that asks."""
        self._runs = 0
        self._sizes: dict[Step, set[fx.Node]] = {}
        """For sizes in runs of another rank, the sizes of the same tensor along the same axis."""
        self._hear(first)

    def add(self, other: Run) -> None:
        """Compare a run at another size."""
        self.outside |= {id(tensor) for tensor in other.unknown.values()}
        match: dict[Any, fx.Node] = {}
        self._align(self.first.root, other.root, match)
        self._compare_operands(match, other)
        for node, mine in match.items():
            self.alike[mine].append((other, node))
        self._find_readers(match, other)
        self._hear(other)
        for call in other.every_call():
            known = self.first.calls.get(call.path, ())
            if call.changes_state and call.number < len(known):
                self.marks.setdefault(known[call.number], WRITES_STATE)

    def add_rank(self, other: Run) -> None:
        """Compare a run on inputs of another number of axes, where a forward may ask for more sizes or for fewer."""
        match: dict[Any, fx.Node] = {}
        self._align(self.first.root, other.root, match, measuring={*self.first.size_of, *other.size_of})
        known: dict[tuple[fx.Node, int], set[fx.Node]] = defaultdict(set)
        for node in self.first.size_of:
            for key in _measured(node, self.first, {}):
                known[key].add(node)
        for step in other.size_of:
            self._sizes[step] = set().union(*(known[key] for key in _measured(step, other, match) if key in known))
        before = set(self.uneven)
        self._compare_operands(match, other)
        self.uneven_by_rank |= self.uneven - before
        self.uneven = before
        for step, mine in match.items():
            self.at_other_ranks[mine].append((other, step))
        for asked, decision in self._decisions(other):
            if decision.question != PIECES:  # by its number, an axis is another one there
                asked.answers.add(decision)

    def cuts(self) -> bool:
        """Whether a value is cut to a length that it has at all sizes so far; or asked for a size, and has fewer axes
        than the inputs along which it is larger at some: pooled to a pixel, say.

        At smaller sizes it may be shorter, and at larger ones longer.
        """
        taking = (node for node in self.first.nodes if getattr(node.target, "__name__", node.target) in _CUTTING)
        asked = {node.args[0] for node in self.first.size_of if node.target == SIZE}
        given = (node for node in self.first.nodes if node.op == "placeholder" and node in self.first.shape_of)
        free = max((sum(self._varies(node)[1:]) for node in given), default=0)
        return free > 0 and (
            any(self._is_cut(node.args[0], node) for node in taking)
            or any(sum((varies := self._varies(x))[1:]) < min(free, len(varies) - 2) for x in asked)
        )

    def _is_cut(self, whole: Any, part: fx.Node) -> bool:
        if isinstance(whole, fx.Node) and whole not in self.first.shape_of and whole.args:
            whole = whole.args[0]  # what was parted into several
        if whole not in self.first.shape_of or part not in self.first.shape_of:
            return False
        before, after = self._varies(whole), self._varies(part)
        return len(after) >= len(before) and sum(after) < sum(before)

    def _varies(self, node: fx.Node) -> list[bool]:
        """Return for each axis of a value whether its size is another at some size of the inputs."""
        return [len(set(sizes)) > 1 for sizes in zip(*self.shapes(node), strict=False)]

    def shapes(self, node: fx.Node) -> list[tuple[int, ...]]:
        """Return the shapes that a value had, at the example and at the other sizes."""
        others = (run.shape_of[other] for run, other in self.alike.get(node, ()) if other in run.shape_of)
        return [self.first.shape_of[node], *others]

    def add_failed(self, failed: Run) -> None:
        """Take note of the last answer before the network refused a size: that is what refuses it.

        What was answered before that another size may be, too, and not be refused.
        """
        for path, number, place in reversed(failed.last_decisions):
            outcome = failed.calls[path][number].decisions[place].outcome
            if outcome is not None:  # a size in the text of an error is none
                self._asked[path, number, place].refused.add(outcome)
                return

    def decided(self, *, leaves: bool) -> Iterator[ModuleCall]:
        """Yield the calls that decide by a size, without that both answers were seen; or that make plain numbers of
        one, if it ``leaves``.
        """
        return self._open(lambda decision: decision.leaves is leaves)

    def decides_by_rank(self) -> bool:
        """Whether a call decides by the number of axes, without that both answers were seen."""
        return any(True for _ in self._open(lambda decision: decision.of_rank and not decision.leaves))

    def _open(self, concerns: Callable[[Decision], bool]) -> Iterator[ModuleCall]:
        """Yield the calls that decide, where this concerns it, without that all answers were seen."""
        found = {key[:2] for key, asked in self._asked.items() if self._is_open(asked, concerns)}
        return (call for call in self.first.every_call() if (call.path, call.number) in found)

    def _is_open(self, asked: _Asked, concerns: Callable[[Decision], bool]) -> bool:
        alike = asked.times == self._runs  # what some runs ask hangs on another answer
        if not asked.times or (alike and len(asked.answers) == 1) or not any(map(concerns, asked.answers)):
            return False
        questions = {(each.question, each.sizes, each.others) for each in asked.answers}
        outcomes = {each.outcome for each in asked.answers} | asked.refused
        return (len(questions) > 1 or not alike) and (None in outcomes or len(outcomes) == 1)

    def _hear(self, run: Run) -> None:
        self._runs += 1
        for asked, decision in self._decisions(run):
            asked.answers.add(decision)
            asked.times += 1

    def _decisions(self, run: Run) -> Iterator[tuple[_Asked, Decision]]:
        for call in run.every_call():
            for place, decision in enumerate(call.decisions):
                yield self._asked[call.path, call.number, place], decision

    def _align(
        self,
        mine: ModuleCall,
        other: ModuleCall,
        match: dict[Any, fx.Node],
        measuring: Collection[fx.Node | ModuleCall] | None = None,
    ) -> None:
        """Match what one call did with what it did in another run, and the calls it made; in one of another rank, if
        nodes for ``measuring`` are given, but for those.
        """
        own, others = (_without(measuring, call.own) for call in (mine, other))
        if len(own) == len(others) and all(map(_is_same_step, own, others)):
            for one, another in zip(own, others, strict=True):
                self._match(one, another, match, measuring)
            return
        if measuring is None or not is_stock(self.module.get_submodule(mine.path)):
            self.marks.setdefault(mine, ("changes-with-size", "its forward does other things at other sizes"))
        inner, seen = defaultdict[str, list[ModuleCall]](list), defaultdict[str, int](int)
        for call in mine.own:
            if isinstance(call, ModuleCall):
                inner[call.path].append(call)
        for item in other.own:
            path = _called(item)
            known = [] if path is None else inner.get(path) or self.first.calls.get(path)
            if path is not None and known:
                place = min(seen[path], len(known) - 1)
                seen[path] += 1
                self._match(known[place], item, match, measuring)

    def _match(self, one: Any, other: Any, match: dict[Any, fx.Node], measuring: Collection[Any] | None) -> None:
        """Match a node with a step, or two calls; or a call with the step that repeats it, or another like it."""
        if type(one) is not ModuleCall:
            match[other] = one
        elif type(other) is ModuleCall:
            self._align(one, other, match, measuring)
        elif same := [node for node in one.own if type(node) is fx.Node and node.target == other.target]:
            match[other] = same[-1]
        else:
            self._gives_others(one)

    def _compare_operands(self, match: dict[Any, fx.Node], other: Run) -> None:
        for node, mine in match.items():
            if mine.op in ("placeholder", "get_attr"):
                if mine.target != node.target:
                    self.uneven.add(mine)
                continue
            self._compare(mine, mine.args, node.args, match)
            if mine.kwargs or node.kwargs:
                self._compare(mine, mine.kwargs, node.kwargs, match)
        self._compare_calls(match, other)

    def _compare_calls(self, match: dict[Any, fx.Node], other: Run) -> None:
        for step in other.nodes:
            call = step.repeats
            if call is None:
                continue
            if not _same_nodes(call.output, step, match):
                self.marks.setdefault(call, _RETURNS_ANOTHER)
            if not _same_nodes(call.args, tuple(step.all_input_nodes), match):
                self._gives_others(call)
        for path, calls in other.calls.items():
            for call, mine_call in zip(calls, self.first.calls.get(path, ()), strict=False):
                if call is mine_call:  # it was repeated
                    continue
                if call.own and mine_call.own and not _same_nodes(mine_call.output, call.output, match):
                    self.marks.setdefault(mine_call, _RETURNS_ANOTHER)
                if not _same_nodes((mine_call.args, mine_call.kwargs), (call.args, call.kwargs), match):
                    self._gives_others(mine_call)

    def _gives_others(self, call: ModuleCall) -> None:
        if call.caller is not None:
            reason = f"its forward gives {call.path!r} another value there"
            self.marks.setdefault(call.caller, ("changes-with-size", reason))

    def _compare(self, node: fx.Node, mine: Any, other: Any, match: dict[Any, fx.Node]) -> None:
        if type(mine) is fx.Node:
            if not self._is_same_value(mine, other, match):
                self.foreign[node].add(mine)
        elif (pairs := _parts(mine, other)) is not None:
            for one, another in pairs:
                if one is not another:
                    self._compare(node, one, another, match)
        elif type(other) is Step or not _equal(mine, other):
            self.uneven.add(node)

    def _is_same_value(self, mine: fx.Node, other: Any, match: dict[Any, fx.Node]) -> bool:
        if type(other) is fx.Node:  # what a call reads that was repeated: a tensor of the network
            return other.target == mine.target
        return type(other) is Step and (match.get(other) is mine or mine in self._sizes.get(other, ()))

    def _find_readers(self, match: dict[Any, fx.Node], other: Run) -> None:
        """Find values, and tensors of the network, that something else reads in the other run."""
        for node in other.nodes:
            mine = match.get(node)
            if mine is None:
                read = [node] if node.repeats is None else node.repeats.own[:-1]
                self.elsewhere.update(str(each.target) for each in read if each.op == "get_attr")
                continue
            others = [user for user in node.users if user not in match]
            if node in other.escaping or any(user.op != "output" for user in others):
                self.first.escaping.add(mine)


WRITES_STATE = "writes-state", "its forward changes what the module holds"
_CUTTING = frozenset({"getitem", "__getitem__", "narrow", "slice"})
_RETURNS_ANOTHER = "changes-with-size", "its forward returns another value there"


def _measured(node: Any, run: Run, match: dict[Any, fx.Node]) -> set[tuple[fx.Node, int]]:
    """Return of which tensor a node is a size, and along which axis, counted from the first and from the last."""
    if node.target != SIZE or len(node.args) != 2 or node.args[0] not in run.shape_of:
        return set()
    x, axis = node.args
    return {(match.get(x, x), axis), (match.get(x, x), axis - len(run.shape_of[x]))}


def _without(some: Collection[Any] | None, items: list[Any]) -> list[Any]:
    return [item for item in items if item not in some] if some else items


def _is_same_step(one: fx.Node | ModuleCall, other: Step | ModuleCall) -> bool:
    """Whether both call one module, or one function, whatever they give it; or read some tensor of the network."""
    if type(one) is ModuleCall or type(other) is ModuleCall or other.repeats is not None:
        return type(one) is ModuleCall and one.path == _called(other)
    return one.op == other.op and (one.op == "get_attr" or one.target == other.target)


def _called(item: Step | ModuleCall) -> str | None:
    """Return the path of the module that was called; None where it was a function."""
    call = item if type(item) is ModuleCall else item.repeats
    return None if call is None else call.path


def _parts(one: Any, other: Any) -> Iterable[tuple[Any, Any]] | None:
    """Return what lies in the same places of two values of one structure; None where they have none, or two."""
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)) and len(one) == len(other):
        return zip(one, other, strict=True)
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return ((value, other[key]) for key, value in one.items())
    if isinstance(one, slice) and isinstance(other, slice):
        return (one.start, other.start), (one.stop, other.stop), (one.step, other.step)
    return None


def _equal(one: Any, other: Any) -> bool:
    try:
        same = one == other
        return type(one) is type(other) and bool(same.all() if isinstance(same, np.ndarray) else same)
    except Exception:  # whatever the comparison of two objects may raise
        return one is other


def _same_nodes(mine: Any, other: Any, match: dict[Any, fx.Node]) -> bool:
    if type(mine) is fx.Node:
        return type(other) is Step and (match.get(other) is mine or other not in match)
    if isinstance(mine, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(mine) == len(other) and all(_same_nodes(a, b, match) for a, b in zip(mine, other, strict=True))
    if isinstance(mine, dict) and isinstance(other, dict):
        return mine.keys() == other.keys() and all(_same_nodes(x, other[key], match) for key, x in mine.items())
    return True
