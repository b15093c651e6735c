"""The texts in an exported program that torch evaluates: symbolic sizes and guards.

torch hands the first to sympy's ``sympify`` and the second to ``exec``: both run any Python that they are given. So a
text is parsed first, and only arithmetic on sizes passes: an allow-list, node by node.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

LONGEST = 20_000  # characters of one text; torch's own have a few hundred
LARGEST = 1 << 63
POWER = 8
SYMBOL = re.compile(r"(s|u|zf|zuf)\d{1,5}")
NUMBER = re.compile(r"-?\d{1,30}(\.\d{0,40})?(e[+-]?\d{1,3})?")
WORDS = re.compile(r"[\w .,:/+-]*", re.ASCII)
ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
SYMBOLIC = {  # what sympy's srepr writes, and torch's own functions of sizes
    *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "floor", "ceiling"),
    *("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan"),
    *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not"),
    *("FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv"),
    *("FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt", "RoundToInt", "ToFloat", "Identity"),
}
CONSTANTS = {"true", "false", "oo", "int_oo"}
GUARD_FUNCTIONS = {"max", "min", "abs", "float", "int"}
MATH_FUNCTIONS = {"ceil", "floor", "trunc", "sqrt"}


def is_size(text: str) -> bool:
    """Whether ``text`` is an expression of sizes, such as ``Add(Symbol('s0', integer=True), Integer(1))``."""
    tree = _parsed(text)
    return tree is not None and _is_symbolic(tree)


def is_guard(text: str) -> bool:
    """Whether ``text`` is a condition on the inputs, such as ``L['x'].size()[0] % 2 == 0``."""
    tree = _parsed(text)
    return tree is not None and _is_guard(tree)


def _parsed(text: str) -> ast.expr | None:
    if len(text) > LONGEST or "\n" in text or not text.isascii():
        return None
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _is_symbolic(node: ast.AST) -> bool:
    match node:
        case ast.Call(ast.Name("Symbol"), [ast.Constant(str() as name)], keywords):
            return bool(SYMBOL.fullmatch(name)) and _are_flags(keywords)
        case ast.Call(ast.Name("Float"), [ast.Constant(str() as number)], [] | [ast.keyword("precision")] as options):
            return bool(NUMBER.fullmatch(number)) and all(_is_number(option.value, 1 << 10) for option in options)
        case ast.Call(ast.Name("Pow"), [base, exponent], []):
            return _is_symbolic(base) and _is_small(exponent)
        case ast.Call(ast.Name(function), args, []) if function in SYMBOLIC:
            return all(map(_is_symbolic, args))
        case ast.Name(name):
            return name in CONSTANTS or bool(SYMBOL.fullmatch(name))
    return _is_operation(node, _is_symbolic)


def _is_guard(node: ast.AST) -> bool:
    match node:
        case ast.Call(ast.Attribute(tensor, "size" | "stride" | "storage_offset"), [], []):
            return _is_input(tensor)
        case ast.Call(function, args, []) if _is_guard_function(function):
            return all(map(_is_guard, args))
        case ast.Subscript(ast.Call() as sizes, ast.Constant(int())):
            return _is_guard(sizes)
        case ast.BoolOp(_, parts):
            return all(map(_is_guard, parts))
        case ast.Constant(str() as text):
            return bool(WORDS.fullmatch(text))
    return _is_input(node) or _is_operation(node, _is_guard)


def _is_guard_function(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(ast.Name("math"), name):
            return name in MATH_FUNCTIONS
    return isinstance(node, ast.Name) and node.id in GUARD_FUNCTIONS


def _is_operation(node: ast.AST, is_part: Callable[[ast.AST], bool]) -> bool:
    match node:
        case ast.BinOp(left, operator, right):
            return isinstance(operator, ARITHMETIC) and is_part(left) and is_part(right)
        case ast.UnaryOp(_, operand):
            return is_part(operand)
        case ast.Compare(left, _, others):
            return all(map(is_part, (left, *others)))
        case ast.Constant(None):
            return True
    return _is_number(node, LARGEST)


def _is_input(node: ast.AST) -> bool:
    """Whether the node is ``L['x']`` or a member of it, such as ``L['x'][0]['mask']``."""
    match node:
        case ast.Name("L"):
            return True
        case ast.Subscript(value, ast.Constant(str() as key)):
            return bool(WORDS.fullmatch(key)) and _is_input(value)
        case ast.Subscript(value, ast.Constant(int())):
            return _is_input(value)
    return False


def _is_number(node: ast.AST, largest: int) -> bool:
    match node:
        case ast.Constant(bool() | int() | float() as value):
            return abs(value) <= largest
    return False


def _is_small(node: ast.AST) -> bool:
    match node:
        case ast.Call(ast.Name("Integer"), [ast.Constant() | ast.UnaryOp(ast.USub()) as value], []):
            return _is_small(value)
        case ast.UnaryOp(ast.USub(), operand):
            return _is_number(operand, POWER)
    return _is_number(node, POWER)


def _are_flags(keywords: list[ast.keyword]) -> bool:
    return all(
        isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool) for keyword in keywords
    )
