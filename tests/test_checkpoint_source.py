"""How networks are named and built."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

from repfuse import RepfuseError, load, save
from repfuse.samples import DigitsRepVGG


class Told(nn.Linear):
    """Remembers what it was built with."""

    def __init__(self, **told: Any) -> None:
        super().__init__(1, 1)
        self.told = told


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of ``Told``, and of any layer of one number."""
    path = tmp_path_factory.mktemp("weights") / "in.pt"
    torch.save(nn.Linear(1, 1).state_dict(), path)
    return path


def told(weights: Path, arguments: Any) -> dict[str, Any]:
    return load(weights, model=f"{__name__}:Told", model_args=arguments).module.told


def built(spec: str, arguments: Any, like: Callable[[], nn.Module], folder: Path) -> Any:
    """The network that ``spec`` names, with weights that nobody looks at; they take no room in the file."""
    with torch.device("meta"):
        held = like().state_dict()
    state = {name: torch.zeros((), dtype=x.dtype, device="cpu").expand(x.shape) for name, x in held.items()}
    torch.save(state, folder / "in.pt")
    return load(folder / "in.pt", model=spec, model_args=arguments, input="1x3x8x8").module


def refused(weights: Path, spec: str, said: str, arguments: Any = ()) -> RepfuseError:
    with pytest.raises(RepfuseError, match=said) as error:
        load(weights, model=spec, model_args=arguments)
    assert error.value.exit_code == 2
    return error.value


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("timm:no_such", "timm has no 'no_such'"),
        ("timm:no_such.rvgg_in1k", "timm has no 'no_such.rvgg_in1k'"),
        ("torchvision:no_such", "torchvision has no 'no_such'"),
        ("a.b.c:Net", "a.b.c cannot be imported"),
        ("net.py:build", "net.py does not exist"),
        ("C:\\x\\net.py:build", r"C:\\x\\net.py does not exist"),
        ("torch.nn:Net", "torch.nn has no 'Net'"),
    ],
)
def test_the_forms_of_a_spec(spec: str, said: str, weights: Path) -> None:
    refused(weights, spec, said)


@pytest.mark.parametrize("spec", ["", "repvgg_a0", "timm:", ":x", "a b:c", "path/to/file:build", "a-b:c"])
def test_other_specs_are_refused_with_the_forms(spec: str, weights: Path) -> None:
    refused(weights, spec, "timm:NAME")


LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@example({"a": "1"})
@given(
    st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]*", fullmatch=True).filter(lambda name: name != "self"), LITERALS)
)
def test_arguments_survive_the_file_that_is_written(weights: Path, arguments: dict[str, Any]) -> None:
    checkpoint = load(weights, model=f"{__name__}:Told", model_args=arguments)
    assert checkpoint.module.told == arguments
    saved = save(checkpoint, checkpoint.module, weights.with_name("out.pt"), force=True)
    assert load(saved.path, trust=True).module.told == arguments


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
def test_arguments_are_literals_or_else_text(text: str, value: object, weights: Path) -> None:
    assert told(weights, [text]) == {"a": value}


@pytest.mark.parametrize("text", ["a", "=1", "1a=2", "a b=3"])
def test_an_argument_needs_a_name(text: str, weights: Path) -> None:
    refused(weights, "timm:x", "name=value", [text])


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
def test_a_network_of_a_library_is_what_the_library_makes_but_for_random_numbers(name: str, tmp_path: Path) -> None:
    library, _, model = name.partition(":")
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    with Draws() as drawn:
        wanted = make(model).eval()
    with Draws() as seen:
        found = built(name, (), lambda: wanted, tmp_path)
    assert len(drawn.seen) > 20 and not seen.seen
    assert str(found) == str(wanted)
    for (path, x), (other, y) in zip(found.named_parameters(), wanted.named_parameters(), strict=True):
        assert (path, x.shape, x.dtype, x.requires_grad) == (other, y.shape, y.dtype, y.requires_grad)
    held = wanted.state_dict()
    for (path, x), (other, y) in zip(found.named_buffers(), wanted.named_buffers(), strict=True):
        assert path == other and (path in held or torch.equal(x, y))


def test_timm_builds_by_name_and_arguments(tmp_path: Path) -> None:
    like = partial(timm.create_model, "resnet18", num_classes=7, in_chans=1)
    network = built("timm:resnet18", ["num_classes=7", "in_chans=1"], like, tmp_path)
    assert (network.fc.out_features, network.conv1.in_channels) == (7, 1)


def test_torchvision_builds_without_any_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
    like: Any = partial(torchvision.models.resnet18, num_classes=7)
    assert built("torchvision:resnet18", ["num_classes=7"], like, tmp_path).fc.out_features == 7
    lraspp = torchvision.models.segmentation.lraspp_mobilenet_v3_large
    like = partial(lraspp, weights=None, weights_backbone=None)
    built("torchvision:lraspp_mobilenet_v3_large", (), like, tmp_path)  # its backbone would be downloaded by default


@pytest.mark.parametrize("argument", ["pretrained=True", "checkpoint_path=x.pth", "weights='DEFAULT'"])
def test_weights_are_never_fetched(argument: str, weights: Path) -> None:
    for spec in ("timm:resnet18", "torchvision:resnet18"):
        refused(weights, spec, "downloads nothing", [argument])


def test_weights_may_be_said_not_to_be_fetched(tmp_path: Path) -> None:
    built("timm:resnet18", ["pretrained=False"], partial(timm.create_model, "resnet18"), tmp_path)


@pytest.mark.parametrize(("spec", "close"), [("timm:repvgga0", "repvgg_a0"), ("torchvision:resnet_18", "resnet18")])
def test_an_unknown_name_gives_close_ones(spec: str, close: str, weights: Path) -> None:
    assert close in refused(weights, spec, "has no").hint


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18", "hf_hub:timm/resnet18", "local-dir:/tmp"])
def test_names_that_would_fetch_are_unknown(name: str, weights: Path) -> None:
    refused(weights, f"timm:{name}", "has no")


def test_a_library_that_is_missing_or_broken_is_said(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert "belong together" in refused(weights, "timm:resnet18", "does not import").hint

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    refused(weights, "timm:resnet18", "pip install timm")


def test_an_importable_callable(tmp_path: Path) -> None:
    network = built("repfuse.samples:DigitsRepVGG", ["width=4"], lambda: DigitsRepVGG(4), tmp_path)
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
    network = built(spec, ["depth=3"], lambda: nn.Linear(5, 3), tmp_path)
    assert (network.in_features, network.out_features) == (5, 3)


def test_a_file_is_read_anew_each_time(code: Any, tmp_path: Path) -> None:
    for kind, more in ((nn.Conv1d, ""), (nn.Conv2d, "  ")):  # longer: Python knows by it that it has compiled another
        spec = code(f"def net(): return nn.{kind.__name__}(1, 1, 1{more})")
        assert isinstance(built(spec, (), partial(kind, 1, 1, 1), tmp_path), kind)


def test_a_file_named_like_a_library_does_not_hide_it(code: Any, tmp_path: Path) -> None:
    built(code("def net(): return nn.Linear(1, 1)", file="torch.py"), (), lambda: nn.Linear(1, 1), tmp_path)
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
def test_what_goes_wrong_in_the_users_code_is_one_message(
    text: str, name: str, said: str, code: Any, weights: Path
) -> None:
    refused(weights, code(text, name), said)


def test_missing_files_and_packages(weights: Path, tmp_path: Path) -> None:
    refused(weights, f"{tmp_path / 'no.py'}:net", "does not exist")
    refused(weights, "no_such_package.models:net", "cannot be imported")


@pytest.mark.parametrize(
    ("spec", "like"),
    [("timm:resnet18", partial(timm.create_model, "resnet18")), ("repfuse.samples:DigitsRepVGG", DigitsRepVGG)],
)
def test_building_leaves_the_random_generator_alone(spec: str, like: Callable[[], nn.Module], tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    built(spec, (), like, tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
