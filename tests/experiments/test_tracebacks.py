"""Predictions count where decoding went back, in runs in which it may, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from interventions import TruthfulPreIntervention
from slitlamp.experiments import Dataset, Experiment
from slitlamp.experiments.folder import Unit
from slitlamp.experiments.runner import Runner
from slitlamp.tracing import sites
from slitlamp.vlm import VLM


@pytest.fixture(scope="module")
def often(vlm: VLM, captions: Dataset) -> TruthfulPreIntervention:
    """Above its threshold are about half of the steps of what the model says."""
    direction = torch.randn(vlm.anatomy.d_model, generator=torch.Generator().manual_seed(0))
    with vlm.trace(sites.resid_post([1], "before_generated")) as trace:
        vlm.generate(captions.encode(vlm, captions.items), max_new_tokens=12)
    scores = (trace["resid_post"][1] @ direction).flatten().tolist()
    probe = {"direction": direction.tolist(), "intercept": 0.0, "layer": 1, "true_scores": scores}
    return TruthfulPreIntervention(probe, fpr=0.5, steps="every")


def experiment(vlm: VLM, data: Dataset, output: Path, method: TruthfulPreIntervention, **options: Any) -> Experiment:
    return Experiment(
        model=vlm,
        dataset=data,
        conditions={"baseline": [], "back": [method]},
        max_new_tokens=12,
        batch_size=2,
        n_resamples=100,
        output=output,
        progress=False,
        **options,
    )


def test_tracebacks_are_counted(vlm: VLM, captions: Dataset, tmp_path: Path, often: TruthfulPreIntervention) -> None:
    found = experiment(vlm, captions, tmp_path / "run", often, perplexity=True).run().predictions
    with vlm.apply(often):
        generation = vlm.generate(captions.encode(vlm, captions.items), max_new_tokens=12)
    wanted = [sum(not one.capped for one in log) for log in generation.tracebacks]
    assert sum(wanted) > 3
    by_condition = found.groupby("condition")["tracebacks"]
    assert by_condition.get_group("back").tolist() == wanted
    assert by_condition.get_group("baseline").tolist() == [0] * len(wanted)
    plain = Experiment(
        model=vlm, dataset=captions, max_new_tokens=4, n_resamples=100, output=tmp_path / "plain", progress=False
    )
    assert "tracebacks" not in plain.run().predictions


def test_a_run_that_was_broken_off_goes_on_to_the_same_bytes(
    vlm: VLM, captions: Dataset, tmp_path: Path, often: TruthfulPreIntervention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off in the second of two units of going back; the control of random places runs too."""
    controls = {"controls": ["random_places"]}
    good = experiment(vlm, captions, tmp_path / "good", often, **controls).run()
    ordinary = Runner._do

    def fail(self: Runner, unit: Unit, *rest: Any) -> Any:
        if (unit.condition, unit.chunk) == ("back", 1):
            raise KeyboardInterrupt
        return ordinary(self, unit, *rest)

    with monkeypatch.context() as broken:
        broken.setattr(Runner, "_do", fail)
        with pytest.raises(KeyboardInterrupt):
            experiment(vlm, captions, tmp_path / "broken", often, **controls).run()
    experiment(vlm, captions, tmp_path / "broken", often, **controls).run()
    assert set(good.predictions["condition"]) == {"baseline", "back", "back_random_places"}
    for file in ("predictions.parquet", "config.yaml"):
        assert (tmp_path / "broken" / file).read_bytes() == (tmp_path / "good" / file).read_bytes()
