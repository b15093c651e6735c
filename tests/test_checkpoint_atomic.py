"""A file is written as a whole or not at all, never over the input, and over another only when told to."""

from __future__ import annotations

import os
import resource
import signal
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

from repfuse import RepfuseError, load, save
from repfuse.checkpoint.files import replacing
from repfuse.loading import Checkpoint


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_the_file_appears_whole_and_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replacing(out) as temporary:
        temporary.write_bytes(b"new")
        assert not out.exists()
        assert temporary.parent == out.parent  # else the rename is no rename
    assert out.read_bytes() == b"new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, RepfuseError("x")])
def test_an_error_leaves_everything_as_it_was(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(BaseException), replacing(tmp_path / "out") as temporary:  # noqa: B017
        temporary.write_bytes(b"new")
        raise error
    assert (tmp_path / "out").read_bytes() == b"old"
    assert names(tmp_path) == ["out"]


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands in for the full disk: the write fails in the middle likewise."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RepfuseError, match="nothing was changed"), replacing(tmp_path / "out") as temporary:
            temporary.write_bytes(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not names(tmp_path)


def test_an_unwritable_folder_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", denied)  # root may write everywhere, so chmod proves nothing here
    with pytest.raises(RepfuseError, match="Permission denied"), replacing(tmp_path / "out"):
        pass


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_any_new_file(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        (tmp_path / "plain").touch()
        with replacing(tmp_path / "out") as temporary:
            temporary.touch()
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_permissions_of_a_replaced_file_stay(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    (tmp_path / "out").chmod(0o640)
    with replacing(tmp_path / "out") as temporary:
        temporary.touch()
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    torch.save(nn.Linear(2, 2), tmp_path / "in.pt")
    return load(tmp_path / "in.pt")


def refused(source: Checkpoint, out: Path, said: str, *, force: bool) -> None:
    """Nothing is written, and nothing that was there is lost."""
    before = {path.name: path.lstat().st_mtime_ns for path in source.path.parent.iterdir()}
    content = source.path.read_bytes()
    with pytest.raises(RepfuseError, match=said):
        save(source, source.module, out, force=force)
    assert {path.name: path.lstat().st_mtime_ns for path in source.path.parent.iterdir()} == before
    assert source.path.read_bytes() == content


@pytest.mark.parametrize("force", [False, True])
def test_the_input_is_never_the_target(
    force: bool, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "soft.pt").symlink_to(source.path)
    os.link(source.path, tmp_path / "hard.pt")
    monkeypatch.chdir(tmp_path)
    for out in (source.path, Path("in.pt"), tmp_path / "soft.pt", tmp_path / "hard.pt"):
        refused(source, out, "the input itself", force=force)


def test_another_file_is_replaced_only_with_force(source: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    save(source, source.module, out)
    out.write_bytes(b"old")
    refused(source, out, "--force", force=False)
    assert out.read_bytes() == b"old"
    save(source, source.module, out, force=True)
    assert torch.equal(load(out).module.weight, source.module.weight)


def test_a_dangling_link_counts_as_there(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out.pt").symlink_to("nowhere")
    refused(source, tmp_path / "out.pt", "--force", force=False)


def test_a_folder_and_a_missing_folder_are_no_target(source: Checkpoint, tmp_path: Path) -> None:
    for out, said in ((tmp_path, "is a folder"), (tmp_path / "no" / "out.pt", "does not exist")):
        refused(source, out, said, force=True)
