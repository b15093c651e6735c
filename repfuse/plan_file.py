"""The plan as a file: what `repfuse inspect --plan` writes, people edit, and `repfuse convert --plan` applies.

It is the document that `repfuse inspect --json` prints, without what was measured and with a site's fields on a line
each; that document, and the report of a conversion, are read as well. It knows no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repfuse.checked import NotAPlan, count, list_of, shown, text
from repfuse.checkpoint.atomic import replacing
from repfuse.checkpoint.json_file import read_json
from repfuse.errors import RepfuseError
from repfuse.jsonready import json_ready
from repfuse.plans import Plan
from repfuse.report.schema import Report, envelope
from repfuse.wording import first_line

LARGEST = 16 * 2**20
"""Bytes; the plans of the largest networks have less than one million."""

AGAIN = "Make it again: repfuse inspect IN --plan FILE"


@dataclass(frozen=True)
class PlanFile:
    """A plan that was read: from where, and which checkpoint it was made for, as far as the file says so.

    ``example`` is the shape of the input that its user gave (``1x3x224x224``), None where that was known or guessed;
    ``made`` the digest of the file that was written by it, where it is in the report of that.
    """

    path: Path
    plan: Plan
    made_for: str | None = None
    digest: str | None = None
    example: str | None = None
    made: str | None = None


def write_plan(report: Report, path: Path) -> None:
    """Write the plan of a report to ``path``, as a whole or not at all. The same plan gives the same bytes."""
    parts = {"environment": report.environment, "input": report.input, "plan": report.plan.to_dict()}
    with replacing(path) as temporary:
        temporary.write_text(_laid_out(envelope("plan", json_ready(parts))) + "\n", encoding="utf-8")


def read_plan_file(path: Path) -> PlanFile:
    """Return the plan in a file. Raises RepfuseError with what is wrong with it."""
    data = _content(path)
    try:
        made_for, digest, example = _origin(data)
        return PlanFile(path, Plan.from_dict(data), made_for, digest, example, _made(data))
    except NotAPlan as error:
        raise _damaged(path, str(error)) from error
    except RepfuseError as error:
        raise RepfuseError(f"{path}: {error.what}", error.why, error.hint) from error


def _content(path: Path) -> Any:
    try:
        return read_json(path, LARGEST)
    except OSError as error:
        raise RepfuseError(f"The plan {path} cannot be read.", error.strerror or str(error), AGAIN) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise _damaged(path, place, "Mend it there (no comma stands before a closing bracket). ") from error
    except ValueError as error:
        raise _damaged(path, first_line(error)) from error


def _damaged(path: Path, why: str, hint: str = "") -> RepfuseError:
    return RepfuseError(f"{path} is not a plan that repfuse can read.", f"{why}.", hint + AGAIN)


def _origin(data: Any) -> tuple[str | None, str | None, str | None]:
    """Return the path, the digest and, where it was given, the input of the checkpoint that a plan was made for."""
    source = data.get("input") if isinstance(data, dict) else None
    if source is None:
        return None, None, None
    if not isinstance(source, dict):
        raise NotAPlan(f"input is {shown(source)} and not a mapping")
    path, digest = (text(source.get(name), f"input.{name}") for name in ("path", "digest"))
    given = source.get("input_origin") == "given"
    return path, digest, _example(source) if given else None


def _made(data: Any) -> str | None:
    output = data.get("output") if isinstance(data, dict) else None
    return text(output.get("digest"), "output.digest") if isinstance(output, dict) else None


def _example(source: dict[str, Any]) -> str:
    """Return the shapes as --input takes them; floating dtypes follow the network."""
    shapes = list_of(list_of(count))(source.get("shapes"), "input.shapes")
    dtypes = list_of(text)(source.get("dtypes"), "input.dtypes")
    if len(shapes) != len(dtypes):
        raise NotAPlan("input has not as many dtypes as shapes")
    return ",".join(
        "x".join(map(str, sizes)) + ("" if "float" in dtype else f":{dtype}")
        for sizes, dtype in zip(shapes, dtypes, strict=True)
    )


def _laid_out(value: Any, margin: str = "") -> str:
    """Return JSON text in which whatever holds no mapping stands on one line: one line for a list of branches."""
    if not _holds_mappings(value):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = margin + "  "
    if isinstance(value, dict):
        return _block("{}", (f"{json.dumps(key)}: {_laid_out(item, inner)}" for key, item in value.items()), margin)
    return _block("[]", (_laid_out(item, inner) for item in value), margin)


def _block(brackets: str, lines: Iterable[str], margin: str) -> str:
    return f"{brackets[0]}\n{margin}  " + f",\n{margin}  ".join(lines) + f"\n{margin}{brackets[1]}"


def _holds_mappings(value: Any) -> bool:
    """Whether a list holds mappings, or a mapping other mappings or lists."""
    if isinstance(value, dict):
        return any(isinstance(item, dict | list) for item in value.values())
    return isinstance(value, list) and any(isinstance(item, dict) or _holds_mappings(item) for item in value)
