"""Loads hostile files in a process that may be harmed, and says what came of each: one JSON object per line.

    python -m hostile.child FOLDER TRUST NAME...

The process has little memory, and ends where one file takes too long. Starting programs, opening connections, writing
and removing files are noticed through Python's audit events.
"""

from __future__ import annotations

import copyreg
import faulthandler
import json
import re
import resource
import sys
import time
import traceback
from functools import cache
from pathlib import Path

import timm

from hostile.attack import Attack
from hostile.calling import EXTENSIONS
from hostile.controls import CONTROLS
from hostile.corpus import CORPUS
from repfuse.errors import RepfuseError

MEMORY = 8 << 30  # address space; torch alone maps one or two
SECONDS = 600  # on the clock, which other processes share: it is there to end what hangs
FORBIDDEN = re.compile(
    r"os\.(system|exec|fork|posix_spawn|spawn|remove|rename|mkdir|rmdir|chmod|link|symlink)|"
    r"subprocess\.|socket\.|shutil\.|ctypes\.|tempfile\.|code\.__new__"
)


class Watch:
    """Notes forbidden events while it is on."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.on and (forbidden(event) or (event == "open" and _writes(arguments))):
            self.seen.append(f"{event} {arguments!r:.200}")


@cache
def forbidden(event: str) -> bool:
    """Whether it is one of those; Python tells of the same few kinds a million times."""
    return FORBIDDEN.match(event) is not None


def _writes(arguments: tuple[object, ...]) -> bool:
    return isinstance(arguments[1], str) and bool(set(arguments[1]) & set("wax+"))


def memory(field: str) -> int:
    """Return VmHWM (the peak) or VmRSS of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]


def attempt(name: str, folder: Path, watch: Watch, *, trust: bool) -> dict[str, object]:
    """Make the file ``name`` in a folder of its own, load it, and describe what happened."""
    folder.mkdir()
    attack = (CORPUS | CONTROLS)[name]
    canary, path = folder / "canary", folder / attack.name
    path.write_bytes(attack.make(folder, canary))
    sys.path.append(str(folder))
    before, started = set(folder.iterdir()), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    held, watch.seen = memory("VmRSS"), []
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    watch.on = True
    outcome, message = load(attack, folder, trust)
    watch.on = False
    faulthandler.cancel_dump_traceback_later()
    return {
        "name": name,
        "outcome": outcome,
        "message": message,
        "size": path.stat().st_size,
        "seconds": time.process_time() - started,
        "grown": memory("VmHWM") - held,
        "seen": watch.seen,
        "canary": canary.exists(),
        "left": sorted(str(path.name) for path in set(folder.iterdir()) - before),
    }


def load(attack: Attack, folder: Path, trust: bool) -> tuple[str, str]:
    try:
        attack.by(folder / (attack.loads or attack.name), trust=trust, **attack.options)
    except RepfuseError as error:
        return "refused" if error.exit_code == 2 else "failed", str(error)
    except BaseException:
        return "escaped", traceback.format_exc()
    return "loaded", ""


def main(folder: str, trust: str, *names: str) -> None:
    sys.dont_write_bytecode = True  # or what a late import writes is taken for what an attack did
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for code in EXTENSIONS:
        copyreg.add_extension("os", "system", code) if code == EXTENSIONS[0] else _alias(code)
    timm.create_model("repvgg_a0")  # it imports more on its first call
    watch = Watch()
    for number, name in enumerate(names):
        print(json.dumps({"start": name}), flush=True)
        print(json.dumps(attempt(name, Path(folder) / f"attack{number}", watch, trust=trust == "trust")), flush=True)


def _alias(code: int) -> None:
    copyreg._inverted_registry[code] = ("os", "system")  # type: ignore[attr-defined]  # it takes one code per name


if __name__ == "__main__":
    main(*sys.argv[1:])
