"""Subnetworks: Wanda by hand and from the modules' own inputs, a model whose overlap is known, and norms that mean nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import jaccard_score
from tiny_models import BUILDERS
from torch import nn

from interventions import SubnetMask
from probes import Subnetworks
from probes.overlaps import TokenSet, overlaps
from probes.subnetwork_tables import mean_interval
from probes.wanda import (
    Matrix,
    iou,
    keep_masks,
    keep_top,
    load_masks,
    matrices,
    n_dropped,
    random_iou,
    save_masks,
    wanda_score,
    weight_of,
)
from slitlamp.errors import InputError, UnknownNameError, UnsupportedError
from slitlamp.reports.style import NARROW, WIDE
from slitlamp.reports.subnetworks import FIGURES, square_of
from slitlamp.tracing.probe import Part
from slitlamp.tracing.trace import Source
from slitlamp.vlm import VLM

PROMPTS = ["<image> is there a dog ?", "describe this <image> .", "<image> what is in the image and where is it ?"]
NORMED = ("q", "k", "v", "gate", "up")
"""Linear maps whose input is a norm's output."""


def measured(vlm: VLM, image: Any, seeds: range, **parameters: Any) -> Subnetworks:
    """Items of three prompts in turn, with two generated tokens each."""
    probe = Subnetworks(**parameters)
    for seed in seeds:
        batch = vlm.encode(images=[image(seed)], prompts=[PROMPTS[seed % 3]], ids=[f"item{seed}"])
        vlm.measure(probe, batch.with_continuation([[6 + seed % 5, 9]]))
    return probe


# -- formulas by hand ---------------------------------------------------------------------------------------------------


def test_score_and_masks_by_hand() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0], [-5.0, 1.0, 1.0, 1.0]])
    norms = torch.tensor([3.0, 0.5, 2.0, 1.0])
    score = wanda_score(weight, norms)
    assert score.tolist() == [[3, 2, 4, 3], [15, 0.5, 2, 1]]
    half, quarter, none = keep_masks(score, [0.5, 0.25, 0.1])
    # the tie of 3 and 3: the first is dropped
    assert half.tolist() == [[False, False, True, True], [True, False, True, False]]
    assert quarter.tolist() == [[True, False, True, True], [True, False, True, True]]
    assert none.all()
    assert iou(half, quarter) == 4 / 6
    assert [n_dropped(10, 0.3), n_dropped(10, 0.7), n_dropped(7, 0.5)] == [3, 7, 3]


def test_ties_and_zeros_still_drop_the_same_number() -> None:
    score = torch.zeros(3, 8)
    score[1, 5] = 1
    score[2] = torch.tensor([2.0, 1, 1, 1, 2, 1, 1, 1])
    mask = keep_masks(score, [0.5])[0]
    assert mask.sum(dim=1).tolist() == [4, 4, 4]
    assert mask[0].tolist() == [False] * 4 + [True] * 4
    assert mask[1].tolist() == [False] * 4 + [True] * 4
    assert mask[2].tolist() == [True, False, False, False, True, False, True, True]


def test_the_two_ways_to_the_limits_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU by numpy's partition, elsewhere by torch's kthvalue."""
    score = torch.rand(40, 33, generator=torch.Generator().manual_seed(0)).mul(20).round()  # with many ties
    expected = keep_masks(score, [0.3, 0.5])
    by_kth = [score.kthvalue(rank, dim=1).values for rank in (9, 16)]
    monkeypatch.setattr("probes.wanda._ranked", lambda score, ranks: by_kth)
    assert all(torch.equal(a, b) for a, b in zip(expected, keep_masks(score, [0.3, 0.5]), strict=True))


def test_keep_top_keeps_as_many_as_asked() -> None:
    score = torch.rand(6, 10, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([0, 1, 5, 9, 10, 3])
    mask = keep_top(score, counts)
    assert torch.equal(mask.sum(dim=1), counts)
    assert all(score[row][mask[row]].min() > score[row][~mask[row]].max() for row in (1, 2, 3, 5))


def test_iou_of_random_masks_is_what_the_formula_says() -> None:
    """500 pairs of masks of 200 weights; the mean has a standard error of about .002."""
    rng = np.random.default_rng(0)
    for sparsity in (0.3, 0.5):
        pairs = torch.from_numpy(rng.random((500, 2, 200)) > sparsity)
        assert np.mean([iou(a, b) for a, b in pairs]) == pytest.approx(random_iou(sparsity), abs=0.008)
    assert (random_iou(0.5), random_iou(0.3)) == (pytest.approx(1 / 3), pytest.approx(0.7 / 1.3))


def test_masks_survive_their_file(tmp_path: Path) -> None:
    masks = {"0.q": torch.rand(5, 7) > 0.5, "3.down": torch.rand(2, 3) > 0.5}
    path = save_masks(tmp_path / "some" / "masks.safetensors", masks, sparsity="0.5")
    found = load_masks(path)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[key], mask) for key, mask in masks.items())
    assert path.stat().st_size < 400 + 5 + 1
    with pytest.raises(InputError, match="no file of masks"):
        load_masks(tmp_path / "none.safetensors")


def test_a_fused_projection_gives_its_third() -> None:
    model = nn.Module()
    model.qkv = nn.Linear(4, 12)
    parts = [weight_of(model, Matrix(0, name, "qkv", "ln1", third)) for third, name in enumerate("qkv")]
    assert torch.equal(torch.cat(parts), model.qkv.weight)


def test_weights_that_are_not_there_are_refused_by_name() -> None:
    model = nn.Module()
    model.away = nn.Linear(4, 4, device="meta")
    model.tiny = nn.Linear(4, 4)
    model.tiny.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model.none = nn.Identity()
    for path, match in (("away", "offloaded"), ("tiny", "int8"), ("none", "no weight")):
        with pytest.raises(UnsupportedError, match=match):
            weight_of(model, Matrix(0, "q", path, "ln1"))


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_every_family_has_its_linear_maps(family: str) -> None:
    """All linear modules of the decoder's blocks are found, but experts, routers and cross-attention to keys of the image."""
    vlm = BUILDERS[family]()
    found = {one.path for one in matrices(vlm.anatomy)}
    wanted = {
        name
        for name, module in vlm.model.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(f"{block}.") for block in vlm.anatomy.blocks)
    }
    left = {name for name in wanted - found if not any(part in name for part in ("expert", "router", "cross_attn"))}
    assert left == set()
    assert found <= wanted
    for one in matrices(vlm.anatomy):
        assert weight_of(vlm.model, one).ndim == 2


# -- an independent implementation --------------------------------------------------------------------------------------


@contextmanager
def inputs_of(vlm: VLM, found: list[Matrix]) -> Iterator[dict[str, torch.Tensor]]:
    """What goes into the linear modules, from hooks on them: [position, input] of the first row."""
    inputs: dict[str, torch.Tensor] = {}

    def keeper(key: str) -> Any:
        def keep(module: nn.Module, args: Any) -> None:
            inputs[key] = args[0][0]

        return keep

    handles = [vlm.model.get_submodule(one.path).register_forward_pre_hook(keeper(one.key)) for one in found]
    yield inputs
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("text", ["text_after_image", "text", "generated"])
def test_overlap_from_the_modules_own_inputs(llava: VLM, image: Any, text: Any) -> None:
    """Inputs from hooks on the linear modules, one unpadded item at a time; Wanda's own loop; scikit-learn's Jaccard."""
    probe = Subnetworks(text=text)
    items = [(0, [6, 7, 8]), (1, [9]), (2, [6, 6])]
    found = matrices(llava.anatomy)
    sums = {(one.key, kind): 0.0 for one in found for kind in ("image", "text")}
    for seed, tokens in items:
        batch = llava.encode(images=[image(seed)], prompts=[PROMPTS[seed]]).with_continuation([tokens])
        with inputs_of(llava, found) as inputs:
            llava.forward(batch)
        is_image = batch.input_ids[0] == batch.image_token_id
        place = torch.arange(batch.length)
        is_text = {
            "text": ~is_image,
            "text_after_image": place > int(is_image.nonzero().max()),
            "generated": place >= batch.length - len(tokens),
        }[text]
        for one in found:
            for kind, chosen in (("image", is_image), ("text", is_text)):
                sums[one.key, kind] = sums[one.key, kind] + inputs[one.key][chosen].double().square().sum(dim=0)
    together = llava.encode(images=[image(s) for s, _ in items], prompts=[PROMPTS[s] for s, _ in items])
    llava.measure(probe, together.with_continuation([tokens for _, tokens in items]))
    table = probe.result().tables["iou"].set_index(["type", "layer", "sparsity"])["iou"]
    for one in found:
        weight = weight_of(llava.model, one)
        for sparsity in (0.3, 0.5):
            kept = []
            for kind in ("image", "text"):
                score = weight.abs().double() * torch.as_tensor(sums[one.key, kind]).sqrt()
                order = torch.sort(score, dim=-1, stable=True)[1]
                kept.append(torch.ones_like(score).scatter(1, order[:, : int(weight.shape[1] * sparsity)], 0).flatten())
            expected = jaccard_score(kept[0].numpy(), kept[1].numpy())
            assert table[one.name, one.layer, sparsity] == pytest.approx(expected, abs=1e-9)


# -- planted truths -----------------------------------------------------------------------------------------------------


def planted(vlm: VLM, text_from: int) -> VLM:
    """A model whose image tokens use inputs 0-15 alone and whose text uses 16 inputs from `text_from`; blocks add nothing."""
    model = copy.deepcopy(vlm.model)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        words = model.model.language_model.embed_tokens.weight
        words[:, :text_from] = 0
        words[:, text_from + 16 :] = 0
        out = model.model.multi_modal_projector.linear_2
        out.weight[16:] = 0
        out.bias[16:] = 0
    return VLM.wrap(model, vlm.processor)


@pytest.mark.parametrize(("text_from", "expected"), [(16, 0.0), (8, 8 / 24), (4, 12 / 20), (0, 1.0)])
def test_overlap_of_inputs_that_were_planted(llava: VLM, image: Any, text_from: int, expected: float) -> None:
    """Half of the 32 inputs have norm 0 for each kind: at sparsity .5 exactly the others stay."""
    found = measured(planted(llava, text_from), image, range(4), sparsities=[0.5]).result().tables["iou"]
    rows = found[found["type"].isin(NORMED)]
    assert len(rows) == 15
    assert rows["iou"].tolist() == pytest.approx([expected] * 15)
    assert rows["low"].tolist() == pytest.approx([expected] * 15)


def test_the_same_statistics_overlap_wholly(llava: VLM, image: Any) -> None:
    """Every token, of image or text, is the same vector: norms differ by a factor, masks not at all."""
    model = copy.deepcopy(llava.model)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[:] = vector
        model.model.multi_modal_projector.linear_2.weight.zero_()
        model.model.multi_modal_projector.linear_2.bias[:] = vector
    tables = measured(VLM.wrap(model, llava.processor), image, range(4)).result().tables
    assert tables["iou"]["iou"].min() > 0.999  # rounding may turn a near tie
    joint = tables["alpha_subnet"]
    rows = joint[~joint["type"].isin(["down", "all"])]  # those of 32 inputs
    expected = [n_dropped(32, sparsity) / 32 for sparsity in rows["sparsity"]]
    assert rows["joint_sparsity"].to_numpy() == pytest.approx(expected, abs=1e-3)


class Holder(nn.Module):
    """A model with one linear map, for token sets made by hand."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.one = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.one.weight = nn.Parameter(weight, requires_grad=False)


def sets_by_hand(weight: torch.Tensor, *squares: Any) -> list[TokenSet]:
    """Token sets over one linear map from arrays [fold, width]."""
    source = Source(Holder(weight), None, None)  # type: ignore[arg-type]
    matrix = {"0.one": Matrix(0, "one", "one", "ln1")}
    layers = {"ln1": np.array([0])}
    return [TokenSet(source, matrix, {"ln1": one[:, None]}, layers, np.full(len(one), 4)) for one in squares]


def test_random_norms_overlap_as_random_masks_do() -> None:
    """Equal weights: a row's mask is a random set of inputs. 400 pairs over 64 inputs; the standard error is about .004."""
    rng = np.random.default_rng(0)
    for sparsity in (0.3, 0.5):
        found = []
        for _ in range(400):
            one, other = sets_by_hand(torch.ones(2, 64), *rng.gamma(1.0, size=(2, 1, 64)))
            found.append(float(overlaps([one, other], [(0, 1)], [sparsity]).iou[0, 0, 0, 0]))
        assert np.mean(found) == pytest.approx(random_iou(sparsity), abs=0.015)


def test_unrelated_norms_overlap_as_shuffled_ones_do_and_more_than_random_masks() -> None:
    """Shared weights alone make masks alike; the control of shuffled norms knows it, the formula does not."""
    rng = np.random.default_rng(1)
    weight = torch.from_numpy(rng.normal(size=(50, 64))).float()
    found, control = [], []
    for seed in range(150):
        image, text = sets_by_hand(weight, *rng.gamma(2.0, size=(2, 1, 64)))
        both = overlaps([image, text, text.shuffled(seed)], [(0, 1), (0, 2)], [0.5]).iou[0, :, 0, 0]
        found.append(both[0])
        control.append(both[1])
    difference = np.array(found) - np.array(control)
    assert abs(difference.mean()) < 3 * difference.std() / np.sqrt(len(difference))
    assert np.mean(found) > random_iou(0.5) + 0.1


def test_intervals_cover_the_overlap_of_all_items() -> None:
    """Items drawn from a population whose norms are known. Sampling noise pulls the IoU down by less than its error here.

    100 simulated measurements of 160 items in 8 folds; a coverage of 95 % has a standard error of 2 %.
    """
    rng = np.random.default_rng(2)
    weight = torch.from_numpy(rng.normal(size=(60, 48))).float()
    means = rng.gamma(1.0, size=(2, 48))
    truth = overlaps(sets_by_hand(weight, *means[:, None]), [(0, 1)], [0.5]).iou[0, 0, 0, 0]
    covered = 0
    for _ in range(100):
        drawn = [rng.gamma(1.0, mean, size=(160, 48)).reshape(8, 20, 48).sum(axis=1) for mean in means]
        values = overlaps(sets_by_hand(weight, *drawn), [(0, 1)], [0.5], folds=range(8)).iou[:, 0, :, 0]
        one = mean_interval(values, np.full(8, 20.0))
        covered += one.low <= truth <= one.high
    assert covered >= 88


# -- states, comparisons, files -----------------------------------------------------------------------------------------


def test_a_state_needs_its_model_and_nothing_else(llava: VLM, image: Any) -> None:
    whole = measured(llava, image, range(3))
    loaded = Subnetworks()
    loaded.load_state(whole.state())
    with pytest.raises(InputError, match="source_"):
        loaded.result()
    loaded.source_ = whole.source_
    pd.testing.assert_frame_equal(loaded.result().tables["iou"], whole.result().tables["iou"])


def test_memory_does_not_grow_with_the_items(llava: VLM, image: Any) -> None:
    few = measured(llava, image, range(12), folds=3).state()
    many = measured(llava, image, range(30), folds=3).state()
    assert sum(one.nbytes for one in many.values()) == sum(one.nbytes for one in few.values())


def test_items_of_one_image_stay_in_one_fold(llava: VLM, image: Any) -> None:
    probe = Subnetworks()
    for number in range(6):
        batch = llava.encode(images=[image(0)], prompts=[PROMPTS[number % 3]], ids=[f"question{number}"])
        llava.measure(probe, batch.grouped(["one image"]))
    table = probe.result().tables["iou"]
    assert table["n_folds"].unique().tolist() == [1]
    assert table["low"].isna().all()


def test_comparing_data_sets_conditions_and_models(llava: VLM, image: Any) -> None:
    first, second = measured(llava, image, range(6)), measured(llava, image, range(6, 12))
    assert Subnetworks.compare({Part("a", "baseline", "one"): first}) is None
    other = measured(VLM.wrap(copy.deepcopy(llava.model), llava.processor), image, range(6))
    parts = {
        Part("a", "baseline", "one"): first,
        Part("a", "baseline", "two"): second,
        Part("a", "vhr", "one"): first,
        Part("copy", "baseline", "one"): other,
    }
    result = Subnetworks.compare(parts)
    assert result is not None
    table = result.tables["tasks"]
    rows = table[(table["type"] == "all") & (table["sparsity"] == 0.5)]
    assert rows.groupby("kind").size().to_dict() == {
        "image and text": 4,
        "image and text, other data": 2,
        "image, other data": 1,
        "text, other data": 1,
        "image, other condition": 1,
        "text, other condition": 1,
        "image, other model": 1,
        "text, other model": 1,
    }
    same = rows[rows["kind"].str.contains("other model|other condition")]
    assert (same["iou"] == 1).all()
    one = first.result().tables["iou_by_type"]
    direct = rows[(rows["kind"] == "image and text") & (rows["dataset_a"] == "one") & (rows["model_a"] == "a")].iloc[0]
    expected = one[(one["type"] == "all") & (one["sparsity"] == 0.5)].iloc[0]
    assert (direct[["iou", "low", "high", "n_items"]] == expected[["iou", "low", "high", "n_items"]]).all()
    apart = Subnetworks.compare({Part("a", "b", "one"): first, Part("v", "b", "one"): shrunk(other)})
    assert apart is not None
    assert set(apart.tables["tasks"]["kind"]) == {"image and text"}
    joint = result.tables["joint_subnet"]
    assert joint.groupby(["model", "condition"])["n_sets"].first().to_dict() == {
        ("a", "baseline"): 4,
        ("a", "vhr"): 2,
        ("copy", "baseline"): 2,
    }
    assert "random masks: 0.333" in result.summary


def shrunk(probe: Subnetworks) -> Subnetworks:
    """The probe on a model with other shapes: its last block is not looked at."""
    small = Subnetworks(layers=[0, 1])
    small.load_state(
        {key: value[:2] if "layers." in key or "squares." in key else value for key, value in probe.state().items()}
    )
    small.source_ = probe.source_
    return small


def test_the_alpha_subnet_is_the_and_of_all_masks(llava: VLM, image: Any, tmp_path: Path) -> None:
    one, other = measured(llava, image, range(4)), measured(llava, image, range(4, 8))
    path = one.save_masks(tmp_path / "alpha.safetensors", sparsity=0.5, others=[other])
    masks = load_masks(path)
    assert list(masks) == [matrix.key for matrix in matrices(llava.anatomy)]
    for key, mask in masks.items():
        expected = torch.ones_like(mask)
        for probe in (one, other):
            for kind in ("image", "text"):
                expected &= probe.token_set(kind).masks(key, [0.5])[0]
        assert torch.equal(mask, expected)
    both = Subnetworks.compare({Part("a", "b", "one"): one, Part("a", "b", "two"): other})
    assert both is not None
    joint = both.tables["joint_subnet"].set_index(["type", "sparsity"])["joint_sparsity"]
    mean = np.mean([1 - float(mask.float().mean()) for mask in masks.values()])
    assert joint["all", 0.5] == pytest.approx(mean, abs=1e-6)
    method = SubnetMask(masks=str(path))
    with llava.apply(method):
        llava.forward(llava.encode(images=[image(0)], prompts=[PROMPTS[0]]))
    kept = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert method.kept_ == pytest.approx(kept)


def test_bad_parameters_and_models_are_refused(llava: VLM, image: Any) -> None:
    for bad in ({"sparsities": [0.0]}, {"sparsities": []}, {"folds": 1}, {"shuffles": 0}, {"layers": [3]}):
        with pytest.raises(InputError):
            Subnetworks(**bad).sites(llava.anatomy)
    with pytest.raises(UnknownNameError, match="text_after_image"):
        Subnetworks(text="text_after").sites(llava.anatomy)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="cross-attention"):
        Subnetworks().sites(BUILDERS["mllama"]().anatomy)
    probe = Subnetworks(text="generated")
    llava.measure(probe, llava.encode(images=[image(0)], prompts=[PROMPTS[0]]))
    with pytest.raises(InputError, match="no text tokens"):
        probe.result()


# -- figures ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(llava: VLM, image: Any) -> dict[str, pd.DataFrame]:
    one, other = measured(llava, image, range(4)), measured(llava, image, range(4, 8))
    compared = Subnetworks.compare(
        {Part("m", "baseline", "x/captions"): one, Part("m", "baseline", "x/pope_random"): other}
    )
    assert compared is not None
    return {**one.result().tables, **compared.tables}


def test_the_square_is_symmetric_with_ones(tables: dict[str, pd.DataFrame]) -> None:
    square = square_of(tables["tasks"])
    assert square is not None
    assert list(square) == ["captions, image", "POPE random, image", "captions, text", "POPE random, text"]
    assert np.array_equal(square.to_numpy(), square.to_numpy().T)
    assert (np.diag(square) == 1).all()
    row = tables["tasks"].query("type == 'all' and sparsity == 0.5 and kind == 'image, other data'").iloc[0]
    assert square.loc["captions, image", "POPE random, image"] == row["iou"]


@pytest.mark.parametrize("name", list(FIGURES))
def test_figures_are_drawn_where_there_is_something_to_draw(name: str, tables: dict[str, pd.DataFrame]) -> None:
    for width in (WIDE, NARROW):
        assert FIGURES[name].draw(tables, width) is not None
    assert FIGURES[name].draw({}, WIDE) is None
    assert len(FIGURES[name].caption(tables)) > 40


def test_the_layer_panel_shows_what_the_table_says(tables: dict[str, pd.DataFrame]) -> None:
    figure = FIGURES["iou_by_layer"].draw(tables, WIDE)
    assert figure is not None
    rows = tables["iou"].query("type == 'q' and sparsity == 0.5").sort_values("layer")
    lines = {str(line.get_label()): line for line in figure.axes[0].lines}
    assert np.asarray(lines["_iou"].get_ydata()).tolist() == rows["iou"].tolist()
    assert np.asarray(lines["_shuffled"].get_ydata()).tolist() == rows["shuffled"].tolist()
    assert np.asarray(lines["_chance"].get_ydata())[0] == pytest.approx(1 / 3)
