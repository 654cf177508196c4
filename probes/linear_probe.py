"""Linear probes of any label at any site and position, with control task, permutations and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch

from probes.direction_targets import direction_targets
from probes.labelled_states import classes, gathered_rows, state_site
from probes.linear_fits import DEFAULT_STRENGTHS, METHODS, CrossValidated, cross_validated
from probes.steering_vectors import steering_vector
from slitlamp.decoding.edits import remove_direction
from slitlamp.errors import InputError, unknown
from slitlamp.evaluation.detection import auroc_interval
from slitlamp.evaluation.statistics import benjamini_hochberg
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import CausalTarget, GatheringProbe, ProbeResult, Site, Trace
from slitlamp.tracing.probe import Array, EditsOf, Labels


@dataclass
class LinearProbe(GatheringProbe):
    """What can be read off the states by a linear classifier, layer by layer (Alain and Bengio, 2017, arXiv 1610.01644).

    Logistic regression on standardised features with the penalty chosen inside the training fold, cross-validated with all
    samples of an image held out together. Beside the AUROC stand that of control labels, one random label per type (object
    category, else word), whose difference is the selectivity (Hewitt and Liang, 2019, arXiv 1909.03368), and the p value of
    labels permuted across images. A decodable label need not be used by the model: see `causal_targets`.

    The interval resamples images with the probes as they are. Without any signal the fitted direction itself is chance, and the
    interval leaves that out: in simulations it missed 1/2 in a quarter of the cases. Whether there is anything to read is
    what the permutations answer.

    The states of all samples and layers are kept: n_samples x n_layers x width numbers of 4 bytes.

    Attributes:
        target: "label" (hallucinated against true objects), "correct" (right against wrong answers), "truth" (questions whose
            answer is yes), or any column of the labels, such as "category": each of its values against the rest.
        site: "resid_post", "resid_pre", "resid_mid", "attn_out", "mlp_out", "ln1", "ln2", "z" or "mlp_post".
        position: "before_object" (the position that predicts the mention, or the answer), "at_object", "last" (the last
            position of the prompt) or "image_mean" (the mean over the image); the last two take the label of the first
            generated token, which is the answer of a question.
        layers: 0-based; None for all.
        method: "logistic", "difference_of_means" or "mlp".
        max_classes: of a target with many values, the most common ones that are probed.
        strengths: penalties that the logistic regression chooses from; with two folds nothing is left to choose on, and the
            middle one is taken.
        n_folds: no more than there are images on either side.
        n_controls: control labelings.
        n_permutations: 0 for no p values; each takes as long as the probe itself.
        seed: of folds, controls, permutations, random directions and the bootstrap.
        n_resamples: of the bootstrap, over images.
    """

    target: str = "label"
    site: str = "resid_post"
    position: Literal["before_object", "at_object", "last", "image_mean"] = "before_object"
    layers: Sequence[int] | None = None
    method: Literal["logistic", "difference_of_means", "mlp"] = "logistic"
    max_classes: int = 5
    strengths: Sequence[float] = DEFAULT_STRENGTHS
    n_folds: int = 5
    n_controls: int = 5
    n_permutations: int = 19
    seed: int = 0
    n_resamples: int = 2000
    _gathered: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    name: ClassVar[str] = "linear_probe"

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The states of the samples."""
        if self.method not in METHODS:
            raise unknown("method of fitting", self.method, METHODS)
        if self.n_folds < 2 or self.max_classes < 1 or min(self.n_controls, self.n_permutations) < 0:
            raise InputError(
                "n_folds starts at 2, max_classes at 1, n_controls and n_permutations at 0: found "
                f"{self.n_folds}, {self.max_classes}, {self.n_controls}, {self.n_permutations}"
            )
        if not self.strengths or min(self.strengths) <= 0:
            raise InputError(f"strengths must be positive penalties: found {list(self.strengths)}")
        return [state_site(self.site, self.layers, self.position, anatomy)]

    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch; rows without labels give no samples."""
        self._constants(layer=np.array(trace["state"].layers))
        self._rows(**gathered_rows(batch, trace, labels, self.position, self.target))

    def result(self) -> ProbeResult:
        """Tables `layers`, one row per class and layer, and `controls`, one per control labeling or permutation."""
        layer = self._get("layer")
        value, group = self._get("value"), self._get("group")
        tables, controls = [], []
        for one in classes(value, group, self.target, self.max_classes):
            fit, n_folds = self._fit(value == one)
            tables.append(self._table(one, fit, n_folds))
            for kind, areas in (("control", fit.control_auroc), ("permutation", fit.null_auroc)):
                for draw in range(areas.shape[1]):
                    controls.append(
                        pd.DataFrame(
                            {"target": self.target, "positive": one, "kind": kind, "draw": draw, "layer": layer,
                             "auroc": areas[:, draw].numpy()}
                        )
                    )  # fmt: skip
        found = pd.concat(tables, ignore_index=True)
        found["q"] = benjamini_hochberg(found["p"]) if found["p"].notna().any() else np.nan
        result = {"layers": found}
        if controls:
            result["controls"] = pd.concat(controls, ignore_index=True)
        return ProbeResult(self.name, result, _summary(found, self.site, self.position))

    def _fit(self, positive: Array) -> tuple[CrossValidated, int]:
        """The cross-validation of one class."""
        group = self._get("group")
        n_folds = min(self.n_folds, *(len(np.unique(group[side])) for side in (positive, ~positive)))
        strengths = self.strengths if n_folds > 2 else [sorted(self.strengths)[len(self.strengths) // 2]]
        states = self._get("state")
        fit = cross_validated(
            lambda place: torch.from_numpy(np.ascontiguousarray(states[:, place])),
            positive, group, method=self.method, strengths=strengths, n_folds=n_folds, seed=self.seed,
            controls=self.n_controls, types=self._get("type"), permutations=self.n_permutations, n_layers=states.shape[1],
        )  # fmt: skip
        return fit, n_folds

    def _table(self, name: str, fit: CrossValidated, n_folds: int) -> pd.DataFrame:
        """A row per layer. Ends of the control are its lowest and highest labeling; those of selectivity are AUROC's interval
        minus the highest and the lowest control, which is wider than an interval of the mean.
        """
        group, positive = self._get("group"), fit.labels.numpy()
        areas = [
            auroc_interval(score, positive, group, n_resamples=self.n_resamples, seed=self.seed)
            for score in fit.scores.numpy()
        ]
        drawn = fit.control_auroc.shape[1] > 0
        lowest, highest = (
            (fit.control_auroc.amin(dim=1).numpy(), fit.control_auroc.amax(dim=1).numpy())
            if drawn
            else (np.nan, np.nan)
        )
        null = fit.null_auroc.shape[1] > 0
        return pd.DataFrame(
            {
                "target": self.target,
                "positive": name,
                "layer": self._get("layer"),
                "auroc": [one.value for one in areas],
                "low": [one.low for one in areas],
                "high": [one.high for one in areas],
                "control": fit.control_auroc.mean(dim=1).numpy() if drawn else np.nan,
                "control_low": lowest,
                "control_high": highest,
                "selectivity": fit.selectivity.numpy(),
                "selectivity_low": np.array([one.low for one in areas]) - highest,
                "selectivity_high": np.array([one.high for one in areas]) - lowest,
                "null_high": fit.null_auroc.quantile(0.95, dim=1).numpy() if null else np.nan,
                "p": fit.p.numpy(),
                "p_any_layer": fit.p_any_layer.numpy(),
                "strength": fit.strengths.median(dim=1).values.numpy(),
                "converged": fit.converged.numpy(),
                "n_folds": n_folds,
                "n_positive": int(positive.sum()),
                "n_negative": int((~positive).sum()),
                "n_images": areas[0].n,
            }
        )

    def causal_targets(self, anatomy: Anatomy) -> list[CausalTarget]:
        """The direction of the best layer of the first class taken out of the residual stream; see `direction_targets`."""
        if self.site != "resid_post" or self.method == "mlp":
            return []
        value, group = self._get("value"), self._get("group")
        one = classes(value, group, self.target, self.max_classes)[0]
        fit, _ = self._fit(value == one)
        place = int(fit.auroc.argmax())
        layer = int(self._get("layer")[place])

        states = torch.from_numpy(self._get("state")[:, place])

        def without(removed: torch.Tensor) -> EditsOf:
            return lambda batch: remove_direction([layer], removed)

        return direction_targets(
            f"the direction of {one!r} taken out after block {layer}",
            fit.directions[place].float(),
            without,
            estimate=lambda label: steering_vector(
                states, label, group, self.method, float(fit.final_strengths[place])
            ),
            positive=value == one,
            group=group,
            seed=self.seed,
        )


def _summary(layers: pd.DataFrame, site: str, position: str) -> str:
    best = layers.loc[layers["auroc"].idxmax()]
    what = {"label": "hallucinated objects", "correct": "right answers", "truth": "questions whose answer is yes"}.get(
        best["target"], f"{best['target']} {best['positive']!r}"
    )
    text = (
        f"A linear probe on {site} ({position.replace('_', ' ')}) tells {what} from the rest best at layer "
        f"{int(best['layer'])}: AUROC {best['auroc']:.2f} [{best['low']:.2f}, {best['high']:.2f}]"
    )
    if np.isfinite(best["control"]):
        text += f", selectivity {best['selectivity']:.2f} over control labels ({best['control']:.2f})"
    if np.isfinite(best["p_any_layer"]):
        text += f", p {best['p_any_layer']:.3f} over all layers by permutation"
    text += f" (n = {int(best['n_positive'])} and {int(best['n_negative'])} in {int(best['n_images'])} images)."
    if layers["positive"].nunique() > 1:
        text += f" It is the best of {layers['positive'].nunique()} classes."
    return text
