"""`write_report`: figures and one self-contained HTML page from a run folder, and from nothing else."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from slitlamp.experiments.storage import write_bytes
from slitlamp.reports import compose, findings, probe_sections, tables, verdicts, viewer
from slitlamp.reports.data import RunData
from slitlamp.reports.figures import FIGURES, RunFigure, run_figures, to_png, to_svg
from slitlamp.reports.metrics import DEFINITIONS, METRICS, is_pope, split_name
from slitlamp.reports.papers import run_findings
from slitlamp.reports.showcase import Scene, read_scenes
from slitlamp.reports.style import NARROW, WIDE
from slitlamp.reports.tables import Table
from slitlamp.reports.wording import count
from slitlamp.reports.words import coloured_words, words_legend

_TERMS: Final = {
    "verdicts": ("control", "matched recall", "interval"),
    "differences": ("VHR", "control", "interval"),
    "pope": ("POPE",),
    "chair": ("CHAIR",),
    "recall_curve": ("matched recall",),
    "head_divergence": ("VHD",),
    "t_vhd_histogram": ("T-VHD",),
}
"""The terms that are explained at the beginning of each section."""
_WHOLE_TABLES: Final = (
    *("verdicts", "verdict_controls", "interactions", "refused_pairs"),
    *("conditions", "differences", "matched_recall", "matched_differences", "pope_strict"),
)


@dataclass
class Section:
    """One section of the report: what the terms mean, a figure for pages and one for phones, its caption, what it shows."""

    name: str
    title: str
    terms: list[str]
    wide: str = ""
    narrow: str = ""
    size: tuple[int, int] = (0, 0)
    note: str = ""
    shows: list[str] = field(default_factory=list)
    scenes: list[dict[str, Any]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def write_report(run_folder: str | Path) -> Path:
    """Write `figures/*.svg`, `figures/*.png` and `report.html` of a run, from what its folder holds.

    The same folder gives the same bytes.

    Raises:
        RunFolderError: this is no run folder, or it cannot be written.
    """
    data = RunData(Path(run_folder))
    figures = run_figures(data)
    sections = [section for name, one in figures.items() if (section := _section(data, name, one)) is not None]
    _remove_figures(data, set(figures) - {section.name for section in sections})
    page = _environment().get_template("report.html.j2").render(_context(data, sections))
    path = data.folder / "report.html"
    write_bytes(path, page.encode())
    return path


def _remove_figures(data: RunData, names: set[str]) -> None:
    """Remove what an earlier version drew and this one has no data for."""
    for path in (data.folder / "figures").glob("*"):
        if path.stem in names and path.suffix in (".svg", ".png"):
            path.unlink()


def _section(data: RunData, name: str, one: RunFigure) -> Section | None:
    """Draw a figure, store it in the run folder, and set its section; None where the run has no data for it."""
    drawn = one.draw(data, WIDE)
    if drawn is None:
        return None
    svg = to_svg(drawn)
    write_bytes(data.folder / "figures" / f"{name}.svg", svg)
    write_bytes(data.folder / "figures" / f"{name}.png", to_png(drawn))
    terms = [DEFINITIONS[term].replace("{level}", data.level) for term in _TERMS.get(name, ()) if _applies(data, term)]
    section = Section(name, one.title, terms, note=one.note(data), shows=one.shows(data))
    if name == "verdicts":
        section.tables = verdicts.verdict_tables(data)
    draw = one.draw
    if name == "caption_words":
        section.scenes = [_scene(one) for one in read_scenes(data)]
        draw = compose.attention_maps
        maps = draw(data, WIDE)
        if maps is None:
            return section
        drawn, svg = maps, to_svg(maps)
    narrow = draw(data, NARROW)
    section.wide = _uri(svg, "image/svg+xml")
    section.narrow = section.wide if narrow is None else _uri(to_svg(narrow), "image/svg+xml")
    section.size = (round(drawn.get_figwidth() * 96), round(drawn.get_figheight() * 96))
    return section


def _applies(data: RunData, term: str) -> bool:
    """Whether a term plays a part in this run."""
    if term == "control":
        return any(one.role == "control" for one in data.conditions)
    return term != "VHR" or "HeadReinforcement" in data.config_text


def _gloss(data: RunData) -> str:
    """The words of the sentences at the top, for a reader who has never met them."""
    parts = []
    if findings.caption_datasets(data):
        parts.append(f"CHAIR_i is the {METRICS['chair_i'].meaning}.")
    if findings.pope_datasets(data):
        parts.append("POPE asks whether an object is in the image; accuracy is the share of right answers.")
    parts.append(
        f"Brackets hold {data.level} intervals of the paired difference to “{data.reference}” or to the control named."
    )
    return " ".join(parts)


def _scene(one: Scene) -> dict[str, Any]:
    """A scene of the showcase for the template."""
    picture = ""
    if one.image is not None:
        buffer = io.BytesIO()
        one.image.save(buffer, format="PNG")
        picture = _uri(buffer.getvalue(), "image/png")
    return {
        "image": picture,
        "prompt": one.prompt,
        "truth": one.truth,
        "words": coloured_words(one.words, one.caption),
        "legend": words_legend(one.words),
    }


def _context(data: RunData, sections: list[Section]) -> dict[str, Any]:
    title = data.config.get("title")
    return {
        "title": str(title) if title else data.folder.resolve().name,
        "style": Markup((resources.files("slitlamp.reports") / "templates" / "report.css").read_text(encoding="utf-8")),
        "facts": _facts(data),
        "conditions": data.conditions,
        "headline": [*probe_sections.headline(data), *(verdicts.headline(data) or findings.headline(data))],
        "gloss": _gloss(data),
        "tables": [one for one in (tables.headline_table(data), tables.control_table(data)) if one is not None],
        "viewer": _viewer(data),
        "papers": run_findings(data.folder),
        "sections": sections,
        "missing": [FIGURES[name].title for name in FIGURES if name not in {section.name for section in sections}],
        "level": data.level,
        "metrics": _metrics(data),
        "limits": _limits(data),
        "config": data.config_text or yaml.safe_dump({}),
        "environment": tables.facts(
            {key: value for key, value in data.environment.items() if key not in ("conditions", "finished")}
        ),
        "whole": [one for one in (tables.whole_table(data, name) for name in _WHOLE_TABLES) if one is not None],
    }


def _viewer(data: RunData) -> dict[str, Any] | None:
    """The viewer for the template, with its script, which alone the page lets run."""
    found = viewer.viewer_of(data)
    if found is None:
        return None
    own = {"script": viewer.script(), "script_source": viewer.script_source(), "style": viewer.style_sheet()}
    return {"data": found.data, "note": found.note, **own}


def _facts(data: RunData) -> list[tuple[str, str]]:
    """What the run was made with, for the top of the page."""
    model = data.fact("model") or _configured_model(data)
    found = [("model", str(model))] if model else []
    if data.fact("family"):
        found.append(
            ("architecture", f"{data.fact('family')}, {data.fact('n_layers')} layers of {data.fact('n_heads')} heads")
        )
    scores = data.table("conditions", "dataset")
    for name, rows in [] if scores is None else scores.groupby(scores["dataset"].astype(str), sort=False):
        if split_name(str(name)) == "all":
            continue
        parts = [
            count(rows[column].max(), noun)
            for column, noun in (("n_questions", "question"), ("n_images", "image"))
            if column in rows.columns and rows[column].notna().any()
        ]
        found.append((str(name), " on ".join(parts)))
    for key in ("seed", "device", "dtype"):
        value = data.fact(key) if data.fact(key) is not None else data.config.get(key)
        if value is not None:
            found.append((key, str(value)))
    versions = data.fact("versions")
    if isinstance(versions, dict):
        found.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return found


def _configured_model(data: RunData) -> str:
    model = data.config.get("model")
    return str(model.get("id", "")) if isinstance(model, dict) else str(model or "")


def _metrics(data: RunData) -> list[tuple[str, str]]:
    """The metrics of this run with their meanings."""
    scores = data.table("conditions", "metric")
    names = [] if scores is None else list(dict.fromkeys(scores["metric"].astype(str)))
    return [(METRICS[name].label, METRICS[name].meaning) for name in names if name in METRICS]


def _limits(data: RunData) -> list[str]:
    """What the numbers of this run cannot say."""
    limits = [
        f"Intervals are {data.level} percentile bootstraps over whole images (questions and mentions of one image "
        "stay together). They say how much the numbers would move with other images of the same kind; they say "
        "nothing about other models, prompts or data.",
        "Differences are paired: both sides see the same images. They are not corrected for the number of comparisons "
        "on this page, but for the p values that say so; read one of many that just excludes zero with care.",
    ]
    n = findings.fewest_images(data)
    if n is not None and n < findings.FEW_IMAGES:
        limits.insert(
            0,
            f"With {count(n, 'image')} this run shows what a report looks like, not what the model does: bootstrap "
            "intervals over so few images are too narrow.",
        )
    if data.fact("seed") is not None or "seed" in data.config:
        limits.append("This is one run with one seed of one model.")
    if not any(one.role == "control" for one in data.conditions):
        limits.append(
            "There is no control condition: an effect here cannot be told from that of any other change of the same "
            "size."
        )
    if findings.pope_datasets(data) and any(is_pope(name) for name in findings.pope_datasets(data)):
        limits.append(
            "POPE answers are read by the official rule (everything that is not no, No or not in the first sentence "
            "counts as yes); the strict reading stands in the table pope_strict. A yes/no question is an easier task "
            "than a caption, and agreement is not understanding."
        )
    if findings.caption_datasets(data):
        limits.append(
            "CHAIR knows only the objects on its list and their synonyms. A low CHAIR_i with a low recall is no "
            "success: see the comparison at equal recall."
        )
    if data.probe_table("heads", "layer", "head", "vhd") is not None:
        limits.append(
            "VHD compares with a run without the image; how the image is removed, and at which word VHD is measured, "
            "changes the ranking of heads. VHD and T-VHD are correlates: a high value does not show that a head causes "
            "the word."
        )
    return limits


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("slitlamp.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
