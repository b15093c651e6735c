"""Where errors end: every command runs in here, and what it raises becomes one message and an exit code."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import typer
from typer.core import TyperCommand

from repfuse.cli.output import say, say_error
from repfuse.errors import EXIT_BAD_INPUT, RepfuseError
from repfuse.wording import described

EXIT_INTERRUPTED = 130


class Command(TyperCommand):
    """A command whose errors are messages. `repfuse --debug COMMAND` lets them through with their traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except RepfuseError as error:
            if ctx.find_root().obj:
                traceback.print_exc()
            say_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            say("interrupted: nothing that is not whole was written.")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if ctx.find_root().obj:
                raise
            say_error(_unexpected(error))
            raise typer.Exit(EXIT_BAD_INPUT) from None


def _unexpected(error: Exception) -> RepfuseError:
    return RepfuseError(
        "Something happened that repfuse does not expect. This is a mistake in repfuse.",
        described(error),
        f"Please report it with what `repfuse --debug {' '.join(sys.argv[1:])}` prints.",
    )
