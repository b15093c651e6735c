"""recording -> scales: which numbers each tensor of a network may be multiplied with while nothing else changes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from repfuse.equalizing.laws import Fixed, law_of
from repfuse.equalizing.solving import Along, Numbers, Part, Scales
from repfuse.ops.channels import only_measures
from repfuse.ops.meaning import Meaning, Passage, convolves, inputs_of
from repfuse.ops.spelling import makes_zeros
from repfuse.ops.table import meaning_of
from repfuse.plans import Refusal
from repfuse.recording.recording import Recording


@dataclass(frozen=True)
class Freedom:
    """``parts`` are the tensors that have scales, whose numbers are 0 to ``count``, number 0 being 1; ``refusals`` say
    why other values have none.
    """

    parts: tuple[Part, ...]
    count: int
    refusals: tuple[Refusal, ...]


def freedom(recording: Recording) -> Freedom:
    """Return the scales of a network: those of its inputs and outputs, and of all that depends on these, are 1."""
    return Reading(recording).run()


class Reading:
    """Goes through the nodes in order. ``along`` are values with scales, ``parts`` the tensors, by one name each."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.scales = Scales()
        self.along: dict[fx.Node, Along] = {}
        self.parts: dict[str, Part] = {}
        self.writers: dict[str, set[fx.Node]] = defaultdict(set)
        self.refusals: dict[tuple[str, str], Refusal] = {}
        self.meanings: dict[fx.Node, Meaning | None] = {node: meaning_of(node, recording) for node in recording.nodes}
        tensors = recording.constants.tensors
        first: dict[int, str] = {}
        self.name_of = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
        self.changeable = _changeable(recording, self.name_of)
        self.before_layers: set[fx.Node] = set()
        for node in reversed(recording.nodes):
            if any(user in self.before_layers or convolves(self.meanings.get(user)) for user in node.users):
                self.before_layers.add(node)

    # What laws are given

    def of(self, node: fx.Node) -> Along | None:
        """Return the scales of a value, None where they are 1."""
        return self.along.get(node)

    def data(self, node: fx.Node) -> list[fx.Node]:
        """Return the values that a node reads, constants apart."""
        known = self.recording.shape_of, self.recording.constants
        return [x for x in node.all_input_nodes if x in known[0] and not known[1].is_constant(x)]

    def write(self, node: fx.Node, *parts: Part) -> None:
        """Let the law of a node change tensors. Raises Fixed where one of them is not to be changed."""
        for part in parts:
            if self.name_of.get(part.name) not in self.changeable:
                raise Fixed(
                    "unwritable-weight", f"{part.name.removeprefix('%')} is no tensor that can be changed alone"
                )
        for part in parts:
            name = self.name_of[part.name]
            known = self.parts.setdefault(name, replace(part, name=name))
            if known.fits(part):
                self.scales.tie(known.times, part.times)
                self.scales.tie(known.over, part.over)
            else:
                self._fix_part(known)
                self._fix_part(part)
            self.writers[name].add(node)

    # The walk

    def run(self) -> Freedom:
        """Go through all nodes."""
        recording = self.recording
        for node in recording.nodes:
            idle = node.op in ("placeholder", "get_attr") or recording.constants.is_constant(node)
            if not idle and not self._reads_nothing(node):
                self._read(node)
        calls = [call for calls in recording.calls.values() for call in calls]
        asked = {node for call in calls for question in call.questions for node in question.nodes}
        self._fix("decides-by-value", "its forward asks what numbers a tensor holds", *asked)
        held = {*recording.escaping, *(node for call in calls for node in call.stored)}
        self._fix("fixed-scale", "something outside of the network may read it", *held)
        (output,) = recording.graph.find_nodes(op="output")
        self._fix("fixed-scale", "the network returns it", *output.all_input_nodes)
        self._fix_read_elsewhere(asked | held)
        return self._found()

    def _read(self, node: fx.Node) -> None:
        """Take in what a node gives, and what its law asks of others."""
        meaning = self.meanings[node]
        if isinstance(meaning, Passage):  # its reader names what it reads
            return
        try:
            self._check(node, meaning)
            found = law_of(node, meaning)(node, meaning, self)
            self._check_written(node, found)
        except Fixed as error:
            if convolves(meaning) and node in self.before_layers:
                self._refuse(error.code, error.reason, node)
            self._fix(error.code, error.reason, *node.all_input_nodes, *inputs_of(meaning), at=node)
            if node in self.recording.run.writes:
                self._fix(error.code, error.reason, *self.recording.memory.members(node), at=node)
        else:
            if found is not None:
                self.along[node] = found

    def _check(self, node: fx.Node, meaning: Meaning | None) -> None:
        """Raise Fixed where a node may do something else than was seen."""
        recording = self.recording
        marks = [
            recording.mark_of(node),
            *(recording.between(x, node) for x in (*node.all_input_nodes, *inputs_of(meaning))),
        ]
        if recording.foreign.get(node):
            marks.append(("changes-with-size", "it is given other tensors at other sizes"))
        if mark := next((mark for mark in marks if mark), None):
            raise Fixed(*mark)
        dtype = recording.dtype_of.get(node)
        if dtype is None or not dtype.is_floating_point:
            raise Fixed("not-homogeneous", "it gives no numbers with a point")

    def _check_written(self, node: fx.Node, found: Along | None) -> None:
        """Raise Fixed where a node writes, into memory that others may share, what has other scales than was there."""
        if node not in self.recording.run.writes:
            return
        target = next(iter(node.all_input_nodes))
        before = self.along.get(target)
        own = self.recording.run.writes[node] == {self.recording.run.storage_of.get(target)}
        alike = own and before is not None and found is not None and before.axis == found.axis
        if not alike or not np.array_equal(self.scales.of(before.scales), self.scales.of(found.scales)):  # type: ignore[union-attr]
            raise Fixed("in-place", "it writes into a tensor")

    def _reads_nothing(self, node: fx.Node) -> bool:
        """Whether a node takes no more of its inputs than their sizes and dtypes."""
        run = self.recording.run
        return node in run.size_of or node in run.attribute_of or makes_zeros(node)

    def _fix(self, code: str, reason: str, *nodes: fx.Node, at: fx.Node | None = None) -> None:
        """Let the scales of these be 1; that is a refusal where layers come before and after."""
        for node in nodes:
            if at is not None and only_measures(at, node):
                continue
            if isinstance(meaning := self.meanings.get(node), Passage):
                self._fix(code, reason, *meaning.inputs, at=at)
            elif node in self.along:
                scales = self.along[node].scales
                if node in self.before_layers and self.scales.of(scales).any():
                    self._refuse(code, reason, at or node)
                self.scales.fix(scales)

    def _refuse(self, code: str, reason: str, node: fx.Node) -> None:
        where = self.recording.where(node)
        self.refusals.setdefault((code, where), Refusal(code, where, reason))

    def _fix_part(self, part: Part) -> None:
        self.scales.fix(part.times)
        self.scales.fix(part.over)

    def _fix_read_elsewhere(self, unseen: set[fx.Node]) -> None:
        """Leave tensors alone that something reads for which no law has said what becomes of them; what depends on
        them alone may be read ``unseen``.
        """
        for node in self.recording.nodes:
            name = self.name_of.get(str(node.target)) if node.op == "get_attr" else None
            if name not in self.parts or self._readers(node, unseen) <= self.writers[name]:
                continue
            part, reason = self.parts[name], "it is read in another way, too"
            if any(self.scales.of(side).any() for side in (part.times, part.over)):
                self.refusals.setdefault(("unwritable-weight", name), Refusal("unwritable-weight", name, reason))
            self._fix_part(part)

    def _readers(self, node: fx.Node, unseen: set[fx.Node]) -> set[fx.Node]:
        """Return what reads a tensor, or what is computed of it alone; itself, where that is ``unseen``."""
        found = {node} & unseen
        for user in node.users:
            constant = user.op != "output" and self.recording.constants.is_constant(user)
            found |= self._readers(user, unseen) if constant else set() if self._reads_nothing(user) else {user}
        return found

    def _found(self) -> Freedom:
        parts = [
            replace(part, times=self.scales.of(part.times), over=self.scales.of(part.over))
            for part in self.parts.values()
        ]
        parts = [part for part in parts if part.times.any() or part.over.any()]
        known = np.unique(np.concatenate([[0], *(side.ravel() for part in parts for side in (part.times, part.over))]))

        def numbered(scales: Numbers) -> Numbers:
            return np.searchsorted(known, scales)

        parts = [replace(part, times=numbered(part.times), over=numbered(part.over)) for part in parts]
        return Freedom(tuple(parts), len(known) - 1, tuple(self.refusals.values()))


def _changeable(recording: Recording, name_of: dict[str, str]) -> set[str]:
    """Return the names of tensors that nothing else shares memory with, or may read unseen."""
    tensors: dict[str, Tensor] = recording.constants.tensors
    unsure = {name_of.get(name) for name in (*recording.elsewhere, *recording.run.replaced)}
    shared: dict[Any, set[str]] = defaultdict(set)
    for name, first in name_of.items():
        if tensors[name].layout is torch.strided:
            shared[tensors[name].untyped_storage().data_ptr()].add(first)
    alone = {name for names in shared.values() if len(names) == 1 for name in names}
    return {name for name in alone - unsure if tensors[name].is_floating_point()}
