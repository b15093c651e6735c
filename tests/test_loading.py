"""Checkpoints in and out, end to end: every layout, every format, and what goes wrong."""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.networks import digits
from torch import Tensor, nn

from repfuse.checkpoint import allow as allow_list
from repfuse.checkpoint import safetensors_file, torch_pickle
from repfuse.errors import RepfuseError
from repfuse.loading import Checkpoint, load
from repfuse.planning.planner import plan
from repfuse.rewriting import rewrite
from repfuse.samples import DigitsRepVGG, NotebookBlock
from repfuse.saving import save

DIGITS = "repfuse.samples:DigitsRepVGG"


NETWORK = digits()
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
ARGUMENTS = ["width=4"]


def prefixed(prefix: str) -> dict[str, Tensor]:
    return NETWORK.state_dict(prefix=prefix)


class NeverEval(nn.BatchNorm2d):
    """Stays in training mode, as some detectors' normalisations do."""

    def train(self, mode: bool = True) -> NeverEval:
        return super().train(True)


def training(**more: Any) -> dict[str, Any]:
    optimizer = torch.optim.SGD(NETWORK.parameters(), lr=0.1)
    return {"epoch": 7, "state_dict": NETWORK.state_dict(), "optimizer": optimizer.state_dict(), **more}


LAYOUTS: dict[str, Any] = {
    "module": NETWORK,
    "module in a checkpoint": {"epoch": 7, "model": NETWORK},
    "module in DataParallel": nn.DataParallel(NETWORK),
    "state dict": NETWORK.state_dict(),
    "plain dict": dict(NETWORK.state_dict()),
    "DataParallel's names": prefixed("module."),
    "torch.compile's names": prefixed("_orig_mod."),
    "training checkpoint": training(),
    "training checkpoint with foreign objects": training(args=SimpleNamespace(lr=1), path=Path("x")),
    "averaged": {"ema": {"module": NETWORK.state_dict()}, "model": None},
}


def written(layout: str, path: Path, **options: Any) -> Path:
    torch.save(LAYOUTS[layout], path, **options)
    return path


def opened(path: Path, **options: Any) -> Checkpoint:
    return load(path, model=DIGITS, model_args=ARGUMENTS, **options)


def same(checkpoint: Checkpoint) -> bool:
    return torch.equal(checkpoint.module(X), NETWORK(X))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_to_the_same_network(layout: str, legacy: bool, tmp_path: Path) -> None:
    path = written(layout, tmp_path / "x.safetensors", _use_new_zipfile_serialization=not legacy)  # the name lies
    if legacy and "module" in layout:
        assert "before version 1.6" in bad(path).why
        assert same(load(path, trust=True))
        return
    checkpoint = opened(path)
    assert same(checkpoint)
    assert not any(part.training for part in checkpoint.module.modules())
    assert checkpoint.format == ("pt" if layout.startswith("module") else "state-dict")
    assert [tuple(x.shape) for x in checkpoint.example_inputs] == [(1, 1, 8, 8)]
    assert checkpoint.digest.startswith("sha256:")


def test_safetensors_loads_to_the_same_network(tmp_path: Path) -> None:
    save_file(NETWORK.state_dict(), tmp_path / "x.pt")
    checkpoint = opened(tmp_path / "x.pt")
    assert same(checkpoint)
    assert checkpoint.format == "safetensors"


def test_what_was_loaded_does_not_change_with_the_file(tmp_path: Path) -> None:
    """A mapped file would change under the network, or kill the process where the file gets shorter."""
    save_file(NETWORK.state_dict(), tmp_path / "x.safetensors")
    written("module", tmp_path / "x.pt")
    checkpoints = [opened(tmp_path / "x.safetensors"), opened(tmp_path / "x.pt")]
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    assert all(map(same, checkpoints))


def test_a_file_saved_on_a_gpu_loads_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:3")
    paths = [written("module", tmp_path / "x.pt"), written("state dict", tmp_path / "y.pt")]
    monkeypatch.undo()
    for path in paths:
        assert b"cuda:3" in path.read_bytes()
        assert same(opened(path))


def test_training_mode_is_said_of_a_module_and_of_nothing_else(tmp_path: Path) -> None:
    torch.save(digits().train(), tmp_path / "x.pt")
    checkpoint = load(tmp_path / "x.pt")
    assert "training mode" in checkpoint.notes[0]
    assert not any(part.training for part in checkpoint.module.modules())
    for layout in ("module", "state dict"):
        assert not opened(written(layout, tmp_path / "y.pt")).notes[1 if layout == "module" else 0 :]


def test_a_child_that_was_left_in_training_mode_is_named(tmp_path: Path) -> None:
    network = digits().eval()
    network.blocks[1].train()
    network.blocks[3].conv3[1].train()
    torch.save(network, tmp_path / "x.pt")
    checkpoint = load(tmp_path / "x.pt")
    assert checkpoint.notes[0] == (
        "blocks.1, blocks.3.conv3.1 were in training mode: all of the network is used in eval mode"
    )
    assert not any(part.training for part in checkpoint.module.modules())


def test_a_module_that_stays_in_training_mode_is_named(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), NeverEval(2)).eval()
    torch.save(network, tmp_path / "x.pt")
    checkpoint = load(tmp_path / "x.pt", allow=[__name__], input="1x1x8x8")
    assert checkpoint.notes == ("in training mode, and staying in it after eval(): 1",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["module", "state dict"])
def test_the_network_has_the_dtype_of_the_file(dtype: torch.dtype, layout: str, tmp_path: Path) -> None:
    network = digits().to(dtype)
    torch.save(network if layout == "module" else network.state_dict(), tmp_path / "x.pt")
    checkpoint = opened(tmp_path / "x.pt")
    assert {p.dtype for p in checkpoint.module.parameters()} == {dtype}
    assert checkpoint.example_inputs[0].dtype == dtype
    assert torch.equal(checkpoint.module(X.to(dtype)), network(X.to(dtype)))


def test_where_the_input_is_from(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    torch.save(plain, tmp_path / "plain.pt")
    guess = load(tmp_path / "plain.pt")
    assert (guess.input_origin, guess.example_inputs[0].shape) == ("guess", (1, 3, 224, 224))
    assert "guess" in guess.notes[-1]
    given_ = load(tmp_path / "plain.pt", input="2x3x8x9:float64,1x2")
    assert [tuple(x.shape) for x in given_.example_inputs] == [(2, 3, 8, 9), (1, 2)]
    assert (given_.input_origin, given_.notes) == ("given", ())
    assert load(written("module", tmp_path / "x.pt")).input_origin == "checkpoint"
    assert opened(written("state dict", tmp_path / "x.pt")).input_origin == "model source"


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        pytest.param("timm:repvgg_a0", "checkpoint", marks=pytest.mark.slow),
        ("timm:mobileone_s0", "checkpoint"),
        pytest.param("timm:resnet18", "checkpoint", marks=pytest.mark.slow),
        ("timm:convnext_atto", "checkpoint"),
        pytest.param("timm:vit_tiny_patch16_224", "checkpoint", marks=pytest.mark.slow),
        ("timm:deit_tiny_patch16_224", "checkpoint"),  # has an enumeration
        pytest.param("torchvision:resnet18", "guess", marks=pytest.mark.slow),
        ("torchvision:mobilenet_v3_small", "guess"),
        ("torchvision:swin_t", "guess"),  # has buffers that are in no state dict
    ],
)
def test_pickled_networks_of_the_libraries_need_no_trust(name: str, origin: str, tmp_path: Path) -> None:
    library, _, model = name.partition(":")
    network = (timm.create_model if library == "timm" else torchvision.models.get_model)(model).eval()
    for parameter in network.parameters():
        if parameter.dim() < 2:  # which the libraries make ones and zeros
            nn.init.normal_(parameter)
    torch.save(network, tmp_path / "x.pt")
    checkpoint = load(tmp_path / "x.pt")
    assert checkpoint.input_origin == origin
    assert type(checkpoint.module) is type(network)
    assert [key for key, _ in checkpoint.module.named_modules()] == [key for key, _ in network.named_modules()]
    pairs = zip(tensors(network).items(), tensors(checkpoint.module).items(), strict=True)
    assert all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in pairs)


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return dict([*network.named_parameters(), *network.named_buffers()])


def test_a_partial_of_a_layer_is_restored(tmp_path: Path) -> None:
    import torchvision

    network = torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32)
    torch.save(network, tmp_path / "x.pt")
    norm_layer = load(tmp_path / "x.pt").module.norm_layer
    assert (norm_layer.func, norm_layer.keywords) == (nn.LayerNorm, {"eps": 1e-6})


@pytest.mark.parametrize("function", [torch.tanh, nn.functional.relu, nn.functional.gelu, nn.functional.leaky_relu])
def test_an_activation_that_a_network_holds_is_restored(function: Any, tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=function)
    torch.save(layer, tmp_path / "x.pt")
    assert load(tmp_path / "x.pt", input="2x3x8").module.activation is function


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An installed package that repfuse does not know, with one network."""
    (tmp_path / "some_package.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n    pass\ndef net(): return Net(nn.Conv2d(2, 2, 1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import some_package

    yield some_package
    del sys.modules["some_package"]


def test_an_unknown_class_needs_its_package_allowed_or_trust(package: Any, tmp_path: Path) -> None:
    network = package.net()
    torch.save(network, tmp_path / "x.pt")
    with pytest.raises(RepfuseError, match=r"some_package\.Net") as error:
        load(tmp_path / "x.pt")
    assert "--allow some_package" in error.value.hint
    assert "--model" in error.value.hint
    for options in ({"allow": ["some_package"]}, {"trust": True}):
        assert type(load(tmp_path / "x.pt", **options).module) is package.Net


def test_a_known_library_that_is_missing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(torchvision.models.resnet18(), tmp_path / "x.pt")
    monkeypatch.setattr(allow_list, "is_found", lambda package: package != "torchvision")
    hint = bad(tmp_path / "x.pt").hint
    assert hint.startswith("Install what is missing: pip install torchvision.") and "--trust" not in hint


def test_a_class_that_is_gone_gives_its_weights_to_a_network_of_the_user(package: Any, tmp_path: Path) -> None:
    network = package.net()
    network.register_buffer("scratch", torch.ones(1), persistent=False)
    package.Net.__module__ = "__main__"  # as a notebook would have saved it
    sys.modules["__main__"].Net = package.Net
    torch.save(network, tmp_path / "x.pt")
    del sys.modules["__main__"].Net
    with pytest.raises(RepfuseError, match="notebook"):
        load(tmp_path / "x.pt")
    checkpoint = load(tmp_path / "x.pt", model="some_package:net")
    assert torch.equal(checkpoint.module[0].weight, network[0].weight)
    assert "only the weights" in checkpoint.notes[0]
    assert checkpoint.format == "state-dict"


def test_a_model_for_a_file_that_holds_its_network_is_not_used_and_this_is_said(tmp_path: Path) -> None:
    checkpoint = load(written("module", tmp_path / "x.pt"), model="timm:resnet18")
    assert same(checkpoint)
    assert "timm:resnet18 is not used" in checkpoint.notes[0]


def test_trust_loads_what_needs_it(tmp_path: Path) -> None:
    torch.save({"model": NETWORK, "why": print}, tmp_path / "x.pt")
    checkpoint = load(tmp_path / "x.pt", trust=True)
    assert same(checkpoint)
    (tmp_path / "y.pt").write_bytes((tmp_path / "x.pt").read_bytes().replace(b"DigitsRepVGG", b"DigitsRepVGX"))
    with pytest.raises(RepfuseError):
        load(tmp_path / "y.pt", trust=True)


def test_a_newer_pickle_protocol_needs_trust_or_another_save(tmp_path: Path) -> None:
    path = written("module", tmp_path / "x.pt", pickle_protocol=4)
    with pytest.raises(RepfuseError, match="protocol 4"):
        load(path)
    assert same(load(path, trust=True))


def bad(path: Path, **options: Any) -> RepfuseError:
    with pytest.raises(RepfuseError) as error:
        load(path, **options)
    assert error.value.exit_code == 2
    return error.value


def test_a_state_dict_needs_a_model(tmp_path: Path) -> None:
    error = bad(written("state dict", tmp_path / "x.pt"))
    assert "--model" in error.hint
    assert "state dict" in error.why


def test_a_wrong_network_lists_what_does_not_fit(tmp_path: Path) -> None:
    error = bad(written("state dict", tmp_path / "x.pt"), model="repfuse.samples:NotebookBlock")
    assert "missing" in error.why
    assert "unexpected" in error.why
    assert "do not fit" in bad(written("state dict", tmp_path / "y.pt"), model=DIGITS).what  # another width


def test_other_bad_options(tmp_path: Path) -> None:
    path = written("module", tmp_path / "x.pt")
    assert "input shape" in bad(path, input="3y4").what
    assert "no model" in bad(path, model_args=["a=1"]).what
    assert "how to build" in bad(path, model="resnet18").what
    assert "moved to" in bad(path, device="nonsense").what
    assert "under 'x'" in bad(path.with_name("x.pt") if torch.save({"model": NETWORK}, path) else path, weights="x").why


FILES = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}, "safetensors": None}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One small file of each format."""
    folder = tmp_path_factory.mktemp("whole")
    network = NotebookBlock(2).eval()
    save_file(network.state_dict(), folder / "safetensors")
    torch.save(network, folder / "zip")
    torch.save(network, folder / "legacy", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


SLOW_FIXTURE = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("form", FILES)
@SLOW_FIXTURE
@given(data=st.data())
def test_a_file_cut_short_is_one_message(
    form: str, whole: dict[str, bytes], tmp_path: Path, data: st.DataObject
) -> None:
    content = whole[form]
    (tmp_path / "x").write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    bad(tmp_path / "x", model="repfuse.samples:NotebookBlock", model_args=["channels=2"])


@pytest.mark.parametrize("form", FILES)
@SLOW_FIXTURE
@given(data=st.data())
def test_a_damaged_file_loads_or_is_one_message(
    form: str, whole: dict[str, bytes], tmp_path: Path, data: st.DataObject
) -> None:
    """A changed byte in a weight cannot be seen; anything else must end in a RepfuseError and in nothing else."""
    content = bytearray(whole[form])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x").write_bytes(content)
    try:
        load(tmp_path / "x", model="repfuse.samples:NotebookBlock", model_args=["channels=2"])
    except RepfuseError as error:
        assert error.exit_code == 2


@SLOW_FIXTURE
@given(content=st.binary(min_size=1, max_size=300))
def test_any_bytes_are_one_message(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    bad(tmp_path / "x")


def fused(checkpoint: Checkpoint) -> nn.Module:
    return rewrite(checkpoint.module, plan(checkpoint.module, checkpoint.example_inputs))


def convolutions(network: nn.Module) -> int:
    return sum(isinstance(part, nn.Conv2d) for part in network.modules())


def source_of(form: str, folder: Path) -> Checkpoint:
    """A checkpoint of each format, of the unfused network."""
    if form == "safetensors":
        save_file(NETWORK.state_dict(), folder / "in.safetensors", {"author": "me"})
        return opened(folder / "in.safetensors")
    return opened(written("module" if form == "pt" else "training checkpoint", folder / "in.pt"))


FORMATS = ["pt", "state-dict", "safetensors"]


@pytest.mark.parametrize("of_output", FORMATS)
@pytest.mark.parametrize("of_input", FORMATS)
def test_a_fused_network_comes_back_as_it_was_written(of_input: str, of_output: str, tmp_path: Path) -> None:
    checkpoint = source_of(of_input, tmp_path)
    network = fused(checkpoint)
    saved = save(checkpoint, network, tmp_path / "out", format=of_output)
    assert saved.format == of_output
    assert saved.digest == load_digest(saved.path)
    if of_input == "pt" and of_output != "pt":
        assert "does not say how its network is built" in saved.notes[-1]
        assert "--model" in bad(saved.path).hint
        return
    again = load(saved.path)  # by itself: no model, no trust
    assert convolutions(again.module) == convolutions(network) == 5
    assert type(again.module) is DigitsRepVGG
    assert torch.equal(again.module(X), network(X))
    assert again.input_origin == "checkpoint"
    assert (again.plan is not None) == (of_output != "pt")


def load_digest(path: Path) -> str:
    import hashlib

    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_state_dict_is_plain_and_strict_for_others(tmp_path: Path) -> None:
    """Plain torch reads it safely, and finds the weights where they were, and nothing else among them."""
    checkpoint = source_of("state-dict", tmp_path)
    network = fused(checkpoint)
    saved = save(checkpoint, network, tmp_path / "out.pt")
    plain = torch.load(saved.path, weights_only=True)
    assert set(plain) == {"epoch", "state_dict"}
    assert plain["epoch"] == 7
    assert saved.notes[0] == "kept from the training checkpoint: epoch"
    assert saved.notes[1].startswith("left out of the training checkpoint: optimizer (")
    other = rewrite(digits(), plan(digits(), [X]))
    other.load_state_dict(plain["state_dict"], strict=True)
    assert torch.equal(other(X), network(X))
    assert plain["state_dict"]._metadata  # the versions of the modules are there too


def test_safetensors_are_plain_for_others(tmp_path: Path) -> None:
    checkpoint = source_of("safetensors", tmp_path)
    network = fused(checkpoint)
    saved = save(checkpoint, network, tmp_path / "out.safetensors")
    assert load_file(saved.path).keys() == network.state_dict().keys()
    with safe_open(saved.path, "pt") as file:
        metadata = file.metadata()
    assert metadata["author"] == "me"  # what the input said of itself
    recipe = json.loads(metadata["repfuse"])
    assert (recipe["model"], recipe["model_args"], recipe["input"]) == (DIGITS, ARGUMENTS, "1x1x8x8")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_the_prefix_is_written_back(prefix: str, tmp_path: Path) -> None:
    torch.save(prefixed(prefix) | {"n_averaged": torch.tensor(3)}, tmp_path / "in.pt")
    checkpoint = opened(tmp_path / "in.pt")
    saved = save(checkpoint, fused(checkpoint), tmp_path / "out.pt")
    names = set(torch.load(saved.path, weights_only=True))
    assert "n_averaged" in names
    assert all(name.startswith(prefix) for name in names - {"n_averaged"})
    assert torch.equal(load(saved.path).module(X), fused(checkpoint)(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_come_back_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.save(digits().to(dtype).state_dict(), tmp_path / "in.pt")
    checkpoint = opened(tmp_path / "in.pt")
    network = fused(checkpoint)
    for out in (tmp_path / "out.pt", tmp_path / "out.safetensors"):
        again = load(save(checkpoint, network, out).path)
        assert {p.dtype for p in again.module.parameters()} == {dtype}
        assert torch.equal(again.module(X.to(dtype)), network(X.to(dtype)))


def test_a_file_that_is_fused_twice_remembers_both_times(tmp_path: Path) -> None:
    checkpoint = source_of("state-dict", tmp_path)
    first = plan(checkpoint.module, checkpoint.example_inputs)
    half = replace(first, sites=first.sites[:2], refusals=())
    network = rewrite(checkpoint.module, half)
    once = load(save(checkpoint, network, tmp_path / "once.pt", plan=half).path)
    assert 5 < convolutions(once.module) < 10
    twice = load(save(once, fused(once), tmp_path / "twice.pt").path)
    assert convolutions(twice.module) == 5
    assert len(twice.plans) == 2
    unchanged = load(save(twice, twice.module, tmp_path / "unchanged.pt").path)
    assert torch.equal(unchanged.module(X), twice.module(X))


@pytest.mark.parametrize("strides", [torch.contiguous_format, torch.channels_last])
def test_tied_weights_and_strides_survive_every_format(strides: torch.memory_format, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).to(memory_format=strides).eval()
    network[1].weight = network[0].weight
    torch.save(network, tmp_path / "in.pt")
    checkpoint = load(tmp_path / "in.pt")
    assert checkpoint.module[0].weight is checkpoint.module[1].weight
    again = load(save(checkpoint, checkpoint.module, tmp_path / "out.pt").path)
    assert again.module[0].weight is again.module[1].weight
    assert again.module[0].weight.is_contiguous(memory_format=strides)
    out = save(checkpoint, checkpoint.module, tmp_path / "out.safetensors").path
    assert load_file(out).keys() == network.state_dict().keys()  # each name is there, for strict readers
    fresh = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    fresh.load_state_dict(load_file(out), strict=True)
    assert torch.equal(fresh[1].weight, network[0].weight)


@pytest.mark.parametrize(
    ("of_input", "out", "asked", "expected"),
    [
        ("pt", "x.pt", None, "pt"),
        ("pt", "x", None, "pt"),
        ("pt", "x.safetensors", None, "safetensors"),
        ("pt", "x.pt", "state-dict", "state-dict"),
        ("state-dict", "x.PTH", None, "state-dict"),
        ("state-dict", "x.safetensors", None, "safetensors"),
        ("safetensors", "x.other", None, "safetensors"),
        ("safetensors", "x.ckpt", None, "state-dict"),
        ("safetensors", "x.pt", "pt", "pt"),
    ],
)
def test_the_format_follows_the_wish_the_suffix_and_the_input(
    of_input: str, out: str, asked: str | None, expected: str, tmp_path: Path
) -> None:
    checkpoint = source_of(of_input, tmp_path)
    assert save(checkpoint, checkpoint.module, tmp_path / out, format=asked).format == expected


def test_bad_targets_and_formats(tmp_path: Path) -> None:
    checkpoint = source_of("pt", tmp_path)
    (tmp_path / "there.pt").write_bytes(b"precious")
    for out, options, said in (
        (checkpoint.path, {"force": True}, "the input itself"),
        (tmp_path / "there.pt", {}, "--force"),
        (tmp_path / "no" / "x.pt", {}, "does not exist"),
        (tmp_path / "x.pt", {"format": "keras"}, "pt, pt2, safetensors, state-dict, onnx"),
    ):
        with pytest.raises(RepfuseError, match=said):
            save(checkpoint, checkpoint.module, out, **options)
    assert (tmp_path / "there.pt").read_bytes() == b"precious"
    save(checkpoint, checkpoint.module, tmp_path / "there.pt", force=True)
    assert same(load(tmp_path / "there.pt"))


def test_a_network_that_cannot_be_pickled_is_one_message(tmp_path: Path) -> None:
    checkpoint = source_of("pt", tmp_path)
    checkpoint.module.act = lambda x: x
    with pytest.raises(RepfuseError, match="cannot be pickled") as error:
        save(checkpoint, checkpoint.module, tmp_path / "out.pt")
    assert ".safetensors" in error.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"in.pt"}


@pytest.mark.parametrize("form", FORMATS)
def test_what_does_not_read_back_is_not_kept(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of one weight is wrong on the disk."""
    checkpoint = source_of("state-dict", tmp_path)

    def spoiled(write: Any, data: Any, *rest: Any) -> None:
        state = data if isinstance(data, dict) else data.state_dict()
        state = state.get("state_dict", state)
        weight = data["state_dict"].head.bias.data if form == "pt" else state["head.bias"]
        weight.view(torch.int32)[0] ^= 1
        write(data, *rest)
        weight.view(torch.int32)[0] ^= 1

    for module in (torch_pickle, safetensors_file):
        monkeypatch.setattr(module, "write", lambda *args, write=module.write: spoiled(write, *args))
    with pytest.raises(RepfuseError, match="read back") as error:
        save(checkpoint, checkpoint.module, tmp_path / "out", format=form)
    assert error.value.exit_code == 1
    assert "head.bias" in error.value.why
    assert {path.name for path in tmp_path.iterdir()} == {"in.pt"}


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_is_one_message_and_leaves_nothing(form: str, tmp_path: Path) -> None:
    checkpoint = source_of("state-dict", tmp_path)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))  # stands in for the full disk
    try:
        with pytest.raises(RepfuseError, match="nothing was changed"):
            save(checkpoint, checkpoint.module, tmp_path / "out", format=form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name for path in tmp_path.iterdir()} == {"in.pt"}


def test_weights_that_safetensors_cannot_hold_are_one_message(tmp_path: Path) -> None:
    checkpoint = source_of("pt", tmp_path)
    checkpoint.module.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(RepfuseError, match="safetensors"):
        save(checkpoint, checkpoint.module, tmp_path / "out.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"in.pt"}
    again = load(save(checkpoint, checkpoint.module, tmp_path / "out.pt").path)
    assert torch.equal(again.module.sparse.to_dense(), torch.eye(3))


def test_nan_weights_are_the_same_bits_and_are_kept(tmp_path: Path) -> None:
    checkpoint = source_of("state-dict", tmp_path)
    checkpoint.module.head.bias.data[0] = float("nan")
    for name in ("out.pt", "out.safetensors"):
        save(checkpoint, checkpoint.module, tmp_path / name)


def test_a_recipe_for_another_network_is_one_message(tmp_path: Path) -> None:
    checkpoint = source_of("safetensors", tmp_path)
    saved = save(checkpoint, fused(checkpoint), tmp_path / "out.safetensors")
    with safe_open(saved.path, "pt") as file:
        recipe = json.loads(file.metadata()["repfuse"])
    for change, said in (
        ({"model_args": ["width=6"]}, "does not fit"),
        ({"plans": []}, "looks fused already"),
        ({"schema": 99}, "schema 99"),
        ({"plans": [{}]}, "not a plan"),
        ({"model": 3}, "how to build"),
        ({"model_args": None}, "damaged recipe"),
    ):
        metadata = {"repfuse": json.dumps(recipe | change)}
        save_file(load_file(saved.path), tmp_path / "bad.safetensors", metadata)
        assert said in str(bad(tmp_path / "bad.safetensors"))
    save_file(load_file(saved.path), tmp_path / "bad.safetensors", {"repfuse": "{"})
    assert "damaged recipe" in bad(tmp_path / "bad.safetensors").what


def test_a_recipe_with_the_users_own_code_asks_for_it(tmp_path: Path) -> None:
    (tmp_path / "own_net.py").write_text(
        "from repfuse.samples import DigitsRepVGG\ndef net(): return DigitsRepVGG(4)\n"
    )
    spec = f"{tmp_path / 'own_net.py'}:net"
    checkpoint = load(written("state dict", tmp_path / "in.pt"), model=spec)
    network = fused(checkpoint)
    saved = save(checkpoint, network, tmp_path / "out.pt")
    assert spec in bad(saved.path).hint
    for options in ({"model": spec}, {"trust": True}):
        assert torch.equal(load(saved.path, **options).module(X), network(X))


def test_arguments_that_have_no_text_leave_a_file_without_recipe(tmp_path: Path) -> None:
    (tmp_path / "odd_net.py").write_text("def net(make): return make(width=4)\n")
    checkpoint = load(
        written("state dict", tmp_path / "in.pt"),
        model=f"{tmp_path / 'odd_net.py'}:net",
        model_args={"make": DigitsRepVGG},
    )
    saved = save(checkpoint, checkpoint.module, tmp_path / "out.pt")
    assert "does not say how" in saved.notes[0]


def test_an_output_that_needs_more_trust_than_its_input_is_said(tmp_path: Path) -> None:
    checkpoint = source_of("pt", tmp_path)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    saved = save(checkpoint, traced, tmp_path / "out.pt")
    assert "--trust" in saved.notes[0]
    assert "reduce_graph_module" in saved.notes[0]
    assert not save(checkpoint, checkpoint.module, tmp_path / "plain.pt").notes


def test_a_state_dict_with_tensors_of_one_storage_keeps_its_values(tmp_path: Path) -> None:
    whole_ = torch.randn(4, 6)
    state = OrderedDict(weight=whole_[:3, :4], bias=whole_.flatten()[:3])
    torch.save(state, tmp_path / "in.pt")
    checkpoint = load(tmp_path / "in.pt", model="torch.nn:Linear", model_args=["in_features=4", "out_features=3"])
    for name in ("out.pt", "out.safetensors"):
        saved = save(checkpoint, checkpoint.module, tmp_path / name)
        again = load(saved.path, model="torch.nn:Linear", model_args=["in_features=4", "out_features=3"])
        assert torch.equal(again.module.weight, state["weight"])
        assert torch.equal(again.module.bias, state["bias"])
