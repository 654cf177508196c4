"""The report in a real browser: nothing overflows on a phone, light and dark differ, no message on the console."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from browser import browse, needs_chromium
from PIL import Image

from slitlamp.reports import write_report

pytestmark = [needs_chromium, pytest.mark.slow]
MEASURE = """<script>
const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".table, pre, svg")
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "." + e.className);
const small = [...document.querySelectorAll("p, li, td, th, dd, dt, figcaption, a, pre")].map(
  e => parseFloat(getComputedStyle(e).fontSize)).reduce((a, b) => Math.min(a, b));
const shown = [...document.querySelectorAll(".card img")].map(e => e.naturalWidth > 0);
parent.postMessage({scroll: document.documentElement.scrollWidth, inner: innerWidth, wide, small, shown}, "*");
</script></body>"""


@pytest.fixture(scope="module")
def report(demo_run: Path) -> Path:
    return write_report(demo_run)


def framed(tmp_path: Path, page: Path, width: int, script: str = "") -> Path:
    """A page that shows another in a frame of any width (windows have a least width)."""
    outer = tmp_path / f"outer{width}.html"
    frame = f'<iframe src="{page.as_uri()}" style="border:0;width:{width}px;height:1500px;display:block"></iframe>'
    outer.write_text(f'<!doctype html><body style="margin:0"><pre id="found"></pre>{script}{frame}</body>')
    return outer


@pytest.mark.parametrize("width", [360, 1100])
def test_nothing_overflows_and_all_figures_load(report: Path, tmp_path: Path, width: int) -> None:
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text(encoding="utf-8"))
    copy = tmp_path / "report.html"
    copy.write_text(page.replace("</body>", f"<!-- -->{MEASURE}"), encoding="utf-8")
    listen = "<script>onmessage = e => document.getElementById('found').textContent = JSON.stringify(e.data)</script>"
    dom = browse(tmp_path, "--dump-dom", framed(tmp_path, copy, width, listen).as_uri()).stdout
    match = re.search(r'<pre id="found">(.+?)</pre>', dom)
    assert match is not None
    found = json.loads(match[1].replace("&amp;", "&"))
    assert found["inner"] == width
    assert found["scroll"] == width
    assert found["wide"] == []
    assert found["small"] >= 12
    assert found["shown"]
    assert all(found["shown"])


def test_light_and_dark(report: Path, tmp_path: Path) -> None:
    corners = {}
    for scheme, code in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{scheme}.png"
        browse(
            tmp_path,
            "--window-size=800,600",
            f"--blink-settings=preferredColorScheme={code}",
            f"--screenshot={shot}",
            report.as_uri(),
        )
        pixels = np.asarray(Image.open(shot).convert("L"))
        corners[scheme] = int(pixels[2, 2])
        assert np.ptp(pixels) > 150
    assert corners["dark"] < 60
    assert corners["light"] > 240


def test_no_message_on_the_console(report: Path, tmp_path: Path) -> None:
    errors = browse(tmp_path, "--enable-logging=stderr", "--dump-dom", report.as_uri()).stderr
    assert not [line for line in errors.splitlines() if "CONSOLE" in line]
