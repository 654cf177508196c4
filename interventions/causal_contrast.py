"""CausalMM: contrast with counterfactual attention (Zhou et al., ICLR 2025, arXiv 2410.04780)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from interventions.counterfactual_attention import KINDS, Kind, counterfactual_edits
from interventions.given_tensors import check_layers
from slitlamp.decoding.intervention import Intervention, RunContext
from slitlamp.decoding.two_branch import ContrastDecoding, ContrastView
from slitlamp.decoding.views import image_free
from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.models import Anatomy
from slitlamp.tracing.weights_edit import Tower

Modality = Literal["vision", "language", "both"]
Against = Literal["attention", "noise"]
MODALITIES: dict[str, str] = {
    "vision": "the vision tower",
    "language": "the language model",
    "both": "the vision tower and, apart from it, the language model",
}
AGAINST: tuple[str, ...] = ("attention", "noise")


@dataclass
class CausalContrast(ContrastDecoding):
    """Decode from what the model says, against what it says where its attention follows nothing that it sees.

    l* = (1 + g) l - g l', on logits, then APC, with l' under counterfactual attention in the vision tower or in the language
    model; for "both", l* = (1 + 2 g) l - g l_vision - g l_language. In the contrast every row of the chosen layers, of the prompt
    and of every token after it, attends by other weights than its own, after the softmax, in all heads: drawn at random, all
    alike, reversed (the largest minus each), or its own in a random order. All items get the same draws. The cost is one more
    forward pass per step, two for "both".

    The weights of a row are made from that row and add up to 1. The paper's formulas for the tower take the largest weight, and
    the order, over the whole map of a head, and leave "random" (even from 0 to 2) and "reversed" unnormalised; `normalise=False`
    leaves them so here, where rows that add up to hundreds drown the values. Two things of the released code are not done: its
    tower multiplies the features by the resized map in place of attending by it, and its branches share one cache, so
    that the first token alone is changed. It shuffles in the tower alone.

    Attributes:
        g: strength; 0 contrasts nothing. The paper's are 0.5, the default, to 1.
        modality: "vision", "language" or "both".
        counterfactual: "random", "uniform", "reversed" or "shuffled".
        language_layers: 0-based; None for all [?].
        vision_layers: 0-based; None for all [?] (the released code takes the map of the layer that the model reads).
        normalise: whether rows are made to add up to 1.
        against: "attention" (the method), or, as a control, "noise": attention as it is, on an image of noise, with the same
            weights in all.
        seed: of the draws, and of the noise.
        beta: of APC; 0.1 is the paper's.
    """

    g: float = 0.5
    modality: Modality = "both"
    counterfactual: Kind = "shuffled"
    language_layers: Sequence[int] | None = None
    vision_layers: Sequence[int] | None = None
    normalise: bool = True
    against: Against = "attention"
    seed: int = 0
    beta: float = field(default=0.1, kw_only=True)

    name: ClassVar[str] = "CausalContrast"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters out of range, and towers whose attention cannot be edited."""
        super().check(anatomy)
        if not self.g >= 0:
            raise InputError(f"{self.name}: g must be 0 or more, found {self.g!r}")
        for what, value, known in (
            ("modality", self.modality, MODALITIES),
            ("counterfactual", self.counterfactual, KINDS),
            ("against", self.against, AGAINST),
        ):
            if value not in known:
                raise unknown(f"{self.name} {what}", str(value), known)
        check_layers(self._language(anatomy), anatomy.n_layers, self.name)
        for layer in self._language(anatomy):
            anatomy.place("attention", layer)
        check_layers(self._vision(anatomy), anatomy.n_vision_layers, f"{self.name}, vision_layers")
        if self.modality != "language" and anatomy.tower.unpack is not None:
            raise UnsupportedError(
                f"{self.name}: the vision tower of {anatomy.family.name} runs over all tiles as one sequence, so that its "
                "attention weights cannot be edited; take modality='language'"
            )

    def _language(self, anatomy: Anatomy) -> tuple[int, ...]:
        return anatomy.layers("attention") if self.language_layers is None else tuple(self.language_layers)

    def _vision(self, anatomy: Anatomy) -> tuple[int, ...]:
        return anatomy.layers("vision_attention") if self.vision_layers is None else tuple(self.vision_layers)

    def views(self, run: RunContext) -> Sequence[ContrastView]:
        """The batch under counterfactual attention, once for each modality."""
        batch, anatomy = run.batch, run.anatomy
        if self.against == "noise":
            return [image_free(batch, "noise", self.seed)]
        if self.modality != "language" and not batch.has_images:
            raise InputError(f"{self.name}: counterfactual attention in the vision tower needs an image in every row")
        towers: dict[Tower, tuple[int, ...]] = {"vision": self._vision(anatomy), "language": self._language(anatomy)}
        return [
            (
                batch,
                counterfactual_edits(anatomy, tower, layers, self.counterfactual, self.seed, normalise=self.normalise),
            )
            for tower, layers in towers.items()
            if self.modality in (tower, "both")
        ]

    def combine(self, clean: Tensor, contrasts: Sequence[Tensor], step: Tensor) -> Tensor:
        """(1 + g) l - g l'; for both modalities (1 + 2 g) l - g l_vision - g l_language."""
        weight = self.g * (2 if self.modality == "both" else 1)
        other = contrasts[0] if len(contrasts) == 1 else torch.stack(list(contrasts)).mean(dim=0)
        return (1 + weight) * clean - weight * other

    def controls(self) -> dict[str, Intervention]:
        """The same contrast with an image of noise; and APC without a contrast."""
        return {"noise": replace(self, against="noise"), "apc_only": replace(self, g=0.0)}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        rows = "" if self.normalise else " (rows as they come)"
        what = f"{self.counterfactual} attention{rows} in {MODALITIES[self.modality]}"
        if self.against == "noise":
            what = f"an image of noise in place of {what}"
        return f"contrast with {what}, g {self.g:g}, beta {self.beta:g}"
