"""What the graph of an exported program may say: checked before torch makes code of it.

torch turns names, guards and tree specs into Python source, and looks operators and types up by name. The rule here:
every text at a place that torch reads as more than text must be of the plain form that torch.export writes.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from repfuse.checkpoint.exported.expressions import SYMBOL, WORDS, is_guard, is_size
from repfuse.checkpoint.exported.operators import is_operator

PLAIN = re.compile(r"[\w.:+-]*", re.ASCII)
CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "collections.deque"}
MAPS = {  # fields that are tables: their keys are names of the file, not of the format
    *("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "config", "as_string_to_argument"),
}
CUSTOM = {"as_custom_obj", "custom_obj", "custom_obj_values"}
VERIFIERS = {"TRAINING", "ATEN", ""}


class Unsafe(Exception):
    """Says what in the program is more than a graph of operators."""


def check_program(program: Any) -> None:
    """Raise Unsafe where ``program``, the parsed JSON of an exported program, is more than a graph of operators."""
    try:
        _check(program, free=False)
        _require(set(program["verifiers"]) <= VERIFIERS, "verifier", program["verifiers"])
        for guard in program.get("guards_code", ()):
            _require(isinstance(guard, str) and is_guard(guard), "guard", guard)
        for name, bounds in program["range_constraints"].items():
            _require(_is_range(name) and _are_bounds(bounds), "range of sizes", name)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Unsafe(f"it is not laid out as torch.export does it ({type(error).__name__}: {error})") from error


def check_names(config: Any) -> None:
    """Raise Unsafe where a name of the weights is not one that a network can have."""
    for name in config:
        _require(is_path(name), "name", name)


def is_path(text: str) -> bool:
    """Whether ``text`` is a dotted name, such as ``layers.0.weight``, that hides nothing of ``nn.Module`` itself."""
    parts = text.split(".")
    return all(re.fullmatch(r"\w+", part, re.ASCII) and not hasattr(nn.Module, part) for part in parts)


def _is_identifier(text: str) -> bool:
    plain = text.isascii() and text.isidentifier() and not keyword.iskeyword(text)
    return text == "" or (plain and not text.startswith("__"))


def _is_path_or_root(text: str) -> bool:
    return text == "" or all(re.fullmatch(r"[\w@]+", part, re.ASCII) for part in text.split("."))


def _is_tree(text: str) -> bool:
    version, tree = json.loads(text)
    return version == 1 and _is_branch(tree)


def _is_branch(tree: Any) -> bool:
    children = tree["children_spec"]
    if tree["type"] is None:
        return tree["context"] is None and not children
    context = tree["context"]
    keys = json.loads(context) if isinstance(context, str) else context
    plain = keys is None or (isinstance(keys, list) and all(map(_is_key, keys))) or isinstance(keys, int)
    return tree["type"] in CONTAINERS and plain and all(map(_is_branch, children))


def _is_key(key: Any) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and bool(WORDS.fullmatch(key)))


def _is_range(name: str) -> bool:
    return is_size(name) if SYMBOL.fullmatch(name) is None else True


def _are_bounds(bounds: Any) -> bool:
    return all(value is None or isinstance(value, int) for value in bounds.values())


def _is_words(text: str) -> bool:
    return bool(WORDS.fullmatch(text))


RULES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "target": ("operator", is_operator),
    "as_operator": ("operator", is_operator),
    "expr_str": ("symbolic size", is_size),
    "in_spec": ("structure of the inputs", _is_tree),
    "out_spec": ("structure of the outputs", _is_tree),
    "name": ("name", _is_identifier),
    "as_name": ("name", _is_identifier),
    "user_input_name": ("name", _is_identifier),
    "forward_arg_names": ("name", _is_identifier),
    "parameter_name": ("name", is_path),
    "buffer_name": ("name", is_path),
    "tensor_constant_name": ("name", is_path),
    "fqn": ("name", _is_path_or_root),
    "as_string": ("text among the inputs", _is_words),
}
ELSEWHERE = {"verifiers", "guards_code", "range_constraints"}  # checked apart
HELD = {"metadata", "treespec_namedtuple_fields", "torch_version"}  # texts that torch keeps as they are


def _check(value: Any, *, free: bool, field: str = "") -> None:
    """Walk the JSON; ``free`` inside nodes, where a text is an argument of an operator and nothing else."""
    if field in ELSEWHERE or field in HELD:
        return
    if field in RULES and not (free and field == "as_string"):
        what, holds = RULES[field]
        for text in value if isinstance(value, list) else [value]:
            _require(text is None or (isinstance(text, str) and holds(text)), what, text)
    elif isinstance(value, dict):
        _check_fields(value, free=free, is_map=field in MAPS)
    elif isinstance(value, list):
        for item in value:
            _check(item, free=free, field="as_string" if field == "as_strings" else "")
    elif isinstance(value, str):
        _require(free or bool(PLAIN.fullmatch(value)), field or "text", value)


def _check_fields(fields: dict[str, Any], *, free: bool, is_map: bool) -> None:
    for name, value in fields.items():
        if is_map:
            _require(_is_identifier(name) or is_path(name), "name", name)
        _require(is_map or name not in CUSTOM or not value, "object of a class of its own", name)
        _check(value, free=free or name == "nodes", field="" if is_map else name)


def _require(holds: bool, what: str, found: Any) -> None:
    if not holds:
        raise Unsafe(f"its {what} {str(found)[:80]!r} is not one that a network needs")
