"""Reading and writing .pt2 files. Nothing of a file runs: its members are checked before torch loads any of them.

torch's own loader runs a file in five ways: a member of plain pickle (custom objects, and whatever its safe unpickler
refuses), compiled code (AOTInductor), guards and names (which become Python source), symbolic sizes (``sympify``), and
operators and types that it looks up by name. The bytes that are checked are the very bytes that are loaded.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repfuse.checkpoint.formats import reading
from repfuse.checkpoint.torch_pickle import check_unpacked, read_plain
from repfuse.errors import RepfuseError, quietly
from repfuse.networks import quantised
from repfuse.wording import first_line

PROGRAM = "models/model.json"
INPUTS = "data/sample_inputs/model.pt"
TENSORS = {"data/weights/": "model_weights_config.json", "data/constants/": "model_constants_config.json"}
MEMBERS = re.compile(  # every member that a program without code of its own has
    r"models/model\.json|data/sample_inputs/model\.pt|data/weights/(model_weights_config\.json|weight_\d+)"
    r"|data/constants/(model_constants_config\.json|tensor_\d+)|extra/.*"
    r"|archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version|\.storage_alignment"
)
INT8 = b'"torch.ops.quantized'  # an operator of a network that was converted to int8
KNOWN_DEVICES = ("cuda", "xpu", "mps")
SAVE_AGAIN = "Save it again with torch.export.save, or, if you trust whoever made it, use --trust."


def read(path: Path, *, trust: bool) -> torch.export.ExportedProgram:
    """Return the program in the file at ``path``, its tensors on the device that it names.

    Raises RepfuseError where the file is damaged, where the network is one of int8, or, without ``trust``, where it
    holds more than a graph of operators and plain tensors.
    """
    data = path.read_bytes()
    if INT8 in data:
        raise quantised(str(path), aware=False)
    if not trust:
        check(path, data)
    with reading(path), quietly():
        return torch.export.load(io.BytesIO(data))


def write(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write ``program`` as torch.export.save does. Raises RepfuseError where it cannot be saved, OSError for a disk."""
    try:
        with path.open("wb") as file, quietly():
            torch.export.save(program, file)
    except OSError:
        raise
    except Exception as error:  # the serialiser raises what it likes
        raise RepfuseError(
            "This program cannot be written as .pt2.",
            first_line(error),
            "Choose a .pt or .safetensors file.",
        ) from error


def check(path: Path, data: bytes) -> None:
    """Raise RepfuseError where ``data``, the file at ``path``, is more than a graph of operators and plain tensors."""
    with reading(path), quietly():
        check_unpacked(io.BytesIO(data), len(data))  # torch's reader unpacks some members as soon as it is made
        try:
            _check_members(path, torch._C.PyTorchFileReader(io.BytesIO(data)), len(data))  # another might see others
        except Unsafe as error:
            what = f"{path} cannot be loaded without running code from it."
            raise RepfuseError(what, f"{error}.", SAVE_AGAIN) from error


def _check_members(path: Path, reader: Any, size: int) -> None:
    members = set(reader.get_all_records())
    if PROGRAM not in members:
        compiled = any("aotinductor" in name for name in members)
        older = "it has no models/model.json: it may be from torch 2.7 or before"
        raise Unsafe("it was compiled by AOTInductor" if compiled else older)
    if strange := sorted(name for name in members if not MEMBERS.fullmatch(name)):
        raise Unsafe(f"it has the member {strange[0]!r}, which may be code or a pickle")
    check_program(json.loads(reader.get_record(PROGRAM)))
    for folder, config in TENSORS.items():
        for name, payload in json.loads(reader.get_record(folder + config))["config"].items():
            _require(is_path(name), "name", name)
            _check_tensor(path, name, payload, folder, reader=reader, size=size)
    inputs = reader.get_record(INPUTS)
    try:
        if inputs:  # torch would fall back from its safe unpickler to the one that runs code
            check_unpacked(io.BytesIO(inputs), len(inputs))
            read_plain(io.BytesIO(inputs), len(inputs))
    except Exception as error:  # a damaged pickle can make its reader fail in any way
        raise Unsafe("its sample inputs are more than tensors and plain containers") from error


def _check_tensor(path: Path, name: str, payload: dict[str, Any], folder: str, *, reader: Any, size: int) -> None:
    """Raise Unsafe where a tensor is a pickle, or where it would be larger than the file, which has ``size`` bytes."""
    member, form = folder + payload["path_name"], payload["tensor_meta"]
    if payload["use_pickle"] is not False or not MEMBERS.fullmatch(member) or form is None:
        raise Unsafe(f"its tensor {name!r} is a pickle or an object of a class of its own")
    if math.prod(dimension["as_int"] for dimension in form["sizes"]) > (size if reader.get_record_size(member) else 0):
        raise Unsafe(f"its tensor {name!r} would be larger than the file")
    device = form["device"]["type"]
    if device != "cpu" and not (device in KNOWN_DEVICES and getattr(torch, device).is_available()):
        raise RepfuseError(
            f"{path} was exported for {str(device)[:20]!r}, which this machine does not have.",
            "An exported program names its device at every place.",
            "Move it first, where it runs: torch.export.passes.move_to_device_pass(program, 'cpu').",
        )


# What the graph of a program may say is checked before torch makes code of it. torch turns names, guards and tree specs
# into Python source, and looks operators and types up by name. The rule: every text at a place that torch reads as more
# than text must be of the plain form that torch.export writes. Operators it looks up in ``torch``, ``math`` and
# ``operator``: it would take ``torch.os.system`` as it takes a convolution. Symbolic sizes it hands to sympy's
# ``sympify``, and guards to ``exec``: both run any Python that they are given. So such a text is parsed first, and only
# arithmetic on sizes passes: an allow-list, node by node.

POWER = 8
SYMBOL = re.compile(r"(s|u|zf|zuf)\d{1,5}")
NUMBER = re.compile(r"-?\d{1,30}(\.\d{0,40})?(e[+-]?\d{1,3})?")
WORDS = re.compile(r"[\w .,:/+-]*", re.ASCII)
ARITHMETIC = (  # no powers and no shifts, whose results have no end
    *(ast.Load, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.unaryop, ast.boolop, ast.cmpop),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
)
SYMBOLIC = {  # what sympy's srepr writes, and torch's own functions of sizes
    *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "floor", "ceiling"),
    *("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan"),
    *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not"),
    *("FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv"),
    *("FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt", "RoundToInt", "ToFloat", "Identity"),
    *("true", "false", "oo", "int_oo"),
}
IN_GUARDS = {"L", "math", "max", "min", "abs", "float", "int"}
METHODS = {"size", "stride", "storage_offset", "ceil", "floor", "trunc", "sqrt"}


def is_size(text: str) -> bool:
    """Whether ``text`` is an expression of sizes, such as ``Add(Symbol('s0', integer=True), Integer(1))``."""
    return _is_made_of(text, _is_symbolic)


def is_guard(text: str) -> bool:
    """Whether ``text`` is a condition on the inputs, such as ``L['x'].size()[0] % 2 == 0``."""
    return _is_made_of(text, _is_of_inputs)


def _is_made_of(text: str, is_known: Callable[[ast.AST], bool]) -> bool:
    """Whether ``text`` is one expression of arithmetic, numbers and what ``is_known``: each node of it by itself."""
    if not text.isascii() or set(text) & {"\n", "#"}:
        return False
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False

    def is_plain(node: ast.AST) -> bool:
        number = isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, int | float))
        return number or isinstance(node, ARITHMETIC)

    return all(is_plain(node) or is_known(node) for node in ast.walk(tree))


def _is_symbolic(node: ast.AST) -> bool:
    match node:
        case ast.Call(
            ast.Name("Pow"), [_, ast.Call(_, [ast.Constant(int(power)) | ast.UnaryOp(_, ast.Constant(int(power)))])]
        ):
            return power <= POWER
        case ast.Call(ast.Name("Pow")):  # 9**9**9 has no end
            return False
        case ast.Call(ast.Name()) | ast.keyword(str(), ast.Constant()):
            return True
        case ast.Constant(str() as text):
            return bool(SYMBOL.fullmatch(text) or NUMBER.fullmatch(text))
        case ast.Name(name):
            return name in SYMBOLIC or bool(SYMBOL.fullmatch(name))
    return False


def _is_of_inputs(node: ast.AST) -> bool:
    match node:
        case ast.Call() | ast.Subscript():
            return True
        case ast.Name(name):
            return name in IN_GUARDS
        case ast.Attribute(_, name):
            return name in METHODS
        case ast.Constant(str() as text):
            return bool(WORDS.fullmatch(text))
    return False


PLAIN = re.compile(r"[\w.:+-]*", re.ASCII)
CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "collections.deque"}
MAPS = {  # fields that are tables: their keys are names of the file, not of the format
    *("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "config", "as_string_to_argument"),
}
CUSTOM = {"as_custom_obj", "custom_obj", "custom_obj_values"}
VERIFIERS = {"TRAINING", "ATEN", ""}
OPERATOR = re.compile(r"torch\.ops\.(aten|prims|torchvision)\.([a-z]\w*|_\w+|[A-Z]\w*)\.(\w+)", re.ASCII)
HIGHER_ORDER = {
    f"torch.ops.higher_order.{name}"
    for name in (
        *("cond", "while_loop", "map_impl", "scan", "associative_scan", "invoke_subgraph"),
        *("wrap_with_set_grad_enabled", "wrap_with_autocast"),
    )
}
ON_SIZES = {
    *(f"_operator.{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow", "getitem")),
    *(f"_operator.{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "pos")),
    *(f"math.{name}" for name in ("ceil", "floor", "trunc", "sqrt")),
    *(f"torch.{name}" for name in ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite")),
    *(f"torch.{name}" for name in ("_sym_sqrt", "sym_sum")),
}
TEXTS = {  # the operators that take a text which is a mode and not the name of a file
    *("conv1d", "conv2d", "conv3d", "div", "div_", "einsum", "gelu", "gelu_", "pad", "meshgrid", "searchsorted"),
    *("scatter", "scatter_", "scatter_reduce", "scatter_reduce_", "index_reduce", "index_reduce_", "stft"),
    *("quantile", "nanquantile", "linalg_norm", "linalg_matrix_norm", "linalg_svd", "linalg_qr", "linalg_eigh"),
    *("_assert_scalar", "_assert_async", "_functional_assert_scalar", "_functional_assert_async"),
}
PRIVATE = {  # those with a leading underscore that torch.export writes; the others check their arguments less
    *("_assert_tensor_metadata", "_to_copy", "_softmax", "_log_softmax", "_unsafe_view", "_unsafe_index"),
    *("_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "_weight_norm", "_convolution"),
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    *("_scaled_dot_product_flash_attention_for_cpu", "_shape_as_tensor", "_prelu_kernel", "_conj", "_trilinear"),
    *("_fft_c2r", "_fft_r2c", "_fft_c2c", "_cdist_forward", "_local_scalar_dense", "_transformer_encoder_layer_fwd"),
}
CARELESS = ("Any", "Storage", "Dict", "Stream")  # types of arguments that no network has


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
            numbers = all(value is None or isinstance(value, int) for value in bounds.values())
            _require(is_size(name) and numbers, "range of sizes", name)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Unsafe(f"it is not laid out as torch.export does it ({type(error).__name__}: {error})") from error


def is_path(text: str) -> bool:
    """Whether ``text`` is a dotted name, such as ``layers.0.weight``, that hides nothing of ``nn.Module`` itself."""
    parts = text.split(".")
    return all(re.fullmatch(r"\w+", part, re.ASCII) and not hasattr(nn.Module, part) for part in parts)


def _is_identifier(text: str) -> bool:
    plain = text.isascii() and text.isidentifier() and not keyword.iskeyword(text)
    return text == "" or (plain and not text.startswith("__"))


def _is_tree(text: str) -> bool:
    version, tree = json.loads(text)
    return version == 1 and _is_branch(tree)


def _is_branch(tree: Any) -> bool:
    children = tree["children_spec"]
    if tree["type"] is None:
        return tree["context"] is None and not children

    def is_key(key: Any) -> bool:
        return isinstance(key, int) or (isinstance(key, str) and bool(WORDS.fullmatch(key)))

    context = tree["context"]
    keys = json.loads(context) if isinstance(context, str) else context
    listed = isinstance(keys, list) and all(map(is_key, keys))
    plain = keys is None or listed or isinstance(keys, int)
    return tree["type"] in CONTAINERS and plain and all(map(_is_branch, children))


def is_operator(name: str) -> bool:
    """Whether ``name`` is an operator on tensors or sizes, which reads and writes nothing but its arguments.

    Operators of other libraries (torchvision) count where the library is imported.
    """
    if name in HIGHER_ORDER or name in ON_SIZES:
        return True
    match = OPERATOR.fullmatch(name)
    if match is None:
        return False
    namespace, base, overload = match.groups()
    if base.startswith("_") and base not in PRIVATE | TEXTS:
        return False
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), base), overload)
    except (AttributeError, RuntimeError):
        return False
    if not isinstance(found, torch._ops.OpOverload):
        return False
    types = [str(argument.type) for argument in found._schema.arguments]
    texts = any(re.search(r"\bstr\b", name) for name in types)
    return (base in TEXTS or not texts) and not any(name in kind for kind in types for name in CARELESS)


RULES: dict[str, tuple[str, Callable[[str], object]]] = {
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
    "fqn": ("name", lambda text: text == "" or all(re.fullmatch(r"[\w@]+", x, re.ASCII) for x in text.split("."))),
    "as_string": ("text among the inputs", WORDS.fullmatch),
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
        is_map = field in MAPS
        for name, held in value.items():
            _require(not is_map or _is_identifier(name) or is_path(name), "name", name)
            _require(is_map or name not in CUSTOM or not held, "object of a class of its own", name)
            _check(held, free=free or name == "nodes", field="" if is_map else name)
    elif isinstance(value, list):
        for item in value:
            _check(item, free=free, field="as_string" if field == "as_strings" else "")
    elif isinstance(value, str):
        _require(free or bool(PLAIN.fullmatch(value)), field or "text", value)


def _require(holds: object, what: str, found: Any) -> None:
    if not holds:
        raise Unsafe(f"its {what} {str(found)[:80]!r} is not one that a network needs")
