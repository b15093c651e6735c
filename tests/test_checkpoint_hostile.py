"""The rules by which objects of a file become real ones, and what is said where they forbid it.

Attacks that need no rule of their own are rows of ``hostile``.
"""

from __future__ import annotations

import collections
import functools
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from repfuse.checkpoint import allow as allow_list
from repfuse.checkpoint.formats import Container
from repfuse.checkpoint.records import Record
from repfuse.checkpoint.torch_pickle import read
from repfuse.errors import RepfuseError
from repfuse.loading import load
from repfuse.samples import NotebookBlock


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that exists only after hostile code ran."""
    return tmp_path / "mark"


class Calls:
    """Pickles as a call of ``function`` with ``arguments`` (the opcode REDUCE)."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def with_pickle(path: Path, data: bytes) -> Path:
    """Write a torch archive whose pickle is ``data``."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)
    return path


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(RepfuseError) as error:
        load(path, **options)
    assert error.value.exit_code == 2
    return str(error.value)


def call(module: str, name: str, argument: str) -> bytes:
    text = argument.encode()
    return b"\x80\x02c%s\n%s\nX%s%s\x85R." % (module.encode(), name.encode(), len(text).to_bytes(4, "little"), text)


@pytest.mark.parametrize("function", ["posix.system", "torch.hub.load", "builtins.eval", "torch.load"])
def test_the_message_names_the_function_and_the_way_out(function: str, tmp_path: Path) -> None:
    module, _, name = function.rpartition(".")
    message = refused(with_pickle(tmp_path / "x.pt", call(module, name, "true")))
    assert function in message
    assert "--trust" in message


def test_what_other_code_has_marked_safe_is_not_safe_here(tmp_path: Path) -> None:
    """Many functions, since which of two equal names torch takes is a matter of chance."""
    functions = [getattr(os.path, name) for name in ("exists", "isfile", "isdir", "getsize", "getmtime", "getatime")]
    functions += [os.path.abspath, os.path.basename, os.path.dirname, os.path.join, os.path.normpath, os.path.split]
    torch.save([Calls(function, str(tmp_path)) for function in functions], tmp_path / "x.pt")
    with torch.serialization.safe_globals(functions):
        assert torch.load(tmp_path / "x.pt", weights_only=True)[0] is True  # torch itself calls them
        assert all(isinstance(value, Record) for value in read(tmp_path / "x.pt", Container.TORCH_ZIP))
        assert set(torch.serialization.get_safe_globals()) >= set(functions)  # and they are there again


class Restored(NotebookBlock):
    """A class whose restoring runs code, and that the allow-list does not know."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        Path(state["mark"]).touch()


def test_setstate_of_an_unknown_class_does_not_run(mark: Path, tmp_path: Path) -> None:
    module = Restored()
    module.mark = str(mark)
    torch.save(module, tmp_path / "x.pt")
    assert "Restored" in refused(tmp_path / "x.pt")
    assert not mark.exists()


def test_a_graph_module_needs_trust(mark: Path, tmp_path: Path) -> None:
    """It would be rebuilt from source text in the file."""
    traced = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    function, (body, imports) = traced.__reduce__()
    torch.save(Calls(function, body, f"open({str(mark)!r}, 'w')\n" + imports), tmp_path / "x.pt")
    torch.save(nn.Sequential(traced), tmp_path / "y.pt")
    for path in (tmp_path / "x.pt", tmp_path / "y.pt"):
        for options in ({}, {"allow": ["torch"]}):
            message = refused(path, **options)
            assert "torch.fx.graph_module.reduce_graph_module" in message
            assert "--trust" in message
    assert not mark.exists()
    load(tmp_path / "x.pt", trust=True, input="1x3")
    assert mark.exists()  # so the code was really in there


@pytest.fixture
def package(mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package that the user allows, with one network and other things."""
    folder = tmp_path / "allowed_package"
    folder.mkdir()
    touch = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    (folder / "__main__.py").write_text(touch)
    (folder / "__init__.py").write_text(
        "from torch import fx, nn\n"
        "from collections import UserDict\n"
        "from torch.distributed.fsdp import FullyShardedDataParallel as Elsewhere\n"
        "class Net(nn.ReLU): pass\n"
        f"def function(*_): {touch}\n"
        f"class Plain:\n    def __setstate__(self, state): {touch}\n"
        f"class Graph(fx.GraphModule):\n    def __setstate__(self, state): {touch}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "allowed_package"
    for name in [name for name in sys.modules if name.partition(".")[0] == "allowed_package"]:
        del sys.modules[name]


def instance(name: str) -> bytes:
    """A pickle of an instance of ``name`` with the state of an empty module."""
    module, _, cls = name.rpartition(".")
    state = pickle.dumps(vars(nn.ReLU()), 2)[2:-1]
    return b"\x80\x02c%s\n%s\n)\x81%sb." % (module.encode(), cls.encode(), state)


def test_an_allowed_package_may_give_its_networks(package: str, tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "x.pt", instance("allowed_package.Net"))
    assert type(load(path, allow=[package], input="1x3").module).__name__ == "Net"


@pytest.mark.parametrize("name", ["Plain", "Graph", "function", "Elsewhere", "UserDict", "__main__.Net", "nothing"])
def test_an_allowed_package_gives_nothing_else(name: str, package: str, mark: Path, tmp_path: Path) -> None:
    """Neither objects of another kind, nor what it imports from elsewhere."""
    for data in (instance(f"{package}.{name}"), call(f"{package}", name, "x")):
        assert name in refused(with_pickle(tmp_path / "x.pt", data), allow=[package])
    assert not mark.exists()


def test_a_class_that_says_how_to_call_it_is_not_restored(tmp_path: Path) -> None:
    torch.save(Calls(NotebookBlock, 8, state=vars(NotebookBlock())), tmp_path / "x.pt")
    assert "called" in refused(tmp_path / "x.pt")


def test_constructors_are_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(NotebookBlock(), tmp_path / "good.pt")
    torch.save(Calls(NotebookBlock, 8), tmp_path / "called.pt")
    monkeypatch.setattr(NotebookBlock, "__init__", lambda *_: pytest.fail("the constructor ran"))
    load(tmp_path / "good.pt")
    refused(tmp_path / "called.pt")


def hostile(change: Any) -> nn.Module:
    block = NotebookBlock()
    change(block)
    return block


CHANGES = {
    "a method": lambda block: vars(block).update(forward=nn.ReLU()),
    "a class in place of a method": lambda block: vars(block).update(_call_impl=nn.ReLU),
    "a dunder": lambda block: vars(block).update(__class__=nn.ReLU),
    "a hook": lambda block: block.__dict__["_forward_hooks"].update({0: nn.ReLU()}),
    "a module that is none": lambda block: block._modules.update(conv3="os.system"),
    "a parameter that is none": lambda block: block.conv3._parameters.update(weight=nn.ReLU()),
    "no tables at all": lambda block: vars(block.conv3).pop("_parameters"),
    "a table of another kind": lambda block: vars(block).update(_modules=[nn.ReLU()]),
    "a module inside itself": lambda block: block._modules.update(again=block),
    "a partial of something else": lambda block: vars(block).update(norm=functools.partial(NotebookBlock, 3)),
    "a partial of a function": lambda block: vars(block).update(norm=functools.partial(open, "x", "w")),
    "a partial with an object": lambda block: vars(block).update(norm=functools.partial(nn.Linear, nn.ReLU())),
    "partial itself": lambda block: vars(block).update(norm=functools.partial),
    "a function": lambda block: vars(block).update(norm=nn.functional.handle_torch_function),
    "a function of torch": lambda block: vars(block).update(norm=torch.from_file),
    "torch's functions": lambda block: vars(block).update(norm=torch._C._VariableFunctionsClass),
    "an attribute of something else": lambda block: vars(block).update(norm=Calls(getattr, nn.Linear, "forward")),
    "a call of an activation": lambda block: vars(block).update(norm=Calls(nn.functional.relu, 3)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_attributes_cannot_turn_a_known_class_against_us(change: Any, tmp_path: Path) -> None:
    torch.save(hostile(change), tmp_path / "x.pt")
    refused(tmp_path / "x.pt")


def quoted(mark: Path) -> str:
    """A module's name that torch.fx writes into source code, where it ends a string and begins a call."""
    return f'training"), open("{mark}", "w"), getattr(self, "training'


def test_the_fx_injection_is_real(mark: Path) -> None:
    """The negative control of the next test. Where this fails, torch has mended it."""
    network = nn.Sequential(nn.ReLU())
    network._modules = {quoted(Path(mark.name)): nn.ReLU()}  # no dots: torch.fx splits the name there
    traced = fx.symbolic_trace(network)
    assert f'open("{mark.name}", "w")' in traced.code


@pytest.mark.parametrize("table", ["_modules", "_parameters", "_buffers", None])
@pytest.mark.parametrize("name", [quoted(Path("mark")), "a'b", "a\\", "a\nb", "a.b", "", 3, "a\0"])
def test_names_cannot_carry_code_into_a_traced_network(table: str | None, name: Any, tmp_path: Path) -> None:
    block = NotebookBlock()
    values = {"_modules": nn.ReLU(), "_parameters": nn.Parameter(torch.zeros(1)), "_buffers": torch.zeros(1)}
    if table:
        vars(block)[table][name] = values[table]
    else:
        vars(block)[name] = 1
    torch.save(block, tmp_path / "x.pt")
    refused(tmp_path / "x.pt")


def test_ordinary_odd_names_are_fine(tmp_path: Path) -> None:
    block = NotebookBlock()
    block.more = nn.ModuleDict({"layer-1": nn.ReLU(), "3x3 conv": nn.ReLU(), "größe": nn.ReLU()})
    torch.save(block, tmp_path / "x.pt")
    assert list(load(tmp_path / "x.pt").module.more) == ["layer-1", "3x3 conv", "größe"]


def test_attributes_of_dictionaries_cannot_hide_methods(tmp_path: Path) -> None:
    state = collections.OrderedDict(NotebookBlock().state_dict())
    state.keys = state.copy = state.get = "not a method"
    torch.save(state, tmp_path / "x.pt")
    load(tmp_path / "x.pt", model="repfuse.samples:NotebookBlock")


def test_attributes_of_tensors_cannot_hide_methods(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.zeros(3))
    weight.numel = "not a method"
    torch.save({"weight": weight}, tmp_path / "x.pt")
    assert "damaged" in refused(tmp_path / "x.pt", model="torch.nn:Identity")


def test_nothing_outside_the_allowed_packages_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "landmine.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = with_pickle(tmp_path / "x.pt", b"\x80\x02clandmine\nNet\n)\x81.")
    message = refused(path)
    assert "--allow landmine" in message
    refused(with_pickle(tmp_path / "y.pt", b"\x80\x02ctorch.__main__\nNet\n)\x81."), allow=["torch"])


def test_folders_of_the_users_code_give_no_known_library(mark: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A library that is not installed must not be found beside a file, also after other code was found there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(allow_list, "KNOWN", (*allow_list.KNOWN, "not_installed.models"))
    (tmp_path / "mine_beside.py").write_text("from torch import nn\nclass Net(nn.ReLU): pass\n")
    (tmp_path / "not_installed").mkdir()
    (tmp_path / "not_installed" / "models.py").write_text(f"open({str(mark)!r}, 'w')\n")
    mine = with_pickle(tmp_path / "x.pt", instance("mine_beside.Net"))
    load(mine, allow=["mine_beside"], input="1x3")
    known = with_pickle(tmp_path / "y.pt", instance("not_installed.models.Net"))
    for options in ({}, {"allow": ["mine_beside"]}):
        refused(known, **options)
    assert not mark.exists()
    refused(known, allow=["not_installed"])  # for it has no Net
    assert mark.exists()


def test_a_wrapper_in_itself_is_no_network(tmp_path: Path) -> None:
    body = b"\x80\x02ctorch.nn.parallel.data_parallel\nDataParallel\n)\x81q\x01"
    body += b"}(X\x08\x00\x00\x00_modules}X\x06\x00\x00\x00moduleh\x01sub."
    refused(with_pickle(tmp_path / "x.pt", body))
