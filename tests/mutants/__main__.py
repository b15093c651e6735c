"""Mutation testing of the algebra and the operator tables: ``make mutants``.

    python -m tests.mutants [--one-in N] [--blunt-one-in N] [--jobs N] [FILE ...]

Changes one thing in one file at a time (``mutations``) and runs the tests of that file (``coverage``). Prints each
change that no test noticed. Which test noticed a mutant is kept in ``.mutants``, so a run that was stopped goes on
where it was, and the next one tries only what survived and the files that have changed; remove it to begin anew.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from . import running
from .coverage import ALGEBRA, OPS, tests_of
from .mutations import Mutant, mutants_of

KEPT = Path(".mutants")


def main() -> None:
    """Run all that is asked for and not known yet; print what survived."""
    options = _options()
    files = options.files or sorted(map(str, [*Path(ALGEBRA).glob("*.py"), *Path(OPS).glob("*.py")]))
    chosen = [mutant for file in files for mutant in mutants_of(Path(file)) if _is_chosen(mutant, options)]
    known = _known()
    waiting = [mutant for mutant in chosen if known.get(mutant.key) is None]
    print(f"{len(chosen)} mutants in {len(files)} files, {len(waiting)} to try", flush=True)
    running.preload()
    _check_unchanged(sorted({mutant.path for mutant in waiting}))
    _try_all(waiting, options.jobs, known)
    _report(chosen, known)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("files", nargs="*", help="files to mutate; all of algebra and ops if none is given")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--blunt-one-in", type=int, default=10, help="of the mutants that give None or another string, one in so many"
    )
    parser.add_argument("--one-in", type=int, default=1, help="of all mutants, one in so many")
    return parser.parse_args()


def _is_chosen(mutant: Mutant, options: argparse.Namespace) -> bool:
    """Whether the mutant is in the sample, which is the same in every run."""
    return int(mutant.key, 16) % (options.one_in * (options.blunt_one_in if mutant.blunt else 1)) == 0


def _known() -> dict[str, str | None]:
    """Return by key which test noticed the mutant, None where none did."""
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    return dict(json.loads(line) for line in lines)


def _check_unchanged(paths: list[str]) -> None:
    """Stop where the tests fail without a mutant: they would seem to notice each."""
    for tests in sorted({tests_of(path) for path in paths}):
        trial = running.started(paths[0], Path(paths[0]).read_text(), tests)
        if (verdict := trial.verdict(os.waitpid(trial.process, 0)[1])) is not None:
            sys.exit(f"these tests fail before anything is changed: {verdict} of {' '.join(tests)}")


def _try_all(waiting: list[Mutant], jobs: int, known: dict[str, str | None]) -> None:
    begin, left = time.monotonic(), len(waiting)
    with KEPT.open("a") as kept:
        for mutant, verdict in _verdicts(waiting, jobs):
            known[mutant.key] = verdict
            kept.write(json.dumps([mutant.key, verdict]) + "\n")
            kept.flush()
            left -= 1
            if verdict is None:
                print(mutant, flush=True)
            if left % 100 == 0:
                print(f"... {left} left after {time.monotonic() - begin:.0f} s", flush=True)


def _verdicts(waiting: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, str | None]]:
    """Yield each mutant with the test that noticed it, as they end. Tests that noticed one are first for the next."""
    now: dict[int, tuple[Mutant, running.Trial]] = {}
    first: defaultdict[str, deque[str]] = defaultdict(partial(deque, maxlen=8))
    queue = iter(waiting)
    while True:
        for mutant in islice(queue, jobs - len(now)):
            trial = running.started(mutant.path, mutant.source(), tests_of(mutant.path), first[mutant.path])
            now[trial.process] = mutant, trial
        if not now:
            return
        process, status = os.wait()
        mutant, trial = now.pop(process)
        verdict = trial.verdict(status)
        if verdict is not None and verdict not in first[mutant.path]:
            first[mutant.path].append(verdict)
        yield mutant, verdict


def _report(chosen: list[Mutant], known: dict[str, str | None]) -> None:
    survivors = [mutant for mutant in chosen if known[mutant.key] is None]
    print(f"\n{len(chosen)} mutants, {len(chosen) - len(survivors)} noticed, {len(survivors)} survived:")
    for mutant in survivors:
        print(mutant)
    for path, count in sorted(Counter(mutant.path for mutant in survivors).items()):
        print(f"{count:4} {path}")


main()
