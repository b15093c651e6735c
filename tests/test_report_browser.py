"""The page in a real browser (Debian's chromium): it says nothing on the console, asks for nothing, and fits."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_report_page import bench_document, document, large, page_of, timed, verified
from test_report_views import measurement

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
pytestmark = pytest.mark.skipif(not BROWSER, reason="needs a browser: apt-get install chromium")

WIDTHS = (1200, 380)
MEASURING = """<!doctype html><link rel="icon" href="data:,"><body>FRAMES<script>
function measured(frame) {
  const page = frame.contentDocument, style = (at) => frame.contentWindow.getComputedStyle(page.querySelector(at));
  const box = (one) => one.getBoundingClientRect();
  return {
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    paper: style("body").backgroundColor,
    inks: [style("body").color, style(".soft").color, style(".verdict span").color],
    chart: box(page.querySelector(".speed svg")).width,
    dots: [...page.querySelectorAll(".speed circle")].map((dot) => box(dot).left - box(dot.closest("svg")).left),
    medians: [...page.querySelectorAll(".kernel circle")].map((dot) => box(dot).left - box(dot.closest("svg")).left),
    bars: [...page.querySelectorAll(".speed:not(.head)")].map((row) => box(row.querySelector(".bar")).width),
  };
}
onload = () => {
  document.body.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(measured));
};
</script>"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder, and remembers what was asked for."""

    asked: list[str]

    def log_message(self, *args: object) -> None:
        self.asked.append(self.path)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """Give a folder, where it is served, and what was asked for."""
    handler = type("Handler", (Quiet,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}", handler.asked
        server.shutdown()


def shown(url: str, folder: Path, *, dark: bool = False) -> tuple[str, list[str]]:
    """Return what the body of a page holds once it is loaded, and what the console said."""
    settings = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    quiet = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--enable-logging=stderr",
    )
    command = [BROWSER, *quiet, f"--user-data-dir={folder / 'profile'}", settings, "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as the accessibility guidelines (WCAG) define it."""

    def luminance(colour: str) -> float:
        shares = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    less, more = sorted((luminance(one), luminance(other)))
    return (more + 0.05) / (less + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_a_page_fits_wide_and_narrow_in_light_and_dark(dark: bool, desk: Any) -> None:
    folder, url, asked = desk
    made = large(30, "x" * 300 + ".{}")
    timing = bench_document(timed(made, measurement(1.9, 2.1, 2.0), measurement(0.9, 1.1, 1.0)))
    (folder / "page.html").write_text(page_of(document(made), verified(), timing), encoding="utf-8")
    frames = "".join(f'<iframe src="page.html" style="width: {width}px; border: 0"></iframe>' for width in WIDTHS)
    (folder / "frames.html").write_text(MEASURING.replace("FRAMES", frames))
    dom, console = shown(f"{url}/frames.html", folder, dark=dark)
    assert console == []
    assert set(asked) == {"/frames.html", "/page.html"}
    for width, found in zip(WIDTHS, json.loads(re.sub("<[^>]*>", "", dom)), strict=True):
        assert found["overflow"] <= 0, width
        assert all(contrast(ink, found["paper"]) >= 4.5 for ink in found["inks"])
        assert (contrast(found["paper"], "rgb(0, 0, 0)") < 2) == dark
        assert found["chart"] > 250
        assert len(found["dots"]) == 2 and all(0 < dot < found["chart"] for dot in found["dots"])
        assert len(found["medians"]) == 24 and all(0 < dot < found["chart"] for dot in found["medians"])
        assert found["dots"][0] > found["dots"][1] and min(found["bars"]) > 10


def test_the_console_and_the_requests_are_seen(desk: Any) -> None:
    """And the page's own policy lets nothing in that a mistake would bring."""
    folder, url, asked = desk
    bad = '<img src="/x.png"><script>console.error("no")</script>'
    (folder / "bad.html").write_text(f"<!doctype html>{bad}")
    (folder / "page.html").write_text(page_of(document()).replace("</main>", f"{bad}</main>"), encoding="utf-8")
    assert shown(f"{url}/bad.html", folder)[1] and "/x.png" in asked
    asked.clear()
    assert len(shown(f"{url}/page.html", folder)[1]) == 2 and asked == ["/page.html"]
