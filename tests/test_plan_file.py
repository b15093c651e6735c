"""The plan as a file: what is written reads back and is pleasant to edit; what is not a plan is one clear error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repfuse.errors import RepfuseError
from repfuse.explanations import REFUSALS
from repfuse.plan_file import read_plan_file, write_plan
from repfuse.plans import Cost, Plan, Refusal, Site
from repfuse.report.schema import Environment, Input, Report, envelope, to_json

TENSOR = {"shape": [1, 1, 8, 8], "dtype": "float32"}
ARGUMENTS = {"tuple": [{"tuple": [TENSOR, {"list": [{"value": None}, {"float": "-inf"}]}]}, {"dict": {"s": TENSOR}}]}
FIRST = Site("a.fused", ("conv 3x3", "skip"), "3x3", Cost(9, 8, 7, 6), Cost(), "a", "chain", "x", "add", ("c", "add"))
PLAN = Plan(
    (FIRST, replace(FIRST, path="b.größe", output="add_1")),
    (Refusal("cost", "c", "slower", Cost(1), Cost(2)), Refusal("hooks", "d", "a hook\n\tthere")),
    "always",
    "f" * 64,
    ARGUMENTS,
    ("a.pad/pad",),
)


def report(plan: Plan = PLAN, **changes: object) -> Report:
    fields = {"input_origin": "given", "shapes": ((1, 1, 8, 8), (1, 5)), "dtypes": ("float16", "int64"), **changes}
    source = Input("in.pt", "sha256:" + "1" * 64, "module", None, **fields)  # type: ignore[arg-type]
    made_with = Environment("0.1.0", "2.13.0", "3.11.7", "Linux x86_64")
    return Report(status="planned", environment=made_with, input=source, plan=plan, seconds=0.5)


def written(path: Path, **changes: object) -> str:
    write_plan(report(**changes), path)
    return path.read_text(encoding="utf-8")


def test_what_is_written_reads_back(tmp_path):
    path = tmp_path / "plan.json"
    text = written(path)
    back = read_plan_file(path)
    assert back.plan == PLAN
    assert back.origin.input == report().input
    said = back.said
    assert said and (said.by, said.source, said.input, said.asked) == ("the plan", None, "1x1x8x8,1x5:int64", True)
    assert text == written(path) and "größe" in text
    written(path, input_origin="guess")
    said = read_plan_file(path).said
    assert said and (said.by, said.source, said.input) == ("the plan", None, None)


def test_a_site_is_a_few_lines_and_begins_with_what_people_read(tmp_path):
    lines = written(tmp_path / "plan.json").splitlines()
    start = next(number for number, line in enumerate(lines) if '"sites"' in line) + 1
    assert [line.strip() for line in lines[start : start + 6]] == [
        "{",
        '"path": "a.fused",',
        '"branches": ["conv 3x3", "skip"],',
        '"kernel": "3x3",',
        '"before": {"macs": 9, "bytes": 8, "launches": 7, "parameters": 6},',
        '"after": {"macs": 0, "bytes": 0, "launches": 0, "parameters": 0},',
    ]
    assert lines[start + 11].strip() == "}," and '"0.1.0"' in lines[3]


@pytest.mark.parametrize("kind", ["inspection", "conversion"])
def test_what_the_commands_print_can_be_given_too(tmp_path, kind):
    path = tmp_path / "printed.json"
    path.write_text(to_json(envelope(kind, report().to_dict())))
    assert read_plan_file(path).plan == PLAN
    assert Plan.from_dict(json.loads(path.read_text())) == PLAN


def test_a_bare_plan_can_be_given_too(tmp_path):
    (tmp_path / "plan.json").write_text(PLAN.to_json())
    back = read_plan_file(tmp_path / "plan.json")
    assert back.plan == PLAN and back.origin.input is back.origin.output is back.said is None


def places(value: object, path: tuple[object, ...] = ()):
    """Yield the path to everything in JSON data."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


TEXT = to_json(envelope("plan", report().to_dict()))


def document() -> dict:
    """A new one each time, to be changed."""
    return json.loads(TEXT)


def put(data: dict, path: tuple, value: object) -> dict:
    *above, last = path
    inner = data
    for key in above:
        inner = inner[key]
    inner[last] = value
    return data


READ = [path for path in places(document()) if path[:1] == ("plan",) or path[1:2] in [("path",), ("digest",)]]
FREE = {"hint"}  # what nobody reads
STRANGE = [None, True, -1, 0.5, 10**30, "\x1b[31m", [], {}, [None], {"x": 1}]


@pytest.mark.parametrize("path", READ, ids=lambda path: ".".join(map(str, path)))
def test_a_wrong_type_anywhere_is_one_error(tmp_path, path):
    old = document()
    for key in path:
        old = old[key]
    for value in STRANGE:
        if not may_stand(path, old, value):
            refused(tmp_path, json.dumps(put(document(), path, value)))


def may_stand(path, old, value) -> bool:
    """Whether a plan may have ``value`` in the place of ``old``."""
    if path[-1] in FREE or (value in (None, {}) and path[-1] in ("before", "after")):
        return True
    if "arguments" in path and path[-1] == "value":
        return not isinstance(value, dict | list)
    if isinstance(old, bool):
        return isinstance(value, bool)
    return type(value) is type(old) and (value == [] or (value == {} and path[-1] == "dict"))


def refused(folder: Path, content: str | bytes, *said: str) -> RepfuseError:
    path = folder / "plan.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RepfuseError) as caught:
        read_plan_file(path)
    message = str(caught.value)
    assert str(path) in message and caught.value.why and caught.value.hint and len(message) < 600
    assert message.isprintable() or set(message) - {"\n"} <= set(filter(str.isprintable, message))
    for words in said:
        assert words in message
    return caught.value


@pytest.mark.parametrize(
    "path", [path for path in READ if isinstance(path[-1], str)], ids=lambda p: ".".join(map(str, p))
)
def test_a_missing_or_added_field_is_one_error(tmp_path, path):
    if path[-1] in FREE or "arguments" in path:
        return
    data = document()
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    kept = inner.pop(path[-1])
    # These may be left out: where nothing is, nothing was said, or the plan is older.
    if path[-1] not in ("before", "after", "macs", "bytes", "launches", "parameters", "keep_affine"):
        refused(tmp_path, json.dumps(data))
    inner.update({path[-1]: kept, "another": 1})
    if path[0] == "plan" and len(path) > 1:
        refused(tmp_path, json.dumps(data), "another")


DAMAGED = {
    "empty": ("", "line 1"),
    "no text": (b"\xff\xfe\x00\xd8\x00", ""),
    "a zip": (b"PK\x03\x04" + bytes(range(256)), ""),
    "a list": ("[]", "it is []"),
    "a number": ("3", "3"),
    "cut": (json.dumps(document())[:700], "column"),
    "a comma too many": ('{"sites": [1,],}', "no comma stands before"),
    "not a number": (json.dumps(put(document(), ("seconds",), float("nan"))), "NaN"),
    "infinity": (json.dumps(put(document(), ("plan", "sites", 0, "before", "macs"), float("inf"))), "Infinity"),
    "long number": ('{"schema": ' + "9" * 10_000 + "}", ""),
    "deep lists": ("[" * 100_000, "deep"),
    "deep mappings": ('{"a":' * 100_000, "deep"),
    "twice": ('{"schema": 3, "schema": 3}', "twice"),
    "another kind": (json.dumps(document() | {"kind": "repfuse.verification"}), "repfuse.verification"),
    "another schema": (json.dumps(put(document(), ("plan", "schema"), 3)), "schema 3"),
    "another schema of nothing": (json.dumps({"schema": {"x": 1}}), "schema"),
    "unknown policy": (json.dumps(put(document(), ("plan", "policy"), "fast")), "fast"),
    "unknown refusal": (json.dumps(put(document(), ("plan", "refusals", 0, "code"), "mood")), "mood"),
    "same site": (json.dumps(put(document(), ("plan", "sites", 1, "output"), "add")), "two of its sites"),
    "an older field": (json.dumps(put(document(), ("plan", "sites", 0, "part"), "x")), "does not belong there"),
    "half a character": (json.dumps(put(document(), ("plan", "sites", 0, "path"), "\ud800")), "cannot be shown"),
    "huge example": (
        json.dumps(put(document(), ("plan", "arguments"), {"shape": [2**40], "dtype": "float32"})),
        "more than",
    ),
    "many axes": (
        json.dumps(put(document(), ("plan", "arguments"), {"shape": [2**40] * 100_000, "dtype": "int8"})),
        "more than",
    ),
    "shapes without dtypes": (json.dumps(put(document(), ("input", "dtypes"), [])), "dtypes"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_plan_is_one_error(tmp_path, name):
    content, said = DAMAGED[name]
    refused(tmp_path, content, said)


def test_a_deep_example_is_one_error(tmp_path):
    deep: object = {"value": 1}
    for _ in range(200):
        deep = {"list": [deep]}
    refused(tmp_path, json.dumps(put(document(), ("plan", "arguments"), deep)), "too deeply")


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "plan.json").open("wb") as stream:
        stream.truncate((16 << 20) + 1)
    with pytest.raises(RepfuseError, match="not a plan") as caught:
        read_plan_file(tmp_path / "plan.json")
    assert "16 MiB" in caught.value.why


@pytest.mark.parametrize("name", ["none.json", "."])
def test_a_file_that_is_none_is_said(tmp_path, name):
    with pytest.raises(RepfuseError, match="read") as caught:
        read_plan_file(tmp_path / name)
    assert caught.value.why


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=3 * settings().max_examples)
@given(st.sampled_from(list(places(document()))), JSON)
def test_whatever_stands_anywhere_is_a_plan_or_one_error(path, value):
    data = put(document(), path, value) if path else value
    try:
        made = Plan.from_dict(data)
    except RepfuseError as error:
        assert error.what and error.hint
        return
    assert Plan.from_dict(json.loads(made.to_json())).to_dict() == made.to_dict()
    assert all(refusal.code in REFUSALS for refusal in made.refusals)


@settings(max_examples=2 * settings().max_examples)
@given(st.data())
def test_changed_bytes_are_a_plan_or_one_error(tmp_path_factory, data):
    content = bytearray(json.dumps(document()).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.json"
    path.write_bytes(bytes(content))
    try:
        assert read_plan_file(path).plan
    except RepfuseError as error:
        assert str(path) in error.what and error.hint
