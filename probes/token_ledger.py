"""The token ledger: every object that a model named, every internal signal beside it, and how well each finds the false ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from probes.direction_targets import direction_targets
from probes.ledger_combination import combination_table, out_of_fold, probe_fits
from probes.ledger_ranking import FALSE, TRUE, Detection, agreement_table, ranking_table, redundancy_table
from probes.ledger_readings import Need, Readings, Settings, checked_layer, sites_for, views_for
from probes.ledger_signals import Signal, chosen_signals, signal_table
from probes.steering_vectors import steering_vector
from slitlamp.decoding.edits import remove_direction
from slitlamp.errors import InputError
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import CausalTarget, GatheringProbe, Probe, ProbeResult, Site, Trace, View
from slitlamp.tracing.probe import EditsOf, Labels, Part


@dataclass
class TokenLedger(GatheringProbe):
    """One row for every object that the model named, one column for every signal, and their ranking as detectors.

    Every signal is read at the position that predicts the object's first token (the first of several sub-words), in one
    teacher-forced run of the caption, one without the image and one with a noised image. Signals and the direction each is
    expected to point in are declared in `probes.ledger_signals`. Of yes/no questions the answer is the token, and a wrong
    answer takes the place of a hallucinated object.

    Attributes:
        signals: names of the signals; None for all.
        top_k: the number of heads per layer that T-VHD sums; not stated in the paper [?].
        n_outliers: how many image tokens count as the tower's outliers (3 in DAMRO's analysis).
        vision_layer: whose attention finds them, from the end where negative: -2 is the layer whose features LLaVA uses. By
            the CLS token's attention; in a tower without one, by the mean attention a patch receives.
        lens_layers: layers of the logit lens on image tokens, the largest value over them counts; None for the middle one
            [?] (the paper takes the largest over all).
        truth_layer: after which layer the state before the object is probed; None for the middle one (best in TruthPrInt).
        noise_step: of the diffusion schedule, 0 to 999, at which the image of the token visual dependence is noised [?];
            VCD takes 500.
        fpr: the false positive rate at which the true positive rate is given.
        n_folds: of the cross-validated probe and combination, grouped by image.
        seed: of the noise, the folds, the random number and the bootstrap.
        n_resamples: of the bootstrap, over images.
    """

    signals: Sequence[str] | None = None
    top_k: int = 4
    n_outliers: int = 3
    vision_layer: int = -2
    lens_layers: Sequence[int] | None = None
    truth_layer: int | None = None
    noise_step: int = 500
    fpr: float = 0.01
    n_folds: int = 5
    seed: int = 0
    n_resamples: int = 2000
    _gathered: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    name: ClassVar[str] = "token_ledger"

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """What the signals read, and nothing else."""
        if min(self.top_k, self.n_outliers) < 1:
            raise InputError(f"top_k and n_outliers must be 1 or more, found {self.top_k} and {self.n_outliers}")
        if not 0 <= self.noise_step < 1000:
            raise InputError(f"noise_step must be 0 to 999, found {self.noise_step}")
        if not 0 < self.fpr < 1:
            raise InputError(f"fpr must lie between 0 and 1, found {self.fpr}")
        if self.n_folds < 2:
            raise InputError(f"n_folds must be 2 or more, found {self.n_folds}")
        middle, last = anatomy.n_layers // 2, anatomy.n_layers
        lens = [middle] if self.lens_layers is None else list(self.lens_layers)
        return sites_for(
            self._needs(),
            anatomy,
            lens_layers=[checked_layer(one, middle, last, "lens_layers") for one in lens],
            truth_layer=checked_layer(self.truth_layer, middle, last, "truth_layer"),
            vision_layer=checked_layer(self.vision_layer, -1, anatomy.n_vision_layers, "vision_layer"),
        )

    def views(self, anatomy: Anatomy) -> dict[str, View]:
        """The batch without its images, and with noise in them."""
        return views_for(self._needs(), self._settings())

    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch.

        Raises:
            InputError: no labels, which say what the object tokens are.
        """
        if labels is None or all(one is None for one in labels):
            raise InputError("the token ledger needs labels of the generated tokens: a data set with ground truth")
        table = _object_tokens(batch, labels)
        signals = chosen_signals(self.signals)
        readings = Readings.of(batch, trace, table, self._settings())
        columns = [
            np.full(len(table), np.nan) if one.function is None else _numbers(one, readings, len(table))
            for one in signals
        ]
        self._constants(signal=np.array([one.name for one in signals]))
        self._rows(
            item=table["item"].to_numpy(dtype=str),
            image=table["image"].to_numpy(dtype=str),
            token=table["token"].to_numpy(dtype=np.int64),
            mention=table["mention"].to_numpy(dtype=np.int64),
            word=table["word"].to_numpy(dtype=str),
            label=table["label"].to_numpy(dtype=str),
            category=table["category"].to_numpy(dtype=str),
            frequency=table["frequency"].to_numpy(dtype=np.float64),
            values=np.stack(columns, axis=1).astype(np.float64),
        )
        if "state" in self._needs():
            self._rows(state=readings.state.cpu().numpy())

    def result(self) -> ProbeResult:
        """Tables `ledger`, `ranking`, `signals` (what each is, and from where), `redundancy` and `combination`.

        Raises:
            InputError: nothing was taken in, or no object was named.
        """
        ledger, signals = self.ledger(), chosen_signals(self.signals)
        states = self._get("state") if self._has("state") else None
        ranking = ranking_table(ledger, signals, self._detection())
        redundancy = redundancy_table(ledger, signals, n_resamples=self.n_resamples, seed=self.seed)
        combined, ledger["combined"] = combination_table(
            ledger, signals, ranking, states,
            detection=self._detection(), n_folds=self.n_folds,
        )  # fmt: skip
        tables = {"ledger": ledger, "ranking": ranking, "signals": signal_table(signals)}
        tables |= {"redundancy": redundancy} if len(redundancy) else {}
        tables |= {"combination": combined} if len(combined) else {}
        return ProbeResult(name=self.name, tables=tables, summary=_summary(tables))

    def ledger(self) -> pd.DataFrame:
        """One row per object token: item, image, token, mention, word, label, category, frequency, then one column per signal.

        Raises:
            InputError: nothing was taken in, or no object was named.
        """
        kept = ("item", "image", "token", "mention", "word", "label", "category", "frequency")
        columns = {name: self._get(name) for name in kept}
        if not len(columns["item"]):
            raise InputError("no generated token was labelled as an object, so there is nothing to put into the ledger")
        ledger = pd.DataFrame(columns)
        for name, values in zip(self._get("signal"), self._get("values").T, strict=True):
            ledger[str(name)] = values
        if "random" in ledger:
            ledger["random"] = np.random.default_rng(self.seed).random(len(ledger))
        if "truthful_score" in ledger:
            false = np.isin(columns["label"], FALSE)
            ledger["truthful_score"] = out_of_fold(
                self._get("state"), false, columns["image"], n_folds=self.n_folds, seed=self.seed
            )
        return ledger

    def causal_targets(self, anatomy: Anatomy) -> list[CausalTarget]:
        """The direction of the truthful score, the one signal that is read off a fixed place: taken out of its layer.

        Of the other signals those of heads, tokens and layers are checked by the probes they come from (`HeadDivergence`,
        `ClsOutliers`, `AttentionKnockout`, `LogitLens`); certainty and the baselines are no places.
        """
        if not self._has("state"):
            return []
        false, image = np.isin(self._get("label"), FALSE), self._get("image")
        states = torch.from_numpy(self._get("state")).float()
        fits = probe_fits(self._get("state"), false, image, n_folds=self.n_folds, seed=self.seed)
        if fits is None:
            return []
        layer = checked_layer(self.truth_layer, anatomy.n_layers // 2, anatomy.n_layers, "truth_layer")

        def removed(direction: torch.Tensor) -> EditsOf:
            return lambda batch: remove_direction([layer], direction)

        return direction_targets(
            f"the direction of the ledger's truthful score taken out after block {layer}", fits.directions[0].float(), removed,
            estimate=lambda label: steering_vector(states, label, image, "logistic", float(fits.final_strengths[0])),
            positive=false, group=image, seed=self.seed,
        )  # fmt: skip

    @classmethod
    def compare(cls, parts: Mapping[Part, Probe], scores: pd.DataFrame | None = None) -> ProbeResult | None:
        """The rankings of several models, conditions or data sets, and how far they agree."""
        probes = {part: probe for part, probe in parts.items() if isinstance(probe, cls)}
        if len(probes) < 2:
            return None
        rankings = []
        for part, probe in probes.items():
            ranking = ranking_table(probe.ledger(), chosen_signals(probe.signals), probe._detection())
            for place, (name, value) in enumerate(part._asdict().items()):
                ranking.insert(place, name, value)
            rankings.append(ranking)
        tables = {"rankings": pd.concat(rankings, ignore_index=True), "agreement": agreement_table(rankings)}
        return ProbeResult(name=cls.name, tables=tables, summary=_agreement_summary(tables["agreement"]))

    def _needs(self) -> set[Need]:
        return {need for one in chosen_signals(self.signals) for need in one.needs}

    def _detection(self) -> Detection:
        return Detection(self.fpr, self.n_resamples, self.seed)

    def _settings(self) -> Settings:
        return Settings(self.top_k, self.n_outliers, self.noise_step, self.seed)


def _object_tokens(batch: Batch, labels: Labels) -> pd.DataFrame:
    """The labelled object tokens of a batch in order: columns row, item, image, token, mention, word, label, category,
    frequency.
    """
    found = []
    for row, table in enumerate(labels):
        named = None if table is None else table[table["label"].isin(FALSE + TRUE)].sort_values("token", kind="stable")
        for mention, one in enumerate(() if named is None else named.to_dict("records"), start=1):
            category, frequency = one.get("category"), one.get("frequency")
            found.append(
                {
                    "row": row,
                    "item": batch.ids[row],
                    "image": batch.groups[row],
                    "token": int(one["token"]),
                    "mention": mention,
                    "word": str(one["word"]),
                    "label": str(one["label"]),
                    "category": category if isinstance(category, str) else "",
                    "frequency": np.nan if frequency is None else float(frequency),
                }
            )
    columns = ("row", "item", "image", "token", "mention", "word", "label", "category", "frequency")
    return pd.DataFrame(found, columns=columns)


def _numbers(signal: Signal, readings: Readings, count: int) -> np.ndarray[Any, Any]:
    """The values of a signal.

    Raises:
        InputError: not one number per token.
    """
    assert signal.function is not None
    if not count:
        return np.zeros(0)
    values = signal.function(readings).detach().cpu().numpy()
    if values.shape != (count,):
        raise InputError(f"the signal {signal.name!r} gave values of shape {values.shape} for {count} tokens")
    return values


def _summary(tables: dict[str, pd.DataFrame]) -> str:
    """The best signal and what is left of it at equal position, what the combination adds, and what points the wrong way."""
    ranking = tables["ranking"]
    real = ranking[(ranking["family"] != "null") & ranking["auroc"].notna()]
    if real.empty:
        return f"No signal can be ranked: the {len(tables['ledger'])} named objects are all true or all hallucinated."
    best = real.iloc[0]
    text = (
        f"Of {len(real)} signals {best['title']} finds hallucinated objects best: AUROC {best['auroc']:.2f} "
        f"[{best['low']:.2f}, {best['high']:.2f}]"
    )
    if np.isfinite(best["partial"]):
        text += (
            f", and {best['partial']:.2f} [{best['partial_low']:.2f}, {best['partial_high']:.2f}] at equal position and object "
            "frequency"
        )
    text += f" (chance .5; {int(best['n_tokens'])} named objects of {int(best['n_images'])} images)."
    close = real[(real["to_best_low"] <= 0) & (real["to_best_high"] >= 0)]
    if len(close):
        text += f" On the same objects it is not told from {', '.join(close['title'])}."
    together = tables.get("combination", pd.DataFrame({"against": []}))
    for row in together[together["against"] == best["title"]].head(1).to_dict("records"):
        text += (
            f" All signals together change that by {row['difference']:+.4f} [{row['difference_low']:+.4f}, "
            f"{row['difference_high']:+.4f}]."
        )
    wrong = real.loc[real["agrees"] == "no", "title"]
    return text + (f" Against the declared direction: {', '.join(wrong)}." if len(wrong) else "")


def _agreement_summary(agreement: pd.DataFrame) -> str:
    known = agreement.dropna(subset="spearman")
    if known.empty:
        return "The rankings have too few signals in common to be compared."
    least = known.loc[known["spearman"].idxmin()]
    pair = (
        f"{least['spearman']:.2f} [{least['low']:.2f}, {least['high']:.2f}] ({_part(least, 'a')} against {_part(least, 'b')}; "
        f"interval over {int(least['n_signals'])} signals, chance 0)"
    )
    if len(known) == 1:
        return f"The two rankings of the signals correlate by {pair}."
    return (
        f"Over {len(known)} pairs the rankings of the signals correlate by {known['spearman'].mean():.2f} on average, least by "
        f"{pair}."
    )


def _part(row: pd.Series, side: str) -> str:
    return ", ".join(str(row[f"{name}_{side}"]) for name in ("model", "condition", "dataset"))
