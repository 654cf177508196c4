"""Directions and tokens as causal targets: controls that lie where states vary and say nothing, and tokens that nobody reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from probes.direction_targets import RANDOM, SHUFFLED, direction_targets, random_directions, shuffled_directions
from probes.rollout_causal import rollout_targets
from probes.steering_vectors import difference
from slitlamp.errors import InputError
from slitlamp.tracing import sites
from slitlamp.vlm import VLM


def sample(seed: int = 0) -> tuple[torch.Tensor, Any, Any]:
    """80 images of 3 samples: the label moves dimension 0 by two, images differ ten times as much along dimension 1."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(80), 3).astype(str)
    positive = rng.random(240) < 0.4
    states = rng.normal(size=(240, 6))
    states[:, 0] += 2 * positive
    states[:, 1] *= 10
    return torch.from_numpy(states), positive, group


def means_of(states: torch.Tensor) -> Any:
    return lambda label: difference(states[torch.from_numpy(label)], states[torch.from_numpy(~label)])


def test_shuffled_labels_give_directions_where_states_vary_that_say_nothing() -> None:
    states, positive, group = sample()
    truth = states[positive].mean(dim=0) - states[~positive].mean(dim=0)
    drawn = torch.stack(shuffled_directions(means_of(states), positive, group, seed=1, count=200))
    assert float(truth[0]) == pytest.approx(2, abs=0.4)
    # a difference of two means of 96 and 144 samples has the spread sd (1/96 + 1/144)^(1/2) = .13 sd
    assert drawn.mean(dim=0).abs().max() < 4 * 0.13 * 10 / 200**0.5
    assert float(drawn[:, 1].std()) == pytest.approx(1.3, rel=0.25)
    assert float(drawn[:, 2].std()) == pytest.approx(0.13, rel=0.25)


def test_whole_images_are_shuffled() -> None:
    """Labels that belong to images stay with images: with equal states in an image, as many ways as images allow."""
    group = np.repeat(np.arange(6), 5).astype(str)
    positive = np.repeat([True, False, False, False, False, False], 5)
    states = torch.eye(6, dtype=torch.float64).repeat_interleave(5, dim=0)
    for one in shuffled_directions(means_of(states), positive, group, seed=0, count=20):
        assert sorted(one.tolist()) == pytest.approx([-0.2] * 5 + [1.0])


def test_every_kind_of_control_is_a_target_with_the_same_edit() -> None:
    states, positive, group = sample()
    seen: list[torch.Tensor] = []

    def edit(direction: torch.Tensor) -> Any:
        seen.append(direction)
        return lambda batch: []

    direction = torch.ones(6)
    targets = direction_targets(
        "moved", direction, edit, estimate=means_of(states), positive=positive, group=group, seed=3
    )  # fmt: skip
    assert [(one.name, one.control_name, len(one.controls)) for one in targets] == [
        ("moved", RANDOM, 19), ("moved", SHUFFLED, 19),
    ]  # fmt: skip
    assert len(seen) == 40
    assert torch.equal(seen[0], direction)
    assert torch.equal(seen[1], random_directions(6, 3)[0])


def test_hidden_tokens_are_read_by_nobody_but_themselves(llava: VLM, image: Any) -> None:
    batch = llava.encode([image(0), image(1)], ["<image> what ?", "describe this <image> ."], ids=["a", "b"])
    top = {"a": np.array([2, 5]), "b": np.array([0])}
    counts = {item: int(n) for item, n in zip(batch.ids, batch.image_mask.sum(dim=1), strict=True)}
    (target,) = rollout_targets(top, counts, llava.anatomy.n_layers, seed=0)
    with llava.trace(sites.attention(queries="all", keys="all")) as trace:
        llava.forward(batch, edits=target.target(batch))
    for row, item in enumerate(batch.ids):
        start = int((~batch.real_mask[row]).sum())
        hidden = batch.image_mask[row].nonzero()[:, 0][torch.from_numpy(top[item])] - start
        for weights in trace["attention"].values():
            columns = weights[row][..., hidden].clone()  # [head, query, hidden]
            for number, place in enumerate(hidden.tolist()):
                assert (columns[:, place, number] > 0).all()
                columns[:, place, number] = 0
            assert (columns == 0).all()
    for control in target.controls:
        assert len(control(batch)) == llava.anatomy.n_layers
    with pytest.raises(InputError, match="not measured"):
        target.target(llava.encode([image(0)], ["<image> what ?"], ids=["c"]))
