"""Nothing of a .pt2 file runs: whatever torch would run or look up is refused before torch sees the file."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import exported

import repfuse
from repfuse.checkpoint.pt2_file import is_guard, is_operator, is_size
from repfuse.errors import RepfuseError

WITNESS = "ran_by_the_file"
CODE = f"open({WITNESS!r}, 'w')"
CALL = f"__import__('builtins').{CODE}"


class Payload:
    """Pickles as a call of os.system."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {WITNESS}",)


def torch_file(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def member(name: str, data: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda held: held.update({name: data})


def pickled_weight(folder: str) -> Callable[[dict[str, bytes]], None]:
    def change(held: dict[str, bytes]) -> None:
        name = f"data/{folder}/model_{folder}_config.json"
        config = json.loads(held[name])
        stem = {"weights": "weight_0", "constants": "tensor_0"}[folder]
        form = next(iter(json.loads(held["data/weights/model_weights_config.json"])["config"].values()))
        config["config"]["stem.weight"] = form | {"path_name": stem, "use_pickle": True}
        held |= {name: json.dumps(config).encode(), f"data/{folder}/{stem}": torch_file(Payload())}

    return change


MEMBERS = {
    "sample inputs": member("data/sample_inputs/model.pt", torch_file(((Payload(),), {}))),
    "plain pickle as sample inputs": member("data/sample_inputs/model.pt", pickle.dumps(Payload(), protocol=2)),
    "weights as a torch file": member("data/weights/model.pt", torch_file({"a": Payload()})),
    "constants as a torch file": member("data/constants/model.pt", torch_file({"a": Payload()})),
    "a pickled weight": pickled_weight("weights"),
    "a pickled constant": pickled_weight("constants"),
    "a custom object": member("data/constants/custom_obj_0", b"x"),
    "an opaque object": member("data/constants/opaque_obj_0", pickle.dumps(Payload())),
    "compiled code": member("data/aotinductor/model/model.so", b"\x7fELF"),
    "a second program": member("models/other.json", b"{}"),
}


def graph(program: Any) -> Any:
    return program["graph_module"]["graph"]


def first(program: Any, target: str) -> Any:
    return next(node for node in graph(program)["nodes"] if target in node["target"])


def renamed(program: Any, old: str, new: str) -> None:
    """Give a value another name, wherever it stands."""
    text = json.dumps(program["graph_module"]).replace(json.dumps(old), json.dumps(new))
    program["graph_module"] = json.loads(text)


def signature(program: Any) -> Any:
    return program["graph_module"]["module_call_graph"][0]["signature"]


def tree(program: Any, change: Callable[[Any], None], which: str = "in_spec") -> None:
    version, root = json.loads(signature(program)[which])
    change(root)
    signature(program)[which] = json.dumps([version, root])


def default_dict(root: Any) -> None:
    factory = {"default_factory_module": "os", "default_factory_name": "getcwd", "dict_context": []}
    root["children_spec"][1] |= {"type": "collections.defaultdict", "context": factory}


def enum_key(root: Any) -> None:
    key = {"__enum__": True, "fqn": "antigravity:x", "name": "y"}
    root["children_spec"][1]["context"] = json.dumps([key])


def hidden_in_list(program: Any) -> None:
    graph(program)["tensor_values"]["x"]["sizes"][0] = {"as_expr": {"expr_str": [CALL], "hint": None}}


def nested(program: Any, values: Any) -> None:
    graph = {"name": "g", "graph": {"tensor_values": values}}
    first(program, "relu")["inputs"].append({"name": "g", "arg": {"as_graph": graph}, "kind": 1})


PROGRAMS: dict[str, Callable[[Any], None]] = {
    "operator os.system": lambda p: first(p, "relu").update(target="torch.os.system"),
    "operator torch.load": lambda p: first(p, "relu").update(target="torch.serialization.load"),
    "operator of operator": lambda p: first(p, "relu").update(target="_operator.methodcaller"),
    "operator that writes files": lambda p: first(p, "relu").update(target="torch.ops.aten.save.default"),
    "operator that maps files": lambda p: first(p, "relu").update(target="torch.ops.aten.from_file.default"),
    "operator as an argument": lambda p: first(p, "relu")["inputs"].append(
        {"name": "f", "arg": {"as_operator": "torch.os.system"}, "kind": 1}
    ),
    "size": lambda p: graph(p)["tensor_values"]["x"]["sizes"].__setitem__(0, {"as_expr": {"expr_str": CALL}}),
    "size in a list": hidden_in_list,
    "size in a graph of its own": lambda p: nested(p, {"a": {"sizes": [{"as_expr": {"expr_str": CALL}}]}}),
    "name in a graph of its own": lambda p: nested(p, {f"a={CALL}": {}}),
    "name of an output in a graph of its own": lambda p: nested(p, {"a": {"as_name": f"a={CALL}"}}),
    "guard": lambda p: p["guards_code"].append(CALL),
    "guard in a text": lambda p: p["guards_code"].append(f"L['x'] == '\" + {CALL} + \"'"),
    "range": lambda p: p["range_constraints"].update({CALL: {"min_val": 1, "max_val": 2}}),
    "endless range": lambda p: p["range_constraints"].update({"u99999999999": {"min_val": 1, "max_val": 2}}),
    "name of an input": lambda p: renamed(p, "x", f"x={CALL}"),
    "name of a value": lambda p: renamed(p, "relu", f"relu = {CALL}; y"),
    "name of a keyword": lambda p: first(p, "relu")["inputs"][0].update(name=f"a={CALL}, b"),
    "name of a weight": lambda p: renamed(p, "stem.weight", f'stem.x", {CALL}, "weight'),
    "name that hides a method": lambda p: renamed(p, "stem.weight", "forward.weight"),
    "name of a module": lambda p: p["graph_module"]["module_call_graph"][1].update(fqn=f'a", {CALL}, "b'),
    "name of an argument": lambda p: signature(p)["forward_arg_names"].__setitem__(0, f"x={CALL}"),
    "key of an input": lambda p: tree(
        p, lambda r: r["children_spec"][1].update(context=json.dumps([f"a']+{CALL}+L['"]))
    ),
    "container that imports": lambda p: tree(p, default_dict),
    "key that imports": lambda p: tree(p, enum_key),
    "container of a library": lambda p: tree(p, lambda r: r.update(type="x.Y"), "out_spec"),
    "constant input": lambda p: p["graph_module"]["signature"]["input_specs"].append(
        {"constant_input": {"name": "c", "value": {"as_string": f"'+{CALL}+'"}}}
    ),
    "custom object": lambda p: graph(p)["custom_obj_values"].update(a={"name": "a", "class_fqn": "os.system"}),
    "verifier": lambda p: p["verifiers"].append("os"),
    "no graph at all": lambda p: p.pop("graph_module") and p.update(verifiers=None),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("exported") / "in.pt2"
    return exported.saved(exported.program(), path).read_bytes()


@pytest.fixture
def source(valid: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.pt2").write_bytes(valid)
    return tmp_path / "in.pt2"


def refused(path: Path) -> RepfuseError:
    with pytest.raises(RepfuseError) as error:
        repfuse.load(path)
    assert error.value.exit_code == 2
    assert not Path(WITNESS).exists()
    return error.value


def test_the_rewriting_of_files_changes_nothing_by_itself(source: Path) -> None:
    repfuse.load(exported.rewritten(source, lambda _: None))
    repfuse.load(exported.with_program(source, lambda _: None))


@pytest.mark.parametrize("what", MEMBERS)
def test_a_member_that_torch_would_run_is_refused(what: str, source: Path) -> None:
    assert "--trust" in refused(exported.rewritten(source, MEMBERS[what])).hint


@pytest.mark.parametrize("what", PROGRAMS)
def test_a_text_that_torch_would_run_is_refused(what: str, source: Path) -> None:
    assert "--trust" in refused(exported.with_program(source, PROGRAMS[what])).hint


def test_the_attacks_are_real(source: Path) -> None:
    """With trust, what torch does with such texts really runs: else the tests above would prove little."""
    path = exported.rewritten(source, MEMBERS["sample inputs"])
    with pytest.raises(RepfuseError):
        repfuse.load(path, trust=True)
    assert Path(WITNESS).exists()
    Path(WITNESS).unlink()
    source.write_bytes(exported.saved(exported.program(), source).read_bytes())
    with pytest.raises(RepfuseError):
        repfuse.load(exported.with_program(source, PROGRAMS["size"]), trust=True)
    assert Path(WITNESS).exists()


def tensor(change: Callable[[Any], None], held: bytes | None = None) -> Callable[[dict[str, bytes]], None]:
    def changed(members: dict[str, bytes]) -> None:
        name = "data/weights/model_weights_config.json"
        config = json.loads(members[name])
        change(config["config"]["stem.weight"]["tensor_meta"])
        members[name] = json.dumps(config).encode()
        if held is not None:
            members["data/weights/weight_0"] = held

    return changed


def test_a_device_that_is_not_here_is_said(source: Path) -> None:
    change = tensor(lambda form: form.update(device={"type": "cuda", "index": 0}))
    if not torch.cuda.is_available():
        assert "move_to_device_pass" in refused(exported.rewritten(source, change)).hint


HUGE = [{"as_int": 1 << 40}]


@pytest.mark.parametrize(
    "change",
    [
        tensor(lambda form: form.update(sizes=HUGE, strides=[{"as_int": 0}])),
        tensor(lambda form: form.update(sizes=HUGE, strides=[{"as_int": 1}]), held=b""),
        tensor(lambda form: form.update(strides=[{"as_int": 1 << 40}] * 4)),
        tensor(lambda form: form.update(storage_offset={"as_int": 1 << 40})),
        tensor(lambda form: form.update(dtype=99)),
    ],
)
def test_a_tensor_that_the_file_does_not_hold_is_refused(change: Any, source: Path) -> None:
    refused(exported.rewritten(source, change))


SIZES = {
    True: (
        "Symbol('s0', positive=True, integer=True)",
        "Add(Symbol('s0', integer=True), Integer(-1))",
        "Pow(s0, Integer(-1))",
        "s0 + 2*s11",
    ),
    False: (
        *("__import__('os')", "Symbol('__import__')", "s0.func", "Integer(1).__class__", "[s0]", "lambda: 1", "f(s0)"),
        *("Pow(Integer(9), Integer(9))", "Pow(Integer(9), Integer(-9))", "Pow(s0, s1)", "9**9**9"),
        *("Integer(1 << 99)", "Symbol('s0', a=exit())", "Float('exit()')", "Symbol('s0')\n+1", ""),
        *(f"{'(' * 300}s0{')' * 300}", "Integer(" * 3000 + "1" + ")" * 3000, "Eq(s0, 'x')", "1 if s0 else 2"),
    ),
}
GUARDS = {
    True: ("L['x'].size()[0] % 4 == 0", "L['x'][0]['y'].size()[3] <= max(1, 2 * L['z'].size()[0] // 3)", "L['n'] == 3"),
    False: (
        *("L['x'].__class__", "L['x'].size().__class__", "exit()", "L[exit()]", "L['x'] == '\"'", "L['\\n'] == 1"),
        *(
            "math.system(1)",
            "torch.load('x')",
            "[exit() for _ in L]",
            "(y := 1)",
            "f'{exit()}'",
            "L['x'].item() == 1",
            "L['n'] == 3 # x",
        ),
    ),
}


@pytest.mark.parametrize(("holds", "text"), [(holds, text) for holds in SIZES for text in SIZES[holds]])
def test_sizes(holds: bool, text: str) -> None:
    assert is_size(text) is holds


@pytest.mark.parametrize(("holds", "text"), [(holds, text) for holds in GUARDS for text in GUARDS[holds]])
def test_guards(holds: bool, text: str) -> None:
    assert is_guard(text) is holds


@pytest.mark.parametrize(
    "name",
    [
        *("torch.ops.aten.add.Tensor", "torch.ops.aten.conv2d.padding", "torch.ops.aten._to_copy.default"),
        *("torch.ops.higher_order.cond", "_operator.mul", "math.ceil", "torch.sym_max", "torch.ops.aten.gelu.default"),
    ],
)
def test_operators_that_compute(name: str) -> None:
    assert is_operator(name)


@pytest.mark.parametrize(
    "name",
    [
        *("torch.hub.load", "torch.ops.load_library", "torch.ops.aten.add", "torch.ops.aten.nothing.default"),
        *("torch.ops.aten.__class__.x", "torch.ops.image.write_file.default", "math.__loader__", "_operator.call"),
        *("torch.ops.aten.record_stream.default", "#x:y", "eval", "torch.ops.aten._sparse_coo_tensor_unsafe.default"),
    ],
)
def test_operators_that_do_more(name: str) -> None:
    assert not is_operator(name)


@settings(max_examples=settings().max_examples // 2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_with_changed_bytes_loads_or_is_refused(data: st.DataObject, source: Path, valid: bytes) -> None:
    changed = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(valid) - 1))] = data.draw(st.integers(0, 255))
    source.write_bytes(changed[: data.draw(st.sampled_from([len(valid), len(valid) // 2, 100]))])
    try:
        repfuse.load(source)
    except RepfuseError as error:
        assert error.exit_code == 2
    assert not Path(WITNESS).exists()
