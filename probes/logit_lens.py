"""The logit lens on text and on image tokens (nostalgebraist 2020; for VLMs Neo et al., ICLR 2025, arXiv 2410.07149)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from probes.lens_readout import IMAGE_METRICS, PLACES, TEXT_METRICS, at_object, name_tokens, read_image, read_text
from probes.patching_places import boxes_of, category_of
from slitlamp.decoding.edits import skip_block
from slitlamp.errors import InputError
from slitlamp.evaluation.statistics import Interval, benjamini_hochberg, cluster_bootstrap, cluster_sums, ratio
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import CausalTarget, GatheringProbe, ProbeResult, Site, Trace
from slitlamp.tracing.probe import N_DRAWS, Array, EditsOf, Labels
from slitlamp.tracing.sites import resid_post

KINDS = ("all", "object", "hallucinated", "other", "correct", "wrong")
"""Kinds of tokens: every one, and by the labels of captions and of answers."""
NAMED = ("object", "hallucinated", "correct", "wrong")
"""Those at which causal checks look."""


@dataclass
class LogitLens(GatheringProbe):
    """What the model would say if it stopped after each layer: softmax(head(norm(h_l))).

    The model's own final norm, head and soft cap are applied to the residual stream after each block; that after the last
    block has not been normed before, so that its lens is the model's prediction.

    - Text: at the positions that predict, the probability and rank of the token that is emitted in the end, the entropy, and
      KL(final layer || layer), by kind of token.
    - Image: at every image token, the probability and rank of the name of each object in the image (its first token, in any
      way of writing it): inside the object's boxes, outside, and, as the control, at the same shape moved elsewhere on the
      image. Needs labels with boxes.

    Only sums are kept, one row per item; questions about one image are one group of the bootstrap.

    TransformerLens's own tools run on the same recordings: `trace.to_activation_cache().logit_lens(positions=None)` gives the
    lens of every layer, `.accumulated_resid(...)` and `.logit_attrs(...)` the parts of the stream and what they add to a logit
    (record `sites.resid_pre()`, `sites.attn_out()` and `sites.mlp_out()`).

    Attributes:
        layers: 0-based; None for all. The last one is always added: others are compared with it.
        image: whether image tokens are read.
        n_shifted: how many shifted places the control averages.
        seed: of the shifted places and the bootstrap.
        n_resamples: of the bootstrap, over groups of items that share an image.
    """

    layers: Sequence[int] | None = None
    image: bool = True
    n_shifted: int = 5
    seed: int = 0
    n_resamples: int = 2000
    _gathered: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    name: ClassVar[str] = "logit_lens"

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The residual stream after blocks, at positions that predict and at image tokens."""
        if self.n_shifted < 1:
            raise InputError(f"n_shifted must be at least 1, found {self.n_shifted}")
        last = anatomy.n_layers - 1
        chosen = range(anatomy.n_layers) if self.layers is None else sorted({*self.layers, last})
        found = [resid_post(chosen, "before_generated", label="text_states")]
        return [*found, resid_post(chosen, "image", label="image_states")] if self.image else found

    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch; `labels` say what kinds the generated tokens are, and where the objects are."""
        assert trace.source is not None
        source, text = trace.source, trace["text_states"]
        self._constants(layer=np.array(text.layers), d_vocab=np.array(source.anatomy.d_vocab))
        states = [text[layer] for layer in text.layers]
        generated = batch.generated_mask
        for row, count in enumerate(batch.n_generated):
            table = labels[row] if labels else None
            if count:
                emitted = batch.input_ids[row, generated[row]]
                values = read_text(source, [one[row, :count] for one in states], emitted)
                self._add_text(batch.groups[row], values, table)
        if self.image and bool(batch.image_mask.any()) and batch.cross_mask is None:
            self._add_images(batch, trace, labels)

    def _add_text(self, group: str, values: Array, table: pd.DataFrame | None) -> None:
        """One row of sums over an item's tokens, for every kind."""
        of_kind = np.zeros((len(KINDS), values.shape[1]))
        of_kind[0] = 1
        if table is not None:
            tokens, given = table["token"].to_numpy(), table["label"].to_numpy(dtype=str)
            for number, kind in enumerate(KINDS[1:], start=1):
                of_kind[number, tokens[given == kind]] = 1
        self._rows(
            text_group=np.array([group]),
            text_sums=np.einsum("kt,ltm->klm", of_kind, values)[None],
            text_count=of_kind.sum(axis=1)[None],
        )

    def _add_images(self, batch: Batch, trace: Trace, labels: Labels | None) -> None:
        """One row of sums over an item's objects."""
        assert trace.source is not None
        record = trace["image_states"]
        states = [record[layer] for layer in record.layers]
        for row, item in enumerate(batch.ids):
            objects = _objects(labels[row] if labels else None)
            names = {one: name_tokens(one, trace.source.tokenizer) for one in objects}
            objects = {one: boxes for one, boxes in objects.items() if names[one]}
            if not objects:
                continue
            count = int(batch.image_mask[row].sum())
            values = read_image(trace.source, [one[row, :count] for one in states], [names[one] for one in objects])
            each = [
                at_object(values[i], batch.patches[row], boxes, item, one, n_shifted=self.n_shifted, seed=self.seed)
                for i, (one, boxes) in enumerate(objects.items())
            ]
            found = [one for one in each if one is not None]
            if found:
                self._rows(
                    image_group=np.array([batch.groups[row]]),
                    image_sums=np.sum(found, axis=0)[None],
                    image_count=np.array([float(len(found))]),
                )

    def result(self) -> ProbeResult:
        """Tables `text`, and with labelled boxes `image` and `image_contrast`."""
        tables = {"text": self._text()}
        if self._has("image_sums"):
            tables["image"], tables["image_contrast"] = self._image()
        return ProbeResult(self.name, tables, _summary(tables))

    def _text(self) -> pd.DataFrame:
        """One row per kind of token, layer and metric."""
        sums, count, layers = self._get("text_sums"), self._get("text_count"), self._get("layer")
        n_items, n_kinds, n_layers, n_metrics = sums.shape
        size = n_layers * n_metrics

        def means(total: Array) -> Array:
            return ratio(total[..., : n_kinds * size], np.repeat(total[..., n_kinds * size :], size, axis=-1))

        found = self._intervals(np.hstack([sums.reshape(n_items, -1), count]), self._get("text_group"), means)
        d_vocab = int(self._get("d_vocab"))
        chance = [1 / d_vocab, (d_vocab + 1) / 2, 1 / d_vocab, np.log(d_vocab), np.nan]
        table = pd.DataFrame(
            {
                "kind": np.repeat(KINDS, size),
                "layer": np.tile(np.repeat(layers, n_metrics), n_kinds),
                "metric": np.tile(TEXT_METRICS, n_kinds * n_layers),
                "value": [one.value for one in found],
                "low": [one.low for one in found],
                "high": [one.high for one in found],
                "chance": np.tile(chance, n_kinds * n_layers),
                "n_tokens": np.repeat(count.sum(axis=0), size).astype(int),
                "n_items": np.repeat((count > 0).sum(axis=0), size),
                "n_groups": np.repeat([len(np.unique(self._get("text_group")[one > 0])) for one in count.T], size),
            }
        )
        return table[table["n_tokens"] > 0].reset_index(drop=True)

    def _image(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """One row per layer, place and metric; and what the object's place has over the shifted one, per layer and metric."""
        sums, count, layers = self._get("image_sums"), self._get("image_count"), self._get("layer")
        n_items, n_layers, n_places, n_metrics = sums.shape
        shape = (n_layers, n_places, n_metrics)

        def means(total: Array) -> Array:
            found = ratio(total[..., :-1], total[..., -1:]).reshape(*total.shape[:-1], *shape)
            over = found[..., 0, :] - found[..., 2, :]
            flat = [found.reshape(*total.shape[:-1], -1), over.reshape(*total.shape[:-1], -1)]
            return np.concatenate(flat, axis=-1)

        found = self._intervals(np.hstack([sums.reshape(n_items, -1), count[:, None]]), self._get("image_group"), means)
        size = n_layers * n_places * n_metrics
        n_groups = len(np.unique(self._get("image_group")))
        numbers = {"n_objects": int(count.sum()), "n_items": n_items, "n_groups": n_groups}
        table = pd.DataFrame(
            {
                "layer": np.repeat(layers, n_places * n_metrics),
                "place": np.tile(np.repeat(PLACES, n_metrics), n_layers),
                "metric": np.tile(IMAGE_METRICS, n_layers * n_places),
                "value": [one.value for one in found[:size]],
                "low": [one.low for one in found[:size]],
                "high": [one.high for one in found[:size]],
                **numbers,
            }
        )
        contrast = pd.DataFrame(
            {
                "layer": np.repeat(layers, n_metrics),
                "metric": np.tile(IMAGE_METRICS, n_layers),
                "difference": [one.value for one in found[size:]],
                "low": [one.low for one in found[size:]],
                "high": [one.high for one in found[size:]],
                "p": [np.nan if one.p is None else one.p for one in found[size:]],
            }
        )
        p = contrast["p"].to_numpy(dtype=np.float64)
        contrast["p_adjusted"] = p if np.isnan(p).all() else benjamini_hochberg(p)
        return table, contrast.assign(**numbers)

    def _intervals(self, sums: Array, groups: Array, statistic: Any) -> list[Interval]:
        found = cluster_bootstrap(
            cluster_sums(sums, groups), statistic, n_resamples=self.n_resamples, seed=self.seed, p_value=True
        )
        return found if isinstance(found, list) else [found]

    def causal_targets(self, anatomy: Anatomy) -> list[CausalTarget]:
        """The layer after which the probability of named objects (of answers; of all tokens where none is labelled) has risen
        most, skipped, against other layers.
        """
        text = self._text().query("metric == 'probability'")
        named = text[text["kind"].isin(NAMED)]
        what = "the words that name objects, or answer" if len(named) else "the emitted token"
        text = named if len(named) else text
        total = (text["value"] * text["n_tokens"]).groupby(text["layer"]).sum()
        layers, values = total.index.to_numpy(), total.to_numpy(dtype=np.float64)
        if len(layers) < 3 or len(layers) != anatomy.n_layers:
            return []
        top = int(layers[1:][np.argmax(np.diff(values))])
        others = np.setdiff1d(layers[1:], [top])  # what the first layer gains is not known
        rng = np.random.default_rng(self.seed)
        drawn = rng.choice(others, size=min(N_DRAWS, len(others)), replace=False)

        def skipped(layer: int) -> EditsOf:
            return lambda batch: skip_block(layer)

        return [
            CausalTarget(
                f"layer {top}, in which the lens gains most on {what}, skipped",
                skipped(top),
                tuple(skipped(int(one)) for one in drawn),
                "another layer",
            )
        ]


def _objects(table: pd.DataFrame | None) -> dict[str, list[Any]]:
    """The objects that are in the image by a table of labels, with their boxes."""
    found: dict[str, list[Any]] = {}
    for _, about in table.iterrows() if table is not None else ():
        category, boxes = category_of(about), boxes_of(about)
        if category is not None and boxes:
            found.setdefault(category, boxes)
    return found


def _summary(tables: dict[str, pd.DataFrame]) -> str:
    text = tables["text"].query("kind == 'all'")
    top1 = text[text["metric"] == "top1"]
    last = top1.iloc[-1]
    most = top1[top1["value"] >= 0.5 * last["value"]].iloc[0]
    said = (
        f"The lens first names the emitted token half as often as the last layer at layer {int(most['layer'])}: "
        f"{100 * most['value']:.0f} % [{100 * most['low']:.0f}, {100 * most['high']:.0f}] of {int(most['n_tokens'])} tokens "
        f"(n = {int(most['n_items'])} items; last layer {100 * last['value']:.0f} %)."
    )
    if "image" not in tables:
        return said
    contrast = tables["image_contrast"].query("metric == 'auroc'")
    if contrast["difference"].isna().all():
        return said
    best = contrast.loc[contrast["difference"].idxmax()]
    image = tables["image"].query("metric == 'auroc'").set_index(["layer", "place"])
    inside, shifted = image.loc[(best["layer"], "inside")], image.loc[(best["layer"], "shifted")]
    return (
        f"{said} At image tokens it tells an object's own place best after layer {int(best['layer'])} (of {len(contrast)}): "
        f"AUROC {inside['value']:.2f} [{inside['low']:.2f}, {inside['high']:.2f}], at the same shape elsewhere "
        f"{shifted['value']:.2f} [{shifted['low']:.2f}, {shifted['high']:.2f}] ({int(best['n_objects'])} objects)."
    )
