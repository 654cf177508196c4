"""Attention knockout: through which layers information flows from the image to the answer (Geva et al., EMNLP 2023,
arXiv 2304.14767; for VLMs Zhang et al., CVPR 2025, arXiv 2411.18620).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from probes.knockout_flows import (
    FLOWS,
    Flow,
    check_cut,
    cut_pairs,
    default_window,
    flow_weights,
    measured_ids,
    measured_tokens,
    of_flow,
    random_pairs,
    up_to,
    window_of,
)
from slitlamp.decoding.edits import knock_out
from slitlamp.errors import InputError, unknown
from slitlamp.evaluation.statistics import Interval, benjamini_hochberg, cluster_bootstrap, cluster_sums, ratio
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import AnyEdit, CausalTarget, GatheringProbe, ProbeResult, Site, Trace, View
from slitlamp.tracing.probe import N_DRAWS, Array, EditsOf, Labels
from slitlamp.tracing.sites import logits


@dataclass
class AttentionKnockout(GatheringProbe):
    """How much less likely the model's answer is when some positions may not attend to others in a window of layers.

    In a window of layers centred on l, score(q, k) = -inf in all heads, for the queries q and keys k of a flow:
    image -> question, image -> last position, question -> last position, image -> tokens generated so far. The measure is
    (p_new - p_base) / p_base of the answer's first token (the papers' is 100 times that): -1 means that the answer needs
    the flow there. The answer is the first token of a correctly answered question, or the first object of a caption that is
    in the image; all else is left out.

    The control cuts, in the same layers, as many random pairs of positions that are not of the flow: what cutting that many
    connections anywhere does, those of the other flows included. p values are one-sided: the flow's cut lowers the
    probability more than the control's. All runs are of the unmodified model, also where interventions are in force. In every
    run with a cut the weights of its pairs are recorded after the softmax, and one that is not zero is an error.

    TransformerLens has no knockout of its own: one would be written as a hook on `hook_attn_scores` of its bridge, which changes
    the model, holds all scores of all rows, and knows no image tokens.

    Attributes:
        flows: which flows are cut.
        window: how many layers are cut together, an odd number; None for 9, as published, or less in a model of fewer than
            18 layers (`default_window`).
        layers: centres of the windows, 0-based; None for all.
        seed: of the random pairs and the bootstrap.
        n_resamples: of the bootstrap, over groups of items that share an image.
    """

    flows: Sequence[Flow] = ("image_to_question", "image_to_last", "question_to_last")
    window: int | None = None
    layers: Sequence[int] | None = None
    seed: int = 0
    n_resamples: int = 2000
    _gathered: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    name: ClassVar[str] = "attention_knockout"

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The last logits; what is measured is in the views, which are cut before the measured token."""
        for flow in self.flows:
            if flow not in FLOWS:
                raise unknown("flow", flow, FLOWS)
        if not self.flows or len(set(self.flows)) < len(self.flows):
            raise InputError(f"flows must be different ones of {', '.join(FLOWS)}; found {list(self.flows)}")
        if self.window is not None and (self.window < 1 or self.window % 2 == 0):
            raise InputError(f"window must be an odd number of layers from 1, found {self.window}")
        if any(not 0 <= layer < anatomy.n_layers for layer in self._centres(anatomy)) or not self._centres(anatomy):
            raise InputError(f"layers must be some of 0 to {anatomy.n_layers - 1}, found {list(self.layers or ())}")
        return [logits("last")]

    def _centres(self, anatomy: Anatomy) -> list[int]:
        return list(range(anatomy.n_layers)) if self.layers is None else list(self.layers)

    def _layers_cut(self, anatomy: Anatomy, centre: int) -> list[int]:
        width = default_window(anatomy.n_layers) if self.window is None else self.window
        return window_of(centre, width, anatomy.n_layers)

    def views(self, anatomy: Anatomy) -> dict[str, View]:
        """A run without cuts; for each flow and layer one with the flow cut, and one with random pairs cut."""

        def plain(batch: Batch, trace: Trace) -> tuple[Batch, list[AnyEdit]]:
            return up_to(batch, measured_tokens(batch, trace.labels)), []

        def without(flow: str, layers: list[int], batch: Batch, trace: Trace) -> tuple[Batch, Sequence[AnyEdit]]:
            short = self._short(trace)
            return short, knock_out(layers, *of_flow(short, flow))

        def control(flow: str, layers: list[int], batch: Batch, trace: Trace) -> tuple[Batch, Sequence[AnyEdit]]:
            short = self._short(trace)
            return short, cut_pairs(layers, random_pairs(short, *of_flow(short, flow), self.seed))

        found = {"base": View(plain, [logits("last")])}
        for flow in self.flows:
            for centre in self._centres(anatomy):
                layers = self._layers_cut(anatomy, centre)
                seen = [logits("last"), flow_weights(flow, layers)]
                found[f"{flow} {centre}"] = View(partial(without, flow, layers), seen)
                found[f"{flow} {centre} control"] = View(partial(control, flow, layers), [logits("last")])
        return found

    @staticmethod
    def _short(trace: Trace) -> Batch:
        short = trace.views["base"].batch
        assert short is not None
        return short

    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch; `labels` say which answers are correct, and where captions name an object of the image."""
        tokens = measured_tokens(batch, labels)
        short = self._short(trace)
        ids = measured_ids(batch, tokens)
        kept = [row for row, token in enumerate(tokens) if token is not None]
        assert trace.source is not None
        anatomy = trace.source.anatomy
        centres = self._centres(anatomy)

        def log_p(view: str) -> Array:
            """log p of the measured token, float64 [row that is kept]."""
            found = trace.views[view]["logits"][0][:, 0].double().log_softmax(dim=-1)
            return np.asarray(found.gather(1, ids.to(found.device)[:, None])[kept, 0].cpu())

        for flow in self.flows:
            for centre in centres:
                check_cut(trace.views[f"{flow} {centre}"], flow)
        base = log_p("base")
        changes = np.zeros((len(kept), 2, len(self.flows), len(centres)))
        for number, flow in enumerate(self.flows):
            for place, centre in enumerate(centres):
                for kind, view in enumerate((f"{flow} {centre}", f"{flow} {centre} control")):
                    changes[:, kind, number, place] = np.expm1(log_p(view) - base)
        present = torch.stack([_flows_of_rows(short, flow) for flow in self.flows], dim=1)[kept]
        windows = [self._layers_cut(anatomy, centre) for centre in centres]
        self._constants(centre=np.array(centres), window=np.array([[one[0], one[-1]] for one in windows]))
        self._rows(
            item=np.array([batch.ids[row] for row in kept], dtype=str),
            group=np.array([batch.groups[row] for row in kept], dtype=str),
            p_base=np.exp(base),
            changes=changes,
            present=present.cpu().numpy(),
            left_out=np.array([batch.size - len(kept)]),
        )

    def result(self) -> ProbeResult:
        """Tables `effects` and `items`."""
        effects = self._effects()
        items = pd.DataFrame({"item": self._get("item"), "p_base": self._get("p_base")})
        return ProbeResult(self.name, {"effects": effects, "items": items}, self._summary(effects))

    def _effects(self) -> pd.DataFrame:
        """One row per flow and layer: the mean relative change over items, that of the control, and their difference."""
        changes, present = self._get("changes"), self._get("present")
        if not len(changes):
            raise InputError(
                "attention knockout needs correctly answered questions or true objects in captions: found none"
            )
        n_items, _, n_flows, n_layers = changes.shape
        here = present[:, None, :, None].astype(np.float64)
        sums = np.hstack([(changes * here).reshape(n_items, -1), present.astype(np.float64)])
        count = n_flows * n_layers

        def means(total: Array) -> Array:
            n = np.repeat(total[..., 2 * count :], n_layers, axis=-1)
            cut, control = ratio(total[..., :count], n), ratio(total[..., count : 2 * count], n)
            return np.concatenate([cut, control, cut - control], axis=-1)

        groups = self._get("group")
        found = cluster_bootstrap(
            cluster_sums(sums, groups), means, n_resamples=self.n_resamples, seed=self.seed, p_value=True
        )
        assert isinstance(found, list)
        cut, control, difference = found[:count], found[count : 2 * count], found[2 * count :]
        window = self._get("window")
        table = pd.DataFrame(
            {
                "flow": np.repeat(list(self.flows), n_layers),
                "layer": np.tile(self._get("centre"), n_flows),
                "first_layer": np.tile(window[:, 0], n_flows),
                "last_layer": np.tile(window[:, 1], n_flows),
                **_columns("change", cut),
                **_columns("control", control),
                **_columns("difference", difference),
                "p": [_lower(one) for one in difference],
                "n_items": np.repeat(present.sum(axis=0), n_layers),
                "n_groups": [len(np.unique(groups[here])) for here in present.T for _ in range(n_layers)],
            }
        )
        table = table[table["n_items"] > 0].reset_index(drop=True)
        if not len(table):
            raise InputError(f"no item has any of the flows {', '.join(self.flows)}")
        p = table["p"].to_numpy(dtype=np.float64)
        table.insert(len(table.columns) - 2, "p_adjusted", benjamini_hochberg(p) if not np.isnan(p).all() else p)
        return table

    def _summary(self, effects: pd.DataFrame) -> str:
        top = effects.loc[effects["difference"].idxmin()]
        left_out = int(self._get("left_out").sum())
        found = int((effects["p_adjusted"] < 0.05).sum())
        return (
            f"Cutting {_words(top['flow'])} in layers {int(top['first_layer'])} to {int(top['last_layer'])} changes the "
            f"probability of the answer most: {100 * top['change']:.1f} % [{100 * top['change_low']:.1f}, "
            f"{100 * top['change_high']:.1f}], as many random pairs {100 * top['control']:.1f} % "
            f"[{100 * top['control_low']:.1f}, {100 * top['control_high']:.1f}] "
            f"(n = {int(top['n_items'])}; {left_out} left out). {found} of {len(effects)} flows and layers matter more than "
            "their control (Benjamini-Hochberg, 5 %)."
        )

    def causal_targets(self, anatomy: Anatomy) -> list[CausalTarget]:
        """The flow and window of layers whose cut hurts most, against as many random pairs in the same layers."""
        effects = self._effects()
        top = effects.loc[effects["difference"].idxmin()]
        flow, layers = str(top["flow"]), list(range(int(top["first_layer"]), int(top["last_layer"]) + 1))

        def target(batch: Batch) -> Sequence[AnyEdit]:
            return knock_out(layers, *_of_caption(batch, flow))

        def control(seed: int) -> EditsOf:
            return lambda batch: cut_pairs(layers, random_pairs(batch, *_of_caption(batch, flow), seed))

        where = f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
        return [
            CausalTarget(
                f"{_words(flow)} cut in {where}",
                target,
                tuple(control(self.seed + 1 + draw) for draw in range(N_DRAWS)),
                f"as many random pairs cut in {where}",
            )
        ]


def _flows_of_rows(batch: Batch, flow: str) -> torch.Tensor:
    """bool [batch]: whether a row has positions on both sides of a flow."""
    queries, keys = of_flow(batch, flow)
    return queries.any(dim=1) & keys.any(dim=1)


def _of_caption(batch: Batch, flow: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions of a flow in a batch with its whole continuation: every position that predicts counts as the last."""
    source, _, target = flow.partition("_to_")
    question = batch.text_after_image_mask & ~batch.generated_mask & ~batch.before_generated_mask
    found = {
        "image": batch.image_mask,
        "question": question,
        "generated": batch.generated_mask,
        "last": batch.before_generated_mask,
    }
    return found[target], found[source]


def _columns(name: str, intervals: Sequence[Interval]) -> dict[str, list[float]]:
    return {
        name: [one.value for one in intervals],
        f"{name}_low": [one.low for one in intervals],
        f"{name}_high": [one.high for one in intervals],
    }


def _lower(difference: Interval) -> float:
    """The one-sided p value of a difference being below zero, from the two-sided one."""
    if difference.p is None or np.isnan(difference.p):
        return float("nan")
    return difference.p / 2 if difference.value < 0 else 1 - difference.p / 2


def _words(flow: object) -> str:
    return str(flow).replace("_to_", " to ")
