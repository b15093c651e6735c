"""Files elsewhere, by the URLs that fsspec knows: s3://bucket/runs/*/best.pt. torch brings fsspec along.

A URL is kept as a Path, which takes one of its slashes; ``url_of`` gives it back.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

from repfuse.checkpoint.files import PART
from repfuse.errors import RepfuseError
from repfuse.wording import described


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
    try:
        system, place = _reached(url)
        names = system.glob(place, detail=True)
        return [Path(system.unstrip_protocol(name)) for name in sorted(names) if names[name]["type"] == "file"]
    except Exception as error:  # of whatever kind of place
        raise RepfuseError(f"{url} cannot be listed.", described(error), "Check the URL.") from error


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
