"""The page of a report: its parts in their order, whatever the files say; nothing is fetched, nothing runs."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from conftest import SAMPLES, Cli
from markdown_it import MarkdownIt
from support.snapshots import FOLDER, check
from test_report_views import (
    ORIGINAL,
    Data,
    bench_document,
    benchmark,
    cost,
    flips,
    measurement,
    plan,
    plan_of,
    proof,
    real_data,
    refusal,
    report,
    site,
    site_drift,
    timed_site,
    verification,
)
from typer.testing import CliRunner, Result

from repfuse.cli.app import app
from repfuse.report.schema import to_json

SECTIONS = ["verdict", "speed", "size", "sites", "kernels", "refusals", "agreement", "environment"]
HOSTILE = (
    "<script>alert(1)</script>\"'><img src=//x.example onerror=alert(1)>`|`@team#1 *b* [a](http://x.example) \x1b\u202e"
)
VOID = {"meta", "link", "br", "line", "rect", "circle"}


class Elements(HTMLParser):
    """All elements with their attributes, the text, and whether each that was opened was closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.prose = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " " if tag in ("td", "th", "dt", "dd", "p", "strong") else ""

    def handle_data(self, data: str) -> None:
        self.text += "" if "style" in self.open else data
        self.prose += "" if {"style", "code", "pre"} & set(self.open) else data

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.found}


def sites(number: int, name: str = "backbone.stages.{}.token_mixer.reparam_conv") -> list[Data]:
    branches = [("conv 3x3 + norm", "conv 1x1 + norm", "skip + norm"), ("conv 1x1 + norm → conv 3x3", "conv 3x3")]
    return [site(name.format(index), branches[index % 2]) for index in range(number)]


def kernels(path: str, least: float = 0.1, most: float = 4.0) -> list[Data]:
    """Return what is said of one site."""

    def kernel(first: int, second: int) -> Data:
        levels = [{"bits": 8, "per_tensor": first, "per_channel": first + 4}]
        levels += [{"bits": 4, "per_tensor": second, "per_channel": second + 4}]
        return {"ranges": [least, least, (least + most) / 2, most, most], "rounded": levels}

    return [{"path": path, "replaced": f"{path}.weight", "before": kernel(40, 16), "after": kernel(23, -1)}]


def large(number: int = 600, name: str = "backbone.stages.{}.token_mixer.reparam_conv", said: str = "said") -> Data:
    """Return a report with everything in it; of ``number`` sites, and where files choose the words, ``said``."""
    made = sites(number, name)
    proven = {"passed": True, "error": 3e-16, "tolerance": 1e-12, "reason": "why", "trials": 1}
    proven["drift"] = site_drift("the example", 2e-7, 1e-6, 0.2)
    refusals = (
        refusal("excluded", "a.cheap", said, cost(10, 2, 10), cost(9, 1, 9)),
        refusal("cost", name.format("b"), said, cost(10**6, 2, 10**6), cost(9 * 10**6, 1, 10**6)),
        refusal("hooks", "c.unknown", said),
        refusal("shift-before-padding", "d.dear", said, cost(10**9, 2, 10**8), cost(10**8, 1, 10**7)),
    )
    return report(
        plan=plan_of(made, refusals),
        proof=proof(sites=[proven | {"path": each["path"]} for each in made]),
        notes=[said],
        health=[{"name": name.format("bn.running_var"), "what": "small-variance", "count": 3, "of": 64}],
        chosen={"plan": said, "include": [], "exclude": ["head"]},
        command=f"repfuse convert in.pt out.pt --exclude head # {said}",
        quantization=kernels(name.format(said)) * 20,
        timing=benchmark(measurement(1.9, 2.1, 2.0), measurement(0.9, 1.1, 1.0)),
    )


def document(made: Data | None = None) -> Data:
    """Return a document as it is read from its file."""
    return json.loads(to_json(made or large(3)))


def asked(*documents: Data | str, folder: Path) -> Result:
    """Run `repfuse report` on these documents, a file each, for a page of both forms."""
    for number, data in enumerate(documents):
        written = data if isinstance(data, str) else to_json(data)
        (folder / f"{number}.json").write_text(written, encoding="utf-8", errors="surrogateescape")
    named = [str(folder / f"{number}.json") for number in range(len(documents))]
    outs = ["--html", str(folder / "page.html"), "--markdown", str(folder / "page.md")]
    return CliRunner().invoke(app, ["report", *named, *outs])


def pages_of(*documents: Data) -> tuple[str, str]:
    """Return what is told as HTML, and as Markdown."""
    with TemporaryDirectory() as folder:
        done = asked(*documents, folder=Path(folder))
        assert done.exit_code == 0, done.output
        html, markdown = (Path(folder, name).read_text(encoding="utf-8") for name in ("page.html", "page.md"))
    return html, markdown


def page_of(*documents: Data) -> str:
    return pages_of(*documents)[0]


def markdown_of(*documents: Data) -> str:
    return pages_of(*documents)[1]


def tone(page: str) -> str | None:
    """Return whether a page is good news: the class of what is said first."""
    (found,) = re.findall(r'<p class="verdict"><span class="(\w+)">', page)
    return str(found)


def verified(**changes: Any) -> Data:
    changed = flips(2, 1, 1, 1e-6, 2e-6)
    return verification(data=real_data(360, 64, 0.994, 0.9972, 0.9972, flips=changed), **changes)


def test_a_page_has_its_parts_in_order_and_fetches_nothing() -> None:
    page = page_of(document(large()), verified())
    elements = Elements(page)
    assert len(page.encode()) < 1_000_000
    assert [found["id"] for _, found in elements.found if "id" in found] == SECTIONS
    assert not elements.tags & {"script", "img", "iframe", "object", "embed", "form", "base", "a", "image", "use"}
    names = {name for _, found in elements.found for name in found}
    assert not [name for name in names if name.startswith(("on", "src", "xlink", "action", "ping", "background"))]
    assert [found["href"] for _, found in elements.found if "href" in found] == ["data:,"]
    assert "url(" not in page and "@import" not in page and "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in str(elements.found) and "prefers-color-scheme: dark" in page
    assert all(each["path"] in elements.text for each in sites(600))


def test_a_page_says_all_that_is_known() -> None:
    text = " ".join(Elements(page_of(document(), verified())).text.split())
    for said in (
        "Converted. 15 → 3 operators, exact to 3.0e-16, 2.0x faster (1.9 to 2.1) at batch 1, 2 threads",
        "accuracy 99.7 %",
        "no difference",
        "2.00 ms → 2.00 ms",
        "parameters 1.00 M 1.00 M the same",
        "2 sites",
        "the same class for 99.4 % of the samples",
        "2 samples in another class (1 right to wrong, 1 wrong to right)",
        "small-variance",
        "repfuse convert in.pt out.pt --exclude head",
        "sha256:" + "2" * 64,
        "torch 2.13.0",
        "Nothing to do",
    ):
        assert said in text, said


def test_refusals_stand_in_the_order_of_what_they_cost() -> None:
    text = Elements(page_of(document())).text
    assert sorted(
        ["excluded", "cost", "hooks", "shift-before-padding"], key=lambda code: text.index(f"{code} 1 place")
    ) == [
        "shift-before-padding",
        "excluded",
        "hooks",
        "cost",
    ]


@pytest.mark.parametrize("number", [3, 40, 41])
def test_many_sites_are_folded_away(number: int) -> None:
    found = Elements(page_of(document(large(number)))).found
    kinds = [attributes for tag, attributes in found if tag == "details" and attributes.get("class") == "kind"]
    assert ["open" in attributes for attributes in kinds] == [number <= 40] * 2


def test_what_files_say_is_text() -> None:
    name = HOSTILE.replace("\x1b", "")
    hostile = large(3, f"{name}{{}}", name)
    said = {"path": f"{name}/in.pt", "model": HOSTILE, "format": HOSTILE, "model_args": ["a"]}
    hostile |= {"input": hostile["input"] | said, "environment": hostile["environment"] | {"torch": HOSTILE}}
    elements = Elements(page_of(document(hostile)))
    plain = Elements(page_of(document()))
    assert elements.tags == plain.tags
    assert {name for _, found in elements.found for name in found} == {n for _, found in plain.found for n in found}
    assert elements.text.count("<script>alert(1)</script>") > 10
    assert "\x1b" not in elements.text and "\u202e" not in elements.text and "\\x1b\\u202e" in elements.text


def test_markdown_is_ten_lines_and_a_folded_table() -> None:
    written = markdown_of(document(), verified())
    head, _, folded = written.partition("\n\n<details>")
    assert len(head.splitlines()) <= 10 and folded.endswith("</details>\n")
    check("report_markdown", written)


def test_markdown_of_hostile_names_is_text_and_fits_a_comment() -> None:
    name = HOSTILE.replace("\x1b", "") + "x" * 2000
    hostile = markdown_of(large(200, f"{name}{{}}", name))
    assert len(hostile) < 65_536
    plain = markdown_of(large(200))
    shown, expected = (Elements(MarkdownIt("gfm-like", {"linkify": False}).render(text)) for text in (hostile, plain))
    assert [tag for tag, _ in shown.found] == [tag for tag, _ in expected.found]
    assert "<script>alert(1)</script>" in shown.text
    assert "\u202e" not in shown.text and "\\u202e" in shown.text
    assert "@team" not in shown.prose


def test_a_branch_is_drawn_as_its_layers() -> None:
    nested = "cat((conv 3x3 + norm and skip) → conv 1x1, skip)"
    branches = ("skip", "conv 1x1 + norm → conv 3x3", f"{nested} → conv 3x3 + scale")
    page = page_of(report(plan=plan_of([site(branches=branches)])))
    drawn = (
        [(sign, unescape(layer)) for sign, layer in re.findall(r'(\S*) <span class="box">(.*?)</span>', branch)]
        for branch in re.findall(r'<span class="branch">(.*?</span>)</span>', page)
    )
    assert list(drawn) == [
        [("", "skip")],
        [("", "1x1"), ("+", "norm"), ("→", "3x3")],
        [("", nested), ("→", "3x3"), ("+", "scale")],
    ]


def floored(entry: Data, floor: float) -> Data:
    return entry | {"fused": entry["fused"] | {"floor": floor}}


class Chart:
    """A chart of a page as one reads it: the numbers that marks stand for, by those that its axis has."""

    def __init__(self, page: str, section: str) -> None:
        self.drawn = page.partition(f'<section id="{section}">')[2].partition("</section>")[0]
        labels = re.findall(r'<text x="([\d.]+)%" y="1rem" text-anchor="middle">(.*?)x?</text>', self.drawn)
        self.ticks = {float(label): float(at) for at, label in labels}

    def number(self, at: str) -> float:
        """Return for what a place stands: on the axis twice as much is one step, wherever."""
        (least, first), (most, last) = min(self.ticks.items()), max(self.ticks.items())
        return least * (most / least) ** ((float(at) - first) / (last - first))

    def marks(self, kind: str, of: Iterable[str]) -> list[list[str]]:
        """Return where marks of a kind are, in percent."""
        places = "".join(rf' {name}="([\d.]+)%"' for name in of)
        found = re.findall(f'class="{kind}"{places}', self.drawn)
        return [list(each) if isinstance(each, tuple) else [each] for each in found]

    def numbers(self, kind: str, of: Iterable[str] = ("cx",)) -> list[list[float]]:
        """Return for what marks of a kind stand."""
        return [[self.number(at) for at in mark] for mark in self.marks(kind, of)]


def near(*numbers: float) -> list[Any]:
    return [pytest.approx(number, rel=2e-3) for number in numbers]


def test_a_chart_holds_all_that_it_shows() -> None:
    rows = (floored(measurement(5.9, 6.3, 6.1), 1e-3), floored(measurement(0.4, 0.6, 0.5), 2e-6))
    chart = Chart(page_of(report(timing=benchmark(*rows))), "speed")
    assert 1 in chart.ticks and 2 < len(chart.ticks) < 8
    for label, at in chart.ticks.items():  # twice as fast is one step
        assert math.isclose(chart.number(str(at)), label, rel_tol=1e-3)
    assert chart.numbers("dot") == [near(6.1), near(0.5)]
    whole, ends = chart.numbers("bar", ("x1", "x2"))[::3], chart.numbers("bar", ("x1", "x2"))
    assert whole == [near(5.9, 6.3), near(0.4, 0.6)]
    assert [ends[index] for index in (1, 2, 4, 5)] == [near(each, each) for each in (5.9, 6.3, 0.4, 0.6)]
    assert chart.numbers("limit", ("x1", "x2")) == [near(12.2, 12.2)]  # the other is far beyond all ratios
    kinds = {"dot": ("cx",), "bar": ("x1", "x2"), "limit": ("x1", "x2")}
    places = [float(at) for kind, of in kinds.items() for mark in chart.marks(kind, of) for at in mark]
    assert len(places) == 2 + 12 + 2 and min(places) > 0 and max(places) < 100


def test_a_chart_of_ranges_holds_them_all_but_what_is_next_to_nothing() -> None:
    lively, dead, tiny = kernels("a", 0.01, 5.0), kernels("b", 0.0, 0.02), kernels("c", 1e-30, 5.0)
    for found in (lively, lively + dead, dead):
        chart = Chart(page_of(report(quantization=found)), "kernels")
        shown = [each["before"]["ranges"] for each in found]
        for kind in ("bar former", "bar "):
            for (least, most), sizes in zip(chart.marks(kind, ("x1", "x2")), shown, strict=True):
                assert float(most) < 100 and chart.number(most) == near(sizes[-1])[0]
                assert float(least) > 0 if sizes[0] else float(least) == 0
        halves = chart.numbers("half ", ("x1", "x2"))
        assert [half[1] for half in halves] == [near(sizes[3])[0] for sizes in shown]
        assert chart.numbers("dot") == [near(sizes[2]) for sizes in shown]
    chart = Chart(page_of(report(quantization=tiny)), "kernels")
    assert chart.number("0") == pytest.approx(5.0 / 1e5, rel=0.2)  # so far an axis goes, whatever is less
    assert {least for least, _ in chart.marks("bar ", ("x1", "x2"))} == {"0.00"}
    empty = Chart(page_of(report(quantization=kernels("d", 0.0, 0.0))), "kernels")
    assert 1 in empty.ticks and empty.marks("dot", ("cx",)) == [["0.00"]]


NOTHING = plan(sites=0)
UNWRITTEN = {"output": None, "timing": None}


@pytest.mark.parametrize(
    ("changes", "tone_of_it", "said"),
    [
        ({"status": "planned", "proof": None, "drift": None, **UNWRITTEN}, "unsure", "Planned. 15 → 3"),
        ({"status": "failed", "proof": proof(1e-3), **UNWRITTEN}, "bad", "Not converted. The check failed"),
        ({"status": "nothing-to-fuse", "plan": NOTHING, "proof": None, **UNWRITTEN}, "unsure", "There is nothing"),
        ({"timing": benchmark(measurement(0.4, 0.6, 0.5))}, "unsure", "2.0x slower"),
        ({"proof": proof("inf"), "timing": None}, "good", "exact to inf"),
    ],
)
def test_what_is_not_known_is_left_out(changes: dict[str, Any], tone_of_it: str, said: str) -> None:
    page, comment = pages_of(large(3) | changes)
    assert tone(page) == tone_of_it
    elements = Elements(page)
    assert said in " ".join(elements.text.split())
    assert [found["id"] for _, found in elements.found if "id" in found] == SECTIONS
    assert comment


def test_a_different_file_is_no_good_news() -> None:
    assert tone(page_of(document(), verified())) == "good"
    page = page_of(document(), verified(verdict="different", reason="It is off."))
    assert tone(page) == "bad"
    assert "But `repfuse verify`: It is off." in " ".join(Elements(page).text.split())


def test_a_benchmark_takes_the_place_of_the_short_timing() -> None:
    chart = Chart(page_of(bench_document(benchmark(measurement(2.9, 3.1, 3.0))), document()), "speed")
    assert chart.numbers("dot") == [near(3.0)]


def timed(made: Data, *measurements: Data) -> Data:
    """Return a benchmark with each site of a report."""
    known = {each["output"]: each for each in made["plan"]["sites"]}.values()
    return benchmark(*measurements, sites=[timed_site(each, 2e-3, 1.9e-3, 2.1e-3) for each in known])


def test_a_benchmark_brings_runtimes_the_floor_and_what_each_site_gained() -> None:
    made = large(3)
    eager, other = floored(measurement(1.9, 2.1, 2.0), 1e-3), floored(measurement(2.9, 3.1, 3.0), 1e-3)
    other |= {"runtime": "onnxruntime", "over_eager": {"value": 7.0, "low": 6.9, "high": 7.1}}
    timing = timed(made, eager, other) | {"left_out": ["openvino: it is not there"]}
    page, comment = pages_of(made, bench_document(timing))
    text = " ".join(Elements(page).text.split())
    for said in (
        "batch 1, 2 threads in onnxruntime",
        "50.0 %",
        "not timed in openvino: it is not there",
        "4.00x, 2.00 ms",
    ):
        assert said in text, said
    chart = Chart(page, "speed")
    assert chart.numbers("limit", ("x1",)) == [near(4.0), near(6.0)] and chart.numbers("ring") == [near(7.0)]
    assert all(0 < float(at) < 100 for (at,) in chart.marks("ring", ("cx",)))
    assert len(comment.partition("\n\n<details>")[0].splitlines()) <= 10 and "| 50.0 % |" in comment


MEASURED = document()["timing"]["measurements"][0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kind": "repfuse.refusals"}, "It is repfuse.refusals"),
        ({"schema": 2}, "another version"),
        ({"status": "splendid"}, "status"),
        ({"environment": None}, "environment"),
        (
            {"timing": document()["timing"] | {"measurements": [MEASURED | {"speedup": -1}]}},
            "timing.measurements[0].speedup",
        ),
        (
            {"timing": document()["timing"] | {"measurements": [MEASURED | {"low": "nan"}]}},
            "timing.measurements[0].low",
        ),
        ({"plan": {"schema": 4}}, "another version"),
        ({"plan": None}, "schema"),
    ],
)
def test_what_is_no_report_is_one_clear_error(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    done = asked(document() | changed, folder=tmp_path)
    assert done.exit_code == 2 and "0.json is not a report" in done.stderr
    assert said in done.stderr.partition(" why: ")[2].partition("\n")[0]


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff", '{"a": 1, "a": 2}', "[" * 100_000, "NaN", "3"])
def test_what_is_no_json_is_one_clear_error(content: str, tmp_path: Path) -> None:
    done = asked(content, folder=tmp_path)
    assert done.exit_code == 2 and "0.json is not a report" in done.stderr


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ([], "FILE is missing"),
        (["conversion", "conversion"], "2 conversions"),
        (["verification"], "0 conversions"),
        (["conversion", "verification", "verification"], "2 verifications"),
    ],
)
def test_a_page_is_of_one_conversion(documents: list[str], said: str, tmp_path: Path) -> None:
    every = {"conversion": document(), "verification": verified()}
    done = asked(*(every[kind] for kind in documents), folder=tmp_path)
    assert done.exit_code == 2 and said in done.stderr


@pytest.mark.parametrize("files", [{"original": ORIGINAL, "fused": "sha256:" + "3" * 64}, None])
def test_what_is_of_other_files_is_refused(files: Any, tmp_path: Path) -> None:
    other = bench_document(benchmark(measurement(2.9, 3.1, 3.0))) | {"files": files}
    done = asked(document(), other, folder=tmp_path)
    assert done.exit_code == 2 and ("of other files" if files else "of which files") in done.stderr


def test_the_command(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "in.json").write_text(to_json(document()), encoding="utf-8")
    here = {"PYTHONPATH": f"{tmp_path}:{FOLDER.parents[1]}", "PYTHONIOENCODING": "ascii"}
    done = cli("report", "in.json", "--html", "out.html", "--markdown", "-", cwd=tmp_path, env=here, fresh=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert ((tmp_path / "out.html").read_text(encoding="utf-8"), done.stdout) == pages_of(document())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["in.json", "--markdown", "out.html"], "exists already"),
        (["in.json"], "Give --html OUT"),
        (["in.json", "--html", "a", "--markdown", "a"], "Give two places"),
        (["out.html", "--markdown", "x.md"], "out.html is not a report"),
        (["no.json", "--markdown", "x.md"], "no.json cannot be read"),
        (["in.json", "--markdown", "in.json", "--force"], "is the input itself"),
        (["in.json", "--html", "no/x.html"], "does not exist"),
    ],
)
def test_what_cannot_be_written_is_said(args: list[str], said: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.json").write_text(to_json(document()), encoding="utf-8")
    Path("out.html").touch()
    done = CliRunner().invoke(app, ["report", *args])
    assert done.exit_code == 2 and said in " ".join(done.stderr.split()), done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in.json", "out.html"}


@pytest.mark.parametrize(
    "args", [["report", "in.json", "--html", "x.html"], ["convert", "a", "b", "--report", "x.html"]]
)
def test_a_missing_extra_is_named_before_anything_else(args: list[str], monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "repfuse.report.page", raising=False)  # as where no page was made yet
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 2 and "pip install 'repfuse[report]'" in done.stderr


def test_convert_writes_the_page_of_its_report_too(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["convert", str(SAMPLES / "notebook_block.pt"), "out.pt", "--report", "out.md"])
    assert done.exit_code == 0, done.stderr
    assert "out.md" in done.stdout
    found = json.loads((tmp_path / "out.pt.report.json").read_text(encoding="utf-8"))
    assert (tmp_path / "out.md").read_text(encoding="utf-8") == markdown_of(found)


def test_a_page_says_by_its_name_what_it_is_written_as(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["convert", "a", "b", "--report", "x.pdf"])
    assert done.exit_code == 2 and "PAGE.html or PAGE.md" in done.stderr
