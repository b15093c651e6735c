"""The fresh process: a job on standard input, an answer on standard output, and all that is printed goes elsewhere.

The first line of the input says where Python modules are found, and names those that the job will need.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from contextlib import suppress

PATIENCE = 1.0  # seconds between two looks at whether the parent is still there


def main() -> None:
    """Read one job, do it, and write the answer."""
    end_with_parent()
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # whatever the network's code prints is no part of the answer
        from repfuse.readback.messages import packed, unpacked  # takes its seconds while the parent writes the file
        from repfuse.readback.reading import answer

        needed = json.loads(sys.stdin.buffer.readline())
        sys.path[:] = needed["path"]
        for name in needed["modules"]:
            with suppress(Exception):  # of what is missing the job will tell
                importlib.import_module(name)
        out.write(packed(answer(unpacked(sys.stdin.buffer.read()))))


def end_with_parent() -> None:
    """Let this process end with the one that started it, which may be killed."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PATIENCE)
    os._exit(1)


if __name__ == "__main__":
    main()
