"""Files as such: their digests, writing them as a whole or not at all, and reading JSON that anybody may have written.

Those elsewhere are told by the URLs that fsspec knows: s3://bucket/runs/*/best.pt. torch brings fsspec along, and this
knows no torch.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from repfuse.errors import RepfuseError, failing_as

PART = ".part"
Replacement = tuple[Path, Path]  # a whole temporary file, and the place that it will take
_group: ContextVar[list[Replacement] | None] = ContextVar("group", default=None)


def digest_of(*paths: Path) -> str:
    """Return ``sha256:`` and the digest of the file in hexadecimal; of several, the digest of their digests."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    whole = digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(each.digest() for each in digests))
    return f"sha256:{whole.hexdigest()}"


def check_target(out: Path, source: Path, *, force: bool) -> None:
    """Raise RepfuseError where ``out`` must not be written: it is the input, a folder, or there already."""
    if out.is_dir():
        raise RepfuseError(f"{out} is a folder.", "The result is one file.", f"Give a file: {out / source.name}")
    if not out.parent.is_dir():
        raise RepfuseError(f"The folder {out.parent} does not exist.", "", f"Make it first: mkdir -p {out.parent}")
    if out.exists() and not out.is_file():
        raise RepfuseError(f"{out} is no regular file.", "It is a device or a pipe.", "Give the path of a file.")
    if out.exists() and source.exists() and out.samefile(source):
        raise RepfuseError(f"{out} is the input itself.", "repfuse never overwrites its input.", "Give another path.")
    if os.path.lexists(out) and not force:
        raise RepfuseError(f"{out} exists already.", "", "Give another path, or --force to replace it.")


@contextmanager
def together() -> Iterator[None]:
    """Let all files that are replaced within the block take their places at its end: all of them, or none.

    Where the process is killed in between, the first may be there without the others, but never beside old ones.
    """
    group: list[Replacement] = []
    token = _group.set(group)
    try:
        yield
        if group:
            _commit(group)
    finally:
        _group.reset(token)
        _discard(temporary for temporary, _ in group)


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Give the path of a temporary file beside ``out``, which takes its place when the block ends without an error.

    On any error the temporary file goes and ``out`` stays as it was; trouble with the disk becomes a RepfuseError. A
    process that is killed leaves its temporary file: the next that writes ``out`` removes it.
    """
    out, group = out.resolve(), _group.get()  # through a link, so that the link stays and its target is replaced
    with _changing(out, "; nothing was changed"):
        remove_left(out)
        handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.", suffix=PART)
    temporary = Path(name)
    try:
        with _changing(out, "; nothing was changed"):
            _lock(handle)
            yield temporary
            temporary.chmod(_mode(out))
            _sync(temporary)
            if group is None:
                _commit([(temporary, out)])
            else:
                group.append((temporary, out))
    finally:
        os.close(handle)
        if group is None or (temporary, out) not in group:
            _discard([temporary])


def _commit(group: list[Replacement]) -> None:
    """Put the files in their places. Old files of the others go first, so that none stands beside a new first one."""
    with _changing(group[0][1]):
        for _, out in group[1:]:
            out.unlink(missing_ok=True)
        for temporary, out in group:
            temporary.replace(out)
        for folder in {out.parent for _, out in group}:
            _sync(folder)


def _discard(paths: Iterable[Path]) -> None:
    """Remove these files, or leave them to the next run."""
    for path in paths:
        with suppress(OSError):
            path.unlink()


def remove_left(out: Path) -> None:
    """Remove what processes that were killed have left of ``out``."""
    _discard(left_of(out))


def left_of(out: Path) -> Iterator[Path]:
    """Yield what processes that were killed have left of ``out``: what no living process has locked."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.????????{PART}"):
        with suppress(OSError), path.open("rb") as file:
            _lock(file.fileno())
            yield path


def _lock(handle: int) -> None:
    """Lock a file as long as this process has it open. Raises BlockingIOError where another one has it locked."""
    if sys.platform != "win32":  # which removes no open file anyway
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _mode(out: Path) -> int:
    """Return the permissions of the file that is replaced, or those that a new file gets."""
    if out.exists():
        return out.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _changing(out: Path, what_else: str = "") -> AbstractContextManager[None]:
    """Say of trouble with the disk that ``out`` could not be written."""
    what, hint = f"{out} could not be written{what_else}.", "Free some space, or give a folder that you may write to."
    return failing_as(what, hint, of=OSError, why=lambda error: getattr(error, "strerror", None) or str(error))


def read_json(path: Path, largest: int) -> Any:
    """Return the JSON in a file of at most ``largest`` bytes. Raises ValueError where it is none, OSError of a disk."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")  # a pipe would wait
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it is larger than {largest >> 20} MiB")
    return parse_json(content)


def parse_json(content: bytes | str) -> Any:
    """Return what JSON text says. Raises ValueError where it is none, or where two readers might differ on it."""
    try:
        return json.loads(content, object_pairs_hook=_mapping, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ValueError("it is no text") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise ValueError(f"{name[:40]!r} stands twice in one place")
        mapping[name] = value
    return mapping


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


# Files elsewhere. A URL is kept as a Path, which takes one of its slashes; ``url_of`` gives it back.


def url_of(path: Path) -> str:
    """Return the URL that a path is; nothing where it is a file of this machine."""
    found = re.match(r"([a-z][a-z0-9+]+):/(.*)", path.as_posix())  # C:/ is a drive
    return f"{found[1]}://{found[2]}" if found else ""


def name_of(path: Path) -> str:
    """Return what to call a file."""
    return url_of(path) or str(path)


def here(path: Path) -> Path:
    """Return a path as it is, and that of a file:// URL."""
    return Path(re.sub(r"^file:/+", "/", path.as_posix())) if path.as_posix().startswith("file:/") else path


def absolute(path: Path) -> Path:
    """Return a path that means the same in all folders."""
    return path if url_of(path) else path.absolute()


def found(pattern: str) -> list[Path]:
    """Return the files that a pattern or a URL names. Raises RepfuseError where that place cannot be reached."""
    path = here(Path(pattern))
    url = url_of(path)
    if not url:
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207 - relative or not
        return [file for file in map(Path, sorted(names)) if file.is_file()]
    with failing_as(f"{url} cannot be listed.", "Check the URL."):
        system, place = _reached(url)
        names = system.glob(place, detail=True)
        return [Path(system.unstrip_protocol(name)) for name in sorted(names) if names[name]["type"] == "file"]


def fetch(path: Path, folder: Path) -> Path:
    """Return a file of this machine as it is; one that is elsewhere is fetched into the folder, if it is there."""
    url = url_of(path)
    if not url:
        return path
    folder.mkdir(exist_ok=True)
    system, place = _reached(url)
    if system.exists(place):
        system.get_file(place, str(folder / path.name))
    return folder / path.name


def send(files: dict[Path, Path]) -> None:
    """Send files to where they belong: as a whole each, the first of them last, and none beside an old first one."""
    (first, *others) = files
    system, place = _reached(url_of(files[first]))
    system.makedirs(place.rpartition("/")[0], exist_ok=True)
    if system.exists(place):
        system.rm_file(place)
    for file in (*others, first):
        _, place = _reached(url_of(files[file]))
        system.put_file(str(file), place + PART)
        system.mv(place + PART, place)


def _reached(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    system, place = url_to_fs(url)
    return system, str(place)
