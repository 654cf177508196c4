"""Ablation of attention heads: their outputs set to zero, or to a mean (standard tools of the field)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from interventions.given_tensors import check_tensor, from_file, name_of
from slitlamp.decoding.edits import scale_heads, set_heads
from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy
from slitlamp.tracing import Edit

Value = Literal["zero", "mean"]
Select = Literal["given", "random"]


@dataclass(eq=False)
class HeadAblation(Intervention):
    """The outputs of chosen heads, before the output projection, are replaced by zero or by their mean, at every position.

    A mean keeps what a head always adds and takes away what it tells. Means over items can be had from a recording, and kept:

        with vlm.trace(sl.sites.z(reduce="mean")) as trace:  # over the positions of each item
            vlm.forward(batch)
        means = trace["z"].stack().mean(dim=1)  # over the items: [layer, head, d_head]
        safetensors.torch.save_file({"means": means}, "means.safetensors")

    Attributes:
        heads: (layer, head) pairs, 0-based; () changes nothing, and is the default.
        value: "zero" or "mean".
        means: for "mean": a safetensors file with the tensor `means`, or the tensor (or numbers): [layer, head, d_head], of all
            layers and heads of the model.
        select: "given", or its control "random": of each layer as many heads, drawn among the others.
        seed: of the random heads.
    """

    heads: Sequence[tuple[int, int]] = ()
    value: Value = "zero"
    means: str | Path | Tensor | Sequence[Sequence[Sequence[float]]] | None = None
    select: Select = "given"
    seed: int = 0

    name: ClassVar[str] = "HeadAblation"
    kind: ClassVar[Kind] = "blocks"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse heads or means that do not fit the model, and too many heads for a control."""
        if self.value not in ("zero", "mean"):
            raise unknown(f"{self.name} value", str(self.value), ("zero", "mean"))
        if self.select not in ("given", "random"):
            raise unknown(f"{self.name} select", str(self.select), ("given", "random"))
        for layer, head in self.heads:
            if not 0 <= layer < anatomy.n_layers:
                raise InputError(f"{self.name}: layer {layer!r} is not one of 0 to {anatomy.n_layers - 1}")
            if not 0 <= head < anatomy.n_heads:
                raise InputError(f"{self.name}: head {head!r} is not one of 0 to {anatomy.n_heads - 1}")
            anatomy.place("z", layer)
        if self.select == "random":
            self.chosen(anatomy.n_heads)
        if self.value == "mean":
            self._means(anatomy)

    def chosen(self, n_heads: int) -> list[tuple[int, int]]:
        """The heads that are ablated, of a model of so many per layer, in order.

        Raises:
            InputError: random ones are asked for, and a layer has not as many others.
        """
        given = sorted({(int(layer), int(head)) for layer, head in self.heads})
        if self.select == "given":
            return given
        rng, drawn = np.random.default_rng(self.seed), []
        for layer in sorted({layer for layer, _ in given}):
            mine = [head for other, head in given if other == layer]
            others = [head for head in range(n_heads) if head not in mine]
            if len(others) < len(mine):
                raise InputError(
                    f"{self.name}: {len(mine)} of the {n_heads} heads of layer {layer} are given, so that there are not as many "
                    "others for the control 'random'; give at most half of a layer, or leave this control out"
                )
            drawn += [(layer, int(head)) for head in rng.choice(others, size=len(mine), replace=False)]
        return sorted(drawn)

    def _means(self, anatomy: Anatomy) -> Tensor:
        if self.means is None:
            raise InputError(
                f"{self.name}: value='mean' needs means, a file or a tensor [layer, head, d_head]; found None"
            )
        if isinstance(self.means, str | Path):
            means, _ = from_file(self.means, "means", self.name)
        else:
            means = torch.as_tensor(self.means).float()
        shape = [anatomy.n_layers, anatomy.n_heads, anatomy.d_head]
        return check_tensor(means, shape, "[layer, head, d_head]", f"{self.name} means")

    def controls(self) -> dict[str, Intervention]:
        """As many random heads of the same layers."""
        return {"random": replace(self, select="random")}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        pairs = sorted({(layer, head) for layer, head in self.heads})
        which = ", ".join(f"{layer}.{head}" for layer, head in pairs[:8]) + (", ..." if len(pairs) > 8 else "")
        if self.select == "random":
            which = f"as many random heads of the same layers as {which} (seed {self.seed})"
        else:
            which = f"heads {which}" if pairs else "no head"
        return f"{which} set to " + ("zero" if self.value == "zero" else f"the mean of {name_of(self.means)}")

    def edits(self, run: RunContext) -> list[Edit]:
        """Edits at the input of each layer's output projection."""
        heads = self.chosen(run.anatomy.n_heads)
        if self.value == "zero":
            return scale_heads(heads, 0.0)
        return set_heads(heads, self._means(run.anatomy))
