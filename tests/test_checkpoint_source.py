"""How networks are named and built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

from repfuse.checkpoint import build as building
from repfuse.checkpoint.build import build
from repfuse.checkpoint.spec import ModelSource, as_texts, model_source
from repfuse.errors import RepfuseError
from repfuse.samples import DigitsRepVGG


@pytest.mark.parametrize(
    ("spec", "kind", "parts"),
    [
        ("timm:repvgg_a0", "timm", ("timm", "repvgg_a0")),
        ("timm:repvgg_a0.rvgg_in1k", "timm", ("timm", "repvgg_a0.rvgg_in1k")),
        ("torchvision:resnet18", "torchvision", ("torchvision", "resnet18")),
        ("a.b.c:Net", "import", ("a.b.c", "Net")),
        ("net.py:build", "file", ("net.py", "build")),
        ("C:\\x\\net.py:build", "file", ("C:\\x\\net.py", "build")),
    ],
)
def test_the_forms_of_a_spec(spec: str, kind: str, parts: tuple[str, str]) -> None:
    source = model_source(spec)
    assert (source.kind, source.parts) == (kind, parts)


@pytest.mark.parametrize("spec", ["", "repvgg_a0", "timm:", ":x", "a b:c", "path/to/file:build", "a-b:c"])
def test_other_specs_are_refused_with_the_forms(spec: str) -> None:
    with pytest.raises(RepfuseError, match="timm:NAME") as error:
        model_source(spec)
    assert error.value.exit_code == 2


LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]*", fullmatch=True), LITERALS))
def test_arguments_survive_their_text_form(arguments: dict[str, Any]) -> None:
    source = ModelSource("timm:x", arguments)
    texts = as_texts(source)
    assert texts is not None
    assert model_source("timm:x", texts) == source


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=10", 10),
        ("a=True", True),
        ("a=(1, 2)", (1, 2)),
        ("a=relu", "relu"),
        ("a=", ""),
        ("a=b=c", "b=c"),
        ("a='1'", "1"),
    ],
)
def test_arguments_are_literals_or_else_text(text: str, value: object) -> None:
    assert model_source("timm:x", [text]).arguments == {"a": value}


@pytest.mark.parametrize("text", ["a", "=1", "1a=2", "a b=3"])
def test_an_argument_needs_a_name(text: str) -> None:
    with pytest.raises(RepfuseError, match="name=value"):
        model_source("timm:x", [text])


def test_an_argument_without_a_literal_form_has_no_text() -> None:
    assert as_texts(ModelSource("timm:x", {"norm_layer": nn.BatchNorm2d})) is None


class Draws(TorchFunctionMode):
    """Notes which functions draw random numbers for parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_", "erfinv_"):
            self.seen += [func.__name__ for x in (*args, *kwargs.values()) if isinstance(x, nn.Parameter)]
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["timm:mobileone_s0", "timm:vit_tiny_patch16_224", "torchvision:swin_t"])
def test_a_network_of_a_library_is_what_the_library_makes_but_for_random_numbers(name: str) -> None:
    library, _, model = name.partition(":")
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    with Draws() as drawn:
        wanted = make(model)
    with Draws() as seen:
        found = build(model_source(name))
    assert len(drawn.seen) > 20 and not seen.seen
    assert str(found) == str(wanted)
    for (path, x), (other, y) in zip(found.named_parameters(), wanted.named_parameters(), strict=True):
        assert (path, x.shape, x.dtype, x.requires_grad) == (other, y.shape, y.dtype, y.requires_grad)
        if y.min() == y.max():  # ones, zeros, the scale of a layer
            assert torch.equal(x, y)
    for (path, x), (other, y) in zip(found.named_buffers(), wanted.named_buffers(), strict=True):
        assert path == other and torch.equal(x, y)


def test_timm_builds_by_name_and_arguments() -> None:
    network = build(model_source("timm:resnet18", ["num_classes=7", "in_chans=1"]))
    assert (network.fc.out_features, network.conv1.in_channels) == (7, 1)


def test_torchvision_builds_without_any_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
    assert build(model_source("torchvision:resnet18", ["num_classes=7"])).fc.out_features == 7
    build(model_source("torchvision:lraspp_mobilenet_v3_large"))  # its backbone would be downloaded by default


@pytest.mark.parametrize("argument", ["pretrained=True", "checkpoint_path=x.pth", "weights='DEFAULT'"])
def test_weights_are_never_fetched(argument: str) -> None:
    for spec in ("timm:resnet18", "torchvision:resnet18"):
        with pytest.raises(RepfuseError, match="downloads nothing"):
            build(model_source(spec, [argument]))
    build(model_source("timm:resnet18", ["pretrained=False"]))


@pytest.mark.parametrize(("spec", "close"), [("timm:repvgga0", "repvgg_a0"), ("torchvision:resnet_18", "resnet18")])
def test_an_unknown_name_gives_close_ones(spec: str, close: str) -> None:
    with pytest.raises(RepfuseError) as error:
        build(model_source(spec))
    assert close in error.value.hint


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18", "hf_hub:timm/resnet18", "local-dir:/tmp"])
def test_names_that_would_fetch_are_unknown(name: str) -> None:
    with pytest.raises(RepfuseError, match="has no"):
        build(model_source(f"timm:{name}"))


def test_a_library_that_is_missing_or_broken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(building.importlib, "import_module", broken)
    with pytest.raises(RepfuseError, match="does not import") as error:
        build(model_source("timm:resnet18"))
    assert "belong together" in error.value.hint

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(building.importlib, "import_module", missing)
    monkeypatch.setattr(building.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RepfuseError, match="pip install timm"):
        build(model_source("timm:resnet18"))


def test_an_importable_callable() -> None:
    network = build(model_source("repfuse.samples:DigitsRepVGG", ["width=4"]))
    assert isinstance(network, DigitsRepVGG)
    assert network.head.in_features == 8


@pytest.fixture
def code(tmp_path: Path) -> Any:
    """Write a Python file, and give the spec of a callable in it."""
    modules, paths = dict(sys.modules), list(sys.path)

    def write(text: str, name: str = "net", file: str = "my_net.py") -> str:
        (tmp_path / file).write_text("from torch import nn\n" + text)
        return f"{tmp_path / file}:{name}"

    yield write
    for module in set(sys.modules) - set(modules):
        if getattr(sys.modules[module], "__file__", None) and str(tmp_path) in str(sys.modules[module].__file__):
            del sys.modules[module]
    sys.path[:] = paths


def test_a_file_with_its_neighbours(code: Any, tmp_path: Path) -> None:
    (tmp_path / "my_parts.py").write_text("WIDTH = 5\n")
    spec = code("from my_parts import WIDTH\ndef net(depth=1): return nn.Linear(WIDTH, depth)")
    network = build(model_source(spec, ["depth=3"]))
    assert (network.in_features, network.out_features) == (5, 3)


def test_a_file_is_read_anew_each_time(code: Any) -> None:
    build(model_source(code("def net(): return nn.ReLU()")))
    assert isinstance(build(model_source(code("def net(): return nn.GELU(  )"))), nn.GELU)


def test_a_file_named_like_a_library_does_not_hide_it(code: Any) -> None:
    build(model_source(code("def net(): return nn.ReLU()", file="torch.py")))
    assert sys.modules["torch"] is torch


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("def net(): return 3", "net", "gave a int, not a network"),
        ("def net(): return nn.ReLU(1, 2, 3)", "net", "could not be built"),
        ("def net(a): return nn.ReLU()", "net", "could not be built"),
        ("net = 3", "net", "is not callable"),
        ("def nett(): return nn.ReLU()", "net", "Did you mean nett"),
        ("1 / 0", "net", "ZeroDivisionError"),
        ("def net(:", "net", "SyntaxError"),
    ],
)
def test_what_goes_wrong_in_the_users_code_is_one_message(text: str, name: str, said: str, code: Any) -> None:
    with pytest.raises(RepfuseError, match=said) as error:
        build(model_source(code(text, name)))
    assert error.value.exit_code == 2


def test_missing_files_and_packages(tmp_path: Path) -> None:
    with pytest.raises(RepfuseError, match="does not exist"):
        build(model_source(f"{tmp_path / 'no.py'}:net"))
    with pytest.raises(RepfuseError, match="cannot be imported"):
        build(model_source("no_such_package.models:net"))


def test_building_leaves_the_random_generator_alone() -> None:
    before = torch.random.get_rng_state()
    build(model_source("timm:resnet18"))
    assert torch.equal(before, torch.random.get_rng_state())
