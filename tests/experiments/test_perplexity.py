"""Perplexity of captions under the unmodified model, and the figure of a method at several strengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from interventions import HeadReinforcement
from slitlamp.experiments import Dataset, Experiment, Run
from slitlamp.reports.data import RunData
from slitlamp.reports.dose import dose_curve, dose_findings, dose_response, dose_response_note, dose_scores, doses

FACTORS = (1.0, 3.0, 9.0)


def experiment(vlm: Any, data: list[Dataset], output: Path, **options: Any) -> Experiment:
    conditions = {"baseline": [], **{f"x{factor:g}": [HeadReinforcement(alpha=factor)] for factor in FACTORS}}
    settings = {"max_new_tokens": {"captions": 8, "pope": 2}, "n_resamples": 100, "progress": False}
    return Experiment(
        model=vlm, dataset=data, conditions=conditions, controls=["random"], output=output, **settings, **options
    )


@pytest.fixture(scope="module")
def run(vlm: Any, captions: Dataset, pope: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("dose") / "run"
    return experiment(vlm, [pope, captions], folder, perplexity=True, batch_size=3).run()


def test_it_is_that_of_the_plain_model_token_by_token(run: Run, vlm: Any, captions: Dataset) -> None:
    """Each text by itself through the Hugging Face model, with no batch, no padding and nothing in force."""
    texts = run.predictions.query("dataset == @captions.name and condition == 'x9'")
    for item, row in zip(captions.items, texts.to_dict("records"), strict=True):
        batch = captions.encode(vlm, [item]).with_continuation([row["tokens"]])
        with torch.no_grad():
            log_p = vlm.model(**batch.inputs()).logits[0].log_softmax(dim=-1)
        n = len(row["tokens"])
        picked = [log_p[batch.length - n - 1 + place, token].item() for place, token in enumerate(row["tokens"])]
        assert row["nll"] == pytest.approx(-sum(picked), abs=1e-4)
    scores = run.table("conditions").query("metric == 'perplexity'").set_index("condition")
    assert set(scores["dataset"]) == {captions.name}
    expected = np.exp(texts["nll"].sum() / texts["n_tokens"].sum())
    assert scores.loc["x9", "value"] == pytest.approx(expected)
    assert scores.loc["x9", "low"] <= expected <= scores.loc["x9", "high"]


def test_the_model_is_less_surprised_by_its_own_greedy_words(run: Run) -> None:
    scores = run.table("conditions").query("metric == 'perplexity'").set_index("condition")["value"]
    assert scores["x1"] == scores["baseline"]
    assert scores["x9"] > scores["baseline"]
    change = run.table("differences").query("metric == 'perplexity' and reference == 'baseline'").set_index("condition")
    assert change.loc["x9", "value"] == pytest.approx(scores["x9"] - scores["baseline"])
    assert change.loc["x1", "low"] == change.loc["x1", "high"] == 0


def test_it_depends_on_no_batch_and_only_captions_have_one(
    run: Run, vlm: Any, captions: Dataset, pope: Dataset, tmp_path: Path
) -> None:
    other = experiment(vlm, [pope, captions], tmp_path / "one", perplexity=True, batch_size=1).run()
    for name, has in ((captions.name, True), (pope.name, False)):
        nll = [one.predictions.loc[one.predictions["dataset"] == name, "nll"] for one in (run, other)]
        assert nll[0].notna().all() == nll[0].notna().any() == has
        np.testing.assert_allclose(nll[0], nll[1], atol=1e-4)
    plain = experiment(vlm, [captions], tmp_path / "plain", batch_size=3).run()
    assert "nll" not in plain.predictions
    assert "perplexity" not in set(plain.table("conditions")["metric"])


def test_every_score_is_drawn_against_the_strength(run: Run) -> None:
    data = RunData(run.folder)
    table = dose_scores(data)
    assert table is not None
    found = table[(table["metric"] == "perplexity") & (table["control"] == "random")]
    assert list(found["dose"]) == list(FACTORS)
    figure = dose_response(data, 6.6)
    assert figure is not None
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "CHAIR_i",
        "CHAIR_s",
        "Recall",
        "Length",
        "Perplexity",
        "F1, POPE",
    ]
    lines = {line.get_label(): line for line in figure.axes[4].get_lines()}
    scores = run.table("conditions").query("metric == 'perplexity'").set_index("condition")["value"]
    assert list(lines["_method"].get_xdata()) == list(FACTORS)  # type: ignore[arg-type]
    assert list(lines["_method"].get_ydata()) == [scores[f"x{one:g}"] for one in FACTORS]  # type: ignore[arg-type]
    assert list(lines["_random"].get_ydata()) == [scores[f"x{one:g}_random"] for one in FACTORS]  # type: ignore[arg-type]
    assert list(lines["_unmodified"].get_ydata()) == [scores["baseline"]] * 2  # type: ignore[arg-type]
    assert "HeadReinforcement at 3 values of alpha" in dose_response_note(data)


@pytest.mark.parametrize(("broken", "scale"), [(1.3, "linear"), (20_000.0, "log")])
def test_a_control_that_breaks_the_model_does_not_flatten_the_others(broken: float, scale: str) -> None:
    rows = [
        (dose, control, name, value, value, value)
        for name, worst in (("perplexity", broken), ("chair_i", 0.9))
        for dose, control, value in [(1.0, "", 1.2), (2.0, "", 1.4), (1.0, "random", 1.25), (2.0, "random", worst)]
    ]
    table = pd.DataFrame(rows, columns=["dose", "control", "metric", "value", "low", "high"])
    ax = dose_curve(table, "perplexity", "sparsity")
    assert ax.get_yscale() == scale
    ax.figure.canvas.draw()
    labels = [label.get_text() for label in ax.get_yticklabels(which="both")]
    assert any(labels)
    assert not any("$" in label for label in labels)
    assert dose_curve(table, "chair_i", "sparsity").get_yscale() == "linear"


def test_what_the_strengths_show(run: Run, tmp_path: Path) -> None:
    """From differences written by hand: lower than the baseline at 3 and 9, than the control too at 9 alone."""
    data = RunData(run.folder)
    differences = data.table("differences")
    assert differences is not None
    rows = differences[differences["metric"] == "chair_i"].copy()
    rows["high"] = 0.1
    lower = [("x3", "baseline"), ("x9", "baseline"), ("x9", "x9_random")]
    pairs = list(zip(rows["condition"].astype(str), rows["reference"].astype(str), strict=True))
    rows.loc[[pair in lower for pair in pairs], "high"] = -0.1
    data._tables["differences"] = rows
    expected = "CHAIR_i is below that of the unmodified model at alpha 3, 9; below every control at 9."
    assert dose_findings(data) == [expected]
    data._tables["differences"] = rows.assign(high=0.1)
    assert dose_findings(data) == ["At no value of alpha is CHAIR_i below that of the unmodified model."]


def test_a_run_without_the_unmodified_model_says_nothing_of_it(run: Run) -> None:
    """Its reference is one of the strengths, and stays one."""
    data = RunData(run.folder)
    info, scores = data.table("condition_info"), data.table("conditions")
    assert info is not None
    assert scores is not None
    roles = ["reference" if name == "x1" else role for name, role in zip(info["condition"], info["role"], strict=True)]
    kept = info.assign(role=roles)[info["condition"] != "baseline"]
    data._tables |= {"condition_info": kept, "conditions": scores[scores["condition"] != "baseline"]}
    data.config["conditions"].pop("baseline")
    table = dose_scores(data)
    assert table is not None
    assert list(table[(table["metric"] == "recall") & (table["control"] == "")]["dose"]) == list(FACTORS)
    assert dose_findings(data) == []


@pytest.mark.parametrize(
    "conditions",
    [
        {"baseline": [], "a": [{"M3ID": {"decay": 0.1}}], "b": [{"M3ID": {"decay": 0.2}}]},
        {
            "a": [{"M3ID": {"decay": 1, "gate": 1}}],
            "b": [{"M3ID": {"decay": 2, "gate": 2}}],
            "c": [{"M3ID": {"decay": 3}}],
        },
        {"a": [{"M3ID": {"x": 1}}], "b": [{"M3ID": {"x": 2}}], "c": [{"Other": {"x": 3}}]},
        {"a": [{"M3ID": {"x": "1"}}], "b": [{"M3ID": {"x": "2"}}], "c": [{"M3ID": {"x": "3"}}]},
        {"a": [{"M3ID": {"x": 1}}], "b": [{"M3ID": {"x": 2}}], "c": [{"M3ID": {"x": 3}}, {"Other": {}}]},
    ],
    ids=["two", "two parameters", "two methods", "words", "a pair"],
)
def test_other_conditions_are_no_sweep(conditions: dict[str, Any]) -> None:
    assert doses(conditions) is None


def test_a_sweep_is_found() -> None:
    entries = {f"d{one}": [{"M3ID": {"decay": one, "gate": 0.3}}] for one in (0.1, 0.2, 0.4)}
    assert doses({"baseline": [], **entries}) == ("M3ID", "decay", {"d0.1": 0.1, "d0.2": 0.2, "d0.4": 0.4})


def test_the_strength_of_a_list_is_its_length() -> None:
    entries = {f"n{n}": [{"CutAttention": {"layers": list(range(n))}}] for n in (1, 2, 4)}
    assert doses({"baseline": [], **entries}) == ("CutAttention", "number of layers", {"n1": 1.0, "n2": 2.0, "n4": 4.0})
    alike = {"a": [{"CutAttention": {"layers": [0]}}], "b": [{"CutAttention": {"layers": [1]}}]}
    assert doses({"baseline": [], **alike, "c": [{"CutAttention": {"layers": [0, 1]}}]}) is None
    apart = {str(n): [{"CutAttention": {"layers": one}}] for n, one in enumerate(([0], [1, 2], [1, 2, 3]))}
    assert doses({"baseline": [], **apart}) is None
