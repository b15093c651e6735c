"""Whose insides the code of an untraceable module reaches for, also in branches that did not run while it was watched.

What is written in plain sight is found: ``self.block.conv.weight``, ``self.row[0](x)``, ``for block in self.blocks``.
What other functions do with a module that they are handed is not.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

_LISTS = (nn.ModuleList, nn.ModuleDict, list, tuple, dict)
_WALKS = frozenset(
    {
        "apply",
        "buffers",
        "modules",
        "named_buffers",
        "named_modules",
        "named_parameters",
        "parameters",
        "state_dict",
    }
)
_OPENING = _WALKS | {
    "children",
    "forward",
    "get_buffer",
    "get_parameter",
    "get_submodule",
    "named_children",
    "register_forward_hook",
    "register_forward_pre_hook",
}
_HARMLESS = frozenset(vars(nn.Module)) - _OPENING


def reached(module: nn.Module) -> set[nn.Module]:
    """Return the modules below ``module`` of which its own forward uses more than their call."""
    reader = _Reader(module)
    for function in _methods(module):
        reader.read(function)
    return reader.found - {module}


def _methods(module: nn.Module) -> Iterator[ast.AST]:
    """Yield the code of ``forward`` and of the methods that it names, in turn, as far as there is source."""
    names = ["forward"]
    for name in names:
        for kind in takewhile(lambda kind: kind is not nn.Module, type(module).__mro__):
            code = _code(vars(kind).get(name))
            if code is None:
                continue
            named = (node.attr for node in ast.walk(code) if isinstance(node, ast.Attribute))
            names += [other for other in dict.fromkeys(named) if other not in names]
            yield code


def _code(function: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, ValueError, SyntaxError, IndexError):
        return None


class _Reader(ast.NodeVisitor):
    """Follows modules through names, attributes, indices and loops, without an order: a name is all it ever was."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.found: set[nn.Module] = set()
        self.names: dict[str, list[Any]] = {}

    def read(self, function: ast.AST) -> None:
        if not isinstance(function, ast.FunctionDef) or not function.args.args:
            return
        self.names = defaultdict(list, {function.args.args[0].arg: [self.module]})
        for _ in range(2):  # what a loop assigns at its end is read at its beginning
            self.visit(function)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._bind(target, self._values(node.value))

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, self._items(self._values(node.iter)))
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._bind(node.target, self._items(self._values(node.iter)))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in ("device", "dtype"):  # next(self.parameters()).device
            return
        self._values(node)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self._values(node)
        self.generic_visit(node)

    def _bind(self, target: ast.AST, values: list[Any]) -> None:
        for name in (each.id for each in ast.walk(target) if isinstance(each, ast.Name)):
            known = {id(value) for value in self.names[name]}
            self.names[name] += [value for value in values if id(value) not in known]

    def _values(self, node: ast.AST) -> list[Any]:
        """Return the modules, and lists of them, that an expression may be."""
        match node:
            case ast.Name(id=name):
                return list(self.names.get(name, ()))
            case ast.Attribute(value=value, attr=name):
                return [found for each in self._values(value) for found in self._attribute(each, name)]
            case ast.Subscript(value=value):
                return self._items(self._values(value))
            case ast.Call(func=ast.Name(), args=args):  # enumerate, zip, reversed, list
                return [each for arg in args for each in self._values(arg) if isinstance(each, _CONTAINERS)]
            case ast.Call(func=ast.Attribute(value=value, attr="values" | "items")):
                return self._values(value)
        return []

    def _attribute(self, value: Any, name: str) -> Iterable[Any]:
        if not isinstance(value, nn.Module):
            return ()
        found = {**vars(value), **value._parameters, **value._buffers, **value._modules}.get(name)
        opens = isinstance(found, Tensor | nn.Module) or (found is None and callable(getattr(type(value), name, None)))
        if value is self.module and name in _WALKS:
            self.found.update(value.modules())
        if value is not self.module and not isinstance(value, _LISTS) and opens and name not in _HARMLESS:
            self.found.update(value.modules() if found is None else {value})
        return [] if found is None else [found]

    def _items(self, values: list[Any]) -> list[Any]:
        """Return what lists hold. A row of modules that is taken apart is used in another way than by its call."""
        items: list[Any] = []
        for value in values:
            if isinstance(value, nn.Sequential):
                self.found.update(value.children())
            if isinstance(value, _CONTAINERS):
                items += value.values() if isinstance(value, dict | nn.ModuleDict) else value
        return [
            *items,
            *(value for value in values if isinstance(value, nn.Module) and not isinstance(value, _CONTAINERS)),
        ]


_CONTAINERS = (*_LISTS, nn.Sequential)
