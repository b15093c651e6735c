"""Killed at any moment, or out of disk: the input is untouched, the result and its report are whole or not there."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from conftest import Cli

import repfuse
from repfuse import RepfuseError
from repfuse.checkpoint.files import replacing
from repfuse.cli.app import app

POINTS = ("open", "fsync", "chmod", "unlink", "replace", "rename")  # of os: where the disk is changed
Files = dict[str, bytes]


def files(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def write(samples: Path) -> Iterator[Callable[..., None]]:
    """Write the result of a conversion that is done, and its report, to ``folder``, as the command does."""
    import repfuse.cli.conversion as conversion

    source = samples / "notebook_block.pt"
    checkpoint = repfuse.load(source)
    done = repfuse.convert(checkpoint)
    command = typer.main.get_command(app)  # once: to make it takes as long as to write a file

    def converted(*_: object, proven: Callable[..., object], **_more: object) -> object:
        proven(done.plan, done.module)
        return done

    def run(folder: Path, name: str = "out.pt", *, force: bool = False) -> None:
        typed = ["convert", str(source), str(folder / name), "--quick", "--quiet", *(["--force"] if force else [])]
        with redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as ended:
            command.main(typed)
        if ended.value.code == 130:
            raise KeyboardInterrupt
        if ended.value.code:
            assert ended.value.code == 2 and "repfuse does not expect" not in said.getvalue()
            raise RepfuseError(said.getvalue())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "load", lambda *_, **_more: checkpoint)
        patch.setattr(conversion, "convert", converted)
        yield run


def old(folder: Path) -> Files:
    """Put files there that will be replaced: a whole result with its report."""
    torch.save({"old": torch.ones(3)}, folder / "out.pt")
    said = {"output": {"digest": digest((folder / "out.pt").read_bytes())}}
    (folder / "out.pt.report.json").write_text(json.dumps(said))
    return files(folder)


def at(number: int, do: Callable[[], Any], patch: pytest.MonkeyPatch) -> list[str]:
    """Have ``do`` happen before the call of this number, of those that change the disk; return them as they come."""
    seen: list[str] = []
    for name in POINTS:
        real = getattr(os, name)

        def call(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) - 1 == number:
                do()
            return real(*args, **kwargs)

        patch.setattr(os, name, call)
    return seen


def count(write: Callable[..., None], folder: Path, *, force: bool) -> int:
    folder.mkdir()
    if force:
        old(folder)
    with pytest.MonkeyPatch.context() as patch:
        seen = at(-1, lambda: None, patch)
        write(folder, force=force)
    assert {"fsync", "unlink", "replace"} <= set(seen)
    return len(seen)


def killed(act: Callable[[], None]) -> bool:
    """Do ``act`` in a copy of this process, and say whether that was killed."""
    if (child := os.fork()) == 0:
        try:
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def suicide() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def check_whole(found: Files, before: Files, clean: Files) -> None:
    assert set(found) <= {"out.pt", "out.pt.report.json"}
    assert found.get("out.pt") in (before.get("out.pt"), clean["out.pt"])
    if "out.pt.report.json" in found:  # it is of the very file beside it
        assert json.loads(found["out.pt.report.json"])["output"]["digest"] == digest(found["out.pt"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("force", [False, True])
def test_killed_at_each_point_the_files_are_whole_or_absent(
    force: bool, write: Callable[..., None], samples: Path, tmp_path: Path
) -> None:
    source = digest((samples / "notebook_block.pt").read_bytes())
    points = count(write, tmp_path / "clean", force=force)
    clean = files(tmp_path / "clean")
    left = states = 0
    for point in range(points):
        folder = tmp_path / f"killed{point}"
        folder.mkdir()
        before = old(folder) if force else {}

        def act(folder: Path = folder, point: int = point) -> None:
            at(point, suicide, pytest.MonkeyPatch())
            write(folder, force=force)

        assert killed(act)
        found = files(folder)
        check_whole(found, before, clean)
        states += found.get("out.pt") == clean["out.pt"]
        left += any(path.name.endswith(".part") for path in folder.iterdir())
        write(folder, force=True)  # and the next run puts all in order
        assert {path.name for path in folder.iterdir()} == {"out.pt", "out.pt.report.json"}
    assert 0 < states < points  # some were killed before the result was there, some after
    assert left
    assert digest((samples / "notebook_block.pt").read_bytes()) == source


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("force", [False, True])
def test_after_an_error_at_each_point_the_files_are_whole_or_absent(
    force: bool, error: BaseException, write: Callable[..., None], tmp_path: Path
) -> None:
    points = count(write, tmp_path / "clean", force=force)
    fine = 0

    def fail() -> None:
        raise error

    for point in range(points):
        folder = tmp_path / f"failed{point}"
        folder.mkdir()
        before = old(folder) if force else {}
        with pytest.MonkeyPatch.context() as patch:
            seen = at(point, fail, patch)
            try:
                write(folder, force=force)
            except RepfuseError as raised:
                if "nothing was changed" in str(raised):
                    assert files(folder) == before, (point, seen)
                check_whole(files(folder), before, files(tmp_path / "clean"))
            except KeyboardInterrupt:
                check_whole(files(folder), before, files(tmp_path / "clean"))
            else:
                fine += 1  # the call only tidied up
                assert set(files(folder)) == {"out.pt", "out.pt.report.json"}
    assert fine <= points / 3


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Limit the size of files; a write beyond it fails as it does on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_a_disk_that_is_full_at_any_byte(
    name: str, limit: Callable[[int], None], write: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)  # or the report is longer or shorter by a digit
    write(tmp_path, name)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    for path in tmp_path.iterdir():
        path.unlink()
    for size in [0, 1, 500, *(size - 1 for size in sizes), *range(1000, max(sizes), 3000)]:
        limit(size)
        with pytest.raises(RepfuseError, match="could not be written"):
            write(tmp_path, name)
        assert list(tmp_path.iterdir()) == []
    limit(max(sizes))
    write(tmp_path, name)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_run_left_goes_with_the_next_and_what_a_living_one_uses_stays(tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    (tmp_path / ".out.pt.abcdefgh.part").touch()
    others = [tmp_path / name for name in (".out.pt.x.part", ".out2.pt.abcdefgh.part", "out.pt.abcdefgh.part")]
    for other in others:
        other.touch()
    with replacing(out) as living:
        living.write_bytes(b"first")
        with replacing(out) as second:
            second.write_bytes(b"second")
        assert living.read_bytes() == b"first"
    assert {path.name for path in tmp_path.iterdir()} == {"out.pt", *(other.name for other in others)}
    assert out.read_bytes() == b"first"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_the_target_may_be_on_another_file_system(write: Callable[..., None], tmp_path: Path) -> None:
    folder = Path("/dev/shm") / f"repfuse-{os.getpid()}"
    folder.mkdir()
    try:
        write(folder)
        assert len(files(folder)) == 2
        repfuse.load(folder / "out.pt")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("may not mount a disk")
    except OSError:
        pytest.skip("there is no mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full_or_read_only(disk: Path, cli: Cli, samples: Path) -> None:
    (disk / "ballast").write_bytes(bytes(250_000))
    full = cli("convert", samples / "repvgg_digits.pt", disk / "out.pt")
    assert full.returncode == 2
    assert "No space left" in full.stderr or "could not be written" in full.stderr
    assert [path.name for path in disk.iterdir()] == ["ballast"]
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    fixed = cli("convert", samples / "repvgg_digits.pt", disk / "out.pt")
    assert fixed.returncode == 2
    assert "Nothing can be written to the folder" in fixed.stderr


@pytest.mark.slow
def test_the_command_killed_after_any_time(samples: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.pt"
    shutil.copy(samples / "notebook_block.pt", source)
    command = [sys.executable, "-m", "repfuse", "convert", str(source), str(tmp_path / "out.pt"), "--force", "--quiet"]
    started = time.monotonic()
    subprocess.run(command, check=True)
    lasted, clean, before = time.monotonic() - started, files(tmp_path), digest(source.read_bytes())
    chance, unfinished = random.Random(0), 0
    for _ in range(12):
        for path in tmp_path.iterdir():
            path.unlink() if path != source else None
        process = subprocess.Popen(command)
        time.sleep(lasted * chance.uniform(0.5, 1.05))
        process.kill()
        unfinished += process.wait() != 0
        found = files(tmp_path)
        found.pop("in.pt")
        check_whole(found, {}, clean)
        assert digest(source.read_bytes()) == before
    assert unfinished > 2
