"""Alignment across data sets and models, on samples whose similarities are made."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from probes.alignment_compare import compare, training_step
from probes.alignment_sample import STREAM, Bootstrap, Sample
from probes.alignment_space import Space
from slitlamp.reports.implicit_alignment import FIGURES
from slitlamp.tracing.probe import Part


def sample(angle: float, groups: list[str], n_layers: int = 2, seed: int = 0) -> Sample:
    """Images along e0, texts at an angle to it, each with a little of its own."""
    rng = np.random.default_rng(seed)
    n, d = len(groups), 6
    vectors = np.zeros((n, 2, n_layers, d), dtype=np.float32)
    vectors[:, 0, :, 0] = 1
    vectors[:, 1, :, 0], vectors[:, 1, :, 1] = math.cos(angle), math.sin(angle)
    vectors += 0.01 * rng.normal(size=vectors.shape)
    moments = np.stack([vectors.sum(axis=0), (vectors**2).sum(axis=0)]).astype(np.float64)
    return Sample(
        groups=np.array(groups),
        vectors={STREAM: vectors},
        spaces={STREAM: Space.of(moments, np.zeros((n_layers, d)), n, None, "joint")},
        token_groups=np.array(groups[:1]),
        tokens=np.zeros((1, 2, 1, n_layers, d), dtype=np.float32),
        real=np.ones((1, 2, 1), dtype=bool),
        bootstrap=Bootstrap(100, 0),
    )


ANGLES = {"step-00000": 1.5, "step-01000": 0.9, "step-00200": 1.2, "step-00400": 1.0, "final": 0.5}
GROUPS = [f"image{n}" for n in range(6)]


def models() -> dict[Part, Sample]:
    return {
        Part(f"runs/{name}", "baseline", "captions"): sample(angle, GROUPS, seed=n)
        for n, (name, angle) in enumerate(ANGLES.items())
    }


def scores(values: dict[str, float], metric: str = "chair_i") -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "model": f"runs/{name}",
                "condition": "baseline",
                "dataset": "captions",
                "metric": one,
                "value": value,
                "low": value - 0.01,
                "high": value + 0.01,
            }
            for name, value in values.items()
            for one in (metric, "mean_words")
        ]
    )


def test_checkpoints_come_in_the_order_of_their_steps() -> None:
    assert training_step("runs/organism/checkpoints/step-00400") == 400
    assert math.isnan(training_step("organism"))
    found = compare("ima", models(), None)
    assert found is not None
    curves = found.tables["model_curves"].drop_duplicates("model")
    assert curves["step"].tolist()[:4] == [0, 200, 400, 1000]
    assert curves["model"].iloc[-1] == "runs/final"
    table = found.tables["model_scores"].query("kind == 'same_layer' and variant == 'raw'")
    truth = {f"runs/{name}": math.cos(angle) for name, angle in ANGLES.items()}
    for row in table.itertuples():
        assert row.value == pytest.approx(truth[str(row.model)], abs=0.02)
    assert "correlations" not in found.tables


def test_planted_relation_to_a_score_is_found_with_its_sign() -> None:
    falling = {
        name: 0.1 + 0.3 * angle for name, angle in ANGLES.items()
    }  # the better aligned, the fewer hallucinations
    found = compare("ima", models(), scores(falling))
    assert found is not None
    table = found.tables["correlations"]
    assert set(table["metric"]) == {"chair_i"}  # a length is no score with a direction
    assert set(table["expected"]) == {"negative"}
    own = table.query("kind == 'same_layer' and variant == 'raw' and of == 'alignment'").set_index("method")
    assert own.loc["spearman", "r"] == pytest.approx(-1)
    assert own.loc["pearson", "r"] < -0.95
    assert (own["n_models"] == 5).all()
    control = table.query("kind == 'same_layer' and variant == 'raw' and of == 'training step'")
    assert control["r"].iloc[0] == pytest.approx(-1)
    assert control["n_models"].iloc[0] == 4  # a model whose name holds no step has none
    assert control["p_adjusted"].isna().all()
    assert "expected negative" in found.summary


def test_correlation_is_that_of_scipy_on_the_joined_rows() -> None:
    rng = np.random.default_rng(0)
    values = {name: float(rng.random()) for name in ANGLES}
    found = compare("ima", models(), scores(values, "accuracy"))
    assert found is not None
    joined = found.tables["score_relation"].query("kind == 'same_layer' and variant == 'raw'")
    assert joined["score"].tolist() == [values[name.removeprefix("runs/")] for name in joined["model"]]
    row = found.tables["correlations"].query(
        "kind == 'same_layer' and variant == 'raw' and method == 'spearman' and of == 'alignment'"
    )
    assert row["r"].iloc[0] == pytest.approx(spearmanr(joined["value"], joined["score"]).statistic)


def test_unrelated_scores_are_seldom_called_related() -> None:
    """The null: of 60 random scores, intervals of Spearman's rho over eight models miss zero about 3 times."""
    rng = np.random.default_rng(1)
    parts = {Part(f"m{n}", "baseline", "c"): sample(0.2 + 0.1 * n, GROUPS, n_layers=1, seed=n) for n in range(8)}
    table = pd.DataFrame(
        [
            {
                "model": f"m{n}",
                "condition": "baseline",
                "dataset": str(k),
                "metric": "f1",
                "value": value,
                "low": 0,
                "high": 1,
            }
            for k in range(60)
            for n, value in enumerate(rng.random(8))
        ]
    )
    found = compare("ima", parts, table)
    assert found is not None
    rows = found.tables["correlations"].query(
        "kind == 'same_layer' and variant == 'raw' and method == 'spearman' and of == 'alignment'"
    )
    missed = ((rows["low"] > 0) | (rows["high"] < 0)).sum()
    assert len(rows) == 60
    assert missed <= 9  # p < .01 at a rate of 5 %


def test_across_data_sets_pairs_of_one_image_are_set_apart() -> None:
    one, other = sample(1.0, GROUPS, seed=0), sample(0.8, [*GROUPS[:3], "x", "y"], seed=1)
    parts = {Part("m", "baseline", "captions"): one, Part("m", "baseline", "pope"): other}
    found = compare("ima", parts, None)
    assert found is not None
    assert set(found.tables) == {"across"}
    table = found.tables["across"]
    row = table.query("pair == 'text-text' and variant == 'raw' and layer == 0").iloc[0]
    first, second = one.vectors[STREAM][:, 1, 0], other.vectors[STREAM][:, 1, 0]
    grid = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in second] for a in first])
    apart = one.groups[:, None] != other.groups[None]
    assert row["value"] == pytest.approx(grid.mean(), abs=1e-6)
    assert row["mismatched"] == pytest.approx(grid[apart].mean(), abs=1e-6)
    assert row["value"] == pytest.approx(math.cos(0.2), abs=0.01)
    assert table.query("pair == 'image-image' and variant == 'raw'")["value"].min() > 0.99


def test_nothing_to_compare_gives_nothing() -> None:
    assert compare("ima", {Part("m", "baseline", "c"): sample(1.0, GROUPS)}, None) is None


def test_figures_of_comparisons_are_drawn() -> None:
    found = compare("ima", models(), scores(ANGLES))
    assert found is not None
    drawn = {name: one.draw(found.tables) for name, one in FIGURES.items()}
    assert {name for name, one in drawn.items() if one is not None} == {
        "checkpoint_curves",
        "alignment_and_hallucination",
    }
    figure = drawn["checkpoint_curves"]
    assert figure is not None
    assert len([one for one in figure.axes[0].lines if not str(one.get_label()).startswith("_")]) == 5
    for name in ("checkpoint_curves", "alignment_and_hallucination"):
        assert "models" in FIGURES[name].caption(found.tables) or "model" in FIGURES[name].caption(found.tables)
