"""Linear probes: which states are samples, planted and absent labels, and agreement with the fits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from probes import LinearProbe
from probes.labelled_states import classes, samples
from slitlamp.errors import InputError, UnknownNameError
from slitlamp.reports.style import NARROW
from slitlamp.tracing import sites
from slitlamp.tracing.probe import N_DRAWS
from slitlamp.vlm import VLM

TABLE = pd.DataFrame(
    {
        "token": [0, 1, 2, 5],
        "word": ["a", " Dog", "cat", "late"],
        "label": ["other", "object", "hallucinated", "object"],
        "category": [None, "dog", "cat", "dog"],
    }
)


def planted(target: str = "label", seed: int = 1, strength: float = 2.0, **parameters: Any) -> LinearProbe:
    """States of 80 images of 4 samples: noise at layer 3, the label along one direction at layer 7."""
    rng = np.random.default_rng(seed)
    group = np.repeat([f"image{i}" for i in range(80)], 4)
    positive = rng.random(320) < 0.4
    states = rng.normal(size=(320, 2, 6)).astype(np.float32)
    states[:, 1, 2] += strength * positive
    probe = LinearProbe(target=target, n_resamples=100, **parameters)
    names = {"label": ("hallucinated", "object"), "truth": ("yes", "no")}.get(target, ("red", "blue"))
    probe.load_state(
        {
            "constants.layer": np.array([3, 7]),
            "rows.item": group,
            "rows.group": group,
            "rows.token": np.zeros(320, dtype=int),
            "rows.value": np.where(positive, *names),
            "rows.type": rng.choice(["dog", "cat", "sun", "tree"], 320),
            "rows.state": states,
        }
    )
    return probe


def test_samples_are_mentions_or_answers() -> None:
    mentions = samples(TABLE, 4, "before_object", "label")
    assert mentions.to_numpy().tolist() == [[1, "object", "dog"], [2, "hallucinated", "cat"]]  # token 5 is cut off
    assert samples(TABLE, 9, "before_object", "category")["value"].tolist() == ["dog", "cat", "dog"]
    answer = pd.DataFrame({"token": [0], "word": ["Yes"], "label": ["wrong"], "category": ["dog"], "truth": ["no"]})
    assert samples(answer, 1, "last", "truth").to_numpy().tolist() == [[0, "no", "dog"]]
    assert samples(answer, 1, "image_mean", "correct")["value"].tolist() == ["wrong"]
    assert len(samples(answer, 1, "last", "label")) == 0
    with pytest.raises(InputError, match="no column 'colour'"):
        samples(TABLE, 9, "before_object", "colour")


def test_classes_are_the_positive_one_or_the_most_common() -> None:
    value, group = np.array(list("aaabbc")), np.array([0, 1, 1, 0, 1, 2])
    assert classes(value, group, "colour", 5) == ["a", "b"]  # c is in one image only
    assert classes(value[:5], group[:5], "colour", 5) == ["a"]  # two values are one question
    assert classes(np.array(["yes", "no", "yes", "no"]), np.arange(4), "truth", 5) == ["yes"]
    with pytest.raises(InputError, match=r"a: 3, b: 2, c: 1"):
        classes(value, np.zeros(6), "colour", 5)


def test_states_are_those_of_the_positions_that_were_asked_for(llava: VLM, image: Any) -> None:
    """Token t of the text is predicted one position before its own; the image's mean is over the image's positions."""
    batch = llava.encode(images=[image(0), image(1)], prompts=["<image> is there ?", "what <image> is there now ?"])
    batch = batch.with_continuation([[6, 7, 8], [9, 10]])
    with llava.trace(sites.resid_post()) as trace:
        llava.forward(batch)
    states = trace["resid_post"].stack()
    labels = [TABLE, TABLE]
    for position, shift in (("before_object", -1), ("at_object", 0)):
        probe = LinearProbe(position=position)  # type: ignore[arg-type]
        llava.measure(probe, batch, labels)
        found = [("0", 1), ("0", 2), ("1", 1)]
        for row, (item, token) in enumerate(found):
            n = batch.n_generated[int(item)]
            place = int(trace.mask("resid_post")[int(item)].sum()) - n + token + shift
            torch.testing.assert_close(torch.from_numpy(probe._get("state")[row]), states[:, int(item), place])
        assert len(probe._get("state")) == 3
    answers = [pd.DataFrame({"token": [0], "word": ["yes"], "label": ["correct"], "truth": ["yes"]})] * 2
    probe = LinearProbe(position="image_mean", target="truth")
    llava.measure(probe, batch, answers)
    for row in range(2):
        mean = states[:, row][:, batch.image_mask[row][batch.attention_mask[row].bool()].nonzero()[:, 0]].mean(dim=1)
        torch.testing.assert_close(torch.from_numpy(probe._get("state")[row]), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["label", "truth", "colour"])
def test_a_planted_direction_is_found_where_it_is(target: str) -> None:
    """Two standard deviations between the classes: AUROC Phi(2 / sqrt 2) = .92. Noise stays inside its interval."""
    probe = planted(target)
    tables = probe.result().tables
    noise, signal = tables["layers"].to_dict("records")
    assert signal["layer"] == 7
    assert signal["auroc"] == pytest.approx(0.921, abs=0.03)
    assert signal["selectivity"] > 0.3
    draws = tables["controls"].query("kind == 'control' and layer == 7")["auroc"]
    assert [signal["control_low"], signal["control_high"]] == [draws.min(), draws.max()]
    assert signal["selectivity_low"] == pytest.approx(signal["low"] - draws.max())
    assert signal["selectivity_low"] < signal["selectivity"] < signal["selectivity_high"]
    assert signal["p"] == signal["p_any_layer"] == 1 / 20
    assert noise["low"] < 0.5 < noise["high"]
    assert noise["p"] > 0.05
    assert noise["q"] >= noise["p"]
    assert abs(noise["control"] - 0.5) < 0.1
    assert len(tables["controls"]) == 2 * (5 + 19)
    target_edit = probe.causal_targets(None)[0]  # type: ignore[arg-type]
    assert "block 7" in target_edit.name
    assert len(target_edit.controls) == N_DRAWS


def test_the_interval_holds_the_auroc_of_such_probes() -> None:
    """One standard deviation apart: the mean of 60 data sets, missed about three times; more than 8 has p < .5 %."""
    rows = []
    for seed in range(60):
        probe = planted(seed=seed, strength=1.0, n_controls=0, n_permutations=0, strengths=[100.0])
        rows.append(probe.result().tables["layers"].iloc[1])
    found = pd.DataFrame(rows)
    wanted = found["auroc"].mean()
    assert ((found["low"] > wanted) | (found["high"] < wanted)).sum() <= 8


def test_the_interval_is_not_a_test_of_there_being_nothing() -> None:
    """As the docstring says: without a signal the probe's own direction is chance, which a bootstrap of its scores leaves out.

    The intervals of 60 such data sets miss 1/2 more often than three times; p values by permutation hold their rate.
    """
    missed = rejected = 0
    for seed in range(60):
        probe = planted(seed=seed, strength=0, n_controls=0, n_permutations=19, strengths=[100.0], layers=None)
        row = probe.result().tables["layers"].iloc[0]
        missed += not row["low"] <= 0.5 <= row["high"]
        rejected += row["p"] <= 0.05
    assert rejected <= 8
    assert missed > 3


def test_the_direction_taken_out_is_the_one_that_was_planted() -> None:
    probe = planted(n_controls=0, n_permutations=0)
    edit = probe.causal_targets(None)[0].target(None)[0]  # type: ignore[arg-type]
    states = torch.from_numpy(probe._get("state")[:, 1])
    removed = edit.function(states[None], None)[0]  # type: ignore[call-arg, arg-type]
    positive = probe._get("value") == "hallucinated"
    assert roc_auc_score(positive, states[:, 2]) > 0.85
    assert removed[:, 2].std() < 0.4 * states[:, 2].std()


def test_unusable_parameters_are_refused(llava: VLM) -> None:
    for parameters, error, match in (
        ({"site": "residual"}, UnknownNameError, "resid_post"),
        ({"position": "first"}, UnknownNameError, "before_object"),
        ({"method": "svm"}, UnknownNameError, "logistic"),
        ({"layers": [9]}, InputError, "layers lie between 0 and 2"),
        ({"n_folds": 1}, InputError, "n_folds starts at 2"),
        ({"strengths": []}, InputError, "positive penalties"),
    ):
        with pytest.raises(error, match=match):
            LinearProbe(**parameters).sites(llava.anatomy)  # type: ignore[arg-type]


def test_figures_are_drawn_from_the_tables() -> None:
    from slitlamp.reports.linear_probe import FIGURES

    result = planted().result()
    assert set(result.figures()) == {"layers"}
    for width in (6.6, NARROW):
        figure = FIGURES["layers"].draw(result.tables, width)
        assert figure is not None
        line = next(one for one in figure.axes[0].lines if one.get_label() == "_curve")
        np.testing.assert_allclose(np.asarray(line.get_ydata(), float), result.tables["layers"]["auroc"])
    bare = planted(n_controls=0, n_permutations=0).result()
    assert len(bare.figures()["layers"].axes) == 1
    assert "80 images" in FIGURES["layers"].caption(bare.tables)
