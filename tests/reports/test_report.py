from __future__ import annotations

import html.parser
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from slitlamp.errors import RunFolderError
from slitlamp.reports import FIGURES, write_report
from slitlamp.reports.data import RunData

NASTY = (
    "<script>alert(1)</script>",
    "vhr \"x2\" & 'y' $\\alpha_{$",
    "a very long name of a condition that does not fit anywhere at all",
    "условие ünïcode",
)
VOID = {"meta", "img", "source", "br", "link"}


class Page(html.parser.HTMLParser):
    """Elements, attributes and text of a page; every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.tags if "id" in attributes}


def read(run: Path) -> tuple[str, Page]:
    page = write_report(run).read_text(encoding="utf-8")
    return page, Page(page)


@pytest.fixture(scope="module")
def report(demo_run: Path) -> tuple[str, Page]:
    return read(demo_run)


def test_every_figure_is_written_and_inlined(demo_run: Path, report: tuple[str, Page]) -> None:
    page, parsed = report
    for name, one in FIGURES.items():
        assert (demo_run / "figures" / f"{name}.svg").stat().st_size > 1000
        assert Image.open(demo_run / "figures" / f"{name}.png").width > 1200
        assert one.title in parsed.text
        assert name in parsed.ids()
    assert page.count("<figure>") == len(FIGURES)


def test_order_of_the_report(report: tuple[str, Page]) -> None:
    _, parsed = report
    titles = ["In short", "Contents", "Conditions", *(one.title for one in FIGURES.values()), "How to reproduce this"]
    body = parsed.text[parsed.text.rindex("Contents") :] if parsed.text.count("Contents") > 1 else parsed.text
    places = [body.rindex(title) for title in titles if title not in ("In short", "Contents")]
    assert places == sorted(places)


def test_contents_lead_to_sections(report: tuple[str, Page]) -> None:
    _, parsed = report
    targets = [str(attributes["href"]) for tag, attributes in parsed.tags if tag == "a"]
    assert len(targets) == len(FIGURES) + 3
    assert all(target[0] == "#" and target[1:] in parsed.ids() for target in targets)


def test_the_page_is_self_contained(report: tuple[str, Page]) -> None:
    page, parsed = report
    for tag, attributes in parsed.tags:
        assert tag not in {"script", "link", "iframe", "object"}
        for name in ("src", "srcset", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#"))
        assert not any(name.startswith("on") for name in attributes)
    outside = re.sub(r"data:image/[^\"]*", "", page)
    assert not re.search(r"https?://|url\(|@import", outside)
    assert "default-src 'none'" in page


def test_every_picture_has_words_beside_it(report: tuple[str, Page]) -> None:
    _, parsed = report
    assert all(attributes.get("alt") for tag, attributes in parsed.tags if tag == "img")


def test_numbers_of_the_tables_are_on_the_page(report: tuple[str, Page]) -> None:
    _, parsed = report
    text = parsed.text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")
    assert ".242 [.214, .270]" in text
    assert "Δ -.046 [-.066, -.026]" in text
    assert "“vhr” lowers CHAIR_i by .046 [-.066, -.026]." in text
    assert "the difference between the two, -.013 [-.033, +.007], is not distinguishable from zero" in text
    for fact in ("slitlamp/organism-seed0", "torch 2.9.0", "1,500 questions on 250 images", "what vhr_least does"):
        assert fact in text


def test_each_term_is_explained(report: tuple[str, Page]) -> None:
    _, parsed = report
    for start in ("POPE asks yes/no questions", "CHAIR counts hallucinated", "VHD (vision-aware", "T-VHD of a word is"):
        assert start in parsed.text


def test_the_same_folder_gives_the_same_bytes(demo_run: Path, report: tuple[str, Page], tmp_path: Path) -> None:
    copy = tmp_path / "demo"
    shutil.copytree(demo_run, copy)
    shutil.rmtree(copy / "figures")
    assert write_report(copy).read_text(encoding="utf-8") == report[0]
    for path in (demo_run / "figures").iterdir():
        assert (copy / "figures" / path.name).read_bytes() == path.read_bytes()


def test_all_that_others_wrote_is_escaped(make_run: Callable[..., Path]) -> None:
    run = make_run(NASTY)
    items = pd.read_parquet(run / "tables" / "showcase_items.parquet")
    items["prompt"], items["caption"] = NASTY[0], "<img src=x onerror=alert(2)>"
    items["truth"] = [["<b>dog</b>"]]
    items.to_parquet(run / "tables" / "showcase_items.parquet")
    words = pd.read_parquet(run / "tables" / "showcase_words.parquet").head(2)
    words["word"], words["start"], words["end"] = ["<img src=x onerror=alert(2)>", "b"], [0, 28], [28, 28]
    words["label"] = ["object", "<i>"]
    words.to_parquet(run / "tables" / "showcase_words.parquet")
    (run / "config.yaml").write_text("title: </style></title><script>alert(3)</script>\nmodel: '<u>x</u>'\n")
    environment = {"model": "<u>x</u>", "versions": {"<u>": "<u>"}, "list": ["<u>"]}
    (run / "environment.json").write_text(json.dumps(environment))
    page, parsed = read(run)
    assert not {"script", "u", "b", "i"} & {tag for tag, _ in parsed.tags}
    assert "alert(1)" in parsed.text
    assert "alert(2)" in parsed.text
    assert all("onerror" not in attributes for _, attributes in parsed.tags)
    assert page.count("<style>") == page.count("</style>") == 1
    for name in NASTY:
        assert name in parsed.text


@pytest.mark.parametrize(
    ("names", "without", "absent", "present"),
    [
        (("baseline",), (), ["differences"], ["chair", "pope"]),
        (
            ("baseline", "vhr"),
            ("head_divergence", "showcase"),
            ["head_divergence", "t_vhd_histogram", "caption_words"],
            ["chair"],
        ),
        (("baseline", "vhr"), ("chair", "recall", "matched", "showcase"), ["mention_index", "recall_curve"], ["pope"]),
        (("baseline", "vhr"), ("conditions", "differences"), ["chair", "pope", "differences"], ["recall_curve"]),
        (("baseline", "vhr"), ("",), list(FIGURES), []),
    ],
)
def test_a_run_without_some_of_the_data(
    make_run: Callable[..., Path],
    names: tuple[str, ...],
    without: tuple[str, ...],
    absent: list[str],
    present: list[str],
) -> None:
    run = make_run(names, without)
    _, parsed = read(run)
    assert not set(absent) & parsed.ids()
    assert set(present) <= parsed.ids()
    for name in absent:
        assert FIGURES[name].title in parsed.text[parsed.text.index("Not measured in this run") :]


def test_scores_that_are_not_defined_are_dashes(make_run: Callable[..., Path]) -> None:
    run = make_run()
    scores = pd.read_parquet(run / "tables" / "conditions.parquet")
    scores.loc[scores["metric"] == "chair_i", ["value", "low", "high"]] = np.nan
    scores.loc[scores["metric"] == "accuracy", ["low", "high"]] = np.nan
    scores.to_parquet(run / "tables" / "conditions.parquet")
    _, parsed = read(run)
    assert "nan" not in parsed.text.lower().replace("finance", "")
    assert "CHAIR_i of “baseline” is not defined here" in parsed.text
    assert "chance (.500) cannot be ruled out" in parsed.text


def test_conditions_are_inferred_without_a_list_of_them(make_run: Callable[..., Path]) -> None:
    data = RunData(make_run(without=("condition_info",)))
    assert [(one.name, one.role, one.control_of) for one in data.conditions] == [
        ("baseline", "reference", None),
        ("vhr", "treatment", None),
        *((name, "control", "vhr") for name in ("vhr_random", "vhr_least", "vhr_all")),
    ]


def test_images_outside_of_the_run_folder_are_not_read(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    data = RunData(run)
    assert data.image("showcase/scene.png") is not None
    assert data.image("../secret.png") is None
    assert data.image(str(tmp_path / "secret.png")) is None


def test_what_is_no_run_folder_is_refused(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    with pytest.raises(RunFolderError, match="no run folder"):
        write_report(tmp_path / "nothing")
    with pytest.raises(RunFolderError, match=r"neither tables/ nor config\.yaml"):
        write_report(tmp_path)
    run = make_run()
    environment = (run / "environment.json").read_text()
    (run / "environment.json").write_text('{"finished": false}')
    with pytest.raises(RunFolderError, match="has not ended"):
        write_report(run)
    (run / "environment.json").write_text(environment)
    (run / "tables" / "conditions.parquet").write_bytes(b"no parquet")
    with pytest.raises(RunFolderError, match=r"conditions\.parquet"):
        write_report(run)


def test_few_images_are_said_to_be_too_few(make_run: Callable[..., Path]) -> None:
    run = make_run(without=("head_divergence", "showcase", "recall_curve", "chair_mentions"))
    scores = pd.read_parquet(run / "tables" / "conditions.parquet")
    assert "too few for any conclusion" not in read(run)[1].text
    scores.assign(n_images=4).to_parquet(run / "tables" / "conditions.parquet")
    assert "Only 4 images: too few for any conclusion" in read(run)[1].text


def test_the_folder_of_a_papers_figure_says_what_the_paper_found_and_keeps_no_old_figure(
    demo_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "vhd_fig3_t_vhd"
    shutil.copytree(demo_run, run)
    (run / "figures").mkdir(exist_ok=True)
    for name in ("skipped_operations.png", "mine.png"):
        (run / "figures" / name).write_bytes(b"")
    page = write_report(run).read_text(encoding="utf-8")
    kept = {path.name for path in (run / "figures").iterdir()}
    assert "skipped_operations.png" not in kept
    assert {"mine.png", "chair.png"} <= kept
    assert "Beside the paper" in page
    assert "T-VHD is lower for hallucinated" in page
    assert "Beside the paper" not in write_report(demo_run).read_text(encoding="utf-8")
