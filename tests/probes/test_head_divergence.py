"""VHD and T-VHD against hand-worked cases, a straightforward loop, and a model whose seeing heads are known."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from probes import HeadDivergence
from probes.head_divergence import _mean_rank_correlation
from probes.vision_heads import choose_heads, default_layers, head_divergence, text_activation, zero_surging_heads
from slitlamp.errors import InputError, UnknownNameError
from slitlamp.tracing import sites
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


def test_published_layers_at_depth_32_and_the_same_share_elsewhere() -> None:
    assert default_layers(32) == (1, *range(18, 32))
    assert default_layers(6) == (3, 4, 5)
    assert default_layers(1) == (0,)


def test_unknown_choices_name_the_known() -> None:
    with pytest.raises(UnknownNameError, match="divergent"):
        choose_heads(torch.rand(1, 4), "divergant")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="deleted"):
        HeadDivergence(contrast="delete").sites(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="top_k"):
        HeadDivergence(top_k=(0,)).sites(None)  # type: ignore[arg-type]


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
            "constants.layer": np.array([0]),
            "rows.first": np.ones((3, 1, 2), dtype=np.float32),
            "rows.selected": np.ones((3, 1, 2), dtype=bool),
            "rows.token_item": np.repeat(["a", "b", "c"], 4),
            "rows.token": np.tile(np.arange(4), 3),
            "rows.token_label": labels,
            "rows.token_word": labels,
            "rows.t_vhd": np.where(labels == "object", 2.0, 1.0)[:, None],
            "rows.object_item": np.repeat(["a", "b", "c"], 4),
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


def test_rank_correlation_equals_the_mean_over_pairs() -> None:
    maps = np.random.default_rng(1).normal(size=(5, 2, 4))
    pairs = [spearmanr(maps[i].ravel(), maps[j].ravel()).statistic for i in range(5) for j in range(i)]
    assert _mean_rank_correlation(maps)[0] == pytest.approx(np.mean(pairs), abs=1e-12)
    assert np.isnan(_mean_rank_correlation(maps[:1])[0])


def test_labels_reach_their_tokens(llava: VLM, caption: Any) -> None:
    probe = HeadDivergence(n_resamples=20)
    table = pd.DataFrame({"token": [1], "word": ["dog"], "label": ["hallucinated"]})
    llava.measure(probe, caption, [table, None])
    tokens = probe.result().tables["tokens"]
    assert tokens[tokens["label"] == "hallucinated"][["item", "token", "word"]].values.tolist() == [["a", 1, "dog"]]
    assert (tokens["label"] == "").sum() == 5


def test_figures_are_drawn_from_the_tables(llava: VLM, caption: Any) -> None:
    probe = HeadDivergence(n_resamples=20)
    table = pd.DataFrame({"token": [0, 1], "word": ["dog", "cat"], "label": ["object", "hallucinated"]})
    llava.measure(probe, caption, [table, table])
    result = probe.result()
    figures = result.figures()
    assert set(figures) == {"head_map", "head_intervals", "t_vhd_histogram"}
    drawn = np.asarray(figures["head_map"].axes[0].collections[0].get_array()).ravel()
    np.testing.assert_allclose(drawn, result.tables["heads"]["vhd"])
