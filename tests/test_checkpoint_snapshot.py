"""Snapshot folders of the Hugging Face hub for timm, and `hf-hub:` names from a cache that the test lays out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import Cli
from safetensors.torch import load_file
from timm.models._hub import save_for_hf
from torch import Tensor, nn

from repfuse.errors import RepfuseError
from repfuse.loading import load
from repfuse.planning.planner import plan
from repfuse.rewriting import rewrite
from repfuse.saving import save

NAME = "hf-hub:timm/some_net"
REVISION = "0123456789abcdef0123456789abcdef01234567"
SMALL = {"num_classes": 3, "in_chans": 1}


def network(name: str = "test_byobnet", **arguments: Any) -> nn.Module:
    """A network of timm with statistics that hide no mistake."""
    torch.manual_seed(0)
    made = timm.create_model(name, **(arguments or SMALL)).eval()
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -1, 1)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return made


def snapshot(folder: Path, made: nn.Module, safe: Any = True, **config: Any) -> Path:
    """What timm itself writes for the hub, with changes to the configuration."""
    save_for_hf(made, folder, safe_serialization=safe)
    written = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def cached(home: Path, made: nn.Module) -> dict[str, str]:
    """The cache of huggingface_hub with one repository in it, and the environment that finds it offline."""
    repository = home / "hub" / "models--timm--some_net"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    snapshot(repository / "snapshots" / REVISION, made)
    return {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"}


def output(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return snapshot(tmp_path_factory.mktemp("snapshot"), network())


def test_a_folder_needs_no_model_and_is_converted(folder: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "fused.safetensors"
    done = cli("convert", folder, out, "--json", "--quick", "--input", "1x1x64x64")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["input"]["model"] == "timm:test_byobnet"
    assert {"num_classes=3", "in_chans=1"} <= set(report["input"]["model_args"])
    assert len(report["plan"]["sites"]) == 14
    assert any("no architecture of timm any more" in note for note in report["notes"])
    assert not any("running_mean" in name for name in load_file(out))
    x = torch.randn(2, 1, 64, 64)
    expected = output(timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), x)
    torch.testing.assert_close(output(load(out).module, x), expected, rtol=1e-3, atol=1e-3)


CASES = {
    "defaults": ("repghostnet_050", {"num_classes": 1000}),
    "channels": ("repghostnet_050", {"num_classes": 7, "in_chans": 5}),
    "no head": ("repghostnet_050", {"num_classes": 0}),
    "pooling": ("repghostnet_050", {"num_classes": 4, "global_pool": "max"}),
    "arguments": ("resnet10t", {"num_classes": 4, "output_stride": 8}),
    "fixed size": ("vit_tiny_patch16_224", {"num_classes": 4, "img_size": 64, "depth": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_is_read_as_timm_reads_it(case: str, tmp_path: Path) -> None:
    name, arguments = CASES[case]
    made = network(name, **arguments)
    snapshot(tmp_path, made)
    checkpoint = load(tmp_path)
    x = torch.randn_like(checkpoint.example_inputs[0])
    assert checkpoint.input_origin == "checkpoint"
    assert tuple(x.shape[1:]) == tuple(
        json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["input_size"]
    )
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(output(checkpoint.module, x), output(theirs, x))
    assert torch.equal(output(checkpoint.module, x), output(made, x))


@pytest.mark.parametrize("case", ["pooling", "fixed size", "channels"])
def test_a_configuration_without_arguments_says_the_same(case: str, tmp_path: Path) -> None:
    """Older exports say all of it in pretrained_cfg; today's timm no longer reads a pooling there."""
    name, arguments = CASES[case]
    made = network(name, **{key: value for key, value in arguments.items() if key != "depth"})
    snapshot(tmp_path, made, model_args={})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    if case == "pooling":
        config["pretrained_cfg"]["global_pool"] = "max"
        path.write_text(json.dumps(config))
    checkpoint = load(tmp_path)
    x = torch.randn_like(checkpoint.example_inputs[0])
    assert torch.equal(output(checkpoint.module, x), output(made, x))


def test_pickled_weights_and_the_legacy_configuration(tmp_path: Path) -> None:
    made = network()
    snapshot(tmp_path, made, safe=False)
    config = json.loads((tmp_path / "config.json").read_text())
    flat = config["pretrained_cfg"] | {"architecture": config["architecture"]}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    checkpoint = load(tmp_path)
    assert checkpoint.path.name == "pytorch_model.bin"
    x = checkpoint.example_inputs[0]
    assert torch.equal(output(checkpoint.module, x), output(made, x))


def test_a_model_that_the_user_names_is_used_instead(folder: Path, tmp_path: Path) -> None:
    whole = load(folder, model="timm:test_byobnet", model_args=SMALL)
    assert whole.source is not None
    assert whole.source.arguments == SMALL
    with pytest.raises(RepfuseError, match="do not fit"):
        load(folder, model="timm:test_byobnet")


def test_what_was_fused_from_a_folder_loads_by_itself(folder: Path, tmp_path: Path) -> None:
    checkpoint = load(folder, input="1x1x32x32")
    fused = rewrite(checkpoint.module, plan(checkpoint.module, checkpoint.example_inputs))
    saved = save(checkpoint, fused, tmp_path / "out.pt")
    again = load(saved.path)
    assert torch.equal(output(again.module, checkpoint.example_inputs[0]), output(fused, checkpoint.example_inputs[0]))


BAD: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "is no configuration"),
    "a list": ([], "no JSON object"),
    "one name twice": ('{"architecture": "repvgg_a0", "architecture": "repvgg_a1"}', "'architecture' stands twice"),
    "of transformers": ({"model_type": "bert", "architectures": ["Bert"]}, "does not name a network of timm"),
    "no name": ({"architecture": "../../etc/passwd"}, "does not name a network of timm"),
    "a hub name": ({"architecture": "hf-hub:evil/net"}, "does not name a network of timm"),
    "unknown": ({"architecture": "repvgg_a00"}, "no 'repvgg_a00'"),
    "classes": ({"architecture": "repvgg_a0", "num_classes": 10**12}, "odd num_classes"),
    "classes as text": ({"architecture": "repvgg_a0", "num_classes": "3"}, "odd num_classes"),
    "size": ({"architecture": "repvgg_a0", "pretrained_cfg": {"input_size": [3, 10**9, 5]}}, "odd input_size"),
    "configuration": ({"architecture": "repvgg_a0", "pretrained_cfg": 3}, "odd pretrained_cfg"),
    "arguments": ({"architecture": "repvgg_a0", "model_args": [1]}, "odd model_args"),
    "fetching": ({"architecture": "repvgg_a0", "model_args": {"pretrained": True}}, "odd model_args"),
    "a path": ({"architecture": "repvgg_a0", "model_args": {"checkpoint_path": "/x"}}, "odd model_args"),
    "a deep argument": ({"architecture": "repvgg_a0", "model_args": {"a": [[[[[[1]]]]]]}}, "odd a"),
    "a nested argument": ({"architecture": "repvgg_a0", "model_args": {"a": {"b": 1}}}, "odd a"),
    "a huge argument": ({"architecture": "repvgg_a0", "model_args": {"depth": 1e300}}, "odd depth"),
    "no such argument": ({"architecture": "repvgg_a0", "model_args": {"nonsense": 1}}, "could not be built"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_configuration_is_one_message(case: str, folder: Path, tmp_path: Path) -> None:
    content, said = BAD[case]
    (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(RepfuseError, match=said) as error:
        load(tmp_path)
    assert error.value.exit_code == 2


def test_a_huge_configuration_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "repvgg_a0"}' + " " * (5 << 20))
    with pytest.raises(RepfuseError, match="larger than 4 MiB"):
        load(tmp_path)


def test_a_folder_without_weights_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "repvgg_a0"}')
    with pytest.raises(RepfuseError, match="no weights"):
        load(tmp_path)


def test_a_name_of_the_hub_is_found_in_the_cache_offline(cli: Cli, tmp_path: Path) -> None:
    env = cached(tmp_path / "home", network())
    done = cli("inspect", NAME, "--json", "--input", "1x1x32x32", env=env, bare=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["plan"]["sites"]) == 14
    assert any(f"{NAME} is revision {REVISION}" in note for note in report["notes"])
    done = cli("inspect", f"{NAME}@v9", "--quiet", env=env, bare=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{NAME}@v9 has no config.json" in done.stderr
    assert "offline mode is on" in done.stderr


@pytest.mark.parametrize("name", ["hf-hub:nonsense", "hf-hub:", "hf-hub:../x", "hf-hub:a/b/c", "hf-hub:a/b@"])
def test_what_is_no_name_of_the_hub_is_said(name: str) -> None:
    with pytest.raises(RepfuseError, match="is no name of the hub") as error:
        load(name)
    assert "hf-hub:USER/NAME" in error.value.hint


def test_an_incomplete_cache_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = snapshot(tmp_path / "snapshots" / REVISION, network())
    (folder / "model.safetensors").unlink()

    def download(_repo: str, file: str, revision: str | None) -> str:
        if (folder / file).is_file():
            return str(folder / file)
        raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {file}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(RepfuseError, match="none of model") as error:
        load(NAME)
    assert "cannot be reached" in error.value.why


def test_sharded_weights_are_fetched_whole_and_their_names_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    remote, folder = snapshot(tmp_path / "remote", network()), tmp_path / REVISION
    folder.mkdir()
    shard = "model-00001-of-00001.safetensors"
    (remote / "model.safetensors").rename(remote / shard)
    asked = []

    def download(_repo: str, file: str, revision: str | None) -> str:
        asked.append((file, revision))
        if not (remote / file).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(f"no {file}")
        (folder / file).write_bytes((remote / file).read_bytes())
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    names = load_file(remote / shard)
    first = next(iter(names))
    outside = "outside its own folder"
    for part, wrong in ((shard, ""), ("../../x.safetensors", outside), ("/etc/passwd", outside), (3, "not a table")):
        (remote / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, part)}))
        if not wrong:
            checkpoint = load(NAME)
            assert checkpoint.path.parent == folder
            assert f"{NAME} is revision {REVISION} of the hub, kept in {folder}" in checkpoint.notes
            assert torch.equal(checkpoint.module.state_dict()[first], names[first])
            assert asked[0] == ("config.json", None)
            assert all(revision == REVISION for _, revision in asked[1:])
            continue
        with pytest.raises(RepfuseError, match=wrong):
            load(NAME)
    assert {file for file, _ in asked} == {"config.json", "model.safetensors", "model.safetensors.index.json", shard}


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RepfuseError, match="huggingface_hub") as error:
        load(NAME)
    assert "repfuse[hub]" in error.value.hint


def test_nothing_but_a_name_of_the_hub_asks_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_args: Any, **_options: Any) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    load(folder)
