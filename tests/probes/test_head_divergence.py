"""VHD and T-VHD against hand-worked cases, a straightforward loop, and a model whose seeing heads are known."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from probes import HeadDivergence
from probes.vision_heads import choose_heads, default_layers, head_divergence, text_activation, zero_surging_heads
from slitlamp.errors import InputError, UnknownNameError
from slitlamp.reports.head_drawings import FIGURES
from slitlamp.tracing import sites
from slitlamp.tracing.probe import Part
from slitlamp.vlm import VLM


def test_divergence_and_activation_by_hand() -> None:
    with_image = torch.tensor([[3.0, 4.0], [1.0, 1.0]])
    without = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    assert head_divergence(with_image, without).tolist() == [5.0, 2.0]  # the norm, not its square (25, 4)
    assert text_activation(without).tolist() == [0.0, 10.0]


def test_outlier_rule_needs_both_conditions() -> None:
    """VHD 9 exceeds mean 3 + sd 3.46 and TA 20 exceeds its own limit only in the last head; the first has VHD alone."""
    vhd = torch.tensor([1.0, 1.0, 1.0, 9.0])
    surging = torch.tensor([1.0, 1.0, 1.0, 20.0])
    assert zero_surging_heads(vhd, surging).tolist() == [1, 1, 1, 0]
    assert zero_surging_heads(vhd, torch.tensor([20.0, 1.0, 1.0, 1.0])).tolist() == [1, 1, 1, 9]
    assert zero_surging_heads(torch.tensor([9.0, 1.0, 1.0, 1.0]), surging).tolist() == [9, 1, 1, 1]


def test_outlier_rule_depends_on_ddof_as_it_should() -> None:
    """Mean 5 and sd 4.53 (ddof 0) or 5.23 (ddof 1): a VHD of 10 lies between the two limits, 9.53 and 10.23."""
    vhd = torch.tensor([10.0, 9.0, 1.0, 0.0])
    assert zero_surging_heads(vhd, vhd, ddof=0).tolist() == [0, 9, 1, 0]
    assert zero_surging_heads(vhd, vhd, ddof=1).tolist() == [10, 9, 1, 0]


def test_selection_is_the_upper_half_for_even_and_odd_numbers_of_heads() -> None:
    assert choose_heads(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), "divergent").tolist() == [[True, False, True, False]]
    assert choose_heads(torch.tensor([[5.0, 1.0, 3.0, 2.0, 4.0]]), "divergent").tolist() == [
        [True, False, False, False, True]
    ]


def test_controls_choose_as_many_heads() -> None:
    vhd = torch.rand(5, 9, generator=torch.Generator().manual_seed(0))
    count = choose_heads(vhd, "divergent").sum(dim=1)
    for choice in ("random", "least"):
        assert torch.equal(choose_heads(vhd, choice).sum(dim=1), count)
    least, most = choose_heads(vhd, "least"), choose_heads(vhd, "divergent")
    assert not (least & most).any()
    assert vhd[least].max() <= vhd.max()
    assert all(vhd[row][least[row]].max() < vhd[row][most[row]].min() for row in range(5))
    assert choose_heads(vhd, "all").all()
    random = choose_heads(vhd, "random", seed=1, layer=2)
    assert torch.equal(random[0], random[3])  # the draw does not depend on the row, so not on the batch
    assert not torch.equal(random[0], choose_heads(vhd, "random", seed=2, layer=2)[0])


def test_published_layers_of_their_families_and_the_same_share_elsewhere() -> None:
    assert default_layers(32, "llava") == default_layers(32, "llava_next") == (1, *range(18, 32))
    assert default_layers(32, "instructblip") == tuple(range(14, 32))
    assert default_layers(32, "qwen2_5_vl") == tuple(range(18, 32))
    assert default_layers(24, "llava") == tuple(range(14, 24))
    assert default_layers(6) == (3, 4, 5)
    assert default_layers(1) == (0,)


def test_unknown_choices_name_the_known() -> None:
    with pytest.raises(UnknownNameError, match="divergent"):
        choose_heads(torch.rand(1, 4), "divergant")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="deleted"):
        HeadDivergence(contrast="delete").sites(None)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="noise"):
        HeadDivergence(contrasts=["nois"]).sites(None)  # type: ignore[arg-type, list-item]
    with pytest.raises(UnknownNameError, match="objects"):
        HeadDivergence(sentence_means=["object"]).sites(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="top_heads"):
        HeadDivergence(top_heads=0).sites(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="top_k"):
        HeadDivergence(top_k=(0,)).sites(None)  # type: ignore[arg-type]


def test_numbers_of_heads_that_no_layer_has_are_refused(llava: VLM) -> None:
    with pytest.raises(InputError, match="up to the model's 4"):
        HeadDivergence(top_k=(8, 16)).sites(llava.anatomy)
    assert HeadDivergence(top_k=(4, 16)).sites(llava.anatomy)


@pytest.fixture(scope="module")
def caption(llava: VLM, image: Any) -> Any:
    batch = llava.encode(
        images=[image(0), image(1)], prompts=["<image> is there a dog ?", "<image> what ?"], ids=["a", "b"]
    )
    return batch.with_continuation([[6, 7, 8, 9], [10, 11]])


def test_equal_to_a_loop_over_plain_forward_passes(llava: VLM, caption: Any) -> None:
    """Every number again from separate unpadded runs of each prefix, with and without the image."""
    probe = HeadDivergence(top_k=(1, 2), n_resamples=20)
    llava.measure(probe, caption)
    tables = probe.result().tables
    assert (tables["heads"]["contrast"] == "deleted").all()
    maps: dict[tuple[str, int], np.ndarray[Any, Any]] = {}
    for row, (name, tokens) in enumerate({"a": [6, 7, 8, 9], "b": [10, 11]}.items()):
        for step in range(len(tokens)):
            prefix = llava.encode(
                images=[caption.images[row]], prompts=[["<image> is there a dog ?", "<image> what ?"][row]]
            ).with_continuation([tokens[:step]])
            outputs = []
            for one in (prefix, prefix.without_images()):
                with llava.trace(sites.z(positions="last")) as trace:
                    llava.forward(one)
                outputs.append(trace["z"].stack()[:, 0, 0])
            maps[name, step] = (outputs[0] - outputs[1]).norm(dim=-1).numpy()
    expected = {key: np.sort(one, axis=1)[:, ::-1] for key, one in maps.items()}
    for row in tables["tokens"].itertuples():
        for k in (1, 2):
            assert getattr(row, f"t_vhd_{k}") == pytest.approx(expected[row.item, row.token][:, :k].sum(), rel=1e-4)
    first = np.stack([maps["a", 0], maps["b", 0]])
    np.testing.assert_allclose(tables["heads"]["vhd"].to_numpy(), first.mean(axis=0).ravel(), rtol=1e-4)
    assert (tables["heads"]["low"] <= tables["heads"]["vhd"]).all()
    assert (tables["heads"]["vhd"] <= tables["heads"]["high"]).all()


def plant(vlm: VLM, seeing: list[int]) -> VLM:
    """A one-layer model in which only some heads can see.

    Image features are made to live in the first half of the residual dimensions. A blind head reads (q, k and v) the second
    half only, so that it cannot tell the image from zeros; a seeing head is left as it was.
    """
    model = copy.deepcopy(vlm.model)
    half, d_head = vlm.anatomy.d_model // 2, vlm.anatomy.d_head
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight[half:] = 0
        model.model.multi_modal_projector.linear_2.bias[half:] = 0
        attention = model.model.language_model.layers[0].self_attn
        for head in range(vlm.anatomy.n_heads):
            if head not in seeing:
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                    projection.weight[head * d_head : (head + 1) * d_head, :half] = 0
    return VLM.wrap(model, vlm.processor)


def test_planted_seeing_heads_are_found_and_blind_ones_are_zero(image: Any, build_llava: Any) -> None:
    vlm = plant(build_llava(num_hidden_layers=1, num_key_value_heads=4), seeing=[1, 2])
    probe = HeadDivergence(contrast="zero", n_resamples=20)
    batch = vlm.encode(images=[image(0), image(1)], prompts=["<image> is there a dog ?"] * 2)
    vlm.measure(probe, batch)
    vhd = probe.result().tables["heads"]["vhd"].to_numpy()
    assert vhd[[1, 2]].min() > 0.1
    # RMS normalisation rounds differently beside image features of another size: 1e-6 of the outputs' scale, no more
    assert vhd[[0, 3]].max() < 1e-5


def test_a_model_that_cannot_see_gives_no_divergence(image: Any, build_llava: Any) -> None:
    vlm = plant(build_llava(num_hidden_layers=1, num_key_value_heads=4), seeing=[])
    probe = HeadDivergence(contrast="zero", n_resamples=20)
    vlm.measure(probe, vlm.encode(images=[image(0)], prompts=["<image> is there a dog ?"]))
    assert probe.result().tables["heads"]["vhd"].max() < 1e-5


def test_planted_labels_are_told_apart_by_t_vhd() -> None:
    """States in which true objects diverge by 2 and hallucinated ones by 1 in one head: AUROC 1, and the means are known."""
    probe = HeadDivergence(top_k=(1,), n_resamples=50)
    labels = np.array(["object", "hallucinated"] * 6)
    probe.load_state(
        {
            "rows.item": np.array(["a", "b", "c"]),
            "rows.group": np.array(["a", "b", "c"]),
            "constants.layer": np.array([0]),
            "rows.first": np.ones((3, 1, 1, 2), dtype=np.float32),
            "rows.selected": np.ones((3, 1, 1, 2), dtype=bool),
            "rows.outliers": np.zeros((3, 1, 1, 3), dtype=np.int64),
            "rows.token_item": np.repeat(["a", "b", "c"], 4),
            "rows.token_group": np.repeat(["a", "b", "c"], 4),
            "rows.token": np.tile(np.arange(4), 3),
            "rows.token_label": labels,
            "rows.token_word": labels,
            "rows.t_vhd": np.where(labels == "object", 2.0, 1.0)[:, None],
            "rows.object_group": np.repeat(["a", "b", "c"], 4),
            "rows.object_index": np.tile(np.arange(1, 5), 3),
            "rows.object_map": np.ones((12, 1, 2), dtype=np.float32),
        }
    )
    tables = probe.result().tables
    assert tables["t_vhd_auroc"]["auroc"].tolist() == [1.0]
    means = tables["t_vhd"].set_index("label")["mean"]
    assert means["object"] == 2.0
    assert means["hallucinated"] == 1.0


def test_no_difference_gives_an_interval_that_holds_one_half() -> None:
    """The null: T-VHD independent of the label. Over 40 data sets the 95 % interval misses .5 about twice; 7 has p < .004."""
    from slitlamp.evaluation.detection import auroc_interval

    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(40):
        found = auroc_interval(
            rng.normal(size=120), rng.random(120) < 0.4, np.repeat(np.arange(40), 3), n_resamples=400
        )
        missed += not found.low <= 0.5 <= found.high
    assert missed <= 6


def test_labels_reach_their_tokens(llava: VLM, caption: Any) -> None:
    probe = HeadDivergence(n_resamples=20)
    table = pd.DataFrame({"token": [1], "word": ["dog"], "label": ["hallucinated"]})
    llava.measure(probe, caption, [table, None])
    tokens = probe.result().tables["tokens"]
    assert tokens[tokens["label"] == "hallucinated"][["item", "token", "word"]].values.tolist() == [["a", 1, "dog"]]
    assert (tokens["label"] == "").sum() == 5


def test_other_contrasts_are_what_they_are_as_the_first(llava: VLM, caption: Any) -> None:
    """A contrast beside the primary one gives the same map and selection as a probe of its own."""
    several = HeadDivergence(contrasts=["zero", "noise"], n_resamples=20)
    llava.measure(several, caption)
    maps = several.result().tables["contrast_maps"]
    for how in ("deleted", "zero", "noise"):
        alone = HeadDivergence(contrast=how, n_resamples=20)  # type: ignore[arg-type]
        llava.measure(alone, caption)
        own, heads = maps[maps["contrast"] == how], alone.result().tables["heads"]
        np.testing.assert_allclose(own["vhd"].to_numpy(), heads["vhd"].to_numpy(), rtol=1e-5)
        np.testing.assert_array_equal(own["selected"].to_numpy(), heads["selected"].to_numpy())
    assert not maps.loc[maps["contrast"] == "deleted", "changed"].any()


def test_language_prior_equals_two_plain_forward_passes(llava: VLM, caption: Any) -> None:
    from scipy.special import log_softmax, rel_entr

    probe = HeadDivergence(language_prior=True, n_resamples=20)
    llava.measure(probe, caption)
    tokens = probe.result().tables["tokens"].set_index(["item", "token"])
    prompts = {"a": ("<image> is there a dog ?", 0, [6, 7, 8, 9]), "b": ("<image> what ?", 1, [10, 11])}
    for name, (prompt, row, words) in prompts.items():
        batch = llava.encode(images=[caption.images[row]], prompts=[prompt]).with_continuation([words])
        n = len(words)
        own, free = (
            log_softmax(llava.forward(one).logits[0, -n - 1 : -1].double().numpy(), axis=-1)
            for one in (batch, batch.without_images())
        )
        for step, word in enumerate(words):
            found = tokens.loc[(name, step)]
            assert found["kl"] == pytest.approx(rel_entr(np.exp(own[step]), np.exp(free[step])).sum(), abs=1e-5)
            assert found["log_p"] == pytest.approx(own[step, word], abs=1e-5)
            assert found["log_p_image_free"] == pytest.approx(free[step, word], abs=1e-5)
            assert (found["top"], found["top_image_free"]) == (own[step].argmax(), free[step].argmax())


def test_a_model_that_cannot_see_says_the_same_without_the_image(image: Any, build_llava: Any) -> None:
    vlm = plant(build_llava(num_hidden_layers=1, num_key_value_heads=4), seeing=[])
    probe = HeadDivergence(contrast="zero", language_prior=True, n_resamples=20)
    batch = vlm.encode(images=[image(0)], prompts=["<image> is there a dog ?"]).with_continuation([[6, 7, 8]])
    vlm.measure(probe, batch)
    prior = probe.result().tables["prior"].iloc[0]
    assert prior["same"] == 1
    assert prior["kl"] < 1e-6


def test_planted_heads_are_the_causal_targets_and_their_controls_are_others(image: Any, build_llava: Any) -> None:
    vlm = plant(build_llava(num_hidden_layers=1, num_key_value_heads=4), seeing=[1, 2])
    probe = HeadDivergence(contrast="zero", top_heads=2, n_resamples=20)
    batch = vlm.encode(images=[image(0), image(1)], prompts=["<image> is there a dog ?"] * 2)
    vlm.measure(probe, batch.with_continuation([[6, 7], [8, 9]]))
    zero, mean = probe.causal_targets(vlm.anatomy)
    assert "zero" in zero.name
    assert "mean" in mean.name
    assert len(zero.controls) == len(mean.controls) == 19
    changed = []
    for edits_of in (zero.target, zero.controls[0], mean.target):
        with vlm.trace(sites.z()) as trace:
            vlm.forward(batch, edits=edits_of(batch))
        changed.append(trace["z"][0])
    assert changed[0][:, :, [1, 2]].abs().max() == 0  # the seeing heads, and no other head
    assert changed[0][:, :, [0, 3]].abs().min() > 0
    assert changed[1][:, :, [0, 3]].abs().max() == 0
    assert changed[2][:, :, 1].std(dim=(0, 1)).max() == 0  # one constant at all positions
    free, _ = (changed[0], changed[2])
    assert not torch.equal(changed[2][:, :, 1], free[:, :, 1])


def test_heads_at_a_mention_are_those_of_its_layer_and_token(llava: VLM, image: Any) -> None:
    """Where the first token is the mention, its map is that of the first token, layer by layer; and not where the second is."""
    batch = llava.encode(images=[image(0), image(1)], prompts=["<image> is there a dog ?"] * 2)
    probe = HeadDivergence(n_resamples=20)
    labels = [
        pd.DataFrame({"token": [0, 1], "word": ["a", "b"], "label": label})
        for label in (["object", "other"], ["other", "hallucinated"])
    ]
    llava.measure(probe, batch.with_continuation([[6, 7], [8, 9]]), labels)
    first, mentions = probe._get("first")[:, 0], probe._get("object_map")
    assert mentions.shape == first.shape == (2, 3, 4)
    np.testing.assert_allclose(mentions[0], first[0], rtol=1e-4)
    assert np.abs(first[0] - np.roll(first[0], 1, axis=0)).max() > 0.1 * first[0].max()
    assert np.abs(mentions[1] - first[1]).max() > 1e-3 * first[1].max()


def test_mean_ablation_puts_the_mean_over_the_measured_positions(llava: VLM, caption: Any) -> None:
    probe = HeadDivergence(top_heads=1, n_resamples=20)
    llava.measure(probe, caption)
    with llava.trace(sites.z(positions="before_generated")) as trace:
        llava.forward(caption)
    real = trace.mask("z")
    expected = trace["z"].stack()[:, real].mean(dim=1)
    edit = probe.causal_targets(llava.anatomy)[1].target(caption)[0]
    with llava.trace(sites.z(layers=[edit.layer])) as trace:
        llava.forward(caption, edits=[edit])
    table = probe.result().tables["heads"]
    head = int(table.loc[table["vhd"].idxmax(), "head"])
    torch.testing.assert_close(trace["z"][edit.layer][0, -1, head], expected[edit.layer, head], rtol=1e-5, atol=1e-6)


def test_compare_joins_data_sets_and_is_silent_about_one(llava: VLM, caption: Any) -> None:
    one, other = HeadDivergence(n_resamples=20), HeadDivergence(n_resamples=20)
    llava.measure(one, caption)
    answer = pd.DataFrame({"token": [0], "word": ["yes"], "label": ["correct"]})
    llava.measure(other, caption, [answer, answer])
    first = Part("m", "baseline", "captions")
    assert HeadDivergence.compare({first: one}) is None
    result = HeadDivergence.compare({first: one, Part("m", "baseline", "pope"): other})
    assert result is not None
    row = result.tables["points"].iloc[0]
    assert (row["place"], row["other_place"]) == ("captions: first token", "pope: answer")
    assert row["spearman"] == pytest.approx(1)  # the same batch
    assert row["overlap"] == 1
    # parts that differ in more than one thing are not compared
    assert HeadDivergence.compare({first: one, Part("m", "vhr", "pope"): other}) is None


def test_figures_are_drawn_from_the_tables(llava: VLM, caption: Any) -> None:
    probe = HeadDivergence(contrasts=["zero"], language_prior=True, n_resamples=20)
    table = pd.DataFrame({"token": [0, 1], "word": ["dog", "cat."], "label": ["object", "hallucinated"]})
    llava.measure(probe, caption, [table, table])
    result = probe.result()
    figures = result.figures()
    assert set(figures) == set(FIGURES) - {"points"}
    drawn = np.asarray(figures["head_map"].axes[0].collections[0].get_array()).ravel()
    np.testing.assert_allclose(drawn, result.tables["heads"]["vhd"])
    for drawing in FIGURES.values():
        assert drawing.draw({}) is None
