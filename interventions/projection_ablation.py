"""Projection ablation: a direction taken out of the residual stream (Arditi et al., NeurIPS 2024, arXiv 2406.11717)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from interventions.given_tensors import check_layers, directions, name_of, random_direction
from slitlamp.decoding.edits import remove_direction
from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy
from slitlamp.tracing import Edit

Direction = Literal["given", "random"]


@dataclass(eq=False)
class ProjectionAblation(Intervention):
    """The component along a direction is taken out of the residual stream after some blocks, at every position.

    x becomes x - strength (x . v) v / ||v||^2. The paper writes one direction out of every place that writes into the residual
    stream; this does so after each of the blocks.

    Attributes:
        vector: v. A safetensors file, as `probes.SteeringVectors.save` writes it or with one tensor [d_model]; or the tensor (or
            numbers), [d_model].
        layers: 0-based blocks; None for all.
        strength: 0 (which changes nothing) to 1 (all of the component, the default).
        key: the vector's name in a file.
        vector_layer: of a file of several layers' vectors, the layer whose vector is taken out everywhere; None for each
            layer's own.
        direction: "given", or its control "random": directions drawn evenly from all, one per vector that it stands for. It takes
            away a smaller part of the norm where the states lie along v.
        seed: of the random directions.
    """

    vector: str | Path | Tensor | Sequence[float]
    layers: Sequence[int] | None = None
    strength: float = 1.0
    key: str = "difference_of_means"
    vector_layer: int | None = None
    direction: Direction = "given"
    seed: int = 0

    name: ClassVar[str] = "ProjectionAblation"
    kind: ClassVar[Kind] = "blocks"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a vector, layers or a strength that do not fit."""
        if not 0 <= self.strength <= 1:
            raise InputError(f"{self.name}: strength must be from 0 to 1, found {self.strength!r}")
        if self.direction not in ("given", "random"):
            raise unknown(f"{self.name} direction", str(self.direction), ("given", "random"))
        check_layers(self._layers(anatomy), anatomy.n_layers, self.name)
        self._vectors(anatomy)

    def _layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return tuple(range(anatomy.n_layers)) if self.layers is None else tuple(self.layers)

    def _vectors(self, anatomy: Anatomy) -> dict[int, Tensor]:
        layers = self._layers(anatomy)
        found = directions(self.vector, self.key, self.vector_layer, layers, anatomy.d_model, self.name)
        if self.direction == "given":
            return found
        several = any(not torch.equal(one, other) for one, other in pairwise(found.values()))
        return {
            layer: random_direction(anatomy.d_model, self.seed, layer + 1 if several else 0)  # one for one vector
            for layer in found
        }

    def controls(self) -> dict[str, Intervention]:
        """Random directions in the same layers."""
        return {"random": replace(self, direction="random")}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        what = name_of(self.vector) + (f" ({self.key})" if isinstance(self.vector, str | Path) else "")
        if self.vector_layer is not None:
            what += f" of layer {self.vector_layer}"
        which = f"the direction of {what}" if self.direction == "given" else f"a random direction (seed {self.seed})"
        if self.layers is None:
            where = "every block"
        else:
            where = f"blocks {', '.join(map(str, self.layers))}" if self.layers else "no block"
        part = "" if self.strength == 1 else f", {self.strength:.0%} of it"
        return f"{which} taken out after {where}{part}"

    def edits(self, run: RunContext) -> list[Edit]:
        """Edits of the residual stream; none where the strength is 0."""
        if self.strength == 0:
            return []
        return [
            edit
            for layer, vector in self._vectors(run.anatomy).items()
            for edit in remove_direction([layer], vector, self.strength)
        ]
