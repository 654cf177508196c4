"""Steering vectors: directions between two kinds of states, layer by layer, saved and put to the test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from probes.direction_targets import direction_targets
from probes.labelled_states import classes, gathered_rows, state_site
from probes.linear_fits import auroc, fit_logistic, grouped_folds
from slitlamp.decoding.edits import add_direction, remove_direction
from slitlamp.errors import InputError, unknown
from slitlamp.evaluation.detection import auroc_interval
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import CausalTarget, GatheringProbe, ProbeResult, Site, Trace
from slitlamp.tracing.probe import Array, EditsOf, Labels

METHODS = ("difference_of_means", "paired_component", "logistic")
_N_RANDOM = 20


def difference(positive: Tensor, negative: Tensor) -> Tensor:
    """The mean of the positives minus that of the negatives: [d] (Marks and Tegmark, 2023, arXiv 2310.06824)."""
    return positive.mean(dim=0) - negative.mean(dim=0)


def paired_component(pairs: Tensor) -> Tensor:
    """First principal component [d] of paired differences [pair, d], turned to their mean (Zou et al., 2023, arXiv 2310.01405).

    The differences are not centred: what they have in common is what is looked for [?].
    """
    component = torch.linalg.svd(pairs, full_matrices=False).Vh[0]
    return component if float(component @ pairs.mean(dim=0)) >= 0 else -component


def steering_vector(states: Tensor, positive: Array, group: Array, method: str, strength: float) -> Tensor:
    """The vector [d] from negative to positive states [sample, d] by one of `METHODS`.

    A pair is the mean of the positives and the mean of the negatives of one image that has both.

    Raises:
        InputError: no image has both, for pairs.
    """
    yes = torch.from_numpy(positive)
    if method == "difference_of_means":
        return difference(states[yes], states[~yes])
    if method == "logistic":
        return fit_logistic(states, yes, None, [strength]).coefficients[0, 0, 0].to(states)
    both = [one for one in np.unique(group) if 0 < positive[group == one].mean() < 1]
    if not both:
        raise InputError("paired_component needs images with samples of both kinds: found none; take another method")
    pairs = [
        difference(states[torch.from_numpy(mine & positive)], states[torch.from_numpy(mine & ~positive)])
        for mine in (group == one for one in both)
    ]
    return paired_component(torch.stack(pairs))


@dataclass
class SteeringVectors(GatheringProbe):
    """Directions from one kind of state to another, how well they tell new images apart, and how alike they are.

    `causal_targets` adds the direction to the residual stream, and takes it out, against random directions and those of
    shuffled labels. The interval of the AUROC takes the directions of the folds as given: where there is nothing to find it
    lies above 1/2 in about 12 % of data sets (60 images of 4 samples), not in 2.5 %; `LinearProbe` has p values instead.

    Attributes:
        target: as in `LinearProbe`; of several values the most common against the rest.
        position: "before_object", "at_object", "last" or "image_mean", as in `LinearProbe`.
        layers: 0-based blocks; None for all.
        methods: "difference_of_means", "paired_component" (first principal component of differences within images) or
            "logistic" (normal of the logistic regression on standardised features, in raw units).
        strength: penalty of the logistic regression.
        scale: of the causal step, in units of each position's norm.
        n_folds: for the AUROC on left-out images; no more than there are images on either side.
        seed: of folds, random directions and the bootstrap.
        n_resamples: of the bootstrap, over images.
    """

    target: str = "label"
    position: Literal["before_object", "at_object", "last", "image_mean"] = "before_object"
    layers: Sequence[int] | None = None
    methods: Sequence[str] = METHODS
    strength: float = 100.0
    scale: float = 0.2
    n_folds: int = 5
    seed: int = 0
    n_resamples: int = 2000
    _gathered: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    name: ClassVar[str] = "steering_vectors"

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The residual stream at the samples."""
        for one in self.methods:
            if one not in METHODS:
                raise unknown("steering vector", one, METHODS)
        if not self.methods or self.n_folds < 2 or not self.strength > 0:
            raise InputError("needs a method, n_folds from 2 and a positive strength")
        return [state_site("resid_post", self.layers, self.position, anatomy)]

    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch; rows without labels give no samples."""
        self._constants(layer=np.array(trace["state"].layers))
        self._rows(**gathered_rows(batch, trace, labels, self.position, self.target))

    def _sides(self) -> tuple[str, Array]:
        name = classes(self._get("value"), self._get("group"), self.target, 1)[0]
        return name, self._get("value") == name

    def vectors(self) -> dict[str, Tensor]:
        """Per method, the vectors of all samples: [layer, d], in the units of the residual stream."""
        _, positive = self._sides()
        states, group = torch.from_numpy(self._get("state")), self._get("group")
        return {
            method: torch.stack(
                [
                    steering_vector(states[:, place], positive, group, method, self.strength)
                    for place in range(states.shape[1])
                ]
            )
            for method in self.methods
        }

    def save(self, path: Path | str) -> None:
        """Write the vectors and their layers as safetensors."""
        layer = torch.from_numpy(self._get("layer").astype(np.int64))
        name, _ = self._sides()
        found = {key: one.contiguous() for key, one in self.vectors().items()}
        save_file({**found, "layer": layer}, str(path), {"target": self.target, "positive": name})

    def result(self) -> ProbeResult:
        """Tables `layers`, one row per method and layer, and `cosines` between methods."""
        name, positive = self._sides()
        states, group, layer = torch.from_numpy(self._get("state")), self._get("group"), self._get("layer")
        n_folds = min(self.n_folds, *(len(np.unique(group[side])) for side in (positive, ~positive)))
        folds = grouped_folds(group, positive, n_folds, self.seed)
        vectors = self.vectors()
        norms = states.norm(dim=-1).mean(dim=0)
        generator = torch.Generator().manual_seed(self.seed)
        rows, cosines = [], []
        for method in self.methods:
            for place, number in enumerate(layer):
                x = states[:, place]
                score = np.zeros(len(x))
                for test in folds.test:
                    train = ~test.numpy()
                    one = steering_vector(x[~test], positive[train], group[train], method, self.strength)
                    centre = (x[~test][positive[train]].mean(dim=0) + x[~test][~positive[train]].mean(dim=0)) / 2
                    # of one length and from half way between the means, so that folds can be compared
                    score[test.numpy()] = ((x[test] - centre) @ torch.nn.functional.normalize(one, dim=0)).numpy()
                area = auroc_interval(score, positive, group, n_resamples=self.n_resamples, seed=self.seed)
                random = torch.randn(_N_RANDOM, x.shape[1], generator=generator)
                chance = np.abs(auroc((random @ x.T).numpy(), positive) - 0.5).mean() + 0.5
                rows.append(
                    {
                        "method": method, "target": self.target, "positive": name, "layer": int(number),
                        "auroc": area.value, "low": area.low, "high": area.high, "random": float(chance),
                        "norm": float(vectors[method][place].norm()), "residual_norm": float(norms[place]),
                        "n_positive": int(positive.sum()), "n_negative": int((~positive).sum()), "n_images": area.n,
                    }
                )  # fmt: skip
                for other in self.methods[self.methods.index(method) + 1 :]:
                    pair = (vectors[method][place], vectors[other][place])
                    cosine = float(torch.nn.functional.cosine_similarity(*pair, dim=0))
                    expected = float(np.sqrt(2 / np.pi / x.shape[1]))  # mean |cosine| of random directions
                    cosines.append((method, other, int(number), cosine, expected))
        tables = {"layers": pd.DataFrame(rows)}
        if cosines:
            tables["cosines"] = pd.DataFrame(cosines, columns=["method_a", "method_b", "layer", "cosine", "random"])
        best = tables["layers"].loc[tables["layers"]["auroc"].idxmax()]
        text = (
            f"The {str(best['method']).replace('_', ' ')} direction of {name} tells left-out images apart best at layer "
            f"{int(best['layer'])}: AUROC {best['auroc']:.2f} [{best['low']:.2f}, {best['high']:.2f}], the best of {len(rows)} "
            f"methods and layers; random directions {best['random']:.2f} either way (n = {int(best['n_positive'])} and "
            f"{int(best['n_negative'])})."
        )
        return ProbeResult(self.name, tables, text)

    def causal_targets(self, anatomy: Anatomy) -> list[CausalTarget]:
        """The first method's direction at its best layer: added, and taken out; see `direction_targets`."""
        layers = self.result().tables["layers"]
        mine = layers[layers["method"] == self.methods[0]].reset_index(drop=True)
        place = int(mine["auroc"].idxmax())
        layer, vector = int(mine["layer"][place]), self.vectors()[self.methods[0]][place]
        states, group = torch.from_numpy(self._get("state")[:, place]), self._get("group")
        name, positive = self._sides()

        def added(direction: Tensor) -> EditsOf:
            return lambda batch: add_direction(layer, direction, self.scale)

        def removed(direction: Tensor) -> EditsOf:
            return lambda batch: remove_direction([layer], direction)

        return [
            target
            for what, edit in ((f"added ({self.scale:g} of the norm) after", added), ("taken out after", removed))
            for target in direction_targets(
                f"the direction of {name} {what} block {layer}", vector, edit,
                estimate=lambda label: steering_vector(states, label, group, self.methods[0], self.strength),
                positive=positive, group=group, seed=self.seed,
            )
        ]  # fmt: skip


def load_vectors(path: Path | str) -> dict[str, Tensor]:
    """What `SteeringVectors.save` wrote: vectors [layer, d] by method, and `layer`."""
    return dict(load_file(str(path)))
