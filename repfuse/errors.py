"""The one exception that repfuse raises for what a user can mend; what libraries log and warn about it is not shown."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from repfuse.wording import described

EXIT_FAILED_CHECK = 1
EXIT_BAD_INPUT = 2


LONGEST = 4000  # characters of what a message quotes, which may be a file's own words


class RepfuseError(Exception):
    """What went wrong, why, and what to do about it.

    ``exit_code`` is what the command line returns: 1 where a check failed, 2 where the input was bad.
    """

    def __init__(self, what: str, why: str = "", hint: str = "", exit_code: int = EXIT_BAD_INPUT) -> None:
        super().__init__(what)
        self.what = _clipped(what)
        self.why = _clipped(why)
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        parts = [self.what, self.why and f"why: {self.why}", self.hint and f"do: {self.hint}"]
        return "\n".join(part for part in parts if part)


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... and {len(text) - LONGEST:,} more characters"


@contextmanager
def failing_as(
    what: str,
    hint: str,
    exit_code: int = EXIT_BAD_INPUT,
    *,
    of: type[Exception] | tuple[type[Exception], ...] = Exception,
    why: Callable[[BaseException], str] = described,
) -> Iterator[None]:
    """Make one clear message of whatever code that is not ours raises, or of the errors ``of`` alone."""
    try:
        yield
    except RepfuseError:
        raise
    except of as error:
        raise RepfuseError(what, why(error), hint, exit_code) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Let no warning and no log record through, critical ones apart."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
