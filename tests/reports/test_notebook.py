"""What Jupyter shows of generations, traces, probe results and runs: bounded, escaped, never an error."""

from __future__ import annotations

import base64
import json
import re
import zlib
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from tiny_models import BUILDERS
from tiny_models.common import random_image

import slitlamp as sl
from probes import HeadDivergence
from slitlamp import reporters
from slitlamp.decoding import Generation
from slitlamp.errors import UnsupportedError
from slitlamp.experiments import Run
from slitlamp.reports import notebook, viewer
from slitlamp.tracing import ProbeResult, Trace, sites
from slitlamp.vlm import VLM

VOID = {"img", "meta", "br", "hr", "input", "link", "col"}


class Balanced(HTMLParser):
    """Whether every element that is opened is closed, in order; and the texts between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(html: str | None) -> Balanced:
    assert html is not None
    found = Balanced(html)
    assert found.open == []
    assert "script" not in found.tags  # one may stand in a frame's attribute, never in the notebook's page
    return found


@pytest.fixture(scope="module")
def organism() -> VLM:
    return sl.VLM.organism()


@pytest.fixture(scope="module")
def made(organism: VLM) -> tuple[Generation, Trace]:
    scenes = sl.load_dataset("emoji_scenes/captions").take(10)
    batch = organism.encode([one.image for one in scenes.items], [one.prompt for one in scenes.items])
    with organism.trace(
        sites.attention(queries="last", keys="image"), sites.resid_post(layers=[0, 1, 4], positions="last")
    ) as trace:
        generation = organism.generate(batch, max_new_tokens=12)
    return generation, trace


def framed(html: str) -> tuple[str, dict[str, Any]]:
    """The page of the frame in a display, and the data of its viewer."""
    (source,) = re.findall(r'srcdoc="([^"]*)"', html)
    page = unescape(source)
    (data,) = re.findall(r'id="viewer-data">(.*?)</script>', page, flags=re.S)
    content: dict[str, Any] = json.loads(data)
    return page, content


def unpacked(text: str) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    raw = zlib.decompress(base64.b64decode(text))
    length = int.from_bytes(raw[:4], "little")
    head = json.loads(raw[4 : 4 + length])
    arrays = {
        one["name"]: np.frombuffer(raw, one["type"], int(np.prod(one["shape"])), 4 + length + one["start"]).reshape(
            one["shape"]
        )
        for one in head["arrays"]
    }
    return head, arrays


def test_a_generation_shows_pictures_and_texts(made: tuple[Generation, Trace]) -> None:
    generation, _ = made
    html = generation._repr_html_()
    found = checked(html)
    assert found.tags.count("img") == notebook.MOST_ITEMS == 8
    for text in generation.texts[:8]:
        assert text in found.text
    assert "2 more are not shown" in found.text
    assert "cut off at the limit" in found.text
    assert html is not None
    assert len(html) < notebook.MOST_BYTES


def test_what_a_model_wrote_is_escaped(made: tuple[Generation, Trace]) -> None:
    generation, _ = made
    nasty = "<script>alert(1)</script>&"
    one = Generation(generation.batch.prompt_only(), ((7,),), (nasty,), (((0, len(nasty)),),), (True,))
    found = checked(one._repr_html_())
    assert nasty in found.text


def test_a_trace_lists_its_recordings(made: tuple[Generation, Trace]) -> None:
    found = checked(made[1]._repr_html_())
    assert "attention" in found.text
    assert "0-1, 4" in found.text
    assert "batch, head, query, key" in found.text
    assert f"{made[1].nbytes() / 1e6:.1f} MB" in found.text
    assert "2 more rows not shown" in found.text


def test_the_viewer_of_a_trace_holds_its_attention(made: tuple[Generation, Trace]) -> None:
    html = notebook.trace_html(made[1])
    assert len(html) < notebook.MOST_BYTES
    page, data = framed(html)
    assert 'sandbox="allow-scripts"' in html
    assert viewer.script_source() in page
    assert str(viewer.script()) in page
    assert len(data["items"]) == 8
    head, arrays = unpacked(data["items"][1]["data"])
    weights = made[1]["attention"]
    wanted = torch.stack([weights[layer][1] for layer in weights.layers]).permute(2, 0, 1, 3).numpy()
    wanted = wanted[: len(head["tokens"])]
    assert head["detail"] in ("all", "mean")
    found = arrays["mean"] / 255 * arrays["mean_max"][..., None]
    assert np.abs(found - wanted.mean(axis=2)).max() <= wanted.max() / 255 / 2 + 1e-6
    assert made[1].generated == made[0].tokens
    assert [name for _, name in head["tokens"]][:3] == made[0].texts[1].split()[:3]


def test_a_teacher_forced_trace_names_its_tokens(organism: VLM, made: tuple[Generation, Trace]) -> None:
    generation, _ = made
    with organism.trace(sites.attention(queries="before_generated", keys="image", layers=[3])) as trace:
        organism.forward(generation.teacher_forced())
    _, data = framed(notebook.trace_html(trace))
    for row, one in enumerate(data["items"]):
        head, _ = unpacked(one["data"])
        assert " ".join(name for _, name in head["tokens"]).replace(" </s>", "").replace(" .", ".") == generation.texts[
            row
        ].replace(" ,", ",").replace(",", " ,")
        assert head["attention_layers"] == [3]


@pytest.mark.parametrize(
    "site",
    [
        sites.attention(queries="last", keys="image", reduce_keys="sum"),
        sites.attention(queries="last", keys="all"),
        sites.logits(),
        sites.vision_attention(),
    ],
)
def test_other_recordings_have_no_frame(site: Any, organism: VLM, made: tuple[Generation, Trace]) -> None:
    with organism.trace(site) as trace:
        organism.forward(made[0].batch)
    html = notebook.trace_html(trace)
    assert "iframe" not in checked(html).tags
    assert "cannot be shown" not in html


def test_means_over_heads_are_shown(organism: VLM, made: tuple[Generation, Trace]) -> None:
    with organism.trace(sites.attention(queries="last", keys="image", reduce_heads="mean")) as trace:
        organism.forward(made[0].batch)
    _, data = framed(notebook.trace_html(trace))
    head, arrays = unpacked(data["items"][0]["data"])
    assert head["detail"] == "mean"
    assert arrays["mass"].shape[-1] == 1
    assert [name for _, name in head["tokens"]] == ["after the prompt"]


@pytest.mark.parametrize(("family", "kind"), [("mllama", "grid"), ("blip-2", "tokens"), ("llava_next", "grid")])
def test_families(family: str, kind: str) -> None:
    vlm = BUILDERS[family]()
    own = vlm.anatomy.family
    text = "describe this image"
    if own.placeholder is not None and not own.images_first:
        text = f"{getattr(vlm.processor, own.placeholder)} {text}"
    batch = vlm.encode([random_image(0)], [text], chat=False)
    site = sites.cross_attention() if own.cross is not None else sites.attention()
    with vlm.trace(site) as trace:
        vlm.generate(batch, max_new_tokens=3)
    html = notebook.trace_html(trace)
    assert "cannot be shown" not in html
    head, _ = unpacked(framed(html)[1]["items"][0]["data"])
    assert head["kind"] == kind


def test_a_trace_that_has_not_run(organism: VLM) -> None:
    with organism.trace(sites.logits()) as trace:
        pass
    assert "Nothing has run yet" in checked(trace._repr_html_()).text


def test_a_probe_result_shows_summary_figures_and_tables(organism: VLM, made: tuple[Generation, Trace]) -> None:
    probe = HeadDivergence(n_resamples=100)
    organism.measure(probe, made[0].teacher_forced())
    result = probe.result()
    found = checked(result._repr_html_())
    assert result.summary in found.text
    assert found.tags.count("img") == len(result.figures()) > 0
    assert found.tags.count("details") == len(result.tables)
    assert "The first 20 of 48 rows" in found.text


def test_a_display_never_raises_and_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ProbeResult) -> dict[str, Figure]:
        raise RuntimeError("<b>no memory</b>")

    monkeypatch.setattr(ProbeResult, "figures", broken)
    found = checked(ProbeResult("x", {}, "A sentence.")._repr_html_())
    assert "A sentence." in found.text
    assert "The rest cannot be shown: RuntimeError: <b>no memory</b>" in found.text


def test_a_display_is_bounded() -> None:
    wide = pd.DataFrame({f"column {i}": ["x" * 2000] * 20 for i in range(10)})
    html = ProbeResult("x", {f"t{i}": wide for i in range(20)}, "Large.")._repr_html_()
    found = checked(html)
    assert html is not None
    assert len(html) < 1.05 * notebook.MOST_BYTES
    assert re.search(r"\d+ parts left out", found.text)


def test_a_run_says_what_it_found_and_where_its_report_is(organism: VLM, tmp_path: Path) -> None:
    data = sl.load_dataset("emoji_scenes/captions").take(2)
    run = sl.Experiment(organism, data, output=tmp_path / "run", n_resamples=100, progress=False).run()
    found = checked(run._repr_html_())
    assert "(finished)" in found.text
    assert "baseline on emoji_scenes/captions: CHAIR_i" in found.text
    assert found.tags.count("details") == len(run.table_names)
    assert "No report yet" in found.text
    (run.folder / "report.html").touch()
    assert f"Report: {run.folder / 'report.html'}" in checked(run._repr_html_()).text


def test_a_run_that_has_not_ended_says_so(demo_run: Path) -> None:
    """The made-up run has no entry that it has finished."""
    assert "not finished: run it again" in checked(Run(demo_run)._repr_html_()).text


def test_without_a_reporter_the_text_is_shown(monkeypatch: pytest.MonkeyPatch, made: tuple[Generation, Trace]) -> None:
    monkeypatch.setattr(reporters.metadata, "entry_points", lambda **_: ())
    assert made[0]._repr_html_() is None
    assert made[1]._repr_html_() is None
    assert ProbeResult("x", {}, "y")._repr_html_() is None
    with pytest.raises(UnsupportedError, match="'report'"):
        reporters.reporter("report")
