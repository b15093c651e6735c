"""`hf-hub:USER/NAME`: a snapshot of the Hugging Face hub, through its own library, and only where the user says so.

The library keeps what it fetches, and works offline from that (HF_HUB_OFFLINE=1).
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from repfuse.checkpoint.sharded import weight_map
from repfuse.checkpoint.snapshot import CONFIG, INDEX, WEIGHTS
from repfuse.errors import RepfuseError
from repfuse.wording import described

PREFIX = "hf-hub:"
NAME = re.compile(r"hf-hub:(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")


def is_hub_name(path: Path | str) -> bool:
    """Say whether ``path`` names a repository of the hub."""
    return str(path).startswith(PREFIX)


def fetch(name: str) -> tuple[Path, str]:
    """Return the folder that holds the snapshot ``name``, and its revision: from the cache, else fetched.

    Raises RepfuseError where the name is none, the library is missing, or nothing can be had.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise RepfuseError(
            f"{name!r} is no name of the hub.", "", "Write hf-hub:USER/NAME or hf-hub:USER/NAME@REVISION."
        )
    get = _Getter(name, match["repo"], match["revision"])
    folder = get(CONFIG, f"{name} has no {CONFIG}").parent
    get.revision = folder.name  # all files of one revision
    for weights in WEIGHTS:
        found = get.maybe(weights)
        if found is not None:
            for shard in sorted(set(weight_map(found).values())) if weights == INDEX else ():
                get(shard, f"{name} lacks {shard}, which its index names")
            return folder, folder.name
    raise get.error(f"{name} has none of {', '.join(WEIGHTS)}")


class _Getter:
    """Fetches files of one repository, or finds them in the cache."""

    def __init__(self, name: str, repo: str, revision: str | None) -> None:
        self.name, self.repo, self.revision = name, repo, revision
        self.library = _library()
        self.last: Exception | None = None

    def maybe(self, file: str) -> Path | None:
        """Return the file, or None where the repository (or the cache, offline) does not have it."""
        try:
            return Path(self.library.hf_hub_download(self.repo, file, revision=self.revision))
        except self.library.errors.EntryNotFoundError as error:
            self.last = error
            return None
        except Exception as error:  # a network fails in many ways
            self.last = error
            raise self.error(f"{self.name} cannot be fetched") from error

    def __call__(self, file: str, otherwise: str) -> Path:
        """Return the file. Raises RepfuseError, which begins with ``otherwise``, where it is not there."""
        found = self.maybe(file)
        if found is None:
            raise self.error(otherwise) from self.last
        return found

    def error(self, what: str) -> RepfuseError:
        offline = isinstance(self.last, self.library.errors.LocalEntryNotFoundError)
        why = "The hub cannot be reached, or offline mode is on, and the file is not in the cache." if offline else ""
        return RepfuseError(
            f"{what}.",
            why or (described(self.last) if self.last else ""),
            "Check the name and the network (for private models: `hf auth login`), or download the model's folder "
            "elsewhere and give that folder.",
        )


def _library() -> Any:
    try:
        library = importlib.import_module("huggingface_hub")
        importlib.import_module("huggingface_hub.errors")
    except ImportError as error:
        what = "Models of the hub need huggingface_hub, which is not installed."
        raise RepfuseError(what, str(error), "Install it: pip install 'repfuse[hub]'.") from error
    return library
