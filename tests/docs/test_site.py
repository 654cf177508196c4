"""The site is built, whole, complete, and asks the network for nothing."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer
import yaml
from browser import browse, needs_chromium
from documents import ROOT, intervals, rounds_to, text_of
from mkdocs.commands.build import build
from mkdocs.config import load_config

import interventions
import probes
import slitlamp
from slitlamp.cli import app
from slitlamp.experiments.config import Config, DatasetConfig, ModelConfig
from slitlamp.models.families import families_table
from slitlamp.tracing.sites import SITES

LOOK = """<script>
const found = {};
const frames = [...document.querySelectorAll("iframe")];
setInterval(() => {
  for (const frame of frames) {
    const inside = frame.contentDocument;
    found[frame.title] = {
      wide: inside.documentElement.scrollWidth,
      network: frame.contentWindow.performance.getEntriesByType("resource")
        .map(e => e.name).filter(n => !/^(file|data):/.test(n)),
      results: [...inside.querySelectorAll(".md-search-result__item h1")].map(e => e.textContent),
    };
  }
  document.getElementById("found").textContent = JSON.stringify(found);
}, 500);
</script>"""
LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "video": "src", "audio": "src"}


class Page(HTMLParser):
    """What a page links to, what it loads, and the names of its places."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.ids |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "link" and found.get("rel") not in ("next", "prev", "canonical"):
            self.loads.append(found["href"])
        if tag in LOADED and found.get(LOADED[tag]):
            self.loads.append(found[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning ends the build, as in `make docs`."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


@pytest.fixture(scope="module")
def built(site: Path) -> dict[str, Page]:
    """Every page by its path in the site."""
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def test_links_lead_somewhere(site: Path, built: dict[str, Page]) -> None:
    broken = []
    for name, page in built.items():
        if name == "404.html":  # its links are from the root of a server
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            goal = (site / name).parent / unquote(parts.path) if parts.path else site / name
            if goal.is_dir():
                goal /= "index.html"
            known = built.get(goal.resolve().relative_to(site.resolve()).as_posix()) if goal.exists() else None
            if not goal.exists() or (parts.fragment and known and unquote(parts.fragment) not in known.ids):
                broken.append(f"{name}: {link}")
    assert broken == []
    assert sum(len(page.links) for page in built.values()) > 500


def test_what_is_loaded_is_there(site: Path, built: dict[str, Page]) -> None:
    for name, page in built.items():
        if name != "404.html":
            missing = [one for one in page.loads if not ((site / name).parent / unquote(urlsplit(one).path)).exists()]
            assert missing == [], name
    assert (site / "search/search_index.js").exists(), "what the search reads on pages opened as files"


def test_nothing_is_loaded_from_elsewhere(site: Path, built: dict[str, Page]) -> None:
    for name, page in built.items():
        assert [one for one in page.loads if urlsplit(one).netloc or urlsplit(one).scheme not in ("", "data")] == [], (
            name
        )
        assert 'class="mermaid"' not in page.text, f"{name}: the theme would load mermaid from the network"
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", path.read_text(encoding="utf-8")), path


def test_every_public_name_has_an_entry(built: dict[str, Page]) -> None:
    ids = set().union(*(page.ids for name, page in built.items() if name.startswith("reference/")))
    wanted = {f"probes.{name}" for name in probes.__all__} | {f"interventions.{name}" for name in interventions.__all__}
    for name in slitlamp.__all__:
        module, attribute = slitlamp._LAZY.get(name, (None, None))
        wanted |= {f"{module}.{attribute}"} if attribute else set()
        assert f"<code>sl.{name}</code>" in built["reference/slitlamp.html"].text, name
    assert wanted - ids == set()
    assert len(wanted) > 45
    assert [one for one in SITES if f"<code>{one}</code>" not in built["reference/sites.html"].text] == []


def test_every_key_and_command_has_an_entry(built: dict[str, Page]) -> None:
    keys = built["reference/configuration.html"].text
    for model in (Config, ModelConfig, DatasetConfig):
        assert [key for key in model.model_fields if f"<td><code>{key}</code></td>" not in keys] == []
    page = built["reference/cli.html"]
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert name in page.ids
        written = [one for parameter in command.params for one in parameter.opts if one.startswith("--")]
        assert [one for one in written if one not in page.text] == [], name


def test_every_probe_says_what_it_cannot_claim() -> None:
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text_of("docs/explanation/probes.md"), re.M | re.S))
    assert sorted(sections) == sorted(probes.__all__)
    parts = (
        "Question.",
        "Measure.",
        "A positive result means",
        "It does not mean",
        "Control.",
        "Calibration.",
        "Known pitfalls.",
    )
    for name, text in sections.items():
        assert [part for part in parts if f"**{part}**" not in text] == [], name


def test_every_intervention_has_its_pitfalls_and_results() -> None:
    text = text_of("docs/explanation/interventions.md")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    assert sorted(sections) == sorted(interventions.__all__)
    given = yaml.safe_load((ROOT / "experiments" / "interventions.yaml").read_text(encoding="utf-8"))["conditions"]
    for name, section in sections.items():
        parts = ("**Claims.**", "**Does here.**", "**Traps.**", "**Our controls showed.**")
        assert [part for part in parts if part not in section] == [], name
        conditions = [key for key, components in given.items() if components and name in components[0]]
        (shown,) = re.findall(r"<!-- generated: verdict ([\w ]+) -->", section)
        assert sorted(shown.split()) == sorted(conditions), name
        for experiment in re.findall(r"experiments/results/(dose_\w+)", section):
            assert (ROOT / "experiments" / "results" / experiment).is_dir(), experiment


@pytest.mark.parametrize("page", ["docs/explanation/probes.md", "docs/tutorial/measure.md", "docs/how-to/reproduce.md"])
def test_quoted_intervals_are_those_of_the_results(page: str) -> None:
    """Every `value [low, high]` in a paragraph that names an experiment is in what that experiment published."""
    checked = 0
    prose = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)
    for part in re.split(r"\n\n|^- ", prose, flags=re.M):
        names = [one for one in re.findall(r"[`/](\w+)`", part) if (ROOT / "experiments/results" / one).is_dir()]
        if not names:
            assert list(intervals(part)) == [], f"{page}: which experiment found this? {part[:80]}"
            continue
        published = [
            found
            for name in names
            for found in intervals((ROOT / "experiments/results" / name / "README.md").read_text(encoding="utf-8"))
        ]
        for quoted in intervals(part):
            near = [all(rounds_to(full, shown) for full, shown in zip(one, quoted, strict=True)) for one in published]
            assert any(near), f"{page}: {quoted} is not in the results of {names}"
            checked += 1
    assert checked


def test_the_page_on_interventions_names_them_all() -> None:
    table = "".join(line for line in text_of("docs/interventions.md").splitlines() if line.startswith("|"))
    assert [name for name in interventions.__all__ if f"`{name}`" not in table] == []


def test_readme_table_of_families_is_that_of_the_entries(built: dict[str, Page]) -> None:
    assert families_table() in text_of("README.md")
    assert built["families.html"].text.count("<tr>") == len(families_table().splitlines()) - 1


def test_links_of_the_documents_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text_of(name)):
            assert (ROOT / target).exists(), f"{name} links to {target}"


@pytest.mark.slow
@needs_chromium
def test_pages_opened_as_files_fit_a_telephone_and_are_searched(site: Path, tmp_path: Path) -> None:
    shown = {
        "tutorial": "tutorial/measure.html",
        "families": "families.html",
        "probes": "reference/probes.html",
        "pitfalls": "explanation/interventions.html",
        "search": "index.html?q=matched+recall",
    }
    frames = "".join(
        f'<iframe title="{title}" src="{site.as_uri()}/{page}" style="width:360px;height:800px"></iframe>'
        for title, page in shown.items()
    )
    outer = tmp_path / "outer.html"
    outer.write_text(f'<!doctype html><body><pre id="found"></pre>{frames}{LOOK}</body>')
    dom = browse(tmp_path, "--dump-dom", outer.as_uri()).stdout
    text = re.findall(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[0]
    found = json.loads(unescape(text))
    assert set(found) == set(shown)
    assert {title: one["wide"] for title, one in found.items() if one["wide"] > 360} == {}
    assert [one["network"] for one in found.values() if one["network"]] == []
    assert "Compare at matched recall" in found["search"]["results"]
