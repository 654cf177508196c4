"""Patches beside image tokens, in every family, against an edit of one patch; and cells under boxes."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from contract import prompt
from tiny_models import BUILDERS

from probes.cls_outliers import feature_block
from probes.outlier_places import boxes_of, covered, grow, place_tokens
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.tracing import Edit, sites
from slitlamp.vlm import VLM

REFUSED = {"blip-2": "Q-Former", "instructblip": "Q-Former", "mllama": "cross-attention"}


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_a_patch_reaches_the_token_that_it_is_put_beside(family: str, image: Any) -> None:
    """A change of one patch in the output of the block that the model reads changes that image token alone."""
    vlm = BUILDERS[family]()
    batch = vlm.encode([[image(3, 30, 18)]], [prompt(vlm, 1, "is there a dog ?")], chat=False)
    with vlm.trace(sites.vision_resid_post(positions="patches", layers=0, label="tower")) as trace:
        vlm.forward(batch)
    n_patches = trace.mask("tower").sum(dim=1).tolist()
    if family.split()[0] in REFUSED:
        with pytest.raises(UnsupportedError, match=REFUSED[family.split()[0]]):
            place_tokens(vlm.anatomy, batch, 0, n_patches)
        return
    placed = place_tokens(vlm.anatomy, batch, 0, n_patches)
    assert sorted(placed.patch.flatten().tolist()) == list(range(n_patches[placed.tile]))
    block, first = feature_block(vlm.model.config, vlm.anatomy.n_vision_layers), int(vlm.anatomy.has_cls)
    base = embedded(vlm, batch, [])
    for patch in (0, 1, n_patches[placed.tile] - 2):

        def edit(values: torch.Tensor, calls: Any, patch: int = patch) -> torch.Tensor:
            changed = values.clone()
            changed[placed.tile, first + patch] += torch.randn(
                values.shape[-1], generator=torch.Generator().manual_seed(1)
            )
            return changed

        moved = embedded(vlm, batch, [Edit("vision_resid_post", block, edit)])
        reached = (moved - base).abs().amax(dim=-1).gt(1e-6).nonzero()[:, 0]
        expected = placed.token[(placed.patch == patch).any(dim=1)]
        assert reached.tolist() == expected.tolist()


def embedded(vlm: VLM, batch: Any, edits: list[Edit]) -> torch.Tensor:
    with vlm.trace(sites.resid_pre(layers=0, positions="image")) as trace:
        vlm.forward(batch, edits=edits)
    return trace["resid_pre"][0][0]


def test_rows_without_an_image_or_with_several_are_refused(llava: VLM, image: Any) -> None:
    batch = llava.encode([[image(0), image(1)], []], ["<image> and <image> ?", "is there a dog ?"], ids=["two", "none"])
    for row, name in enumerate(("two", "none")):
        with pytest.raises(InputError, match=name):
            place_tokens(llava.anatomy, batch, row, [16, 16])


def test_cells_under_boxes_by_hand() -> None:
    """A box over the left half and one over the top right cell of 2 x 2; half of a cell counts half."""
    assert covered([(0, 0, 0.5, 1), (0.5, 0, 1, 0.5)], (2, 2)).tolist() == [[1, 1], [1, 0]]
    assert covered([(0, 0, 0.25, 1)], (1, 2)).tolist() == [[0.5, 0]]
    assert covered([(0, 0, 0.5, 1), (0, 0, 0.5, 1)], (1, 2)).tolist() == [[1, 0]]  # counted once
    assert covered([], (1, 2)).sum() == 0


def test_a_margin_of_cells() -> None:
    cells = torch.zeros(5, 5, dtype=torch.bool)
    cells[0, 2] = True
    assert grow(cells, 0).sum() == 1
    assert grow(cells, 1).nonzero().tolist() == [[r, c] for r in (0, 1) for c in (1, 2, 3)]
    assert grow(cells, 2).sum() == 15


def test_boxes_of_a_table_each_once() -> None:
    table = pd.DataFrame(
        {"boxes": [((0.0, 0.0, 1.0, 1.0),), [], None, float("nan"), [(0.0, 0.0, 1.0, 1.0), (0, 0, 0.5, 1)]]}
    )
    assert boxes_of(table) == [(0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0)]
    assert boxes_of(None) == boxes_of(pd.DataFrame({"label": ["object"]})) == []
