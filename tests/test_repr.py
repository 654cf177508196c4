"""What a notebook or a prompt shows of an object: short, and what one wants to know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import slitlamp as sl
from interventions import HeadReinforcement
from probes import HeadDivergence
from slitlamp.tracing import sites
from slitlamp.tracing.sites import SITES
from slitlamp.vlm import VLM


@pytest.mark.parametrize(
    ("site", "written"),
    [
        (sites.resid_post(), "resid_post()"),
        (sites.resid_post(layers=[2, 4], positions="image", reduce="mean"),
         "resid_post(layers=[2, 4], positions='image', reduce='mean')"),
        (sites.attention(), "attention()"),
        (sites.attention(queries="generated", keys="all", label="map"),
         "attention(queries='generated', keys='all', label='map')"),
        (sites.vision_attention(), "vision_attention()"),
        (sites.cross_attention(layers=3), "cross_attention(layers=[3])"),
        (sites.logits(), "logits()"),
        (sites.logits(positions="all"), "logits(positions='all')"),
        (sites.projector_out(), "projector_out()"),
    ],
)  # fmt: skip
def test_a_site_is_shown_as_it_is_written(site: sites.Site, written: str) -> None:
    assert repr(site) == written
    assert eval(f"sites.{written}") == site


def test_a_site_of_given_positions_does_not_print_them() -> None:
    assert "bool" in repr(sites.z(positions=torch.ones(1, 3, dtype=torch.bool)))


def test_objects_are_shown_in_a_few_lines(organism: VLM, tmp_path: Path) -> None:
    data = sl.load_dataset("emoji_scenes/captions").take(2)
    batch = organism.encode(images=[data.items[0].image], prompts=[data.items[0].prompt])
    experiment = sl.Experiment(
        model=organism,
        dataset=data,
        conditions={"baseline": [], "vhr": [HeadReinforcement()]},
        probes=[HeadDivergence()],
    )
    shown = {
        "anatomy": repr(organism.anatomy),
        "family": repr(organism.anatomy.family),
        "data": repr(data),
        "truth": repr(data.truth),
        "synonyms": repr(data.synonyms),
        "patches": repr(batch.patches[0]),
        "experiment": repr(experiment),
    }
    assert max(map(len, shown.values())) < 1200
    assert "6 layers of 8 heads x 24" in shown["anatomy"]
    assert "vision_attention" in shown["anatomy"]
    assert shown["family"] == "Family(LLaVA-1.5, model_type llava)"
    assert "captions, 2 items on 2 images" in shown["data"]
    assert shown["patches"] == "Patches(64 tokens; image 0: 8 x 8)"
    assert "condition vhr: HeadReinforcement(" in shown["experiment"]
    assert "condition baseline: the model as it is" in shown["experiment"]


def test_tab_completion_shows_what_is_public(organism: VLM) -> None:
    assert dir(sl) == sorted(sl.__all__)
    assert set(SITES) <= set(dir(sl.sites))
    assert "np" not in dir(sl.sites)
    data = sl.load_dataset("emoji_scenes/captions").take(1)
    batch = organism.encode(images=[data.items[0].image], prompts=[data.items[0].prompt])
    with organism.trace(sites.z(layers=0, label="heads"), sites.attention()) as trace:
        organism.forward(batch)
    assert trace._ipython_key_completions_() == ["heads", "attention"]
    assert trace.steps[0]._ipython_key_completions_() == ["heads", "attention"]
