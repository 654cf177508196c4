"""Attention knockout as an intervention (Geva et al., EMNLP 2023, arXiv 2304.14767; the probe is `AttentionKnockout`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from interventions.given_tensors import check_layers
from interventions.raised_scores import check_image_tokens, predicting_rows
from probes.knockout_flows import default_window, window_of
from slitlamp.decoding.edits import knock_out
from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy
from slitlamp.tracing import AttentionEdit

Queries = Literal["all", "image", "text", "text_after_image", "generated", "last"]
Keys = Literal["all", "image", "text", "text_after_image", "generated"]
Select = Literal["given", "random"]
QUERIES: dict[str, str] = {
    "all": "all tokens",
    "image": "image tokens",
    "text": "text tokens",
    "text_after_image": "text after the image",
    "generated": "generated tokens",
    "last": "the tokens that predict the answer",
}
KEYS: dict[str, str] = {name: words for name, words in QUERIES.items() if name != "last"}


@dataclass
class CutAttention(Intervention):
    """Some positions may not attend to others, in all heads of some layers: score(q, k) = -inf before the softmax.

    The attention that is left adds up to 1. Every position keeps its attention to itself. Text that is generated is text, too,
    as it comes.

    Attributes:
        queries: who may not look: "all", "image", "text", "text_after_image", "generated", or "last": the last token of the
            prompt and those generated after it, each of which predicts the next.
        keys: at whom: "all", "image", "text", "text_after_image" or "generated".
        layers: 0-based; () changes nothing; None for the middle of the model: 9 layers as published for knockouts, or less
            in a model of fewer than 18 (`probes.knockout_flows.default_window`) [?].
        select: "given", or its control "random": as many layers, drawn among the others.
        seed: of the random layers.
    """

    queries: Queries = "last"
    keys: Keys = "image"
    layers: Sequence[int] | None = None
    select: Select = "given"
    seed: int = 0

    name: ClassVar[str] = "CutAttention"
    kind: ClassVar[Kind] = "blocks"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse names of positions that there are not, layers that do not fit the model, and too many for a control."""
        if self.queries not in QUERIES:
            raise unknown(f"{self.name} queries", str(self.queries), QUERIES)
        if self.keys not in KEYS:
            raise unknown(f"{self.name} keys", str(self.keys), KEYS)
        if self.select not in ("given", "random"):
            raise unknown(f"{self.name} select", str(self.select), ("given", "random"))
        if "image" in (self.queries, self.keys):
            check_image_tokens(anatomy, self.name)
        for layer in self.chosen(anatomy):
            anatomy.place("attention", layer)

    def chosen(self, anatomy: Anatomy) -> tuple[int, ...]:
        """The layers that are cut, in order.

        Raises:
            InputError: a layer that the model does not have, or random ones and not as many others.
        """
        n_layers = anatomy.n_layers
        if self.layers is None:
            given = tuple(window_of(n_layers // 2, default_window(n_layers), n_layers))
        else:
            given = tuple(sorted(self.layers))
        check_layers(given, n_layers, self.name)
        if self.select == "given":
            return given
        others = [layer for layer in anatomy.layers("attention") if layer not in given]
        if len(others) < len(given):
            raise InputError(
                f"{self.name}: {len(given)} of the {n_layers} layers are cut, so that there are only {len(others)} others for "
                "the control 'random_layers'; cut fewer, or leave this control out"
            )
        drawn = np.random.default_rng(self.seed).choice(others, size=len(given), replace=False)
        return tuple(sorted(int(layer) for layer in drawn))

    def controls(self) -> dict[str, Intervention]:
        """The same pairs in as many other layers."""
        return {"random_layers": replace(self, select="random")}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        if self.layers is None:
            where = "the layers in the middle"
        else:
            where = f"layers {', '.join(map(str, self.layers))}" if self.layers else "no layer"
        if self.select == "random":
            where = f"as many random layers as {where} (seed {self.seed})"
        return f"attention of {QUERIES[self.queries]} to {KEYS[self.keys]} cut in {where}"

    def edits(self, run: RunContext) -> list[AttentionEdit]:
        """Edits of attention before the softmax."""
        layers = self.chosen(run.anatomy)
        rows = predicting_rows(run.batch) if self.queries == "last" else (self.queries,)
        return [edit for queries in rows for edit in knock_out(layers, queries, self.keys)]
