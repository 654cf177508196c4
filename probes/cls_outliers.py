"""DAMRO's analysis: outlier tokens of the vision tower and the decoder's attention to them (arXiv 2410.04514, EMNLP 2024)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.image_means import Images
from probes.outlier_data import CLS, RECEIVED, Mask, Tokens, features_valley, outlier_masks
from probes.outlier_definitions import matched_tokens, random_tokens, top_tokens
from probes.outlier_layers import concentration_table, histogram_table, massive_table, norms_table, sinks_table
from probes.outlier_places import Placed, boxes_of, check_places, covered, place_tokens
from probes.outlier_states import of_row, sink_scores, stream_statistics
from probes.outlier_summary import summary
from probes.outlier_tables import agreement_table, influence_tables, map_tables, outliers_table, overlap_table
from slitlamp.decoding.edits import replace_tokens
from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import CausalTarget, Edit, GatheringProbe, ProbeResult, Site, Trace
from slitlamp.tracing.probe import N_DRAWS, EditsOf, Labels
from slitlamp.tracing.sites import attention, resid_post, resid_pre, vision_attention, vision_resid_post

THUMBNAIL = 64
"""Side in pixels of the images that are kept for the maps."""


@dataclass
class ClsOutliers(GatheringProbe):
    """Outlier tokens: where the vision tower's CLS token looks, whether the decoder looks there too, and what they are.

    Overlap: H_i = |S_v(i) & S_l(i)| / i, with S_v and S_l the i image tokens that get most of the attention of the encoder
    (the CLS query, mean over heads) and of the decoder. Influence: F, the share of the decoder's attention to image tokens
    that falls on the `n_influential` tokens first in the encoder's attention, at object words that are true and that are not.
    Three definitions of outliers stand side by side: first in the encoder's attention; norm of the features; attention sinks
    of the language model. Norms, massive activations and the concentration of the encoder's attention are given per layer.

    Measured is the view of the whole image, one image per item; patches of the tower and image tokens are put beside each
    other by their place (`probes.outlier_places`). Which attention of the encoder was taken is said in every table: "CLS
    attention", or for towers without a CLS token (SigLIP, Qwen-VL, Pixtral, ...) "mean attention received", which is another
    quantity: the mean over the patches as queries.

    Recordings hold the residual stream of all layers of the tower, and of `decoder_layers`, at all positions: batches of
    large models must be small, or `decoder_layers` few. Gathered are some numbers per image token.

    Attributes:
        encoder_attention: "cls" or "received"; None for CLS where the tower has one.
        encoder_layers: blocks of the tower, 0-based, whose attention is compared, the first of them decides which tokens are
            outliers; None for the block whose output the model reads, and the last one.
        decoder_layers: blocks of the language model over which its attention is averaged, and in which norms, massive
            activations and sinks are looked for; the paper does not say [?]; None for all.
        encoder_heads, decoder_heads: the heads over which attention is averaged [?]; None for all.
        top_k: how many tokens first in the encoder's attention are outliers: 10, the paper's for LLaVA-1.5 (of 576).
        n_influential: of F; the paper's 3.
        n_concentrated: how many patches the concentration of the encoder's attention counts [?].
        n_sd: of the norm rule, mean + `n_sd` standard deviations per image.
        norm_threshold: above which norms are outliers (150 in DINOv2-g); None for the valley of the features' histogram over
            all items, where there is one.
        massive_value, massive_times: of massive activations; see `probes.outlier_definitions.massive_activations`.
        sink_dimensions: of the language model, where attention sinks are large (1415 and 2533 in LLaMA-2-7B); None for the
            dimensions with a massive activation in the same item.
        sink_threshold: of phi(x); VAR's 20.
        n_maps: of how many items the image is kept, for maps.
        seed: of random controls and the bootstrap.
        n_resamples: of the bootstrap, over images.
    """

    encoder_attention: Literal["cls", "received"] | None = None
    encoder_layers: Sequence[int] | None = None
    decoder_layers: Sequence[int] | None = None
    encoder_heads: Sequence[int] | None = None
    decoder_heads: Sequence[int] | None = None
    top_k: int = 10
    n_influential: int = 3
    n_concentrated: int = 6
    n_sd: float = 2.0
    norm_threshold: float | None = None
    massive_value: float = 100.0
    massive_times: float = 1000.0
    sink_dimensions: Sequence[int] | None = None
    sink_threshold: float = 20.0
    n_maps: int = 4
    seed: int = 0
    n_resamples: int = 2000
    _gathered: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    name: ClassVar[str] = "cls_outliers"
    targets_of: ClassVar[Literal["model", "items"]] = "items"

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """Attention of the tower and of the decoder to image tokens, and the residual streams of both."""
        self._check(anatomy)
        queries: Literal["cls", "patches"] = "cls" if self._encoder(anatomy) == CLS else "patches"
        return [
            vision_attention(
                queries, heads=self.encoder_heads, reduce_heads="mean", reduce_queries="mean", label="encoder"
            ),
            vision_resid_post(label="tower"),
            attention(
                *("before_generated", "image", self.decoder_layers, self.decoder_heads),
                reduce_heads="mean",
                label="decoder",
            ),
            resid_post(layers=self.decoder_layers, label="stream"),
            resid_pre(layers=0, positions="image", label="embedded"),
        ]

    def _check(self, anatomy: Anatomy) -> None:
        if self.encoder_attention not in (None, "cls", "received"):
            raise unknown("attention of the encoder", str(self.encoder_attention), ("cls", "received"))
        for name in ("top_k", "n_influential", "n_concentrated", "n_resamples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.n_maps < 0:
            raise InputError(f"n_maps must be at least 0, found {self.n_maps}")
        layers = range(anatomy.n_vision_layers) if self.encoder_layers is None else self.encoder_layers
        if not layers or not 0 <= min(layers) <= max(layers) < anatomy.n_vision_layers:
            raise InputError(f"encoder_layers must be blocks 0 to {anatomy.n_vision_layers - 1}, found {list(layers)}")
        dimensions = self.sink_dimensions or (0,)
        if not 0 <= min(dimensions) <= max(dimensions) < anatomy.d_model:
            raise InputError(f"sink_dimensions must lie in 0 to {anatomy.d_model - 1}, found {list(dimensions)}")
        check_places(anatomy)
        if self.encoder_attention == "cls" and not anatomy.has_cls:
            raise UnsupportedError(
                f"the vision tower of {anatomy.family.name} has no CLS token; encoder_attention='received' measures the mean "
                "attention that a patch gets from all patches, which is another quantity"
            )

    def _encoder(self, anatomy: Anatomy) -> str:
        return CLS if (self.encoder_attention or ("cls" if anatomy.has_cls else "received")) == "cls" else RECEIVED

    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch; `labels` say which tokens name an object, and where it is."""
        if not batch.has_images:
            rows = [batch.ids[row] for row, some in enumerate(batch.image_mask.any(dim=1).tolist()) if not some]
            raise InputError(f"items without an image have no outlier tokens: {', '.join(rows[:5])}")
        assert trace.source is not None
        anatomy, config = trace.source.anatomy, trace.source.model.config
        last = anatomy.n_vision_layers - 1
        compared = self.encoder_layers or tuple(dict.fromkeys((feature_block(config, last + 1), last)))
        self._constants(
            encoder=np.array(self._encoder(anatomy)),
            compared=np.array(compared),
            tower_layers=np.array(trace["tower"].layers),
            decoder_layers=np.array(trace["stream"].layers),
        )
        image = trace["embedded"][0][trace.mask("embedded")].double()
        self._sums(image_token=image.sum(dim=0).cpu().numpy(), n_image_tokens=np.array(len(image)))
        n_patches = (trace.mask("tower").sum(dim=1) - int(anatomy.has_cls)).tolist()
        for row in range(batch.size):
            placed = place_tokens(anatomy, batch, row, n_patches)
            self._add(batch, trace, row, placed, None if labels is None else labels[row])

    def _add(self, batch: Batch, trace: Trace, row: int, placed: Placed, table: pd.DataFrame | None) -> None:
        item = batch.ids[row]
        boxes = boxes_of(table)
        area = (
            covered(boxes, placed.grid).flatten().double() if boxes else torch.full((len(placed),), torch.nan).double()
        )
        norm = self._tower_norms(trace, placed)
        encoder = self._encoder_attention(trace, placed, area)
        sinks = self._decoder_stream(batch, trace, row, placed)
        decoder = of_row(trace["decoder"], row).double().mean(dim=0).cpu()  # [query, key]
        decoder = decoder[: max(1, batch.n_generated[row]), placed.token]
        named = {label: _named(table, label) for label in ("object", "hallucinated")}
        means = [decoder[one].mean(dim=0) if one else torch.full_like(decoder[0], torch.nan) for one in named.values()]
        values = torch.stack([*encoder, norm, sinks, decoder[0], *means, area], dim=1)
        self._rows(
            item=np.array([item]),
            group=np.array([batch.groups[row]]),
            n_tokens=np.array([len(placed)]),
            token_place=torch.stack([placed.row, placed.column, placed.token], dim=1).to(torch.int32).numpy(),
            token_values=values.float().numpy(),
        )
        if not self._has("picture") or len(self._get("picture")) < self.n_maps:
            small = batch.seen(row).convert("RGB").resize((THUMBNAIL, THUMBNAIL))
            self._rows(picture=np.asarray(small, dtype=np.int16)[None])
        for label, tokens in named.items():
            for token in tokens:
                self._add_mention(item, label, token, encoder, decoder[0], decoder[token])

    def _tower_norms(self, trace: Trace, placed: Placed) -> Tensor:
        """The norms of the features [token]; gathers those of all layers of the tower, and its massive activations."""
        assert trace.source is not None
        states = of_row(trace["tower"], placed.tile)
        states = states[:, trace.mask("tower")[placed.tile]]
        kinds = ["CLS"] * int(trace.source.anatomy.has_cls)
        kinds += ["patch"] * (states.shape[1] - len(kinds))
        found = stream_statistics(
            states,
            kinds,
            torch.tensor([one == "patch" for one in kinds]),
            self.massive_value,
            self.massive_times,
            self.n_sd,
        )
        self._rows(**{f"tower_{name}": one for name, one in found.rows.items()})
        self._sums(**{f"tower_{name}": one for name, one in found.sums.items()})
        place = list(self._get("tower_layers")).index(self._get("compared")[0])
        return placed.of_patches(found.norms[place], "mean")

    def _encoder_attention(self, trace: Trace, placed: Placed, area: Tensor) -> Tensor:
        """The encoder's attention [compared layer, token], as shares of all patches'; gathers how concentrated it is."""
        weights = of_row(trace["encoder"], placed.tile)[:, : placed.patch.numel()].double().cpu()
        weights = weights / weights.sum(dim=-1, keepdim=True)
        n_top = min(self.n_concentrated, weights.shape[-1])
        tokens = placed.of_patches(weights, "sum")
        self._rows(
            top_share=weights.topk(n_top, dim=-1).values.sum(dim=-1)[None].numpy(),
            top_chance=np.array([n_top / weights.shape[-1]]),
            on_objects=(tokens * area).sum(dim=-1)[None].numpy(),
            area=np.array([float(area.mean())]),
        )
        layers = trace["encoder"].layers
        return tokens[[layers.index(int(one)) for one in self._get("compared")]]

    def _decoder_stream(self, batch: Batch, trace: Trace, row: int, placed: Placed) -> Tensor:
        """phi(x) [token], the largest of all layers; gathers norms, massive activations and sinks of the decoder."""
        states = of_row(trace["stream"], row)
        states = states[:, trace.mask("stream")[row]]
        is_image = batch.image_mask[row][batch.real_mask[row]].cpu()
        kinds = ["image" if one else "text" for one in is_image.tolist()]
        kinds[0] = "first"
        view = torch.zeros_like(is_image)
        view[is_image.nonzero()[:, 0][placed.token]] = True
        found = stream_statistics(states, kinds, view, self.massive_value, self.massive_times, self.n_sd)
        self._rows(**{f"decoder_{name}": one for name, one in found.rows.items()})
        self._sums(**{f"decoder_{name}": one for name, one in found.sums.items()})
        in_order = states[:, is_image.to(states.device)][:, placed.token.to(states.device)]
        phi = sink_scores(in_order, found.massive, self.sink_dimensions)
        self._rows(n_sinks=(phi >= self.sink_threshold).sum(dim=1)[None].numpy())
        return phi.amax(dim=0)

    def _add_mention(self, item: str, label: str, token: int, encoder: Tensor, start: Tensor, here: Tensor) -> None:
        """F of one object word, for every compared layer: of the first tokens, of random ones, and of matched ones."""
        first = top_tokens(encoder, self.n_influential).numpy()  # [layer, token]
        random = random_tokens(len(here), self.n_influential, self._generator(item))
        attended = (here / here.sum()).numpy()
        shares = [
            [attended[one].sum(), attended[random].sum(), attended[matched_tokens(start, one)].sum()] for one in first
        ]
        self._rows(
            mention_item=np.array([item]),
            mention_token=np.array([token]),
            mention_label=np.array([label], dtype="<U12"),
            mention_influence=np.array([shares]),
        )

    def _generator(self, item: str, draw: int = 0) -> np.random.Generator:
        """Randomness of one item, whatever batch it is in."""
        return np.random.default_rng([self.seed, draw, zlib.crc32(item.encode())])

    def _outliers(self, tokens: Tokens) -> dict[str, Mask]:
        threshold = features_valley(self._get) if self.norm_threshold is None else self.norm_threshold
        return outlier_masks(tokens, threshold, top_k=self.top_k, n_sd=self.n_sd, sink_threshold=self.sink_threshold)

    def result(self) -> ProbeResult:
        """Tables `overlap`, `influence`, `influence_difference`, `outliers`, `agreement`, `norms`, `norm_histogram`,
        `massive`, `sinks`, `concentration`, `maps` and `pictures`.
        """
        tokens = Tokens.of(self._get)
        masks, images = self._outliers(tokens), Images(tokens.group, self.n_resamples, self.seed)
        tables = {
            "overlap": overlap_table(tokens, images),
            "outliers": outliers_table(tokens, masks, images),
            "agreement": agreement_table(tokens, masks, images),
            "concentration": concentration_table(self._get, images),
            "norms": norms_table(self._get, images, self.n_sd),
            "norm_histogram": histogram_table(self._get),
            "massive": massive_table(self._get),
            "sinks": sinks_table(self._get, images),
            **map_tables(self._get, tokens, masks, self.n_maps),
        }
        if self._has("mention_item"):
            tables["influence"], differences = influence_tables(self._get, tokens, images, self.n_influential)
            if len(differences):
                tables["influence_difference"] = differences
        return ProbeResult(name=self.name, tables=tables, summary=summary(tables, self.top_k))

    def causal_targets(self, anatomy: Anatomy) -> list[CausalTarget]:
        """The outliers of each definition replaced by the data set's mean image token, against as many random tokens;
        against as many others that get the most similar attention of the decoder at the end of the prompt; and, where boxes are
        known, against as many others of which those of named objects are taken first, since the encoder looks at objects.

        For the items that were measured; what DeepStack adds to the residual stream later stays.
        """
        tokens = Tokens.of(self._get)
        mean = torch.from_numpy(self._get("image_token") / self._get("n_image_tokens"))
        parts = dict(zip(tokens.items.tolist(), tokens.parts(), strict=True))
        targets = []
        for name, mask in self._outliers(tokens).items():
            if not mask.any():
                continue
            random, of_objects, matched = [], [], np.zeros_like(mask)
            for draw in range(N_DRAWS):
                one, other = np.zeros_like(mask), np.zeros_like(mask)
                for item, part in parts.items():
                    count, rng = int(mask[part].sum()), self._generator(item, draw + 1)
                    one[part] = random_tokens(len(mask[part]), count, rng, avoid=mask[part])
                    first = np.where(mask[part], -1.0, (tokens.area[part] >= 0.5) + rng.random(len(mask[part])) / 2)
                    other[part] = top_tokens(torch.from_numpy(first), count).numpy()
                random.append(_replacing(tokens, parts, one, mean))
                of_objects.append(_replacing(tokens, parts, other, mean))
            for part in parts.values():
                matched[part] = matched_tokens(tokens.decoder[part, 0], mask[part])
            target, done = _replacing(tokens, parts, mask, mean), f"image tokens replaced by the mean: {name}"
            alike = [_replacing(tokens, parts, matched, mean)]
            controls = {"as many random tokens": random, "as many, of the decoder's attention": alike}
            if np.isfinite(tokens.area).any():
                controls["as many others, of named objects first"] = of_objects
            targets += [CausalTarget(done, target, tuple(some), control) for control, some in controls.items()]
        return targets


def _replacing(tokens: Tokens, parts: dict[str, slice], chosen: Mask, mean: Tensor) -> EditsOf:
    """Edits that replace chosen image tokens, found by the item's id."""

    def edits(batch: Batch) -> list[Edit]:
        mask = torch.zeros_like(batch.image_mask)
        for row, item in enumerate(batch.ids):
            if item not in parts:
                raise InputError(f"the outlier tokens of item {item!r} are not known: it was not measured")
            numbers = torch.from_numpy(tokens.place[parts[item], 2][chosen[parts[item]]]).long()
            mask[row, batch.image_mask[row].nonzero()[:, 0][numbers.to(mask.device)]] = True
        return replace_tokens(mask, mean)

    return edits


def _named(table: pd.DataFrame | None, label: str) -> list[int]:
    """The tokens that have a label."""
    return [] if table is None else [int(one) for one in table["token"][table["label"] == label]]


def feature_block(config: Any, n_layers: int) -> int:
    """The block of the tower whose output the model reads: `vision_feature_layer` of its configuration, or the last one.

    Of several layers (VipLLaVA), the deepest.
    """
    named = getattr(config, "vision_feature_layer", -1)
    layers = named if isinstance(named, list | tuple) else [-1 if named is None else named]
    # hidden_states holds the embeddings first: entry k is the output of block k - 1, entry -1 that of the last block
    return max(int(one) + n_layers if one < 0 else int(one) - 1 for one in layers)
