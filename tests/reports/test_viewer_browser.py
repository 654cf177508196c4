"""The viewer in a real browser: it runs under its policy, controls and keys change what is seen, on a phone too."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import answer_of, browse, needs_chromium
from PIL import Image

import slitlamp as sl
from interventions import HeadReinforcement
from slitlamp.experiments import Experiment, load_dataset
from slitlamp.reports import write_report

pytestmark = [needs_chromium, pytest.mark.slow]

DRIVE = """<script>
(async () => {
  const root = document.querySelector(".viewer");
  const pause = () => new Promise((done) => setTimeout(done, 150));
  const until = async (ready) => { for (let i = 0; i < 200 && !ready(); i += 1) await pause(); };
  const one = (query) => root.querySelector(query);
  const look = () => ({
    picture: one("canvas.picture").toDataURL(), mass: one("canvas.mass").toDataURL(), live: one(".live").textContent,
    lens: one(".lens").textContent, signals: one(".signals").textContent, effects: one(".conditions").textContent,
    words: one(".tokens").textContent, hash: location.hash, layer: one("input[aria-label=layer]").value,
    head: one("select[aria-label=head]").value, help: one(".help").hidden,
    options: one("select[aria-label=item]").options.length,
  });
  const key = async (name) => {
    (document.activeElement === document.body ? root : document.activeElement)
      .dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
    await pause();
  };
  const set = async (query, value, event) => {
    const element = one(query);
    if (typeof value === "boolean") element.checked = value; else element.value = value;
    element.dispatchEvent(new Event(event, { bubbles: true }));
    await pause();
  };
  // another item is unpacked and its picture decoded, in real time
  const moved = async (act) => {
    const before = one(".live").textContent;
    await act();
    await until(() => one(".live").textContent !== before);
  };
  const found = {};
  await until(() => one(".live")?.textContent);
  found.start = look();
  one(".token[aria-pressed=true]").focus();
  await key("ArrowRight"); found.right = look();
  found.focused = document.activeElement === one(".token[aria-pressed=true]");
  await key("ArrowLeft"); found.left = look();
  await key("ArrowDown"); found.down = look();
  await key("ArrowUp"); found.up = look();
  await key("]"); found.head = look();
  await key("["); found.mean = look();
  await key("?"); found.help = look();
  await moved(() => key("n")); found.next = look();
  await moved(() => key("p")); found.previous = look();
  await set("input[aria-label=layer]", 1, "input"); found.slider = look();
  await set("select[aria-label=head]", "3", "change"); found.picker = look();
  await set("input[aria-label='opacity of the map']", 0.1, "input"); found.faint = look();
  await set(".attention input[type=checkbox]", true, "change"); found.side = look();
  await set(".attention input[type=checkbox]", false, "change");
  const mass = one("canvas.mass"), box = mass.getBoundingClientRect();
  mass.dispatchEvent(new MouseEvent("click", { bubbles: true, clientX: box.right - 5, clientY: box.bottom - 8 }));
  await pause(); found.tapped = look();
  root.querySelectorAll(".tokens")[0].children[0].click(); await pause(); found.first = look();
  await set("input[type=search]", "no text has these words", "input"); found.nothing = look();
  await set("input[type=search]", "", "input");
  await set(".bar input[type=checkbox]", true, "change"); found.only = look();
  await set(".bar input[type=checkbox]", false, "change");
  await moved(() => { location.hash = "#look=2,3,0,1"; }); found.shared = look();
  await fetch("/found", { method: "POST", body: JSON.stringify(found) });
})();
</script></body>"""

MEASURE = """<script>
setTimeout(() => {
const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".table, pre, svg, .lens, .strip")
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "." + e.className);
const shown = [...document.querySelectorAll(".viewer button, .viewer select, .viewer input[type=search]")]
  .filter(e => e.getClientRects().length);
const small = shown.filter(e => e.getBoundingClientRect().height < 39.9 || e.getBoundingClientRect().width < 39.9)
  .map(e => e.textContent);
parent.postMessage({scroll: document.documentElement.scrollWidth, inner: innerWidth, wide, small, count: shown.length,
  canvas: document.querySelector("canvas.picture").getBoundingClientRect().width}, "*");
}, 1500);
</script></body>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Experiment(
        model=sl.VLM.organism(),
        dataset=load_dataset("emoji_scenes/captions").take(4),
        conditions={"baseline": [], "vhr": [HeadReinforcement(alpha=2.0)]},
        controls=False,
        viewer=4,
        n_resamples=100,
        output=tmp_path_factory.mktemp("browser") / "run",
        progress=False,
    ).run()
    return write_report(run.folder)


def copied(report: Path, tmp_path: Path, script: str) -> Path:
    """The page without its policy, with a script at its end that plays the reader."""
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text(encoding="utf-8"))
    copy = tmp_path / "report.html"
    copy.write_text(page.replace("</body>", script), encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def seen(report: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page looks like after each thing that the reader does."""
    folder = tmp_path_factory.mktemp("drive")
    found: dict[str, Any] = answer_of(copied(report, folder, DRIVE), "--window-size=1200,900")
    return found


def test_it_runs_under_its_policy_without_a_message(report: Path, tmp_path: Path) -> None:
    done = browse(tmp_path, "--enable-logging=stderr", "--dump-dom", report.as_uri())
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert 'class="live"' in done.stdout
    assert re.search(r'aria-live="polite">Item \d+, token \d+ of \d+', done.stdout)


def test_an_injected_script_is_refused(report: Path, tmp_path: Path) -> None:
    """The policy holds: the same page with one more script runs its own and not the other."""
    copy = tmp_path / "report.html"
    page = report.read_text(encoding="utf-8").replace("</body>", "<script>document.title = 'taken'</script></body>")
    copy.write_text(page, encoding="utf-8")
    done = browse(tmp_path, "--enable-logging=stderr", "--dump-dom", copy.as_uri())
    assert "<title>taken" not in done.stdout
    assert "Content Security Policy" in done.stderr
    assert re.search(r'aria-live="polite">Item \d+', done.stdout)


def test_keys_move_through_tokens_layers_heads_and_items(seen: dict[str, Any]) -> None:
    start = seen["start"]
    for change, parts in {
        "right": ("picture", "mass", "live", "lens", "hash"),
        "down": ("picture", "mass", "live", "hash", "layer"),
        "next": ("picture", "mass", "live", "lens", "words", "effects", "hash"),
    }.items():
        for part in parts:
            assert seen[change][part] != start[part], (change, part)
    for back in ("left", "up", "previous"):
        assert seen[back]["words"] == start["words"]
    assert {**seen["left"], "help": True} == start
    assert {**seen["up"], "help": True} == start
    assert seen["focused"]
    assert int(seen["down"]["layer"]) == int(start["layer"]) - 1


def test_keys_choose_heads_and_show_help(seen: dict[str, Any]) -> None:
    assert (seen["up"]["head"], seen["head"]["head"], seen["mean"]["head"]) == ("mean", "0", "mean")
    assert seen["head"]["picture"] != seen["mean"]["picture"]
    assert "head 0" in seen["head"]["live"]
    assert seen["mean"]["help"]
    assert not seen["help"]["help"]


def test_controls_change_the_picture(seen: dict[str, Any]) -> None:
    assert seen["slider"]["layer"] == "1"
    assert "layer 1" in seen["slider"]["live"]
    assert "layer 1, head 3" in seen["picker"]["live"]
    pictures = [seen[name]["picture"] for name in ("previous", "slider", "picker", "faint", "side")]
    assert len(set(pictures)) == len(pictures)


def test_a_tap_on_the_grid_picks_its_layer_and_head(seen: dict[str, Any]) -> None:
    assert "layer 5, head 7" in seen["tapped"]["live"]
    assert seen["first"]["live"].split("layer")[0] != seen["tapped"]["live"].split("layer")[0]
    assert "token 1 of" in seen["first"]["live"]


def test_signals_are_of_the_picked_object(seen: dict[str, Any]) -> None:
    assert "T-VHD" in seen["start"]["signals"]
    assert "Pick one" in seen["first"]["signals"]  # the first token names no object


def test_searching_and_filtering(seen: dict[str, Any]) -> None:
    assert seen["start"]["options"] == 4
    assert seen["nothing"]["options"] == 1  # which says that there is none
    assert 1 <= seen["only"]["options"] < 4


def test_a_shared_address_is_followed(seen: dict[str, Any]) -> None:
    shared = seen["shared"]
    assert shared["hash"] == "#look=2,3,0,1"
    assert "token 3 of" in shared["live"]
    assert "layer 0, head 1" in shared["live"]
    assert shared["words"] == seen["next"]["words"]


@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_overflows_and_targets_are_large(report: Path, tmp_path: Path, width: int) -> None:
    copy = copied(report, tmp_path, MEASURE)
    outer = tmp_path / "outer.html"
    listen = "<script>onmessage = e => document.getElementById('found').textContent = JSON.stringify(e.data)</script>"
    frame = f'<iframe src="{copy.as_uri()}" style="border:0;width:{width}px;height:1500px;display:block"></iframe>'
    outer.write_text(f'<!doctype html><body style="margin:0"><pre id="found"></pre>{listen}{frame}</body>')
    dom = browse(tmp_path, "--dump-dom", outer.as_uri()).stdout
    match = re.search(r'<pre id="found">(.+?)</pre>', dom)
    assert match is not None
    found = json.loads(unescape(match[1]))
    assert (found["inner"], found["scroll"]) == (width, width)
    assert found["wide"] == []
    assert found["small"] == []
    assert found["count"] > 10
    assert found["canvas"] > 250


def test_light_and_dark(report: Path, tmp_path: Path) -> None:
    means = {}
    for scheme, code in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{scheme}.png"
        browse(
            tmp_path,
            "--window-size=900,1400",
            f"--blink-settings=preferredColorScheme={code}",
            f"--screenshot={shot}",
            f"{report.as_uri()}#look=1,2,3,mean",
        )
        pixels = np.asarray(Image.open(shot).convert("L"))
        means[scheme] = float(np.median(pixels))
        assert np.ptp(pixels) > 150
    assert means["dark"] < 60
    assert means["light"] > 240
