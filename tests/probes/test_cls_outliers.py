"""Overlap, influence and outliers against Hugging Face's own attention, planted outliers, and the rate of the null."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from contract import prompt
from eager import Eager
from edits import Edits
from tiny_models import BUILDERS

from probes import ClsOutliers
from probes.cls_outliers import feature_block
from probes.image_means import Images
from probes.outlier_data import QUERIES, Tokens
from probes.outlier_definitions import matched_tokens
from probes.outlier_tables import (
    against_neighbours,
    influence_tables,
    next_images,
    overlap_curve,
    overlap_table,
    sizes_of,
)
from slitlamp.errors import InputError, UnknownNameError, UnsupportedError
from slitlamp.models import Batch
from slitlamp.reports.cls_outliers import FIGURES
from slitlamp.reports.style import NARROW
from slitlamp.tracing import Edit, sites
from slitlamp.vlm import VLM

TABLE = pd.DataFrame(
    {
        "token": [0, 1, 2, 3],
        "word": list("abcd"),
        "label": ["object", "other", "hallucinated", "object"],
        "boxes": [[(0.0, 0.0, 0.5, 0.5)], [], [], []],
    }
)


def caption(vlm: VLM, image: Any, n: int = 2, *, padded: bool = False) -> Batch:
    prompts = ["<image> what ?" if padded and row % 2 else "<image> is there a dog ?" for row in range(n)]
    batch = vlm.encode([image(row) for row in range(n)], prompts, ids=[f"item{row}" for row in range(n)])
    return batch.with_continuation([[6, 7, 8, 9 + row] for row in range(n)])


# -- formulas -----------------------------------------------------------------------------------------------------------


def test_overlap_by_hand() -> None:
    """Order of the first: 0 1 2 3; of the second: 1 0 3 2. No token shared, then both, then two of three, then all."""
    curve = overlap_curve(np.array([4.0, 3, 2, 1]), np.array([3.0, 4, 1, 2]))
    assert curve.tolist() == pytest.approx([0, 1, 2 / 3, 1])
    assert np.isnan(overlap_curve(np.array([4.0, np.nan]), np.array([1.0, 2]))).all()


def test_overlap_is_that_of_sets() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 30))
    curve = overlap_curve(first, second)
    for i in range(1, 31):
        both = set(np.argsort(-first)[:i]) & set(np.argsort(-second)[:i])
        assert curve[i - 1] == pytest.approx(len(both) / i)


def test_sizes_are_all_or_spread_over_many_tokens() -> None:
    assert sizes_of(64).tolist() == list(range(1, 65))
    assert sizes_of(16).tolist() == [*range(1, 17), *[0] * 48]
    many = sizes_of(576)
    assert len(many) == 64
    assert many[:16].tolist() == list(range(1, 17))
    assert many[-1] == 576
    assert (np.diff(many) > 0).all()


def test_the_next_image_is_another_one() -> None:
    """Several questions about one image: the control is never the attention on the same image."""
    assert next_images(np.array(["a", "a", "b", "c", "c"])).tolist() == [2, 2, 3, 0, 0]
    assert next_images(np.array(["a", "a"])).tolist() == [0, 1]


def test_the_block_that_a_model_reads() -> None:
    class Config:
        vision_feature_layer: Any = -2

    config = Config()
    for named, block in ((-2, 22), (-1, 23), (23, 22), (None, 23), ([-1, -2, 1], 23), ([-3, 2], 21)):
        config.vision_feature_layer = named
        assert feature_block(config, 24) == block
    assert feature_block(object(), 24) == 23


# -- planted agreement, and the null ------------------------------------------------------------------------------------


def tokens_of(encoder: np.ndarray, decoder: np.ndarray) -> Tokens:
    """Items [item, token] whose attention is given."""
    n_items, n = encoder.shape
    row, column = np.divmod(np.arange(n), 6)
    place = np.tile(np.stack([row, column, np.arange(n)], axis=1), (n_items, 1))
    flat, nothing = decoder.ravel(), np.full(n_items * n, np.nan)
    return Tokens(
        items=np.array([f"item{one}" for one in range(n_items)]),
        group=np.array([f"item{one}" for one in range(n_items)]),
        starts=np.arange(n_items + 1) * n,
        place=place,
        encoder=encoder.reshape(-1, 1),
        norm=nothing,
        sink=nothing,
        decoder=np.stack([flat, nothing, nothing], axis=1),
        area=nothing,
        compared=[3],
        encoder_name="CLS attention",
    )


def images_of(tokens: Tokens) -> Images:
    return Images(tokens.group, n_resamples=200, seed=0)


def overlap_of(encoder: np.ndarray, decoder: np.ndarray) -> pd.DataFrame:
    tokens = tokens_of(encoder, decoder)
    return overlap_table(tokens, images_of(tokens))


def influence_of(shift: float, rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    get, tokens = mentions(shift, rng)
    return influence_tables(get, tokens, images_of(tokens), 3)


def test_equal_attention_overlaps_wholly_and_another_image_only_by_chance() -> None:
    attention = np.random.default_rng(0).random((200, 36))
    table = overlap_of(attention, attention**2)
    assert set(table["query"]) == {QUERIES[0]}
    assert (table["overlap"] == 1).all()
    np.testing.assert_allclose(table["chance"], np.arange(1, 37) / 36)
    few = table[(table["i"] >= 3) & (table["i"] <= 35)]
    # 200 items: the sd of a mean of H_i is at most .02
    assert (few["other_image"] - few["chance"]).abs().max() < 0.08


def test_independent_attention_overlaps_by_chance_at_the_stated_rate() -> None:
    """The 95 % interval holds the chance level in all but about 5 % of 100 experiments of 40 images (here for i = 6)."""
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(100):
        table = overlap_of(*rng.random((2, 40, 36)))
        row = table[table["i"] == 6].iloc[0]
        missed += not row["low"] <= row["chance"] <= row["high"]
    # the percentile bootstrap of 40 items is a little narrow; 100 draws at 7 % exceed 13 once in 100 times
    assert missed <= 13


def mentions(shift: float, rng: np.random.Generator) -> tuple[Callable[[str], Any], Tokens]:
    """60 images with two true and two hallucinated words each, the latter with F larger by `shift`; images differ."""
    n = 60
    item = np.repeat([f"item{one}" for one in range(n)], 4)
    label = np.tile(["object", "object", "hallucinated", "hallucinated"], n)
    f = 0.3 + np.repeat(rng.normal(0, 0.1, n), 4) + rng.normal(0, 0.05, 4 * n) + shift * (label == "hallucinated")
    values = np.stack([f, np.full(4 * n, 0.1), np.full(4 * n, 0.1)], axis=1)[:, None]
    token = np.tile([0, 9, 3, 6], n)  # hallucinated words between the true ones
    gathered = {"mention_influence": values, "mention_label": label, "mention_item": item, "mention_token": token}
    return gathered.__getitem__, tokens_of(*rng.random((2, n, 36)))


def test_a_planted_difference_of_influence_is_found_and_its_null_is_not() -> None:
    rng = np.random.default_rng(2)
    table, differences = influence_of(0.05, rng)
    assert table["chance"].tolist() == pytest.approx([3 / 36] * 2)
    within, between = (
        differences[differences["compared"] == one].iloc[0] for one in ("within images", "between images")
    )
    assert within["low"] < 0.05 < within["high"]
    assert within["low"] > 0.02
    assert within["difference"] == pytest.approx(between["difference"])  # balanced: the same estimate
    found = 0
    for _ in range(100):
        null = influence_of(0.0, rng)[1].iloc[0]
        found += bool(null["p"] < 0.05)
    assert found <= 12  # 100 tests at 5 %: 12 or more once in 200 times


def test_neighbours_hold_the_place_in_the_text_fixed() -> None:
    """F falls by 1 a token: the false word at token 4 lies .5 above the line from token 2 to 8; that at 9 is outside."""
    token = np.array([2, 4, 8, 9, 1, 5])
    values = np.array([8.0, 6.5, 2.0, 7.0, 3.0, 9.0])
    label = np.array(["object", "hallucinated", "object", "hallucinated", "object", "hallucinated"])
    found = against_neighbours(values, token, label, np.array([0, 0, 0, 0, 1, 1]), 3)
    assert found[0] == pytest.approx(0.5)
    assert np.isnan(found[1:]).all()


# -- against Hugging Face -----------------------------------------------------------------------------------------------


def test_equal_to_attention_of_the_eager_model(llava: VLM, image: Any) -> None:
    """Every attention again from Hugging Face's eager model, and the tables by loops over sets."""
    batch = caption(llava, image, padded=True)
    probe = ClsOutliers(top_k=3, n_resamples=20, n_concentrated=2)
    llava.measure(probe, batch, [TABLE, TABLE])
    tables, eager = probe.result().tables, Eager(llava, batch)
    positions = [row.nonzero()[:, 0] for row in batch.image_mask]
    overlap = tables["overlap"].set_index(["encoder_layer", "query", "i"])["overlap"]
    for layer in (1, 2):
        expected: dict[tuple[str, int], list[float]] = {}
        shares, f = [], {"object": [], "hallucinated": []}
        for row in range(2):
            seen = eager.vision_attentions[layer][row].mean(dim=0)[0, 1:].numpy()
            shares.append(np.sort(seen)[-2:].sum() / seen.sum())
            all_layers = torch.stack(eager.attentions)[:, row].mean(dim=(0, 1))  # [query, key]
            start = batch.length - batch.n_generated[row] - 1
            given = [all_layers[start + token, positions[row]].numpy() for token in range(4)]
            by_query = {QUERIES[0]: given[0], QUERIES[1]: (given[0] + given[3]) / 2, QUERIES[2]: given[2]}
            top = np.argsort(-seen)[:3]
            for query, attended in by_query.items():
                for i in range(1, 17):
                    both = set(np.argsort(-seen)[:i]) & set(np.argsort(-attended)[:i])
                    expected.setdefault((query, i), []).append(len(both) / i)
            for token, label in ((0, "object"), (2, "hallucinated"), (3, "object")):
                f[label].append(given[token][top].sum() / given[token].sum())
        for (query, i), values in expected.items():
            assert overlap[layer, query, i] == pytest.approx(np.mean(values))
        concentration = tables["concentration"].set_index("layer")["top_share"]
        assert concentration[layer] == pytest.approx(np.mean(shares), rel=1e-4)
        influence = tables["influence"].set_index(["encoder_layer", "label"])["influence"]
        for label, values in f.items():
            assert influence[layer, label] == pytest.approx(np.mean(values), rel=1e-4)


def test_attention_of_chosen_heads_and_layers(llava: VLM, image: Any) -> None:
    """One head of the tower and one of one layer of the decoder, against the eager model."""
    batch = caption(llava, image, padded=True)
    probe = ClsOutliers(
        encoder_heads=[1], decoder_heads=[1], decoder_layers=[2], encoder_layers=[1], n_resamples=20, n_maps=2
    )
    llava.measure(probe, batch)
    maps, eager = probe.result().tables["maps"], Eager(llava, batch)
    for row in range(2):
        table, where = maps[maps["item"] == f"item{row}"], batch.image_mask[row].nonzero()[:, 0]
        seen = eager.vision_attentions[1][row][1, 0, 1:]
        attended = eager.attentions[2][row][1, batch.length - batch.n_generated[row] - 1, where]
        np.testing.assert_allclose(table["encoder_1"], seen / seen.sum(), rtol=1e-4)
        np.testing.assert_allclose(table["decoder"], attended / attended.sum(), rtol=1e-4)


def test_rows_of_one_image_are_one_image(llava: VLM, image: Any) -> None:
    probe = ClsOutliers(n_resamples=20, n_maps=0)
    llava.measure(probe, caption(llava, image).grouped(["same", "same"]), [TABLE, TABLE])
    tables = probe.result().tables
    assert tables["concentration"][["low", "high"]].isna().all().all()  # no interval from one image
    assert tables["influence"]["n_images"].eq(1).all()
    assert tables["overlap"]["other_image"].isna().all()


def test_norms_and_largest_values_are_those_of_hugging_face(llava: VLM, image: Any) -> None:
    batch = caption(llava, image, padded=True)
    probe = ClsOutliers(n_resamples=20)
    llava.measure(probe, batch, [TABLE, TABLE])
    tables, eager = probe.result().tables, Eager(llava, batch)
    norms, massive = (tables[name].set_index(["stream", "layer"]) for name in ("norms", "massive"))
    for layer, states in eager.vision_hidden.items():
        size = states[:, 1:].norm(dim=-1)
        ratio = (size.amax(dim=1) / size.median(dim=1).values).numpy()
        assert norms.loc[("tower", layer), "max_over_median"] == pytest.approx(ratio.mean(), rel=1e-4)
        assert massive.loc[("tower", layer), "largest"] == pytest.approx(float(states.abs().max()), rel=1e-4)
    for layer in range(2):  # the last of Hugging Face's hidden states is after the final norm
        states = eager.hidden[layer + 1]
        size = states[batch.image_mask].view(2, 16, -1).norm(dim=-1)
        ratio = (size.amax(dim=1) / size.median(dim=1).values).numpy()
        assert norms.loc[("decoder", layer), "max_over_median"] == pytest.approx(ratio.mean(), rel=1e-4)
        real = states[batch.real_mask]
        assert massive.loc[("decoder", layer), "largest"] == pytest.approx(float(real.abs().max()), rel=1e-4)


# -- planted outliers ---------------------------------------------------------------------------------------------------


def measured(vlm: VLM, image: Any, edits: list[Edit], n: int = 8, **parameters: Any) -> ClsOutliers:
    probe = ClsOutliers(n_resamples=50, **parameters)
    with vlm.apply(Edits(given=edits)):
        batch = caption(vlm, image, n)
        vlm.measure(probe, batch, [TABLE] * n)
    return probe


def test_planted_norms_are_found_by_rule_and_by_valley(llava: VLM, image: Any) -> None:
    """Two patches of every image with tenfold norm, in the block that the model reads: both rules mark these alone."""

    def raise_norm(values: torch.Tensor, calls: Any) -> torch.Tensor:
        unit = values / values.norm(dim=-1, keepdim=True)
        changed = 5 * unit * (1 + 0.02 * torch.arange(values.shape[1])[:, None])
        changed[:, [1 + 3, 1 + 10]] *= 10
        return changed

    result = measured(llava, image, [Edit("vision_resid_post", 1, raise_norm)]).result()
    tables = result.tables
    outliers = tables["outliers"].set_index("definition")
    for name in ("norm above mean + sd", "norm above the threshold"):
        assert outliers.loc[name, "tokens"] == 2
        marked = tables["maps"][tables["maps"][name]]
        assert set(zip(marked["row"], marked["column"], strict=True)) == {(0, 3), (2, 2)}
    pairs = tables["agreement"].set_index(["first", "second"])["jaccard"]
    assert pairs["norm above mean + sd", "norm above the threshold"] == 1
    row = tables["norms"].set_index(["stream", "layer"]).loc[("tower", 1)]
    assert 7 < row["valley"] < 50
    assert row["above_valley"] == pytest.approx(2 / 16)


def test_a_given_threshold_stands_in_for_the_valley(llava: VLM, image: Any) -> None:
    tables = measured(llava, image, [], n=2, norm_threshold=0.0).result().tables
    assert tables["outliers"].set_index("definition").loc["norm above the threshold", "tokens"] == 16
    tables = measured(llava, image, [], n=2, norm_threshold=1e6).result().tables
    assert tables["outliers"].set_index("definition").loc["norm above the threshold", "tokens"] == 0


def test_without_outliers_there_is_no_valley(llava: VLM, image: Any) -> None:
    tables = measured(llava, image, []).result().tables
    assert tables["norms"]["valley"].isna().all()
    assert "norm above the threshold" not in set(tables["outliers"]["definition"])
    assert (tables["massive"]["n_dimensions"] == 0).all()
    assert (tables["sinks"]["sinks"] == 0).all()
    assert (tables["norms"]["above"] < 0.15).all()  # with 16 tokens at most 3 can lie 2 sd above their mean


def planted_cls(values: torch.Tensor, calls: Any) -> torch.Tensor:
    """Keys of the tower: those of three patches lie along the queries that `along_ones` makes, all others are zero."""
    changed = torch.zeros_like(values)
    for patch, size in ((2, 1.0), (7, 0.9), (13, 0.8)):
        changed[:, 1 + patch] = size
    return changed


def along_ones(values: torch.Tensor, calls: Any) -> torch.Tensor:
    return torch.full_like(values, 2.0)


def test_planted_cls_attention_is_found(llava: VLM, image: Any) -> None:
    edits = [Edit("vision_k", layer, planted_cls) for layer in (1, 2)]
    edits += [Edit("vision_q", layer, along_ones) for layer in (1, 2)]
    tables = measured(llava, image, edits, top_k=3, n_concentrated=3).result().tables
    marked = tables["maps"][tables["maps"]["first in the encoder's attention"]]
    assert set(4 * marked["row"] + marked["column"]) == {2, 7, 13}
    # scores are 2 * 8 / sqrt(8) times the sizes, and 0 for the thirteen others
    scores = np.exp(np.array([1.0, 0.9, 0.8]) * 2 * 8 / 8**0.5)
    share = tables["concentration"].set_index("layer")["top_share"]
    assert share[1] == pytest.approx(scores.sum() / (scores.sum() + 13), rel=1e-4)
    assert share[0] < 0.6
    # the box of the true object holds cells 0, 1, 4 and 5: none of the planted patches
    on_objects = tables["concentration"].set_index("layer")["on_objects"]
    assert on_objects[1] == pytest.approx(4 / (scores.sum() + 13), rel=1e-4)
    assert tables["concentration"]["area"].iloc[0] == pytest.approx(0.25)


def test_planted_sink_dimensions_and_tokens_are_found(llava: VLM, image: Any) -> None:
    """A value of 40000 in dimension 5 of the first token, and of 900 in that of two image tokens, after block 1.

    A state of 32 numbers has |x_d| / RMS of sqrt(32) = 5.7 at most, so the limit of 20 is lowered to 5.
    """

    def plant(values: torch.Tensor, calls: Any) -> torch.Tensor:
        changed = values.clone()
        changed[:, 0, 5] = 40000.0
        for row in range(len(values)):
            changed[row, calls.batch.image_mask[row].nonzero()[[4, 9], 0], 5] = -900.0
        return changed

    tables = measured(llava, image, [Edit("resid_post", 1, plant)], sink_threshold=5.0).result().tables
    massive = tables["massive"].set_index(["stream", "layer"])
    assert massive.loc[("decoder", 1), "dimensions"].startswith("5 (100%)")
    assert massive.loc[("decoder", 1), "token"] == "first"
    assert massive.loc[("decoder", 0), "n_dimensions"] == 0
    assert tables["sinks"].set_index("layer")["sinks"][1] == 2
    assert tables["sinks"].set_index("layer")["sinks"][0] == 0
    marked = tables["maps"][tables["maps"]["attention sink of the decoder"]]
    assert set(4 * marked["row"] + marked["column"]) == {4, 9}


def test_given_sink_dimensions_are_used(llava: VLM, image: Any) -> None:
    probe = measured(llava, image, [], n=2, sink_dimensions=[3], sink_threshold=1.0)
    with llava.trace(sites.resid_post()) as trace:
        llava.forward(caption(llava, image))
    states = trace["resid_post"].stack()[:, caption(llava, image).image_mask].view(3, 2, 16, -1)
    phi = states[..., 3].abs() / states.square().mean(dim=-1).sqrt()
    assert probe.result().tables["sinks"]["sinks"].tolist() == (phi >= 1).sum(dim=-1).double().mean(dim=1).tolist()


# -- families, figures, causal targets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_every_family_is_measured_or_refused_by_name(family: str, image: Any) -> None:
    vlm = BUILDERS[family]()
    probe = ClsOutliers(n_resamples=20, top_k=2)
    if family.split()[0] in ("blip-2", "instructblip", "mllama"):
        with pytest.raises(UnsupportedError, match=r"reads the image by cross-attention|Q-Former"):
            probe.sites(vlm.anatomy)
        return
    batches = [
        vlm.encode([[image(row, 30, 18)]], [prompt(vlm, 1, "is there a dog ?")], chat=False).with_continuation([[8, 9]])
        for row in range(2)
    ]
    for batch in batches:
        vlm.measure(probe, batch)
    tables = probe.result().tables
    kind = "CLS attention" if vlm.anatomy.has_cls else "mean attention received"
    assert set(tables["concentration"]["encoder"]) == set(tables["overlap"]["encoder"]) == {kind}
    assert tables["overlap"]["overlap"].between(0, 1).all()
    assert tables["overlap"].groupby(["encoder_layer", "query"])["overlap"].last().eq(1).all()
    assert np.isfinite(tables["concentration"]["top_share"]).all()


def test_a_tower_without_cls_is_never_taken_for_one_with(llava_siglip: VLM, llava: VLM) -> None:
    with pytest.raises(UnsupportedError, match="no CLS"):
        ClsOutliers(encoder_attention="cls").sites(llava_siglip.anatomy)
    assert ClsOutliers(encoder_attention="received").sites(llava.anatomy)[0].queries == "patches"


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"encoder_attention": "clss"}, UnknownNameError, "cls"),
        ({"top_k": 0}, InputError, "top_k"),
        ({"n_maps": -1}, InputError, "n_maps"),
        ({"encoder_layers": [3]}, InputError, "blocks 0 to 2"),
        ({"encoder_layers": []}, InputError, "blocks 0 to 2"),
        ({"sink_dimensions": [32]}, InputError, "0 to 31"),
    ],
)
def test_parameters_are_checked_before_anything_runs(
    llava: VLM, parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ClsOutliers(**parameters).sites(llava.anatomy)


def test_maps_are_kept_of_a_few_items(llava: VLM, image: Any) -> None:
    tables = measured(llava, image, [], n=3, n_maps=2).result().tables
    assert (
        tables["maps"]["item"].unique().tolist() == tables["pictures"]["item"].unique().tolist() == ["item0", "item1"]
    )
    first = tables["pictures"][tables["pictures"]["item"] == "item0"][["red", "green", "blue"]].to_numpy()
    small = np.asarray(image(0).convert("RGB").resize((64, 64)))
    assert np.array_equal(first.reshape(64, 64, 3), small)
    assert "maps" not in measured(llava, image, [], n=2, n_maps=0).result().tables


def test_causal_targets_replace_the_outliers_and_nothing_else(llava: VLM, image: Any) -> None:
    probe = measured(llava, image, [], n=3, top_k=4, n_maps=3)
    batch = caption(llava, image, 3)
    with llava.trace(sites.resid_pre(layers=0, positions="image")) as before:
        llava.forward(batch)
    plain = before["resid_pre"][0]
    mean = plain.reshape(-1, plain.shape[-1]).mean(dim=0)
    targets = {(one.name, one.control_name): one for one in probe.causal_targets(llava.anatomy)}
    name = "image tokens replaced by the mean: first in the encoder's attention"
    random, matched = targets[name, "as many random tokens"], targets[name, "as many, of the decoder's attention"]
    maps = probe.result().tables["maps"]
    expected = maps["first in the encoder's attention"].to_numpy().reshape(3, 16)
    decoder = maps["decoder"].to_numpy().reshape(3, 16)
    for edits, wanted in (
        (random.target, expected),
        (matched.controls[0], np.stack([matched_tokens(*one) for one in zip(decoder, expected, strict=True)])),
        *((one, None) for one in random.controls),
    ):
        with llava.trace(sites.resid_pre(layers=0, positions="image")) as after:
            llava.forward(batch, edits=edits(batch))
        new = after["resid_pre"][0]
        changed = (new != plain).any(dim=-1)
        if wanted is None:
            assert changed.sum(dim=1).tolist() == [4, 4, 4]
            assert not (changed.numpy() & expected).any()
        else:
            assert np.array_equal(changed.numpy(), wanted)
        torch.testing.assert_close(new[changed], mean.expand(12, -1))
    assert len(random.controls) == 19
    for edits in targets[name, "as many others, of named objects first"].controls:
        with llava.trace(sites.resid_pre(layers=0, positions="image")) as after:
            llava.forward(batch, edits=edits(batch))
        changed = (after["resid_pre"][0] != plain).any(dim=-1).numpy()
        on_object = np.isin(np.arange(16), [0, 1, 4, 5])[None] & ~expected  # the box of the labels
        assert (changed & on_object).sum(axis=1).tolist() == on_object.sum(axis=1).tolist()
        assert changed.sum(axis=1).tolist() == [4, 4, 4]
        assert not (changed & expected).any()
    stranger = llava.encode([image(9)], ["<image> what ?"], ids=["stranger"])
    with pytest.raises(InputError, match="stranger"):
        random.target(stranger)


def test_figures_are_drawn_from_the_tables(llava: VLM, image: Any) -> None:
    result = measured(llava, image, [], n=3).result()
    drawn = result.figures()
    assert set(drawn) == set(FIGURES)
    for drawing in FIGURES.values():
        assert drawing.draw(result.tables, NARROW) is not None
        assert drawing.caption(result.tables)
    curve = drawn["overlap"].axes[0].lines[0].get_ydata()
    table = result.tables["overlap"]
    rows = table[table["features"] & (table["query"] == QUERIES[0])]
    np.testing.assert_allclose(np.asarray(curve, dtype=float), rows["overlap"])
    assert all(drawing.draw({}) is None for drawing in FIGURES.values())


@pytest.mark.filterwarnings("error")
def test_without_labels_there_is_overlap_but_no_influence(llava: VLM, image: Any) -> None:
    probe = ClsOutliers(n_resamples=20)
    llava.measure(probe, llava.encode([image(0)], ["<image> what ?"], ids=["bare"]))
    result = probe.result()
    assert "influence" not in result.tables
    assert set(result.tables["overlap"]["query"]) == {QUERIES[0]}
    assert set(result.figures()) == set(FIGURES) - {"influence"}
    assert "chance" in result.summary
