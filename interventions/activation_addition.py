"""Steering: a vector added to the residual stream (Turner et al., 2023, arXiv 2308.10248; Rimsky et al., ACL 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from interventions.given_tensors import check_layers, directions, name_of, random_direction
from slitlamp.decoding.edits import add_direction
from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy
from slitlamp.tracing import Edit

Direction = Literal["given", "random", "reversed"]
DIRECTIONS: tuple[str, ...] = ("given", "random", "reversed")


@dataclass(eq=False)
class ActivationAddition(Intervention):
    """A direction is added to the residual stream after a block, at every position.

    x becomes x + scale ||x|| v / ||v||, with each position's own norm: the length of v does not matter.

    Attributes:
        vector: v. A safetensors file, as `probes.SteeringVectors.save` writes it or with one tensor [d_model]; or the tensor (or
            numbers), [d_model].
        layer: 0-based block after which it is added, and whose vector is taken of a file of several; None for the middle one,
            n_layers // 2 [?].
        scale: in units of the norm; 0 changes nothing; 0.2 is the default, that of `SteeringVectors`' causal check [?].
        key: the vector's name in a file.
        direction: "given", or its controls "random" (of equal length, drawn evenly from all directions) and "reversed".
        seed: of the random direction.
    """

    vector: str | Path | Tensor | Sequence[float]
    layer: int | None = None
    scale: float = 0.2
    key: str = "difference_of_means"
    direction: Direction = "given"
    seed: int = 0

    name: ClassVar[str] = "ActivationAddition"
    kind: ClassVar[Kind] = "blocks"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a vector or a layer that does not fit the model."""
        if not math.isfinite(self.scale):
            raise InputError(f"{self.name}: scale must be a finite number, found {self.scale!r}")
        if self.direction not in DIRECTIONS:
            raise unknown(f"{self.name} direction", str(self.direction), DIRECTIONS)
        check_layers((self._layer(anatomy),), anatomy.n_layers, self.name)
        self._vector(anatomy)

    def _layer(self, anatomy: Anatomy) -> int:
        return anatomy.n_layers // 2 if self.layer is None else self.layer

    def _vector(self, anatomy: Anatomy) -> Tensor:
        layer = self._layer(anatomy)
        return directions(self.vector, self.key, layer, (layer,), anatomy.d_model, self.name)[layer]

    def controls(self) -> dict[str, Intervention]:
        """A random direction and the opposite one, of equal length."""
        return {"random": replace(self, direction="random"), "reversed": replace(self, direction="reversed")}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        what = name_of(self.vector) + (f" ({self.key})" if isinstance(self.vector, str | Path) else "")
        which = {
            "given": f"the direction of {what}",
            "random": f"a random direction (seed {self.seed})",
            "reversed": f"the direction opposite to that of {what}",
        }[self.direction]
        where = "the middle block" if self.layer is None else f"block {self.layer}"
        return f"{which} added after {where}, scale {self.scale:g} of the norm"

    def edits(self, run: RunContext) -> list[Edit]:
        """The edit of the residual stream; none where the scale is 0."""
        if self.scale == 0:
            return []
        vector = self._vector(run.anatomy)
        if self.direction == "random":
            vector = random_direction(run.anatomy.d_model, self.seed)
        scale = -self.scale if self.direction == "reversed" else self.scale
        return add_direction(self._layer(run.anatomy), vector, scale)
