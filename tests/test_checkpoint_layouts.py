"""Training checkpoints of the libraries, end to end: which weights are taken, and what comes back in the layout."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import zipfile
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from safetensors import safe_open
from safetensors.torch import save_file
from support.layouts import ARGUMENTS, AVERAGED, MODEL, TRAINED, WEIGHTS, WRITERS, X, foreign, mmengine, prefixed
from torch import nn

from repfuse.checkpoint import torch_pickle
from repfuse.errors import RepfuseError
from repfuse.loading import Checkpoint, load
from repfuse.planning.planner import plan
from repfuse.rewriting import rewrite
from repfuse.saving import save

AT = {  # where each layout has its averaged weights and its trained ones
    "timm": ("state_dict_ema", "state_dict"),
    "lightning": (None, "state_dict"),
    "lightning_averaged": ("state_dict", "current_model_state"),
    "mmengine": ("state_dict", "ema_state_dict"),
    "yolo": ("ema", "model"),
    "compiled": ("model_ema", "model"),
}


def opened(path: Path, **options: Any) -> Checkpoint:
    return load(path, model=MODEL, model_args=ARGUMENTS, input="1x1x8x8", **options)


def fused(checkpoint: Checkpoint) -> nn.Module:
    return rewrite(checkpoint.module, plan(checkpoint.module, checkpoint.example_inputs))


def is_one(network: nn.Module, other: nn.Module) -> bool:
    dtype = next(network.parameters()).dtype
    with torch.no_grad():
        return torch.equal(network.float()(X), other.to(dtype).float()(X))


@pytest.fixture(params=WRITERS)
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    WRITERS[request.param](tmp_path / "in.pt")
    return request.param, tmp_path / "in.pt"


@pytest.mark.parametrize("weights", ["auto", "ema", "model", "key"])
def test_the_weights_asked_for_are_taken_and_the_others_are_named(weights: str, layout: tuple[str, Path]) -> None:
    name, path = layout
    averaged, trained = AT[name]
    if weights == "ema" and averaged is None:
        with pytest.raises(RepfuseError, match="no weights for --weights ema"):
            opened(path, weights=weights)
        return
    wanted = trained if weights in ("model", "key") or averaged is None else averaged
    checkpoint = opened(path, weights=wanted if weights == "key" else weights)
    assert checkpoint.around.keys[0] == wanted
    assert is_one(checkpoint.module, deepcopy(TRAINED if wanted == trained else AVERAGED))
    if averaged is not None:
        other = trained if wanted == averaged else averaged
        assert f"under '{wanted}'" in checkpoint.notes[0]
        assert f"--weights {other}" in checkpoint.notes[0]


@pytest.mark.parametrize("weights", ["auto", "model"])
def test_what_is_written_has_the_layout_and_loads_by_itself_and_by_plain_torch(
    weights: str, layout: tuple[str, Path], tmp_path: Path
) -> None:
    _, path = layout
    checkpoint = opened(path, weights=weights)
    network = fused(checkpoint)
    saved = save(checkpoint, network, tmp_path / "out.pt")
    again = load(saved.path)
    assert type(again.module) is type(network)
    assert is_one(again.module, network)
    before, after = plain(path), plain(saved.path)
    gone = {key.partition(".")[0] for key in checkpoint.around.left_out}
    assert list(after) == [key for key in before if key not in gone]
    found = before[checkpoint.around.keys[0]]
    if isinstance(found, dict):
        strictly(after[checkpoint.around.keys[0]], found, network)


def plain(path: Path) -> Any:
    """What torch reads, with the classes of the libraries there."""
    with (
        foreign("pytorch_lightning.utilities.parsing", "AttributeDict", dict),
        foreign("mmengine.logging.history_buffer", "HistoryBuffer"),
    ):
        return torch.load(path, weights_only=False)


def strictly(written: dict[str, Any], read: dict[str, Any], network: nn.Module) -> None:
    """The fused network in the framework's own wrapper takes the file, as the unfused took the old one."""
    own = network.state_dict()
    inner = next(name for name in read if name.endswith("head.weight")).removesuffix("head.weight")
    names = {name.removeprefix(inner).replace("_orig_mod.", "") for name in written if name.startswith(inner)}
    assert names == own.keys()
    outside = {name for name in read if not name.startswith(inner)}
    assert outside == {name for name in written if not name.startswith(inner)}
    assert any("._orig_mod." in name for name in written) == any("._orig_mod." in name for name in read)


def test_the_frameworks_own_way_of_loading(tmp_path: Path) -> None:
    """A Lightning module around the fused network class takes the state dict strictly."""
    WRITERS["lightning"](tmp_path / "in.ckpt")
    checkpoint = opened(tmp_path / "in.ckpt")
    saved = save(checkpoint, fused(checkpoint), tmp_path / "out.ckpt")

    class Accuracy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.tensor(0))

    class Lit(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.accuracy = net, Accuracy()
            self.criterion = nn.PReLU(10)

    lit = Lit(fused(opened(tmp_path / "in.ckpt")))
    lit.load_state_dict(torch.load(saved.path, weights_only=True)["state_dict"], strict=True)
    assert int(lit.accuracy.total) == 3
    assert any("criterion.weight, accuracy.total" in note for note in checkpoint.notes)


def test_the_rest_of_a_timm_checkpoint_is_kept_as_it_was(tmp_path: Path) -> None:
    WRITERS["timm"](tmp_path / "in.pt")
    checkpoint = opened(tmp_path / "in.pt")
    saved = save(checkpoint, fused(checkpoint), tmp_path / "out.pt")
    after = plain(saved.path)
    assert after["args"] == argparse.Namespace(model="repvgg", lr=0.1, data_dir=Path("/data"), opt_betas=None)
    assert (after["epoch"], after["arch"], after["metric"]) == (7, "repvgg", 81.5)
    assert type(after["metric"]) is np.float64
    assert checkpoint.around.left_out.keys() == {"state_dict", "optimizer", "amp_scaler"}
    assert saved.notes[0] == "kept from the training checkpoint: epoch, arch, version, args, metric"
    assert "another copy of the weights" in saved.notes[1] + saved.notes[2]


def test_foreign_objects_are_named_and_nothing_else_goes_with_them(tmp_path: Path) -> None:
    mmengine(tmp_path / "in.pth")
    checkpoint = opened(tmp_path / "in.pth")
    left_out = checkpoint.around.left_out
    assert "mmengine.logging.history_buffer.HistoryBuffer" in left_out["message_hub"]
    assert left_out.keys() == {"message_hub", "ema_state_dict", "optimizer", "param_schedulers"}
    meta = plain(save(checkpoint, fused(checkpoint), tmp_path / "out.pth").path)["meta"]
    assert meta["seed"] == 3
    assert type(meta["seed"]) is np.int64
    assert np.array_equal(meta["dataset_meta"]["palette"], np.zeros((2, 3), np.uint8))


def test_a_dictionary_of_a_library_is_kept_as_a_plain_one_and_this_is_said(tmp_path: Path) -> None:
    WRITERS["lightning"](tmp_path / "in.ckpt")
    checkpoint = opened(tmp_path / "in.ckpt")
    saved = save(checkpoint, fused(checkpoint), tmp_path / "out.ckpt")
    settings = torch.load(saved.path, weights_only=True)["hyper_parameters"]
    assert (type(settings), settings) == (dict, {"width": 4, "lr": 0.1, "tags": ["a"]})
    assert any("AttributeDict, kept as a plain dictionary" in note for note in saved.notes)


def test_kept_objects_are_equal_and_of_their_types(tmp_path: Path) -> None:
    WRITERS["compiled"](tmp_path / "in.pt")
    before = plain(tmp_path / "in.pt")
    checkpoint = opened(tmp_path / "in.pt")
    after = plain(save(checkpoint, checkpoint.module, tmp_path / "out.pt").path)
    assert after["options"] == before["options"]
    assert np.array_equal(after["rng"][1], before["rng"][1])
    assert after["rng"][1].dtype == np.uint32
    assert after["rng"][::2] == before["rng"][::2]


def test_drop_metadata_leaves_the_way_to_the_network_alone(layout: tuple[str, Path], tmp_path: Path) -> None:
    _, path = layout
    checkpoint = opened(path)
    network = fused(checkpoint)
    saved = save(checkpoint, network, tmp_path / "out.pt", keep_metadata=False)
    assert list(plain(saved.path)) == list(checkpoint.around.keys)
    assert not any(note.startswith("kept from") for note in saved.notes)
    everything = set(plain(path)) - set(checkpoint.around.keys)
    said = " ".join(saved.notes)
    assert all(key in said for key in everything)
    assert is_one(load(saved.path).module, network)


def test_a_dotted_key_goes_into_callbacks_and_into_names(tmp_path: Path) -> None:
    content = {
        "state_dict": prefixed("student.", TRAINED) | prefixed("teacher.", AVERAGED),
        "callbacks": {"EMA{'decay': 0.9}": {"average": AVERAGED.state_dict(), "decay": 0.9}},
    }
    torch.save(content, tmp_path / "in.pt")
    with pytest.raises(RepfuseError, match="several networks") as error:
        opened(tmp_path / "in.pt")
    assert "--weights state_dict.student" in error.value.hint
    taken = {
        "state_dict.student": TRAINED,
        "state_dict.teacher": AVERAGED,
        "callbacks.EMA{'decay': 0.9}.average": AVERAGED,
    }
    for key, network in taken.items():
        assert is_one(opened(tmp_path / "in.pt", weights=key).module, deepcopy(network))
    checkpoint = opened(tmp_path / "in.pt", weights="callbacks.EMA{'decay': 0.9}.average")
    after = plain(save(checkpoint, fused(checkpoint), tmp_path / "out.pt").path)
    assert after["callbacks"]["EMA{'decay': 0.9}"]["decay"] == 0.9
    assert "state_dict" not in after  # it holds copies that no longer fit


def test_a_network_under_an_unusual_key_is_pointed_at(tmp_path: Path) -> None:
    torch.save({"epoch": 1, "gan": {"generator": TRAINED.state_dict()}}, tmp_path / "in.pt")
    with pytest.raises(RepfuseError) as error:
        opened(tmp_path / "in.pt")
    assert "--weights gan.generator" in error.value.hint
    assert is_one(opened(tmp_path / "in.pt", weights="gan.generator").module, deepcopy(TRAINED))


class Evil:
    """Calls what it is given when it is unpickled."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def touching(canary: Path) -> Evil:
    return Evil(exec, f"open({str(canary)!r}, 'w')")


def test_the_canary_is_one(tmp_path: Path) -> None:
    torch.save(touching(tmp_path / "canary"), tmp_path / "in.pt")
    torch.load(tmp_path / "in.pt", weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "value",
    [
        lambda canary: argparse.Namespace(inner=touching(canary)),
        lambda canary: Evil(np.dtype, "O8"),
        lambda canary: Evil(np.frombuffer, b"12345678"),
        lambda canary: np.array([touching(canary)], dtype=object),
        lambda canary: Evil(PurePosixPath, touching(canary)),
        lambda canary: datetime.date(2026, 1, 2),
        lambda canary: OrderedDict(x=[touching(canary)]),
        lambda canary: Evil(argparse.Namespace, "not", "keywords"),
        lambda canary: looped(),
        lambda canary: nested(3000),
        lambda canary: {Evil(argparse.Namespace): 1},
        lambda canary: torch.nn.functional.relu,
    ],
)
def test_what_is_no_plain_data_is_dropped_by_name_and_never_run(value: Any, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)
    torch.save({"state_dict": TRAINED.state_dict(), "extra": value(canary), "epoch": 1}, tmp_path / "in.pt")
    sys.setrecursionlimit(limit)
    checkpoint = opened(tmp_path / "in.pt")
    assert "extra" in checkpoint.around.left_out
    assert checkpoint.around.kept() == ["epoch"]
    save(checkpoint, checkpoint.module, tmp_path / "out.pt")
    assert not canary.exists()
    assert "extra" not in torch.load(tmp_path / "out.pt", weights_only=True)


def looped() -> list[Any]:
    inner: list[Any] = [1]
    inner.append(inner)
    return inner


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


def test_shared_containers_stay_shared_and_do_not_multiply(tmp_path: Path) -> None:
    shared: Any = ["x"]
    for _ in range(60):  # 2 ** 60 lists, written out
        shared = [shared, shared]
    torch.save({"state_dict": TRAINED.state_dict(), "deep": shared}, tmp_path / "in.pt")
    deep = opened(tmp_path / "in.pt").around.others[0]["deep"]
    assert deep[0] is deep[1]


def test_a_path_of_another_system_keeps_its_name(tmp_path: Path) -> None:
    torch.save({"state_dict": TRAINED.state_dict(), "root": Path("a/b")}, tmp_path / "posix.pt")
    content = (tmp_path / "posix.pt").read_bytes()
    assert b"PosixPath" in content
    loaded = opened(tmp_path / "posix.pt").around.others[0]["root"]
    assert loaded == Path("a/b")
    torch.save({"state_dict": TRAINED.state_dict(), "root": PureWindowsPath("a/b")}, tmp_path / "windows.pt")
    assert opened(tmp_path / "windows.pt").around.others[0]["root"] == PureWindowsPath("a/b")


def test_a_class_of_a_dictionary_inside_a_network_is_still_refused(tmp_path: Path) -> None:
    with foreign("pytorch_lightning.utilities.parsing", "AttributeDict", dict) as settings:
        network = deepcopy(TRAINED)
        network.hparams = settings(width=4)
        torch.save(network, tmp_path / "in.pt")
    with pytest.raises(RepfuseError, match="needs more") as error:
        load(tmp_path / "in.pt")
    assert "AttributeDict" in error.value.why


def test_the_text_of_a_safetensors_file_is_dropped_by_name(tmp_path: Path) -> None:
    save_file(TRAINED.state_dict(), tmp_path / "in.safetensors", {"author": "me", "format": "pt"})
    checkpoint = opened(tmp_path / "in.safetensors")
    for out, options in (("a.pt", {}), ("b.safetensors", {"keep_metadata": False})):
        saved = save(checkpoint, checkpoint.module, tmp_path / out, **options)
        assert any(note.startswith("left out of the metadata: author (") for note in saved.notes)
    kept = save(checkpoint, checkpoint.module, tmp_path / "c.safetensors")
    assert not any("metadata" in note for note in kept.notes)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert "author" not in file.metadata()


def test_what_safetensors_cannot_hold_is_named(tmp_path: Path) -> None:
    WRITERS["timm"](tmp_path / "in.pt")
    checkpoint = opened(tmp_path / "in.pt")
    saved = save(checkpoint, checkpoint.module, tmp_path / "out.safetensors")
    assert all(key in saved.notes[0] for key in ("epoch", "args", "metric", "optimizer", "state_dict"))


def test_arrays_of_older_numpy_are_read(tmp_path: Path) -> None:
    """Before version 2 the functions that make them had another name."""
    values = {"array": np.arange(6.0).reshape(2, 3).T, "one": np.float32(0.5), "big": np.array([1], ">i4")}
    torch.save({"state_dict": TRAINED.state_dict(), **values}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core.multiarray" in (tmp_path / "old.pt").read_bytes()
    for path in (tmp_path / "new.pt", tmp_path / "old.pt"):
        found = opened(path).around.others[0]
        assert all(np.array_equal(found[name], value) for name, value in values.items())
        assert {name: found[name].dtype for name in values} == {name: value.dtype for name, value in values.items()}
        assert type(found["one"]) is np.float32


def test_as_a_user_runs_it(cli: Cli, tmp_path: Path) -> None:
    WRITERS["timm"](tmp_path / "in.pth")
    done = cli(
        "convert", tmp_path / "in.pth", tmp_path / "out.pth", *WEIGHTS, "--quick", "--weights", "model", "--json"
    )
    assert done.returncode == 0, done.stderr
    notes = json.loads(done.stdout)["notes"]
    assert any("took the trained weights under 'state_dict'" in note for note in notes)
    assert any("kept from the training checkpoint: epoch, arch" in note for note in notes)
    assert any("left out of the training checkpoint: optimizer" in note for note in notes)
    saved = tmp_path / "out.pth"
    for options, verdict in ((("--weights", "model"), 0), ((), 1)):  # the averaged weights are others
        done = cli("verify", tmp_path / "in.pth", saved, *WEIGHTS, *options, "--input", "1x1x8x8", "--quiet")
        assert done.returncode == verdict, done.stderr


def test_ordered_dictionaries_are_real_again_after_reading(tmp_path: Path) -> None:
    torch.save({"a": OrderedDict(b=1)}, tmp_path / "x.pt")
    read = torch_pickle.read(tmp_path / "x.pt", torch_pickle.Container.TORCH_ZIP)
    assert vars(read["a"]) == {}


def test_many_views_of_one_large_storage_are_no_attack(tmp_path: Path) -> None:
    """As a flat parameter has them: each view is as large as it is, and not as its storage."""
    flat = torch.zeros(16 << 20)
    torch.save({"state_dict": {f"w{n}": flat[n : n + 4] for n in range(20)}}, tmp_path / "x.pt")
    assert len(torch_pickle.read(tmp_path / "x.pt", torch_pickle.Container.TORCH_ZIP)["state_dict"]) == 20
