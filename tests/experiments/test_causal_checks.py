"""Causal checks in a run: targets are chosen on other images, what is checked or not is said, and a killed run goes on."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from probes import HeadDivergence, RepresentationSimilarity
from slitlamp.decoding.edits import scale_heads
from slitlamp.errors import InputError
from slitlamp.experiments import Dataset, Experiment, Run, causal_checks
from slitlamp.experiments.causal_checks import OTHER, OWN, SAME, split
from slitlamp.experiments.datasets import Item
from slitlamp.models import Anatomy
from slitlamp.tracing import CausalTarget
from slitlamp.vlm import VLM

from .test_resume import contents, in_child

SEEN: list[tuple[str, list[str]]] = []


class Pointing(HeadDivergence):
    """A probe that points at a head and tells which items it had taken in."""

    name: ClassVar[str] = "pointing"
    __hash__ = None  # type: ignore[assignment]

    def causal_targets(self, anatomy: Anatomy) -> list[CausalTarget]:
        SEEN.append((self.name, sorted(self._get("group").tolist())))
        return [
            CausalTarget("head 0.0", lambda _: scale_heads([(0, 0)]), (lambda _: scale_heads([(1, 1)]),), "head 1.1")
        ]


class PointingAtItems(Pointing):
    """The same, of places in the items themselves."""

    name: ClassVar[str] = "pointing_at_items"
    targets_of: ClassVar[Literal["model", "items"]] = "items"
    __hash__ = None  # type: ignore[assignment]


class Helpless(Pointing):
    """A probe that cannot choose."""

    name: ClassVar[str] = "helpless"
    __hash__ = None  # type: ignore[assignment]

    def causal_targets(self, anatomy: Anatomy) -> list[CausalTarget]:
        raise InputError("too few of them")


def experiment(vlm: VLM, data: Dataset, output: Path, *probes: Any, **options: Any) -> Experiment:
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "batch_size": 2,
        "n_resamples": 100,
        "progress": False,
        "causal": True,
    }
    return Experiment(model=vlm, dataset=data, output=output, probes=list(probes), **{**settings, **options})


def items(*images: str) -> list[Item]:
    return [Item(str(number), Path("x.png"), "p", image) for number, image in enumerate(images)]


def test_targets_are_chosen_on_some_chunks_and_measured_on_images_of_the_others() -> None:
    ten = items(*"abcdefghij")
    assert split(ten, 2, 100) == ([2, 3, 4], [0, 1, 2, 3], OTHER)  # half of five chunks
    assert split(ten, 2, 3) == ([2, 3, 4], [0, 1, 2], OTHER)  # as many as are asked for
    assert split(ten, 2, 2) == ([1, 2, 3, 4], [0, 1], OTHER)
    assert split(ten, 10, 4) == ([0], [0, 1, 2, 3], SAME)  # a single chunk cannot be parted


def test_questions_about_an_image_of_the_other_chunks_are_left_out() -> None:
    assert split(items("a", "a", "a", "b", "b", "c", "c", "c"), 4, 8) == ([1], [0, 1, 2], OTHER)
    assert split(items(*"aaaaaa"), 3, 6) == ([0, 1], list(range(6)), SAME)


def test_a_run_says_of_every_probe_whether_its_finding_is_causal(vlm: VLM, captions: Dataset, tmp_path: Path) -> None:
    SEEN.clear()
    probes = [
        Pointing(n_resamples=50), PointingAtItems(n_resamples=50), Helpless(n_resamples=50),
        RepresentationSimilarity(measures=["cka"], n_permutations=1),
    ]  # fmt: skip
    run = experiment(vlm, captions, tmp_path / "run", *probes, causal=2).run()
    images = [str(one.image_id) for one in captions.items]
    assert [("pointing", sorted(images[2:])), ("pointing_at_items", sorted(images))] == SEEN
    said = {key: run.table(f"{key}_summary")["summary"][0] for key in run.environment["probes"]}
    assert "Causal check: Head 0.0: the next token changes by" in said["pointing"]
    assert said["pointing"].endswith("Targets were chosen on other images.")
    assert said["pointing_at_items"].endswith("Targets were chosen on each image itself.")
    assert said["helpless"].endswith("too few of them")
    assert "No causal check: nothing can be pointed at" in said["helpless"]
    assert "No causal check: how alike two layers" in said["representation_similarity"]
    table = run.table("pointing_causal")
    assert set(table["n_groups"]) == {2}
    assert set(table["chosen_on"]) == {OTHER}
    assert set(run.table("pointing_at_items_causal")["chosen_on"]) == {OWN}


def test_a_run_killed_during_its_causal_checks_goes_on_behind_the_finished_ones(
    vlm: VLM, captions: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at every file from the first causal table on, before or after it appears; never is a check done twice."""

    def one(name: str) -> Experiment:
        return experiment(vlm, captions, tmp_path / name, Pointing(n_resamples=50), PointingAtItems(n_resamples=50))

    one("undisturbed").run()
    expected = contents(tmp_path / "undisturbed")
    first = [path for path in expected if "causal" in path]
    assert len(first) == 2
    n_units = -(-len(captions) // 2)
    # config, environment, units, predictions, two states, then the causal tables
    at = 2 + n_units + 1 + 2 + 1
    assert in_child(one("killed").run, kill_at=at, before=False) == -signal.SIGKILL
    assert [path for path in contents(tmp_path / "killed") if "causal" in path] == ["tables/pointing_causal.parquet"]
    checked: list[str] = []
    ordinary = causal_checks._table

    def counted(*arguments: Any) -> Any:
        checked.append(arguments[2][0].name)
        return ordinary(*arguments)

    monkeypatch.setattr(causal_checks, "_table", counted)
    one("killed").run()
    assert len(checked) == 1
    assert contents(tmp_path / "killed") == expected
    assert Run(tmp_path / "killed").finished
