"""The page of a report: its parts in their order, whatever the files say; nothing is fetched, nothing runs."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLES, Cli
from markdown_it import MarkdownIt
from support.snapshots import FOLDER, check
from test_report_views import benchmark, measurement, proof, report, site, verification
from typer.testing import CliRunner

from repfuse.benching.results import Benchmark, Gain, Measurement, Ratio, SiteTiming
from repfuse.checking.results import Flips, Level, RealData, SiteDrift, SiteProof
from repfuse.cli.app import app
from repfuse.errors import RepfuseError
from repfuse.health import Anomaly
from repfuse.plans import Cost, Plan, Refusal, Site
from repfuse.quantization import Kernel, Rounded, SiteKernels
from repfuse.report.bench_view import speed
from repfuse.report.page import (
    RANGES_SHOWN,
    Page,
    as_html,
    as_markdown,
    layers,
    limit,
    range_axis,
    speed_axis,
    templates,
)
from repfuse.report.schema import Chosen, Report, envelope, read, to_json, told

SECTIONS = ["verdict", "speed", "size", "sites", "kernels", "refusals", "agreement", "environment"]
HOSTILE = (
    "<script>alert(1)</script>\"'><img src=//x.example onerror=alert(1)>`|`@team#1 *b* [a](http://x.example) \x1b\u202e"
)
FILES = {"files": {"original": "sha256:" + "1" * 64, "fused": "sha256:" + "2" * 64}}
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


def sites(number: int, name: str = "backbone.stages.{}.token_mixer.reparam_conv") -> tuple[Site, ...]:
    branches = [("conv 3x3 + norm", "conv 1x1 + norm", "skip + norm"), ("conv 1x1 + norm → conv 3x3", "conv 3x3")]
    return tuple(site(name.format(index), branches[index % 2]) for index in range(number))


def kernels(path: str, least: float = 0.1, most: float = 4.0) -> tuple[SiteKernels, ...]:
    """Return what is said of one site."""

    def kernel(first: int, second: int) -> Kernel:
        levels = (Rounded(8, first, first + 4), Rounded(4, second, second + 4))
        return Kernel((least, least, (least + most) / 2, most, most), levels)

    return (SiteKernels(path, f"{path}.weight", kernel(40, 16), kernel(23, -1)),)


def large(number: int = 600, name: str = "backbone.stages.{}.token_mixer.reparam_conv", said: str = "said") -> Report:
    """Return a report with everything in it; of ``number`` sites, and where files choose the words, ``said``."""
    made = sites(number, name)
    drift = SiteDrift("the example", "float32", Level(1e-7, 1e-7), Level(2e-7, 2e-7), Level(1e-6, 1e-6), 0.2)
    proofs = tuple(SiteProof.of(each.path, proof().network, (), drift) for each in made)
    refusals = (
        Refusal("excluded", "a.cheap", said, Cost(10, 10, 2), Cost(9, 9, 1)),
        Refusal("cost", name.format("b"), said, Cost(10**6, 10**6, 2), Cost(9 * 10**6, 10**6, 1)),
        Refusal("hooks", "c.unknown", said),
        Refusal("shift-before-padding", "d.dear", said, Cost(10**9, 10**8, 2), Cost(10**8, 10**7, 1)),
    )
    plan = Plan(made, refusals, "cost", "f" * 8, {"tuple": []})  # type: ignore[arg-type]
    return report(
        plan=plan,
        proof=proof(sites=proofs),
        notes=(said,),
        health=(Anomaly(name.format("bn.running_var"), "small-variance", 3, 64),),
        chosen=Chosen(said, (), ("head",)),
        command=f"repfuse convert in.pt out.pt --exclude head # {said}",
        quantization=kernels(name.format(said)) * 20,
        timing=benchmark(measurement(1.9, 2.1, 2.0), measurement(0.9, 1.1, 1.0)),
    )


def document(made: Report | None = None, kind: str = "conversion") -> Any:
    return json.loads(to_json(envelope(kind, (made or large(3)).to_dict())))


def page_of(*documents: Any) -> str:
    return as_html(told([(f"{number}.json", data) for number, data in enumerate(documents)]))


def verified(**changes: Any) -> Any:
    flips = Flips(2, 1, 1, 1e-6, 2e-6)
    data = RealData(360, 64, 0.994, 0.9972, 0.9972, flips=flips)
    return envelope("verification", FILES | verification(data=data, **changes).to_dict())


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
    assert all(each.path in elements.text for each in sites(600))


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
    source = replace(hostile.input, path=f"{name}/in.pt", model=HOSTILE, format=HOSTILE, model_args=("a",))
    hostile = replace(hostile, input=source, environment=replace(hostile.environment, torch=HOSTILE))
    elements = Elements(page_of(document(hostile)))
    plain = Elements(page_of(document()))
    assert elements.tags == plain.tags
    assert {name for _, found in elements.found for name in found} == {n for _, found in plain.found for n in found}
    assert elements.text.count("<script>alert(1)</script>") > 10
    assert "\x1b" not in elements.text and "\u202e" not in elements.text and "\\x1b\\u202e" in elements.text


def test_markdown_is_ten_lines_and_a_folded_table() -> None:
    written = as_markdown(told([("a", document()), ("b", verified())]))
    head, _, folded = written.partition("\n\n<details>")
    assert len(head.splitlines()) <= 10 and folded.endswith("</details>\n")
    check("report_markdown", written)


def test_markdown_of_hostile_names_is_text_and_fits_a_comment() -> None:
    name = HOSTILE.replace("\x1b", "") + "x" * 2000
    hostile = as_markdown(told([("a", document(large(200, f"{name}{{}}", name)))]))
    assert len(hostile) < 65_536
    plain = as_markdown(told([("a", document(large(200)))]))
    shown, expected = (Elements(MarkdownIt("gfm-like", {"linkify": False}).render(text)) for text in (hostile, plain))
    assert [tag for tag, _ in shown.found] == [tag for tag, _ in expected.found]
    assert "<script>alert(1)</script>" in shown.text
    assert "\u202e" not in shown.text and "\\u202e" in shown.text
    assert "@team" not in shown.prose


def test_a_branch_is_drawn_as_its_layers() -> None:
    assert layers("skip") == (("", "skip"),)
    assert layers("conv 1x1 + norm → conv 3x3") == (("", "1x1"), ("+", "norm"), ("→", "3x3"))
    nested = "cat((conv 3x3 + norm and skip) → conv 1x1, skip)"
    assert layers(f"{nested} → conv 3x3 + scale") == (("", nested), ("→", "3x3"), ("+", "scale"))


def floored(entry: Measurement, floor: float) -> Measurement:
    return replace(entry, fused=replace(entry.fused, floor=floor))


def test_a_chart_holds_all_that_it_shows() -> None:
    rows = (floored(measurement(5.9, 6.3, 6.1), 1e-3), floored(measurement(0.4, 0.6, 0.5), 2e-6))
    chart = speed_axis(rows)
    where = {ratio: float(chart.at(ratio).removesuffix("%")) for ratio in (0.4, 0.5, 1, 2, 4, 6.3, 12.2)}
    assert list(where.values()) == sorted(where.values())
    assert where[0.4] > 0 and where[12.2] < 100
    assert math.isclose(where[2] - where[1], where[4] - where[2], abs_tol=0.02)  # twice as fast is one step
    assert chart.holds(limit(rows[0])) and not chart.holds(limit(rows[1]))
    assert 1 in chart.ticks and len(chart.ticks) < 8
    assert speed(rows[1]) == "2.0x slower (1.7 to 2.5)"


def test_a_chart_of_ranges_holds_them_all_but_what_is_next_to_nothing() -> None:
    (lively,) = kernels("a", 0.01, 5.0)
    (dead,) = kernels("b", 0.0, 0.02)
    (tiny,) = kernels("c", 1e-30, 5.0)
    for found in ([lively], [lively, dead], [dead]):
        axis = range_axis(found)
        sizes = [size for site in found for size in (*site.before.ranges, *site.after.ranges) if size]
        assert all(map(axis.holds, sizes))
        assert float(axis.at(0.0).removesuffix("%")) == 0
    assert range_axis([tiny]).ends[0] == pytest.approx(5.0 / RANGES_SHOWN / 1.12)
    assert range_axis([]).ends[0] < 1 < range_axis([]).ends[1]


NOTHING = Plan((), (), "cost", "f", {"tuple": []})  # type: ignore[arg-type]
UNWRITTEN = {"output": None, "timing": None}


@pytest.mark.parametrize(
    ("changes", "tone", "said"),
    [
        ({"status": "planned", "proof": None, "drift": None, **UNWRITTEN}, "unsure", "Planned. 15 → 3"),
        ({"status": "failed", "proof": proof(1e-3), **UNWRITTEN}, "bad", "Not converted. The check failed"),
        ({"status": "nothing-to-fuse", "plan": NOTHING, "proof": None, **UNWRITTEN}, "unsure", "There is nothing"),
        ({"timing": benchmark(measurement(0.4, 0.6, 0.5))}, "unsure", "2.0x slower"),
        ({"proof": proof(math.inf), "timing": None}, "good", "exact to inf"),
    ],
)
def test_what_is_not_known_is_left_out(changes: dict[str, Any], tone: str, said: str) -> None:
    data = document(replace(large(3), **changes))
    assert Page(told([("a", data)])).tone == tone
    elements = Elements(page_of(data))
    assert said in " ".join(elements.text.split())
    assert [found["id"] for _, found in elements.found if "id" in found] == SECTIONS
    assert as_markdown(told([("a", data)]))


def test_a_different_file_is_no_good_news() -> None:
    assert Page(told([("a", document()), ("b", verified())])).tone == "good"
    page = Page(told([("a", document()), ("b", verified(verdict="different", reason="It is off."))]))
    assert page.tone == "bad" and "It is off." in page.verdict


def test_a_benchmark_takes_the_place_of_the_short_timing() -> None:
    bench = bench_document(benchmark(measurement(2.9, 3.1, 3.0)))
    page = Page(told([("bench.json", bench), ("a", document())]))
    assert [row.speedup for row in page.speeds] == [3.0]


def timed(made: Report, *measurements: Measurement) -> Benchmark:
    """Return a benchmark with each site of a report."""
    known = {each.output: each for each in made.plan.sites}.values()
    ratio, gain = Ratio(4.0, 3.9, 4.1), Gain(2e-3, 1.9e-3, 2.1e-3)
    sites = (SiteTiming(each.path, each.output, "3x3", 5.0, 4e-3, 1e-3, ratio, gain) for each in known)
    return replace(benchmark(*measurements), sites=tuple(sites))


def bench_document(made: Benchmark) -> Any:
    return envelope("benchmark", FILES | made.to_dict())


def test_a_benchmark_brings_runtimes_the_floor_and_what_each_site_gained() -> None:
    made = large(3)
    eager, other = floored(measurement(1.9, 2.1, 2.0), 1e-3), floored(measurement(2.9, 3.1, 3.0), 1e-3)
    other = replace(other, runtime="onnxruntime", over_eager=Ratio(7.0, 6.9, 7.1))
    documents = (
        document(made),
        bench_document(replace(timed(made, eager, other), left_out=("openvino: it is not there",))),
    )
    text = " ".join(Elements(page_of(*documents)).text.split())
    for said in (
        "batch 1, 2 threads in onnxruntime",
        "50.0 %",
        "not timed in openvino: it is not there",
        "4.00x, 2.00 ms",
    ):
        assert said in text, said
    page = Page(told([("a", documents[0]), ("b", documents[1])]))
    assert [(limit(row), row.over_eager and row.over_eager.value) for row in page.speeds] == [(4.0, None), (6.0, 7.0)]
    assert page_of(*documents).count('class="ring"') == 1 and page_of(*documents).count('class="limit"') == 2
    comment = as_markdown(told([("a", documents[0]), ("b", documents[1])]))
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
def test_what_is_no_report_is_one_clear_error(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(RepfuseError, match=r"bad\.json is not a report") as caught:
        told([("bad.json", document() | changed)])
    assert said in caught.value.why


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff", '{"a": 1, "a": 2}', "[" * 100_000, "NaN", "3"])
def test_what_is_no_json_is_one_clear_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(RepfuseError, match=r"bad\.json is not a report"):
        told([read(path)])


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ([], "0 conversions"),
        (["conversion", "conversion"], "2 conversions"),
        (["verification"], "0 conversions"),
        (["conversion", "verification", "verification"], "2 verifications"),
    ],
)
def test_a_page_is_of_one_conversion(documents: list[str], said: str) -> None:
    every = {"conversion": document(), "verification": verified()}
    with pytest.raises(RepfuseError, match=said):
        told([(kind, every[kind]) for kind in documents])


@pytest.mark.parametrize("files", [{"original": "sha256:" + "1" * 64, "fused": "sha256:" + "3" * 64}, None])
def test_what_is_of_other_files_is_refused(files: Any) -> None:
    other = envelope("benchmark", benchmark(measurement(2.9, 3.1, 3.0)).to_dict() | {"files": files})
    with pytest.raises(RepfuseError, match="of other files" if files else "of which files"):
        told([("a", document()), ("b", other)])


def test_the_command(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "in.json").write_text(to_json(document()), encoding="utf-8")
    here = {"PYTHONPATH": f"{tmp_path}:{FOLDER.parents[1]}", "PYTHONIOENCODING": "ascii"}
    done = cli("report", "in.json", "--html", "out.html", "--markdown", "-", cwd=tmp_path, env=here, fresh=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == as_markdown(told([("a", document())]))
    assert (tmp_path / "out.html").read_text(encoding="utf-8") == page_of(document())


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
    templates.cache_clear()
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 2 and "pip install 'repfuse[report]'" in done.stderr


def test_convert_writes_the_page_of_its_report_too(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["convert", str(SAMPLES / "notebook_block.pt"), "out.pt", "--report", "out.md"])
    assert done.exit_code == 0, done.stderr
    assert "out.md" in done.stdout
    assert (tmp_path / "out.md").read_text(encoding="utf-8") == as_markdown(
        told([read(tmp_path / "out.pt.report.json")])
    )


def test_a_page_says_by_its_name_what_it_is_written_as(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["convert", "a", "b", "--report", "x.pdf"])
    assert done.exit_code == 2 and "PAGE.html or PAGE.md" in done.stderr
