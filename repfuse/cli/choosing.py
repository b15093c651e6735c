"""The options that say which sites are merged, and what they mean together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repfuse.plans import Policy

if TYPE_CHECKING:
    from repfuse.plan_file import PlanFile
    from repfuse.planning.choosing import Choice
    from repfuse.report.schema import Chosen

CHOICE = "What is merged"

Merging = Annotated[
    Policy | None,
    typer.Option(
        "--policy",
        help="What to merge of all that can be merged exactly: what is predicted to be faster (cost, the default), "
        "whatever leaves fewer operators (always), or as cost but no layers in a row (never-compose).",
        show_default=False,
        rich_help_panel=CHOICE,
    ),
]
PlanIn = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FILE",
        help="Merge exactly the sites of this plan, which `repfuse inspect --plan` wrote, and you may have dropped "
        "sites from.",
        rich_help_panel=CHOICE,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="GLOB",
        help="Merge only the sites whose path, or a module around them, matches: 'stages.1', '*.mlp.*'; repeat it. "
        "* stands for dots too.",
        rich_help_panel=CHOICE,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="GLOB",
        help="Leave these sites alone, in the same way; repeat it. It goes before --include.",
        rich_help_panel=CHOICE,
    ),
]
KeepClass = Annotated[
    bool | None,
    typer.Option(
        "--keep-class/--drop-class",
        help="Leave the outermost module what it is, with its class and methods, or merge also what stands in its own "
        "forward, for which it becomes a GraphModule. Without it: as more than 5 % of the time is predicted to be "
        "gained, or not.",
        show_default=False,
        rich_help_panel=CHOICE,
    ),
]


@dataclass(frozen=True)
class Wanted:
    """What the user wants merged, and the file that the plan is from, where there is one."""

    choice: Choice
    file: PlanFile | None

    @property
    def chosen(self) -> Chosen | None:
        """What the report says of it, None where nothing was chosen."""
        from repfuse.report.schema import Chosen

        said = Chosen(
            str(self.file.path) if self.file else None, tuple(self.choice.include), tuple(self.choice.exclude)
        )
        return said if self.file or said.include or said.exclude else None


def wanted(
    policy: Policy | None,
    plan: Path | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    keep_class: bool | None,
) -> Wanted:
    """Read what the options say. Raises RepfuseError where the file is no plan, or where they contradict each other."""
    from repfuse.plan_file import read_plan_file

    file = read_plan_file(plan) if plan else None
    from repfuse.planning.choosing import Choice  # it imports torch: a file that cannot be read is said before

    choice = Choice(policy, file.plan if file else None, tuple(include or ()), tuple(exclude or ()), keep_class)
    return Wanted(choice, file)
