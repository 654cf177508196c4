"""What every probe must hold. A new probe joins by one line in PROBES.

Planted truths and nulls are in the files of the probes: no two probes share them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pretend_devices import PretendDevices, dispatch

from probes import (
    ActivationPatching,
    AttentionKnockout,
    AttentionRollout,
    ClsOutliers,
    HeadDivergence,
    ImplicitAlignment,
    LinearProbe,
    LogitLens,
    RepresentationSimilarity,
    SteeringVectors,
    Subnetworks,
    TokenAblation,
    TokenLedger,
    TruthfulDirection,
)
from slitlamp.causal import causal_check
from slitlamp.errors import InputError
from slitlamp.models import Batch
from slitlamp.tracing import Probe
from slitlamp.vlm import VLM


@dataclass(frozen=True)
class Case:
    """A probe under contract.

    Attributes:
        make: a fresh probe whose parameters fit the tiny LLaVA (3 layers, 3 captions, labels of all kinds).
        value: (table, column) of its main number, which bfloat16 may change by its precision only.
        half: by how much, relative to the largest value of the column.
        atol: by how much anything may differ between batches.
        needs_image: whether rows without an image are refused.
        seeded: the parameter that makes another probe of it.
    """

    make: Callable[[], Probe]
    value: tuple[str, str]
    half: float = 0.1
    atol: float = 1e-5
    needs_image: bool = True
    seeded: str = "seed"


HEADS = ("heads", "vhd")
PROBES: dict[str, Case] = {
    # in folds of one image each, an image of one kind leaves no pair: difference of means and logistic only
    "SteeringVectors": Case(
        lambda: SteeringVectors(methods=["difference_of_means", "logistic"], n_resamples=50),
        ("layers", "norm"),
        needs_image=False,
    ),
    "RepresentationSimilarity": Case(
        lambda: RepresentationSimilarity(measures=["cka", "svcca", "procrustes", "mutual_knn"], k=1),
        ("layers", "value"),
    ),
    "RepresentationSimilarity last": Case(
        lambda: RepresentationSimilarity(measures=["procrustes"], position="last", site="z"),
        ("layers", "value"),
        needs_image=False,
    ),
    # one AUROC of six samples moves in ninths
    "LinearProbe": Case(
        lambda: LinearProbe(n_resamples=50, n_controls=0, n_permutations=0),
        ("layers", "auroc"),
        half=0.5,
        needs_image=False,
    ),
    "LinearProbe category": Case(
        lambda: LinearProbe(
            target="category",
            position="at_object",
            site="z",
            method="difference_of_means",
            n_resamples=50,
            n_controls=0,
            n_permutations=0,
        ),
        ("layers", "auroc"),
        half=0.5,
        needs_image=False,
    ),
    "LogitLens": Case(lambda: LogitLens(n_resamples=50), ("text", "value"), needs_image=False),
    "ActivationPatching": Case(
        lambda: ActivationPatching(n_resamples=50, layers=[1], directions=["denoising"], min_difference=0.1),
        ("positions", "effect"),
        half=0.5,
    ),
    "ActivationPatching attribution": Case(
        lambda: ActivationPatching(n_resamples=50, method="attribution", corrupt="mean", min_difference=0.1),
        ("attribution", "effect"),
        half=0.5,
    ),
    "AttentionKnockout": Case(lambda: AttentionKnockout(n_resamples=50), ("effects", "change"), half=0.5),
    "TokenAblation": Case(
        lambda: TokenAblation(n_resamples=50, top_k=3, n_random=1, n_shifted=1), ("effects", "change"), half=0.5
    ),
    "ClsOutliers": Case(lambda: ClsOutliers(n_resamples=50, top_k=3), ("concentration", "top_share")),
    "ClsOutliers received": Case(
        lambda: ClsOutliers(n_resamples=50, encoder_attention="received"), ("concentration", "top_share")
    ),
    "AttentionRollout": Case(lambda: AttentionRollout(n_resamples=50), ("depths", "image")),
    "AttentionRollout flow": Case(lambda: AttentionRollout(n_resamples=50, flow_share=1.0), ("shares", "image")),
    "HeadDivergence": Case(lambda: HeadDivergence(n_resamples=50), HEADS),
    "HeadDivergence zero": Case(lambda: HeadDivergence(contrast="zero", n_resamples=50), HEADS),
    "HeadDivergence mean": Case(lambda: HeadDivergence(contrast="mean", n_resamples=50), HEADS),
    "HeadDivergence noise": Case(lambda: HeadDivergence(contrast="noise", n_resamples=50), HEADS),
    "HeadDivergence prior": Case(
        lambda: HeadDivergence(contrasts=["zero", "noise"], language_prior=True, n_resamples=50),
        ("prior", "kl"),
        half=0.2,
    ),
    # t-SNE is chaotic: it makes a rounding difference visible
    "ImplicitAlignment": Case(lambda: ImplicitAlignment(n_resamples=50, embedding="pca"), ("similarity", "value")),
    "ImplicitAlignment sampled": Case(
        lambda: ImplicitAlignment(
            n_resamples=50,
            embedding="none",
            max_items=2,
            token_items=1,
            max_tokens=2,
            massive_k=2,
            text="all",
            inside=False,
            vocabulary=False,
        ),
        ("similarity", "value"),
    ),
    "Subnetworks": Case(Subnetworks, ("iou", "iou")),
    "TokenLedger": Case(lambda: TokenLedger(n_resamples=50), ("ledger", "t_vhd")),
    # labels drawn from probabilities flip one at a time when these move: an error of 1 / 6 in one of 2000 draws, a few times
    "TruthfulDirection": Case(
        lambda: TruthfulDirection(n_resamples=50, mlp_epochs=1, mlp_widths=[4, 4], n_controls=1),
        ("mentions", "neg_log_p"),
        atol=5e-4,
    ),
    "TruthfulDirection at": Case(
        lambda: TruthfulDirection(position="at", layers=[0, 2], dtype="float16", methods=["logistic"], n_resamples=50),
        ("mentions", "neg_log_p"),
    ),
}
TOWER = ("model.vision_tower", "model.multi_modal_projector")
PROMPTS = ["<image> is there a dog ?", "<image> what is in the image and where is it ?", "describe this <image> ."]
WORDS = [3, 6, 1]


@pytest.fixture(params=list(PROBES))
def case(request: pytest.FixtureRequest) -> Case:
    return PROBES[request.param]


@pytest.fixture
def make(case: Case) -> Callable[[], Probe]:
    return case.make


def test_every_probe_of_the_package_is_under_contract() -> None:
    ours = {one.name for one in entry_points(group="slitlamp.probes") if one.value.startswith("probes:")}
    assert ours == {name.split()[0] for name in PROBES}


def captions(vlm: VLM, image: Any, rows: list[int]) -> tuple[Batch, list[pd.DataFrame]]:
    """Some prompts with captions of given ids (none an end token), and labels of their words."""
    batch = vlm.encode(
        images=[image(10 + row) for row in rows],
        prompts=[PROMPTS[row] for row in rows],
        ids=[f"item{row}" for row in rows],
    )
    tokens = [[6 + (row + step) % 12 for step in range(WORDS[row])] for row in rows]
    labels = [
        pd.DataFrame(
            {
                "token": range(len(one)),
                "word": [f"w{token}" for token in one],
                "label": [("object", "hallucinated", "other")[(row + step) % 3] for step in range(len(one))],
                "category": [("dog", "cat", None)[(row + step) % 3] for step in range(len(one))],
                "frequency": [(0.5, 0.25, float("nan"))[(row + step) % 3] for step in range(len(one))],
                "truth": [None] * len(one),
                "boxes": [([(0.1, 0.1, 0.6, 0.7)], [], [])[(row + step) % 3] for step in range(len(one))],
            }
        )
        for row, one in zip(rows, tokens, strict=True)
    ]
    return batch.with_continuation(tokens), labels


def measured(probe: Probe, vlm: VLM, image: Any, groups: list[list[int]]) -> Probe:
    for rows in groups:
        batch, labels = captions(vlm, image, rows)
        vlm.measure(probe, batch, labels)
    return probe


def assert_equal_tables(one: Probe, other: Probe, rtol: float, atol: float = 1e-5) -> None:
    first, second = one.result().tables, other.result().tables
    assert first.keys() == second.keys()
    for name, table in first.items():
        assert len(table) > 0
        pd.testing.assert_frame_equal(table, second[name], rtol=rtol, atol=atol, obj=name)


def test_the_same_input_gives_the_same_tables(make: Callable[[], Probe], llava: VLM, image: Any) -> None:
    one, other = (measured(make(), llava, image, [[0, 1, 2]]) for _ in range(2))
    assert_equal_tables(one, other, rtol=0, atol=0)


def test_batch_size_and_padding_do_not_change_the_answer(case: Case, llava: VLM, image: Any) -> None:
    """Rows alone are not padded; together the shorter ones are. float32 sums in another order: a few 1e-6 of the scale."""
    together = measured(case.make(), llava, image, [[0, 1, 2]])
    alone = measured(case.make(), llava, image, [[0], [1], [2]])
    assert_equal_tables(together, alone, rtol=1e-4, atol=case.atol)


def test_bfloat16_gives_the_same_within_its_precision(case: Case, llava: VLM, image: Any) -> None:
    half = VLM.wrap(copy.deepcopy(llava.model).to(torch.bfloat16), llava.processor)
    table, column = case.value
    one, other = (measured(case.make(), vlm, image, [[0, 1]]).result().tables[table][column] for vlm in (llava, half))
    assert np.array_equal(np.isnan(one), np.isnan(other))  # what is measured does not depend on the precision
    # 8 bits of mantissa give 0.4 % a rounding; three blocks of several roundings each add up to some per cent
    assert np.nanmax(np.abs(one - other)) < case.half * np.nanmax(np.abs(one))


def test_layers_on_other_devices_give_the_same(make: Callable[[], Probe], llava: VLM, image: Any) -> None:
    """The first block on one device, the others on another, the tower on a third: the same kernels, so the same numbers."""
    model = copy.deepcopy(llava.model)
    layers = "model.language_model.layers"
    rest = (f"{layers}.1", f"{layers}.2", "model.language_model.norm", "lm_head")
    dispatch(model, {f"{layers}.0": "cuda:0"} | dict.fromkeys(rest, "cuda:1") | dict.fromkeys(TOWER, "cuda:2"))
    spread = make()
    with PretendDevices():
        measured(spread, VLM.wrap(model, llava.processor), image, [[0, 1]])
    assert_equal_tables(measured(make(), llava, image, [[0, 1]]), spread, rtol=1e-6, atol=1e-6)


def test_a_saved_state_goes_on_as_if_nothing_had_happened(make: Callable[[], Probe], llava: VLM, image: Any) -> None:
    whole = measured(make(), llava, image, [[0, 1], [2]])
    first = measured(make(), llava, image, [[0, 1]])
    resumed = make()
    resumed.load_state(first.state())
    measured(resumed, llava, image, [[2]])
    assert_equal_tables(whole, resumed, rtol=0, atol=0)


def test_merged_parts_are_the_whole(make: Callable[[], Probe], llava: VLM, image: Any) -> None:
    whole = measured(make(), llava, image, [[0, 1], [2]])
    parts = measured(make(), llava, image, [[0, 1]])
    parts.merge(measured(make(), llava, image, [[2]]))
    assert_equal_tables(whole, parts, rtol=0, atol=0)


def test_states_are_plain_arrays(make: Callable[[], Probe], llava: VLM, image: Any) -> None:
    for array in measured(make(), llava, image, [[0, 1]]).state().values():
        assert isinstance(array, np.ndarray)
        assert array.dtype.kind in "bifU"


@pytest.mark.parametrize("name", [name for name in PROBES if " " not in name])
def test_a_finding_is_a_place_that_can_be_intervened_on_or_the_probe_says_why_not(
    name: str, llava: VLM, image: Any
) -> None:
    """Every target changes what the model says next, and so do its controls, of which no two are the same."""
    probe = measured(PROBES[name].make(), llava, image, [[0, 1, 2]])
    if probe.no_target:
        assert probe.no_target.endswith(".")
        assert probe.causal_targets(llava.anatomy) == []
        return
    targets = probe.causal_targets(llava.anatomy)
    assert targets
    batch, labels = captions(llava, image, [0, 1, 2])
    table = causal_check(llava, targets, [(batch, labels)], n_resamples=20)
    changed = table[table["outcome"] == "kl"]
    assert len(changed) == len(targets)
    assert (changed[["effect", "control_effect"]] > 0).all(axis=None)
    for target in targets:
        assert (
            len(target.controls) == 19
            or len(target.controls) < llava.anatomy.n_layers
            or "attention" in target.control_name
        )


def test_other_parameters_do_not_merge(case: Case) -> None:
    other = replace(case.make(), **{case.seeded: 99})  # type: ignore[type-var]
    with pytest.raises(InputError, match="not the same probe"):
        case.make().merge(other)


def test_nothing_measured_gives_an_error_not_an_empty_result(make: Callable[[], Probe]) -> None:
    with pytest.raises(InputError, match="taken in nothing"):
        make().result()


def test_rows_without_an_image_are_refused(case: Case, llava: VLM) -> None:
    if not case.needs_image:
        pytest.skip("measures text too")
    batch = llava.encode(prompts=["is there a dog ?"], ids=["textual"]).with_continuation([[6, 7]])
    with pytest.raises(InputError, match="textual"):
        llava.measure(case.make(), batch)


def test_measuring_leaves_the_model_as_it_was(make: Callable[[], Probe], llava: VLM, image: Any) -> None:
    before = llava.model.config.to_dict()
    measured(make(), llava, image, [[0]])
    hooks = [m for m in llava.model.modules() if m._forward_pre_hooks]
    assert hooks == []
    assert llava.model.config.to_dict() == before
