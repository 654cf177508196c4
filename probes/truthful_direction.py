"""Truthful directions: is a hallucinated object known before it is said? (TruthPrInt, ICCV 2025, arXiv 2503.10602)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.direction_targets import direction_targets
from probes.linear_fits import DEFAULT_STRENGTHS, MlpOptions
from probes.steering_vectors import steering_vector
from probes.truthful_file import save_direction
from probes.truthful_fits import METHODS, LayerFits, Options, fit_layers
from probes.truthful_gather import ANSWERS, COLUMNS, INPUT_LAYER, mention_rows, named_tokens
from probes.truthful_pmc import pmc_tables
from probes.truthful_summary import summary
from probes.truthful_tables import detection_tables
from probes.truthful_transfer import ALIGNMENTS, Domain, compare_domains, layer_transfer
from slitlamp.decoding.edits import add_direction, remove_direction
from slitlamp.errors import InputError, unknown
from slitlamp.evaluation.operating_points import threshold_at_fpr
from slitlamp.evaluation.statistics import Interval
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import CausalTarget, Edit, GatheringProbe, Part, Probe, ProbeResult, Site, Trace, sites
from slitlamp.tracing.probe import Array, EditsOf, Labels


@dataclass
class TruthfulDirection(GatheringProbe):
    """Classifiers of the hidden states around object mentions: will it be hallucinated?

    A sample is the first token of an object mention of a caption, positive where the object is not in the image (label
    "hallucinated"). Its feature is the residual stream after each block at the position that predicts the token (the
    paper's), or at the token itself. At the answers of yes/no questions a sample is a "yes", positive where it is wrong.

    Per layer: logistic regression, difference of means and the paper's three-layer perceptron, cross-validated with the
    mentions of an image kept together. Beside them the control labels of Hewitt and Liang (2019), one random label for
    each object category, and what can be said without looking inside: -log p of the token, the place of the mention among
    those of the text, and how common the object is.

    The states of all layers are kept: n_mentions x n_layers x d_model numbers (1000 mentions of a 7B model with 32 layers
    and width 4096: 540 MB in float32, half of it in float16), and with `anchors` two more states per item. `layers` keeps
    fewer.

    Attributes:
        position: "before" (predicts the token; the paper's) or "at" (the token itself).
        layers: 0-based blocks whose output (`resid_post`) is read; -1 stands for the input of the language model
            (`resid_pre[0]`). None for all of them.
        methods: "logistic", "difference_of_means", "mlp".
        dtype: of the kept states, "float32" or "float16".
        answers: of yes/no questions, "yes": only answers of yes are samples (a wrong one names an object that is not there);
            "all": a wrong no is a positive too.
        anchors: keep the states at the last prompt position and the mean over the image, which align models (see `compare`).
        strengths: penalties that the logistic regression chooses from.
        n_folds: of the cross-validation; no more than there are items.
        n_controls: control labelings that are drawn (the perceptron, trained anew for each, has one at most).
        permutations: of the labels across images, for p values of the linear methods that hold for any number of dimensions
            and samples (the intervals take the classifiers as given, and near 1/2 are too narrow: in simulated noise 13 % of
            the 95 % intervals miss 1/2). The perceptron has none: each is a training of its own.
        target_fpr: false positive rate at which the threshold is set (the paper's .01).
        mlp_widths, mlp_epochs, mlp_batch_size: of the perceptron; the widths are not published [?].
        alignments: how `compare` aligns: "none", "standardised", "subspace", "coral", "procrustes".
        components: numbers of components d' of subspace alignment; those above the rank are left out.
        layer_transfer: also carry the logistic probe of every layer to every other one (n_layers^2 times the alignments).
        causal_scale: length of the step along the direction in `causal_targets`, in units of the norm of each state.
        seed: of folds, control labels, perceptron, random directions and the bootstrap.
        n_resamples: of the bootstrap, over images.
    """

    position: Literal["before", "at"] = "before"
    layers: Sequence[int] | None = None
    methods: Sequence[Literal["logistic", "difference_of_means", "mlp"]] = METHODS
    dtype: Literal["float32", "float16"] = "float32"
    answers: Literal["yes", "all"] = "yes"
    anchors: bool = True
    strengths: Sequence[float] = DEFAULT_STRENGTHS
    n_folds: int = 5
    n_controls: int = 5
    permutations: int = 0
    target_fpr: float = 0.01
    mlp_widths: Sequence[int] = (256, 64)
    mlp_epochs: int = 30
    mlp_batch_size: int = 512
    alignments: Sequence[str] = ALIGNMENTS
    components: Sequence[int] = (2, 8, 32, 128)
    layer_transfer: bool = False
    causal_scale: float = 0.2
    seed: int = 0
    n_resamples: int = 2000
    _gathered: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _fits: dict[str, LayerFits] = field(default_factory=dict, init=False, repr=False, compare=False)

    name: ClassVar[str] = "truthful_direction"

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The residual stream around generated tokens, the logits that chose them, and the anchors."""
        self._check(anatomy)
        wanted = range(-1, anatomy.n_layers) if self.layers is None else self.layers
        blocks = [one for one in wanted if one != INPUT_LAYER]
        places: dict[str, tuple[sites.Positions, sites.Reduction | None]] = {
            "state": ("generated" if self.position == "at" else "before_generated", None)
        }
        if self.anchors:
            places |= {"anchor_image": ("image", "mean")}
            if self.position == "at":
                places |= {"anchor_prompt": ("before_generated", None)}
        found = [sites.logits(positions="before_generated", label="logits")]
        for label, (positions, reduce) in places.items():
            if blocks:
                found.append(sites.resid_post(blocks, positions, reduce, label=label))
            if INPUT_LAYER in wanted:
                found.append(sites.resid_pre(0, positions, reduce, label=f"{label}_input"))
        return found

    def _check(self, anatomy: Anatomy) -> None:
        for what, value, known in (
            ("position", [self.position], ("before", "at")),
            ("dtype", [self.dtype], ("float32", "float16")),
            ("choice of answers", [self.answers], ANSWERS),
            ("method", self.methods, METHODS),
            ("alignment", self.alignments, ALIGNMENTS),
        ):
            for one in value:
                if one not in known:
                    raise unknown(what, one, known)
        if not self.methods:
            raise InputError(f"methods must name at least one of {', '.join(METHODS)}")
        if self.layers is not None and not (
            len(self.layers) and all(-1 <= one < anatomy.n_layers for one in self.layers)
        ):
            raise InputError(
                f"layers lie between -1 (the input) and {anatomy.n_layers - 1}, at least one: found {list(self.layers)}"
            )
        if not 0 < self.target_fpr < 1:
            raise InputError(f"target_fpr must lie between 0 and 1: found {self.target_fpr}")
        if self.n_folds < 2:
            raise InputError(f"n_folds must be at least 2: found {self.n_folds}")
        if min(self.n_controls, self.permutations) < 0 or not self.strengths or min(self.strengths) <= 0:
            raise InputError("n_controls and permutations start at 0, and strengths must hold positive penalties")
        if not self.components or min(self.components) < 1:
            raise InputError(f"components must hold numbers from 1: found {list(self.components)}")
        self._options().mlp.check()

    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch; without labels of a row, no sample comes of it."""
        self._fits.clear()
        if not batch.has_images:
            bare = [name for name, row in zip(batch.ids, batch.image_mask, strict=True) if not row.any()]
            raise InputError(f"these items have no image to be true to: {', '.join(bare)}")
        layers = ([INPUT_LAYER] if "state_input" in trace.sites else []) + (
            list(trace["state"].layers or trace.sites["state"].layers or ()) if "state" in trace.sites else []
        )
        self._constants(layer=np.array(layers))
        if self.anchors:
            prompt = _stacked(trace, "anchor_prompt" if self.position == "at" else "state")[:, :, 0]
            anchor = torch.stack([prompt, _stacked(trace, "anchor_image")])  # [kind, layer, batch, d]
            self._rows(
                anchor=self._cast(anchor.permute(2, 0, 1, 3)),
                anchor_item=np.array(batch.ids, dtype=str),
                anchor_group=np.array(batch.groups, dtype=str),
            )
        states = _stacked(trace, "state")  # [layer, batch, position, d]
        logits = trace["logits"][0]
        for row, table in enumerate(labels or ()):
            if table is None or not batch.n_generated[row]:
                continue
            named = named_tokens(table, batch.n_generated[row], self.answers)
            start = batch.length - batch.n_generated[row]
            columns = mention_rows(named, table, logits[row], batch.input_ids[row, start:])
            place = torch.tensor(named["token"].tolist(), dtype=torch.int64, device=states.device)
            self._rows(
                state=self._cast(states[:, row, place].permute(1, 0, 2)),
                item=np.full(len(named), batch.ids[row]),
                group=np.full(len(named), batch.groups[row]),
                **columns,
            )
        self._rows(seen=np.array(batch.ids, dtype=str))

    def _cast(self, states: Tensor) -> Array:
        values = states.to(getattr(torch, self.dtype))
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"states do not fit into {self.dtype}, or are not finite: take dtype='float32'")
        return values.cpu().numpy()

    # -- what was gathered ------------------------------------------------------------------------------------------

    def mentions(self) -> pd.DataFrame:
        """The samples, in order, with everything that is known of them but their states (columns: `truthful_gather.COLUMNS`)."""
        self._get("seen")
        return pd.DataFrame({name: self._get(name) if self._has("state") else [] for name in COLUMNS})

    def states(self, layer: int) -> Tensor:
        """The kept states [mention, d] of a layer, in float32 on the CPU."""
        return torch.from_numpy(self._get("state")[:, self._place(layer)].astype(np.float32))

    def _place(self, layer: int) -> int:
        found = np.flatnonzero(self._get("layer") == layer)
        if not len(found):
            raise InputError(f"layer {layer} was not recorded; recorded: {self._get('layer').tolist()}")
        return int(found[0])

    def _options(self) -> Options:
        mlp = MlpOptions(widths=tuple(self.mlp_widths), epochs=self.mlp_epochs, batch_size=self.mlp_batch_size)
        return Options(
            strengths=tuple(self.strengths),
            n_folds=self.n_folds,
            n_controls=self.n_controls,
            permutations=self.permutations,
            target_fpr=self.target_fpr,
            seed=self.seed,
            mlp=mlp,
        )

    def fits(self, method: str = "logistic") -> LayerFits:
        """The cross-validated classifiers of every layer by one method; computed once.

        Raises:
            InputError: too few mentions of a kind, or nothing taken in.
        """
        if method not in self._fits:
            layers = [int(one) for one in self._get("layer")]
            self._fits[method] = fit_layers(self.states, layers, self.mentions(), method, self._options())
        return self._fits[method]

    def load_state(self, state: dict[str, Array]) -> None:
        """Take back what `state` gave."""
        self._fits.clear()
        super().load_state(state)

    def merge(self, other: Probe) -> None:
        """Add what another probe gathered."""
        self._fits.clear()
        super().merge(other)

    # -- results ----------------------------------------------------------------------------------------------------

    def result(self) -> ProbeResult:
        """Tables `layers`, `metrics`, `baselines`, `threshold`, `mentions`, `pmc`, `pmc_by_length`, and `layer_transfer`."""
        mentions = self.mentions()
        fitted: dict[str, LayerFits] = {}
        reason = ""
        try:
            fitted = {method: self.fits(method) for method in self.methods}
        except InputError as error:
            reason = str(error)
        options: dict[str, Any] = {"n_resamples": self.n_resamples, "seed": self.seed}
        layers = [int(one) for one in self._get("layer")]
        tables = detection_tables(mentions, fitted, list(self.methods), layers, self.target_fpr, options)
        tables |= pmc_tables(mentions, **options)
        if self.layer_transfer and "logistic" in fitted:
            tables["layer_transfer"] = layer_transfer(
                self.domain, fitted["logistic"], self.alignments, self.components, self._options()
            )
        return ProbeResult(name=self.name, tables=tables, summary=summary(tables, self.position, reason))

    def score(self, states: Tensor, layer: int | None = None, method: str = "logistic") -> Tensor:
        """How much states look like those before a hallucination: higher means hallucinated.

        Args:
            states: [..., d], of the probed position, any device.
            layer: where they come from; None for `best_layer`.
            method: "logistic" (log-odds) or "difference_of_means" (projections); the perceptron has no fit on everything.

        Returns:
            [...] in float32.
        """
        direction, intercept = self.direction(layer, method)
        return states.float() @ direction.to(states.device) + intercept

    def direction(self, layer: int | None = None, method: str = "logistic") -> tuple[Tensor, float]:
        """The classifier's normal [d] in raw units of the residual stream, towards hallucination, and its intercept."""
        if method == "mlp":
            raise InputError("a perceptron has no direction: take 'logistic' or 'difference_of_means'")
        fit = self.fits(method)
        place = fit.layers.index(fit.best_layer if layer is None else layer)
        return fit.cv.directions[place].float(), float(fit.cv.intercepts[place])

    def best_layer(self, method: str = "logistic") -> int:
        """The block with the highest cross-validated AUROC over all mentions: to be used on other data than these."""
        return self.fits(method).best_layer

    def threshold(self, layer: int | None = None, fpr: float | None = None, method: str = "logistic") -> Interval:
        """The value of `score` above which a share `fpr` (None: `target_fpr`) of true mentions lies, out of fold."""
        fit = self.fits(method)
        scores = fit.own_scores(fit.best_layer if layer is None else layer)
        mentions = self.mentions()
        return threshold_at_fpr(
            scores, mentions["hallucinated"], mentions["group"], self.target_fpr if fpr is None else fpr,
            n_resamples=self.n_resamples, seed=self.seed,
        )  # fmt: skip

    def save(self, path: str | Path, layer: int | None = None, method: str = "logistic") -> Path:
        """Write a direction as safetensors, for `interventions.TruthfulPreIntervention`.

        Beside it go the scores, out of fold, of the mentions it was fitted on, from which a threshold at any false-positive rate
        follows; for controls the same of a direction of shuffled labels, and random directions with their scores of the true
        mentions; and the first words of the mentions.

        Args:
            path: of the file.
            layer, method: which direction, as in `direction`.

        Raises:
            InputError: states of the tokens themselves (position "at"), which are not there before a token is chosen.
        """
        return save_direction(self, path, layer, method)

    def causal_targets(self, anatomy: Anatomy) -> list[CausalTarget]:
        """The first linear method's direction at its best layer: taken out, and a step against it (towards truth); see
        `direction_targets`.
        """
        linear = [one for one in self.methods if one != "mlp"]
        if not linear:
            return []
        method, mentions = linear[0], self.mentions()
        layer = self.best_layer(method)
        if layer < 0:
            raise InputError("only the model's input was probed, after which there is no block: choose layers from 0")
        states, group = self.states(layer), mentions["group"].to_numpy(dtype=str)
        fit = self.fits(method)
        strength = float(fit.cv.final_strengths[fit.layers.index(layer)])
        return [
            target
            for what, edit in (
                ("taken out", _remove(layer)),
                (f"followed towards truth ({self.causal_scale:g} of the norm)", _step(layer, self.causal_scale)),
            )
            for target in direction_targets(
                f"the direction of layer {layer} ({method.replace('_', ' ')}) {what}",
                self.direction(layer, method)[0],
                edit,
                estimate=lambda label: steering_vector(states, label, group, method, strength),
                positive=mentions["hallucinated"].to_numpy(dtype=bool),
                group=group,
                seed=self.seed,
            )
        ]

    @classmethod
    def compare(cls, parts: Mapping[Part, Probe], scores: pd.DataFrame | None = None) -> ProbeResult | None:
        """Transfer between data sets and models; see `probes.truthful_transfer.compare_parts`."""
        if len(parts) < 2:
            return None
        probes = {part: cast(TruthfulDirection, probe) for part, probe in parts.items()}
        one = next(iter(probes.values()))
        domains, left_out = {}, {}
        for part, probe in probes.items():
            try:
                domains[part] = probe.domain(probe.best_layer())
            except InputError as error:
                left_out[part] = str(error)
        tables, text = compare_domains(
            domains, left_out, one.alignments, one.components, one._options(), one.n_resamples,
            layers={part: probes[part]._get("layer").tolist() for part in domains},
            domain_at=lambda part, layer: probes[part].domain(layer),
        )  # fmt: skip
        return ProbeResult(name=cls.name, tables=tables, summary=text)

    def domain(self, layer: int) -> Domain:
        """States, labels and anchors of a layer, as transfer takes them."""
        mentions = self.mentions()
        anchors = {}
        if self._has("anchor"):
            anchors["prompt"] = (
                self._get("anchor_item"),
                self._get("anchor_group"),
                self._get("anchor")[:, :, self._place(layer)].astype(np.float64),
            )
        return Domain(
            layer=layer,
            states=self.states(layer).double().numpy(),
            hallucinated=mentions["hallucinated"].to_numpy(dtype=bool),
            group=mentions["group"].to_numpy(dtype=str),
            category=mentions["category"].to_numpy(dtype=str),
            anchors=anchors,
        )


def _stacked(trace: Trace, label: str) -> Tensor:
    """The input of the model (where it was asked for) and the blocks: [layer, batch, ...]."""
    parts = [trace[one].stack() for one in (f"{label}_input", label) if one in trace.sites]
    return torch.cat([one.to(parts[0].device) for one in parts])


def _remove(layer: int) -> Any:
    def of(direction: Tensor) -> EditsOf:
        return lambda batch: remove_direction([layer], direction)

    return of


def _step(layer: int, scale: float) -> Any:
    def of(direction: Tensor) -> EditsOf:
        def edits(batch: Batch) -> list[Edit]:
            return add_direction(layer, -direction, scale)

        return edits

    return of
