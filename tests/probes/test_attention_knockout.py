"""Attention knockout by hand, against a mask in the model's own eager attention, on a planted way, and without one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from planted_flow import asked, planted_llava

from probes import AttentionKnockout
from probes.knockout_flows import (
    FLOWS,
    default_window,
    measured_tokens,
    of_flow,
    random_pairs,
    up_to,
    window_of,
)
from slitlamp.errors import InputError, UnknownNameError, UnsupportedError
from slitlamp.reports.attention_knockout import FIGURES
from slitlamp.reports.style import NARROW
from slitlamp.tracing import sites
from slitlamp.vlm import VLM


def test_windows() -> None:
    assert [default_window(n) for n in (1, 2, 3, 6, 12, 18, 32, 40)] == [1, 1, 1, 3, 5, 9, 9, 9]
    assert window_of(0, 3, 6) == [0, 1]
    assert window_of(3, 3, 6) == [2, 3, 4]
    assert window_of(5, 9, 6) == [1, 2, 3, 4, 5]


def test_what_is_measured(llava: VLM, image: Any) -> None:
    batch = llava.encode([image(0)] * 5, ["<image> what ?"] * 5).with_continuation([[6, 7], [8], [9, 10, 11], [6], []])
    tables: list[pd.DataFrame | None] = [
        pd.DataFrame({"token": [0], "word": ["yes"], "label": ["correct"]}),
        pd.DataFrame({"token": [0], "word": ["no"], "label": ["wrong"]}),
        pd.DataFrame({"token": [0, 1, 2], "word": ["a", "cat", "dog"], "label": ["other", "hallucinated", "object"]}),
        None,
        None,
    ]
    tokens = measured_tokens(batch, tables)
    assert tokens == [0, None, 2, 0, None]
    short = up_to(batch, tokens)
    assert short.n_generated == (0, 0, 2, 0, 0)
    assert short.input_ids[2, -2:].tolist() == [9, 10]


def test_positions_of_the_flows(llava: VLM, image: Any) -> None:
    """<s> is it <image> a dog ? | yes it: the question is what follows the image, without the position that predicts."""
    batch = llava.encode([image(0)], ["is it <image> a dog ?"])
    question, images = of_flow(batch, "image_to_question")
    assert question[0].nonzero()[:, 0].tolist() == [19, 20]
    assert images[0].nonzero()[:, 0].tolist() == list(range(3, 19))
    last, of = of_flow(batch, "question_to_last")
    assert last[0].nonzero()[:, 0].tolist() == [21]
    assert torch.equal(of, question)
    longer = batch.with_continuation([[6, 7]])
    assert of_flow(longer, "image_to_generated")[0][0].nonzero()[:, 0].tolist() == [22]
    assert of_flow(longer, "image_to_last")[0][0].nonzero()[:, 0].tolist() == [23]
    assert of_flow(longer, "image_to_question")[0][0].nonzero()[:, 0].tolist() == [19, 20, 21]


def test_random_pairs_are_as_many_and_not_of_the_flow(llava: VLM, image: Any) -> None:
    prompts = ["<image> is there a dog ?", "<image> what ?"]
    batch = llava.encode([image(0)] * 2, prompts, ids=["a", "b"])
    queries, keys = of_flow(batch, "image_to_question")
    pairs = random_pairs(batch, queries, keys, seed=3)
    counts = (queries.sum(dim=1) * keys.sum(dim=1)).tolist()
    assert pairs.valid.sum(dim=1).tolist() == counts
    for row in range(2):
        query, key = pairs.query[row][pairs.valid[row]], pairs.key[row][pairs.valid[row]]
        assert (key < query).all()
        assert batch.real_mask[row][key].all()
        assert not (queries[row][query] & keys[row][key]).any()
        assert len(set(zip(query.tolist(), key.tolist(), strict=True))) == counts[row]
    alone = llava.encode([image(0)], prompts[1:], ids=["b"])
    again = random_pairs(alone, *of_flow(alone, "image_to_question"), seed=3)
    padding = batch.length - alone.length
    assert torch.equal(again.query[0] + padding, pairs.query[1][pairs.valid[1]])
    other = random_pairs(batch, queries, keys, seed=4)
    assert not torch.equal(other.query, pairs.query)


def test_equal_to_masks_in_the_models_own_eager_attention(llava: VLM, image: Any) -> None:
    """p of the answer again from unpadded runs of a copy under eager attention, with -inf written into its masks."""
    batch = llava.encode(
        [image(0), image(1)], ["<image> is there a dog ?", "<image> what is in the image ?"], ids=["a", "b"]
    ).with_continuation([[6, 7], [8]])
    probe = AttentionKnockout(n_resamples=20, window=3)
    llava.measure(probe, batch)
    model: Any = copy.deepcopy(llava.model)
    model.set_attn_implementation("eager")
    answers = {0: 6, 1: 8}

    def p(row: int, layers: list[int], flow: str | None) -> float:
        prompt = ["<image> is there a dog ?", "<image> what is in the image ?"][row]
        one = llava.encode([batch.images[row][0]], [prompt])
        handles = []
        if flow is not None:
            queries, keys = of_flow(one, flow)
            bias = torch.zeros(1, 1, one.length, one.length)
            bias[0, 0][queries[0][:, None] & keys[0]] = -torch.inf

            def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
                return args, {**kwargs, "attention_mask": kwargs["attention_mask"] + bias}

            for layer in layers:
                module = model.get_submodule(llava.anatomy.attention(layer))
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        with torch.no_grad():
            logits = model(**one.inputs()).logits[0, -1]
        for handle in handles:
            handle.remove()
        return float(logits.double().softmax(dim=-1)[answers[row]])

    for found in probe.result().tables["effects"].itertuples():
        layers = window_of(found.layer, 3, 3)
        changes = [p(row, layers, found.flow) / p(row, [], None) - 1 for row in (0, 1)]
        assert found.change == pytest.approx(np.mean(changes), abs=1e-4)


@pytest.fixture(scope="module")
def planted() -> AttentionKnockout:
    vlm = planted_llava(layer=1)
    probe = AttentionKnockout(n_resamples=200)
    for start in (0, 6):
        vlm.measure(probe, *asked(vlm, [(start + i) % 3 != 0 for i in range(6)]))
    return probe


def test_the_layer_and_the_flow_that_carry_the_answer_are_found(planted: AttentionKnockout) -> None:
    result = planted.result()
    table = result.tables["effects"].set_index(["flow", "layer"])
    # 8 of 12 answers are "yes"; without what was read their probability falls from .98 to .05, that of "no" stays
    assert table.loc[("image_to_last", 1), "change_high"] < -0.3
    assert table.loc[("image_to_last", 1), "p_adjusted"] < 0.05
    others = table.drop(("image_to_last", 1))
    assert others["change"].abs().max() < 0.05  # uniform attention: other keys cut make those of the image heavier
    assert (others["p_adjusted"] > 0.05).all()
    assert table.loc[("image_to_last", 1), "control"] > -0.2  # random pairs meet the way now and then
    assert (table.drop(index=1, level="layer")[["change", "control"]] == 0).all(axis=None)
    assert "image to last in layers 1 to 1" in result.summary


def test_the_finding_is_given_as_edits_with_controls(planted: AttentionKnockout) -> None:
    vlm = planted_llava(layer=1)
    (target,) = planted.causal_targets(vlm.anatomy)
    assert len(target.controls) == 19
    batch, _ = asked(vlm, [True, True, False])
    with vlm.trace(sites.logits("before_generated")) as plain:
        vlm.forward(batch)
    changes = []
    for edits in (target.target, *target.controls):
        with vlm.trace(sites.logits("before_generated")) as trace:
            vlm.forward(batch, edits=edits(batch))
        changes.append(float((trace["logits"][0] - plain["logits"][0]).abs().max()))
    assert changes[0] > 5 * max(changes[1:])


def test_no_image_no_effect() -> None:
    """The null: an answer that does not depend on the image changes by nothing, exactly, wherever the image is cut off."""
    vlm = planted_llava(reads_image=False)
    probe = AttentionKnockout(n_resamples=200)
    vlm.measure(probe, *asked(vlm, [i % 2 == 0 for i in range(6)]))
    table = probe.result().tables["effects"]
    assert (table["n_items"] == 3).all()
    assert table[["change", "control"]].abs().max(axis=None) < 1e-9


def test_random_weights_give_as_many_findings_as_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Effects that are noise around the control's: over 60 data sets the share with any finding is about .05."""
    probe = AttentionKnockout(n_resamples=400)
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(60):
        fresh = AttentionKnockout(n_resamples=400)
        fresh._constants(centre=np.arange(3), window=np.stack([np.arange(3)] * 2, axis=1))
        fresh._rows(
            item=np.array([f"i{i}" for i in range(40)]),
            group=np.array([f"i{i}" for i in range(40)]),
            p_base=np.full(40, 0.9),
            changes=rng.normal(0, 5, (40, 2, len(probe.flows), 3)),
            present=np.ones((40, 3), dtype=bool),
            left_out=np.array([0]),
        )
        found += (fresh.result().tables["effects"]["p_adjusted"] < 0.05).any()
    assert (
        found <= 10
    )  # a binomial of 60 and .05 exceeds 8 with p = .004; the bootstrap of 40 items is a little liberal


def test_a_cut_that_does_not_take_is_an_error(llava: VLM, image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of zeros in place of -inf, as a boolean written into an additive mask: the weights give it away."""
    from slitlamp.tracing import AttentionEdit

    def nothing(layers: list[int], queries: Any, keys: Any) -> list[AttentionEdit]:
        return [
            AttentionEdit(
                layer, lambda rows, columns, calls: torch.zeros(len(rows), 1, rows.shape[1], len(columns)), queries
            )
            for layer in layers
        ]

    batch = llava.encode([image(0)] * 2, ["<image> is there a dog ?", "<image> what ?"]).with_continuation(
        [[6], [7, 8, 9]]
    )
    tables = [None, pd.DataFrame({"token": [2], "word": ["dog"], "label": ["object"]})]
    for flow in FLOWS:
        llava.measure(AttentionKnockout(flows=[flow], n_resamples=20), batch, tables)  # type: ignore[list-item]
    monkeypatch.setattr("probes.attention_knockout.knock_out", nothing)
    for flow in FLOWS:
        with pytest.raises(UnsupportedError, match=f"{flow} was cut in layer 0"):
            llava.measure(AttentionKnockout(flows=[flow], n_resamples=20), batch, tables)  # type: ignore[list-item]


def test_wrong_answers_are_left_out(llava: VLM) -> None:
    vlm = planted_llava()
    probe = AttentionKnockout(n_resamples=20)
    vlm.measure(probe, *asked(vlm, [True, True, True], right=[True, False, True]))
    result = probe.result()
    assert result.tables["items"]["item"].tolist() == ["item0", "item2"]
    assert "1 left out" in result.summary
    none = AttentionKnockout(n_resamples=20)
    vlm.measure(none, *asked(vlm, [True], right=[False]))
    with pytest.raises(InputError, match="found none"):
        none.result()


def test_rows_without_a_flow_do_not_count(llava: VLM, image: Any) -> None:
    """The first token of an answer has no generated tokens before it: the other row alone is the mean."""
    prompts = ["<image> is there a dog ?", "<image> what ?"]
    batch = llava.encode([image(0), image(1)], prompts, ids=["a", "b"]).with_continuation([[6], [7, 8, 9]])
    alone = llava.encode([image(1)], prompts[1:], ids=["b"]).with_continuation([[7, 8, 9]])
    named = pd.DataFrame({"token": [2], "word": ["dog"], "label": ["object"]})
    tables = []
    for one, labels in ((batch, [None, named]), (alone, [named])):
        probe = AttentionKnockout(flows=["image_to_generated"], n_resamples=20)
        llava.measure(probe, one, labels)
        tables.append(probe.result().tables["effects"])
    assert (tables[0]["n_items"] == 1).all()
    assert tables[0]["change"].abs().max() > 1e-4
    np.testing.assert_allclose(tables[0]["change"], tables[1]["change"], atol=1e-5)


def test_parameters_are_checked(llava: VLM) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"flows": ["image_to_lst"]}, UnknownNameError, "image_to_last"),
        ({"flows": []}, InputError, "flows must be"),
        ({"window": 2}, InputError, "odd number of layers"),
        ({"layers": [3]}, InputError, "some of 0 to 2"),
        ({"layers": []}, InputError, "some of 0 to 2"),
    ]
    for parameters, error, match in cases:
        with pytest.raises(error, match=match):
            AttentionKnockout(**parameters).sites(llava.anatomy)


def test_figures_are_drawn_from_the_tables(planted: AttentionKnockout) -> None:
    result = planted.result()
    figures = result.figures()
    assert set(figures) == {"knockout"}
    panel = figures["knockout"].axes[1]
    assert panel.get_title(loc="left") == "image → last"
    drawn = next(line for line in panel.lines if line.get_label() == "_change").get_ydata()
    table = result.tables["effects"].query("flow == 'image_to_last'")
    np.testing.assert_allclose(np.asarray(drawn, dtype=float), 100 * table["change"])
    for drawing in FIGURES.values():
        assert drawing.caption(result.tables)
        assert drawing.draw(result.tables, NARROW) is not None
        assert drawing.draw({}) is None


def test_questions_about_one_image_are_resampled_together() -> None:
    """Each question three times, as one group: the same values, and the interval of the questions, not of three times as many."""
    single, triple = AttentionKnockout(), AttentionKnockout()
    rng = np.random.default_rng(0)
    changes = rng.normal(-0.2, 0.1, (12, 2, 3, 2))
    for probe, times in ((single, 1), (triple, 3)):
        probe._constants(centre=np.arange(2), window=np.stack([np.arange(2)] * 2, axis=1))
        probe._rows(
            item=np.array([f"i{i}" for i in range(12 * times)]),
            group=np.repeat([f"g{i}" for i in range(12)], times),
            p_base=np.full(12 * times, 0.9),
            changes=np.repeat(changes, times, axis=0),
            present=np.ones((12 * times, 3), dtype=bool),
            left_out=np.array([0]),
        )
    one, other = (probe.result().tables["effects"] for probe in (single, triple))
    columns = ["change", "change_low", "change_high", "p", "n_groups"]
    pd.testing.assert_frame_equal(one[columns], other[columns])
    assert (other["n_items"] == 36).all()
