"""Pairs of treatments in a run: what is refused, what they add up to, and that all of it is read from the same resamples."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from interventions import M3ID, HeadReinforcement, ImageAttentionBoost, ImageContrast
from slitlamp.errors import InputError
from slitlamp.evaluation import chair_rows, chair_scores, pope_items, pope_scores
from slitlamp.experiments import Dataset, Experiment, Run
from slitlamp.experiments.summary import summary
from slitlamp.vlm import VLM

SINGLE = {
    "vhr": [HeadReinforcement(alpha=6.0)],
    "boost": [ImageAttentionBoost(4.0)],
    "vdd": [ImageContrast(view="deleted")],
    "m3id": [M3ID(offset=40)],
}


def make(vlm: VLM, data: list[Dataset], output: Path, **options: object) -> Experiment:
    settings = {"conditions": {"baseline": [], **SINGLE}, "controls": ["random", "noise"], "pairs": True, **options}
    settings |= {"max_new_tokens": 12, "n_resamples": 200, "batch_size": 8, "progress": False}
    return Experiment(model=vlm, dataset=data, output=output, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(vlm: VLM, captions: Dataset, pope: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make(vlm, [captions, pope], tmp_path_factory.mktemp("pairs") / "run").run()


def test_refused_pairs_are_named_with_the_reason_and_the_others_run(run: Run) -> None:
    (refused,) = run.table("refused_pairs").to_dict("records")
    assert (refused["condition"], refused["first"], refused["second"]) == ("vdd+m3id", "vdd", "m3id")
    assert "ImageContrast and M3ID are both contrasts" in refused["reason"]
    info = run.table("condition_info").set_index("condition")
    pairs = info.index[info["role"] == "pair"].tolist()
    assert pairs == ["vhr+boost", "vhr+vdd", "vhr+m3id", "boost+vdd", "boost+m3id"]
    assert set(run.predictions["condition"]) == set(info.index)
    assert not info.loc[pairs, "control_of"].notna().any()
    assert set(run.table("interactions")["condition"]) == set(pairs)
    assert set(run.table("matched_recall")["condition"]) == set(info.index) - set(pairs)
    assert run.config["pairs"] is True


def test_a_pair_does_what_both_do(run: Run, vlm: VLM, captions: Dataset) -> None:
    items = captions.items
    batch = vlm.encode(images=[one.image for one in items], prompts=[one.prompt for one in items])
    with vlm.apply(*SINGLE["vhr"], *SINGLE["vdd"]):
        expected = list(vlm.generate(batch, max_new_tokens=12).texts)
    rows = run.predictions
    texts = {
        name: rows[(rows["condition"] == name) & (rows["dataset"] == captions.name)] for name in set(rows["condition"])
    }
    assert texts["vhr+vdd"]["text"].tolist() == expected
    assert all(expected != texts[one]["text"].tolist() for one in ("baseline", "vhr", "vdd"))


def test_the_interaction_is_both_minus_the_sum_of_the_two(run: Run, captions: Dataset, pope: Dataset) -> None:
    """From the scores of the four texts, taken anew."""
    rows = run.predictions
    assert captions.truth is not None
    assert captions.synonyms is not None

    def score(condition: str, dataset: str, metric: str) -> float:
        own = rows[(rows["condition"] == condition) & (rows["dataset"] == dataset)]
        if dataset == captions.name:
            ids = [item.image_id for item in captions.items]
            texts = pd.DataFrame({"image_id": ids, "caption": own["text"].tolist()})
            table = chair_scores(chair_rows(texts, captions.truth, captions.synonyms), n_resamples=1)
        else:
            items = own.rename(columns={"item": "question_id"})[["image", "question_id", "label", "text"]]
            table = pope_scores(pope_items(items), n_resamples=1)
        return float(table.set_index("metric").loc[metric, "value"])

    interactions = run.table("interactions")
    assert set(zip(interactions["dataset"], interactions["metric"], strict=True)) == {
        (captions.name, "chair_i"), (captions.name, "recall"), (pope.name, "f1"),
    }  # fmt: skip
    for row in interactions.itertuples():
        base, first, second, both = (
            score(one, row.dataset, row.metric) for one in ("baseline", row.first, row.second, row.condition)
        )
        assert row.first_value == pytest.approx(first - base, nan_ok=True)
        assert row.both_value == pytest.approx(both - base, nan_ok=True)
        assert row.value == pytest.approx(both - first - second + base, nan_ok=True)
        assert row.value == pytest.approx(row.both_value - row.first_value - row.second_value, nan_ok=True)
    assert (interactions["value"].abs() > 1e-9).any()
    assert (interactions["p_holm"].dropna() >= interactions["p"].dropna()).all()


def test_verdicts_are_the_differences_of_the_run(run: Run) -> None:
    differences = run.table("differences").set_index(["condition", "reference", "dataset", "metric"])
    matched = run.table("matched_differences").set_index(["condition", "reference", "dataset"])
    verdicts = run.table("verdicts")
    assert set(verdicts["treatment"]) == set(SINGLE), "neither pairs nor controls"
    for row in verdicts.itertuples():
        known = matched if row.metric == "chair_i_matched" else differences.xs(row.metric, level="metric")
        for reference, value in (("baseline", row.value), (row.control, row.control_value)):
            if reference is not None and reference == reference:
                assert value == pytest.approx(known.loc[(row.treatment, reference, row.dataset), "value"], nan_ok=True)
    controls = run.table("verdict_controls")
    assert set(controls["control"]) == {"vhr_random", "vdd_noise", "m3id_noise"}
    assert verdicts.set_index("treatment").loc["boost", "n_controls"].tolist() == [0] * 6


def test_the_summary_of_many_treatments_is_their_verdicts(run: Run) -> None:
    lines = summary(run)
    table = run.table("verdicts")
    for metric, name in (("chair_i", "CHAIR_i"), ("chair_i_matched", "CHAIR_i at equal recall"), ("f1", "POPE F1")):
        (line,) = (one for one in lines if one.startswith(f"{name}: "))
        said = dict(part.split(": ", 1) for part in line.removeprefix(f"{name}: ").split("; "))
        found = table[table["metric"] == metric].groupby("verdict", sort=False)["treatment"].agg(", ".join).to_dict()
        assert said == found
    assert not any(line.startswith("CHAIR_i against") for line in lines)


def test_without_pairs_there_are_no_such_tables(vlm: VLM, pope: Dataset, tmp_path: Path) -> None:
    conditions = {"baseline": [], "boost": SINGLE["boost"]}
    plain = make(vlm, [pope], tmp_path / "run", conditions=conditions, pairs=False, controls=True).run()
    assert not {"interactions", "refused_pairs"} & set(plain.table_names)
    assert "pairs" not in plain.config
    declared = [f"boost_{one}" for one in SINGLE["boost"][0].controls()]
    assert plain.table("verdict_controls")["control"].unique().tolist() == declared
    assert set(plain.table("verdicts")["n_controls"]) == {len(declared)}


def test_a_pair_that_is_to_be_measured_must_run(vlm: VLM, pope: Dataset, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"'probe_conditions' names 'vdd\+m3id', which cannot run: ImageContrast and M3ID"
    ):
        make(vlm, [pope], tmp_path / "run", probe_conditions=["vdd+m3id"]).run()


def test_a_treatment_that_contradicts_itself_is_found_before_anything_runs(
    vlm: VLM, pope: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VLM, "generate", lambda *_, **__: pytest.fail("an item ran"))
    both = {"baseline": [], "both": [ImageContrast(), M3ID()]}
    with pytest.raises(ValueError, match="ImageContrast and M3ID are both contrasts"):
        make(vlm, [pope], tmp_path / "run", conditions=both, controls=True, pairs=False).run()
