"""What is changed: one small change of a file at a time, each a mutant.

The changes are mutmut's. ``mutmut run`` itself would miss half of what matters here: it leaves out decorated functions,
and all that ``Geometry`` says are properties, and everything outside functions, where the operator tables are. For the
tables there are two changes more: a row less, and the last two argument names of a signature swapped.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcst as cst
from libcst import matchers as m
from libcst.metadata import CodePosition, MetadataWrapper, PositionProvider
from mutmut.mutation import mutators

Change = Callable[[Any], Iterable[cst.CSTNode]]

# What decides: all of it is tried.
_DECISIONS: list[tuple[type[cst.CSTNode], Change]] = [
    (cst.BaseNumber, mutators.operator_number),
    (cst.Name, mutators.operator_name),
    (cst.AugAssign, mutators.operator_augmented_assignment),
    (cst.UnaryOperation, mutators.operator_remove_unary_ops),
    (cst.CSTNode, mutators.operator_keywords),
    (cst.CSTNode, mutators.operator_swap_op),
    (cst.Match, mutators.operator_match),
    (cst.IfExp, mutators.operator_if_exp),
]


def _other_string(node: cst.SimpleString) -> list[cst.CSTNode]:
    return list(mutators.operator_string(node))[:1]


# What nearly always ends in an exception: an argument or a value is None, a string is another. A sample is enough.
_BLUNT: list[tuple[type[cst.CSTNode], Change]] = [
    (cst.Assign, mutators.operator_assignment),
    (cst.AnnAssign, mutators.operator_assignment),
    (cst.Call, mutators.operator_arg_removal),
    (cst.Lambda, mutators.operator_lambda),
    (cst.SimpleString, _other_string),
]

_MESSAGES = m.OneOf(*map(m.Name, ("Unfusible", "NotAffine", "ValueError", "AssertionError")))
_SKIPPED = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Assert)
_TABLES = (cst.Dict, cst.Tuple, cst.List, cst.Set)


@dataclass(frozen=True, eq=False)
class Mutant:
    """A file with one change; ``key`` stays the same as long as the file does."""

    path: str
    line: int
    kind: str
    blunt: bool
    key: str
    tree: cst.Module
    node: cst.CSTNode
    changed: cst.CSTNode

    def source(self) -> str:
        """Return the whole mutated file."""
        return self.tree.deep_replace(self.node, self.changed).code  # type: ignore[arg-type, union-attr]

    def __str__(self) -> str:
        old, new = self.tree.code.splitlines(), self.source().splitlines()
        lines = (line for line in difflib.ndiff(old, new) if line.startswith(("+", "-")))
        return "\n".join([f"{self.path}:{self.line} [{self.kind}]", *(f"  {line}" for line in lines)])


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Yield every mutant of a file."""
    code = path.read_text()
    tree = MetadataWrapper(cst.parse_module(code))
    visitor = _Changes()
    tree.visit(visitor)
    for node, start, kind, changed, blunt in visitor.found:
        if isinstance(node, cst.Call) and _lacks_strict(node, changed):
            continue
        told = (path, start.line, start.column, kind, tree.module.code_for_node(changed), code)
        key = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
        yield Mutant(str(path), start.line, kind, blunt, key, tree.module, node, changed)


class _Changes(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[cst.CSTNode, CodePosition, str, cst.CSTNode, bool]] = []
        self.inside = 0

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, _SKIPPED) or m.matches(node, m.If(test=m.Name("TYPE_CHECKING"))):
            return False
        if isinstance(node, cst.Expr) and isinstance(node.value, cst.SimpleString):
            return False  # a docstring
        if m.matches(node, m.Assign(targets=[m.AssignTarget(target=m.Name("__all__"))])):
            return False
        if m.matches(node, m.Call(func=_MESSAGES)):
            return self._code_of(node)
        if m.matches(node, m.Arg(keyword=m.Name("strict"))):
            return False
        for kinds, blunt in ((_DECISIONS, False), (_BLUNT, True)):
            for kind, change in kinds:
                if isinstance(node, kind):
                    self._add(node, change.__name__, change(node), blunt)
        if not self.inside:
            self._add(node, "row", _rows(node), False)
            self._add(node, "words", _words(node), False)
        self.inside += isinstance(node, cst.FunctionDef)
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        self.inside -= isinstance(original_node, cst.FunctionDef)

    def _code_of(self, node: Any) -> bool:
        """Change the code of a refusal, and not what it says to people."""
        if m.matches(node, m.Call(args=[m.AtLeastN(m.Arg(), n=2)])) and isinstance(
            node.args[0].value, cst.SimpleString
        ):
            code = node.args[0].value
            self._add(code, "code", _other_string(code), False)
        return False

    def _add(self, node: cst.CSTNode, kind: str, changes: Iterable[cst.CSTNode], blunt: bool) -> None:
        start = self.get_metadata(PositionProvider, node).start
        self.found += ((node, start, kind.removeprefix("operator_").strip("_"), changed, blunt) for changed in changes)


def _lacks_strict(node: cst.Call, changed: Any) -> bool:
    """Whether all that is gone is ``strict=True``, a check of the code itself."""
    strict = [arg for arg in node.args if m.matches(arg, m.Arg(keyword=m.Name("strict")))]
    return any(arg not in changed.args for arg in strict)


def _rows(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """Drop one row of a table."""
    if isinstance(node, _TABLES) and len(node.elements) > 1:
        for place in range(len(node.elements)):
            yield node.with_changes(elements=[*node.elements[:place], *node.elements[place + 1 :]])


def _words(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """Swap the last two words of a string, which are two arguments."""
    if isinstance(node, cst.SimpleString) and " " in node.value:
        quote = node.value[0]
        *first, one, other = node.value.strip(quote).split()
        yield node.with_changes(value=f"{quote}{' '.join([*first, other, one])}{quote}")
