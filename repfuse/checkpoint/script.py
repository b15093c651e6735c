"""The classes of a script without its work: what a file that was saved from ``__main__`` needs of the script.

A script that stands under ``if __name__ == "__main__":`` is run but for that, as an import would. Of any other one only
the definitions run that a class refers to, and what these refer to: not the training that saved the file.
"""

from __future__ import annotations

import ast
import builtins
import symtable
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

MAIN = "__main__"
WORK = frozenset({"save", "backward", "step", "fit"})  # methods that only a script calls outside of functions


class Script:
    """The file at ``path``. Raises SyntaxError where it is no Python."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_bytes()
        body = ast.parse(self.text, str(path)).body
        self._body = [statement for statement in body if not _asks_for_its_name(statement)]
        self._guarded = len(self._body) < len(body)
        self._parts = [_Part(statement) for statement in self._body]
        self._done: set[int] = set()
        self._space: dict[str, Any] = {"__name__": MAIN, "__file__": str(path), "__builtins__": builtins}

    @property
    def ran(self) -> bool:
        """Whether any of it ran."""
        return bool(self._done)

    @property
    def names(self) -> set[str]:
        """The names that the script gives a meaning."""
        return set[str]().union(*(part.binds for part in self._parts))

    @property
    def works(self) -> bool:
        """Whether the script trains or saves as soon as it is imported."""
        return not self._guarded and any(part.methods & WORK for part in self._parts)

    def get(self, name: str) -> Any:
        """Return what ``name`` is, having run what that takes, each statement once. It may raise anything."""
        left = [i for i in self._needed(name) if i not in self._done]
        self._done.update(left)
        future = [each for each in self._body if isinstance(each, ast.ImportFrom) and each.module == "__future__"]
        chosen = [*future, *(self._body[i] for i in left if self._body[i] not in future)]
        exec(compile(ast.Module(chosen, []), str(self.path), "exec", dont_inherit=True), self._space)
        return self._space[name]

    def _needed(self, name: str) -> list[int]:
        if self._guarded:
            return list(range(len(self._body)))
        imports = set[str]().union(*(part.binds for part in self._parts if part.is_import))
        wanted, chosen = {name}, {i for i, part in enumerate(self._parts) if part.changes_path or "*" in part.binds}
        before = -1
        while len(chosen) != before:
            before = len(chosen)
            for i, part in enumerate(self._parts):
                if (part.binds | (part.changes - imports)) & wanted:
                    chosen.add(i)
                    wanted |= part.uses
        return sorted(chosen)


class _Part:
    """One statement of a script: the names that it ``binds``, ``uses`` and ``changes`` what they stand for."""

    def __init__(self, statement: ast.stmt) -> None:
        self.is_import = isinstance(statement, (ast.Import, ast.ImportFrom))
        table = symtable.symtable(ast.unparse(statement), "", "exec")
        own = table.get_symbols()
        self.binds = {symbol.get_name() for symbol in own if symbol.is_assigned() or symbol.is_imported()}
        if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
            self.binds.add("*")
        self.uses = {symbol.get_name() for symbol in own if symbol.is_referenced()} | _globals_of(table)
        places = list(_places(statement))
        self.changes = {ast.unparse(place).partition(".")[0].partition("[")[0] for place in places}
        self.methods = {place.attr for place in places if isinstance(place, ast.Attribute)}
        self.changes_path = any(ast.unparse(place).startswith("sys.path") for place in places)


def _asks_for_its_name(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and any(
        isinstance(node, ast.Name) and node.id == "__name__" for node in ast.walk(statement.test)
    )


def _globals_of(table: symtable.SymbolTable) -> set[str]:
    """Return the global names that functions and classes within ``table`` use, at any depth."""
    found: set[str] = set()
    for inner in table.get_children():
        found |= {symbol.get_name() for symbol in inner.get_symbols() if symbol.is_global()} | _globals_of(inner)
    return found


def _places(statement: ast.AST) -> Iterator[ast.AST]:
    """Yield what the statement itself writes to, or calls a method of: ``Net.scale = 2``, ``TABLE[1] = Net``,
    ``names.append("x")``.
    """
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
        return
    if isinstance(statement, (ast.Attribute, ast.Subscript)) and isinstance(statement.ctx, ast.Store):
        yield statement
    if isinstance(statement, ast.Call) and isinstance(statement.func, ast.Attribute):
        yield statement.func
    for child in ast.iter_child_nodes(statement):
        yield from _places(child)


class _Main(ModuleType):
    """Plays ``__main__``: the classes of scripts, and for all else the program that runs."""

    def __init__(self) -> None:
        super().__init__(MAIN)
        self.scripts: dict[Path, Script] = {}

    def __getattr__(self, name: str) -> Any:
        for script in self.scripts.values():
            if name in script.names:
                return script.get(name)
        return getattr(_PROGRAM, name)


_PROGRAM = sys.modules[MAIN]
_MAIN = _Main()


def script(path: Path) -> Script:
    """Return the script at ``path``, which ``playing_main`` knows from now on; anew where the file has changed."""
    known = _MAIN.scripts.get(path)
    if known is None or known.text != path.read_bytes():
        known = _MAIN.scripts[path] = Script(path)
    return known


def is_known() -> bool:
    """Whether a script gave a class."""
    return any(each.ran for each in _MAIN.scripts.values())


@contextmanager
def playing_main() -> Iterator[None]:
    """Let pickles find in ``__main__`` what the scripts define that the user named."""
    before = sys.modules[MAIN]
    sys.modules[MAIN] = _MAIN
    try:
        yield
    finally:
        sys.modules[MAIN] = before
