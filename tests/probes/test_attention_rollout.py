"""Rollout and flow by hand, against independent implementations, on planted patterns, and on attention that says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch

from probes import AttentionRollout
from probes.image_means import Images
from probes.outlier_places import covered
from probes.rollout import attention_flow, inside_share, rollout, turned, uniform_causal, with_residual
from probes.rollout_tables import METHODS, Places, share_table
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.reports.attention_rollout import FIGURES
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

TWO_LAYERS = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [1.0, 0.0]]])


def random_causal(n_layers: int, n: int, seed: int = 0) -> torch.Tensor:
    weights = torch.rand(n_layers, n, n, generator=torch.Generator().manual_seed(seed)).tril()
    return weights / weights.sum(dim=-1, keepdim=True)


# -- formulas -----------------------------------------------------------------------------------------------------------


def test_rollout_by_hand() -> None:
    """Layer 0 adds up to rows (1, 0), (1/4, 3/4); layer 1 to (1, 0), (1/2, 1/2); their product is (1, 0), (5/8, 3/8)."""
    found = rollout(TWO_LAYERS, [1])
    assert found[:, 0].tolist() == [[0.25, 0.75], [0.625, 0.375]]


def test_rollout_equals_the_published_loop() -> None:
    """The loop of the authors' notebook (`compute_joint_attention`), in numpy."""
    weights = random_causal(5, 9)
    whole = weights.double().numpy() + np.eye(9)
    whole /= whole.sum(axis=-1)[..., None]
    joint = whole[0]
    for layer in whole[1:]:
        joint = layer @ joint
    np.testing.assert_allclose(rollout(weights, [4, 8])[-1], joint[[4, 8]], rtol=1e-5)


def test_rows_sum_to_one_also_where_nothing_was_attended() -> None:
    weights = random_causal(3, 6)
    weights[1, 4] = 0
    assert with_residual(weights)[1, 4].tolist() == [0, 0, 0, 0, 1, 0]
    torch.testing.assert_close(rollout(weights, [0, 5]).sum(dim=-1), torch.ones(3, 2))


def test_flow_by_hand() -> None:
    """From position 1: to 0 by 1 -> 0 -> 0 (1/2, then 1) and 1 -> 1 -> 0 (1/4): 3/4; to 1 by 1 -> 1 -> 1: 1/2."""
    assert attention_flow(TWO_LAYERS.numpy(), 1, [0, 1]).tolist() == [0.75, 0.5]


@pytest.mark.parametrize("seed", range(3))
def test_flow_equals_networkx(seed: int) -> None:
    weights = random_causal(3, 6, seed)
    steps = with_residual(weights).numpy()
    graph = nx.DiGraph()
    for layer in range(3):
        for query in range(6):
            for key in range(6):
                if steps[layer, query, key] > 0:
                    graph.add_edge((layer + 1, query), (layer, key), capacity=float(steps[layer, query, key]))
    expected = [nx.maximum_flow_value(graph, (3, 5), (0, key)) for key in range(6)]
    np.testing.assert_allclose(attention_flow(weights.numpy(), 5, range(6)), expected, atol=1e-4)


def test_a_box_turned_by_180_degrees() -> None:
    assert turned([(0, 0.25, 0.5, 0.5)]) == [(0.5, 0.5, 1, 0.75)]


def test_share_inside_by_hand() -> None:
    covered = np.array([0.5, 0, 1])
    assert inside_share(np.array([[2, 1, 1], [0, 1, 0]]), covered).tolist() == [0.5, 0]
    assert np.isnan(inside_share(np.zeros(3), covered))


# -- planted and null ---------------------------------------------------------------------------------------------------


def test_planted_path_is_found_by_rollout_and_not_by_the_last_layer() -> None:
    """Position 5 reads 4 in the last layer, 4 reads 3, 3 reads 0 in the first: raw attention of 5 never points at 0."""
    weights = torch.eye(6).repeat(3, 1, 1)
    for layer, (query, key) in enumerate([(3, 0), (4, 3), (5, 4)]):
        weights[layer, query] = torch.eye(6)[key]
    found = rollout(weights, [5])[-1, 0]
    assert found[0] == pytest.approx(1 / 8)  # one half for each layer
    assert weights[:, 5, 0].max() == 0
    assert found[1:3].max() == 0
    assert attention_flow(weights.numpy(), 5, [0, 1]).tolist() == [0.5, 0.0]  # the narrowest edge of the path; no path


def test_uniform_causal_attention_is_the_known_product() -> None:
    """The null: the first of its rows after one layer, and favour for early tokens after many, though each layer has none."""
    assert uniform_causal(1, 4)[0, 3].tolist() == [0.25] * 4
    found = rollout(uniform_causal(8, 40), [39])[-1, 0]
    middle = found[1:39]
    assert (middle[:-1] > middle[1:]).all()
    assert found[:10].sum() > 2 * found[20:30].sum()


def test_a_map_that_ignores_the_box_gives_its_area() -> None:
    """The null for boxes: random weights and random boxes. The interval of gain over the turned box holds 0 as it should."""
    missed = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        weights = rng.random((40, 1, 64)).repeat(2, axis=1)
        corner, size = rng.random((40, 2)) * 0.6, 0.2 + 0.2 * rng.random((40, 2))
        boxes = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(corner, size, strict=True)]
        inside, opposite = (
            np.stack(
                [
                    inside_share(one, covered([box], (8, 8)).double().numpy().ravel())
                    for one, box in zip(weights, each, strict=True)
                ]
            )
            for each in (boxes, turned(boxes))
        )
        area = np.array([float(covered([box], (8, 8)).mean()) for box in boxes])
        places = Places(
            images=Images(np.arange(40).astype(str), 200, 0), kind=np.full(40, "object"), image=weights.sum(axis=-1),
            inside=inside, opposite=opposite, area=area, agreement=np.zeros(40),
        )  # fmt: skip
        row = share_table(places, METHODS[:2]).iloc[0]
        assert row["inside"] == pytest.approx(row["area"], abs=0.02)
        missed += not row["gain_low"] <= 0 <= row["gain_high"]
    assert missed <= 7


# -- the probe ----------------------------------------------------------------------------------------------------------


def captions(vlm: VLM, image: Any) -> tuple[Any, list[pd.DataFrame]]:
    batch = vlm.encode(
        images=[image(0), image(1)], prompts=["<image> is there a dog ?", "<image> what ?"], ids=["a", "b"]
    ).with_continuation([[6, 7, 8, 9], [10, 11]])
    tables = [
        pd.DataFrame(
            {
                "token": [1, 2],
                "word": ["x", "y"],
                "label": ["object", "hallucinated"],
                "boxes": [((0, 0, 0.5, 0.5),), ()],
            }
        ),
        pd.DataFrame(
            {"token": [0], "word": ["yes"], "label": ["correct"], "truth": ["yes"], "boxes": [((0, 0, 1, 1),)]}
        ),
    ]
    return batch, tables


def test_equal_to_rollout_of_hugging_face_attentions(build_llava: Any, image: Any) -> None:
    """Everything again from `output_attentions` of the eager model, row by row without padding."""
    vlm = build_llava()
    batch, tables = captions(vlm, image)
    probe = AttentionRollout(n_resamples=20, vision=False)
    vlm.measure(probe, batch, tables)
    state = probe.state()
    vlm.model.set_attn_implementation("eager")
    index = 0
    for row, (prompt, words, tokens) in enumerate(
        [("<image> is there a dog ?", [6, 7, 8, 9], [0, 1, 2]), ("<image> what ?", [10, 11], [0])]
    ):
        one = vlm.encode(images=[batch.images[row]], prompts=[prompt]).with_continuation([words])
        with torch.no_grad():
            output = vlm.model(**one.inputs(), output_attentions=True)
        whole = torch.eye(one.length)
        for layer in output.attentions:
            step = layer[0].mean(dim=0) / 2 + torch.eye(one.length) / 2
            whole = step @ whole
        for token in tokens:
            weights = whole[one.length - len(words) - 1 + token][one.image_mask[0]].numpy()
            assert state["rows.image"][index, 0] == pytest.approx(weights.sum(), rel=1e-4)
            if token == 1:  # the box is the first quarter of a 4 x 4 grid
                expected = weights.reshape(4, 4)[:2, :2].sum() / weights.sum()
                assert state["rows.inside"][index, 0] == pytest.approx(expected, rel=1e-4)
                assert state["rows.area"][index] == 0.25
            index += 1
    assert state["rows.place_kind"].tolist() == ["last prompt token", "object", "hallucinated", "answer, truly yes"]
    assert state["rows.inside"][3, 0] == pytest.approx(1)  # the box is the whole image
    assert np.isnan(state["rows.inside"][2]).all()  # a hallucinated object is nowhere


def test_tower_from_cls_equals_a_plain_product(llava: VLM, image: Any) -> None:
    batch, tables = captions(llava, image)
    probe = AttentionRollout(n_resamples=20)
    llava.measure(probe, batch, tables)
    with llava.trace(sites.vision_attention(queries="all", keys="all")) as trace:
        llava.forward(batch)
    whole = torch.eye(17)
    for layer in trace["vision_attention"].stack().mean(dim=2)[:, 0]:
        whole = (layer + torch.eye(17)) / 2 @ whole
    assert probe.state()["rows.vision_image"][0, 0] == pytest.approx(whole[0, 1:].sum().item(), rel=1e-4)
    expected = whole[0, 1:].reshape(4, 4)[:2, :2].sum() / whole[0, 1:].sum()
    assert probe.state()["rows.vision_inside"][0, 0] == pytest.approx(expected.item(), rel=1e-4)
    assert probe.result().tables["vision"]["place"].iloc[0] == "CLS"


def test_a_tower_without_cls_is_followed_from_its_patches(llava_siglip: VLM, image: Any) -> None:
    batch, tables = captions(llava_siglip, image)
    probe = AttentionRollout(n_resamples=20)
    llava_siglip.measure(probe, batch, tables)
    table = probe.result().tables["vision"]
    assert table["place"].iloc[0] == "mean of the patches"
    assert table["image"].iloc[0] == pytest.approx(1)


def test_images_of_several_tiles_have_no_tower_table(llava_next: VLM, image: Any) -> None:
    batch = llava_next.encode(images=[image(0)], prompts=["<image> is there a dog ?"], ids=["a"])
    table = pd.DataFrame({"token": [0], "word": ["x"], "label": ["object"], "boxes": [((0, 0, 0.5, 0.5),)]})
    probe = AttentionRollout(n_resamples=20)
    llava_next.measure(probe, batch.with_continuation([[6]]), [table])
    assert probe.result().tables["shares"]["inside"].notna().any()
    if batch.tiles[0] > 1:
        assert "vision" not in probe.result().tables


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_positions": 5}, "max_positions"),
        ({"flow_share": 1.0, "max_flow_positions": 5}, "max_flow_positions"),
        ({"flow_share": 2.0}, "from 0 to 1"),
    ],
)
def test_what_would_not_fit_is_refused(parameters: dict[str, Any], message: str, llava: VLM, image: Any) -> None:
    with pytest.raises(InputError, match=message):
        llava.measure(AttentionRollout(**parameters), captions(llava, image)[0])


def test_the_items_whose_flow_is_computed_do_not_depend_on_the_batch(llava: VLM, image: Any) -> None:
    probe = AttentionRollout(flow_share=0.5)
    ids = [str(one) for one in range(200)]
    chosen: Sequence[bool] = [probe._wants_flow(one) for one in ids]
    assert 70 < sum(chosen) < 130
    assert not any(AttentionRollout(flow_share=0.0)._wants_flow(one) for one in ids)
    assert all(AttentionRollout(flow_share=1.0)._wants_flow(one) for one in ids)


def test_figures_are_drawn_from_the_tables(llava: VLM, image: Any) -> None:
    batch, tables = captions(llava, image)
    probe = AttentionRollout(n_resamples=20, flow_share=1.0)
    llava.measure(probe, batch, tables)
    assert set(probe.result().figures()) == set(FIGURES)
    for drawing in FIGURES.values():
        assert drawing.draw({}) is None
    bare = AttentionRollout(n_resamples=20, vision=False)
    llava.measure(bare, batch)
    assert "no boxes" in bare.result().summary
    assert FIGURES["inside"].draw(bare.result().tables) is None


def test_tokens_without_a_place_on_the_image_have_no_share_inside() -> None:
    """The queries of a Q-Former stand for no place: their weight on the image is measured, a share inside is not."""
    from tiny_models import BUILDERS
    from tiny_models.common import random_image

    vlm = BUILDERS["blip-2"]()
    batch = vlm.encode(images=[random_image(0)], prompts=["what ?"], ids=["a"], chat=False)
    table = pd.DataFrame({"token": [0], "word": ["x"], "label": ["object"], "boxes": [((0, 0, 0.5, 0.5),)]})
    probe = AttentionRollout(n_resamples=20)
    vlm.measure(probe, batch.with_continuation([[6]]), [table])
    shares = probe.result().tables["shares"]
    assert (shares["image"] > 0).all()
    assert shares["inside"].isna().all()
    assert (shares["n_boxes"] == 0).all()


def test_layers_that_have_no_self_attention_are_refused() -> None:
    from tiny_models import BUILDERS

    with pytest.raises(UnsupportedError, match="no self-attention"):
        AttentionRollout().sites(BUILDERS["mllama"]().anatomy)
