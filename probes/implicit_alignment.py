"""IMA: where image and text tokens are in a language model, and how they come together (Shukor and Cord, arXiv 2405.16700)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import numpy as np
import pandas as pd

from probes import alignment_tables as tables_of
from probes.alignment_causal import causal_targets
from probes.alignment_checks import check_parameters
from probes.alignment_compare import compare
from probes.alignment_grid import REDUCTIONS, Reduction, bucket_sums, whole_grid
from probes.alignment_sample import (
    STREAM,
    Bootstrap,
    Sample,
    inside_similarity,
    reductions,
    similarity,
    token_change,
)
from probes.alignment_space import Space, Standardise
from probes.alignment_states import (
    MODALITIES,
    GeneratedTokens,
    TextTokens,
    item_hash,
    measure,
    take_tokens,
    token_masks,
    token_slots,
)
from probes.alignment_tables import Embedding
from probes.alignment_vocabulary import Lens, read_vocabulary, token_texts
from slitlamp.errors import InputError
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import CausalTarget, GatheringProbe, Probe, ProbeResult, Site, Trace, sites
from slitlamp.tracing.probe import N_DRAWS, Array, Labels, Part

TAPS: Final = ("ln1", "attn_out", "resid_mid", "ln2", "mlp_post", "mlp_out", "resid_post")


@dataclass
class ImplicitAlignment(GatheringProbe):
    """Similarity, change, norm and vocabulary of image and text tokens in every layer: implicit multimodal alignment (IMA).

    Layer 0 is the input of the language model, layer l > 0 the residual stream after block l - 1. Image tokens are all
    tokens of the images; text is the text after them, the continuation included, since the text of most data sets follows
    from the image only there (the paper's captions are such text; for prompts the choice is ours [?]).

    What is kept. Of every item a small row: norms, changes across depth, divergences. Of every layer the sums over items
    of means and mean squares, and of massive activations: these do not grow with the data set. Nor do the sums of unit
    vectors from which raw `avg` and `mean` over the grid of all items follow (table `whole_grid`). The spread of a grid,
    its matched pairs and the other two spaces, which are known only at the end, need one vector per item, modality and
    layer: they are kept of at most `max_items` items, and the curves (`avg`) are over these. The other
    reductions, tokenwise changes without massive dimensions and the pictures of tokens need tokens: they are kept of at
    most `token_items` items, at most `max_tokens` per modality. The items are those of the smallest hash of their names:
    a random sample that depends neither on the order of the items nor on the batches. In float32 that is, for d_model 4096
    and 33 layers, 1.1 MB an item for vectors (9 MB with `inside`) and 69 MB an item for 64 + 64 tokens.

    Attributes:
        text: "after_image", or "all" text.
        generated: whether text holds the continuation ("with"), not ("without"), or is it alone ("only").
        first_token: whether text holds the first token of the row, often an attention sink.
        reductions: of token x token cosines; see `probes.alignment_grid.token_cosines`.
        intervals: numbers of layers between compared states; those not below the number of layers are dropped.
        massive_k: how many dimensions of each layer "removed" leaves out, those of the largest mean square; None for those
            with a massive activation (|value| > 100 and 1000 x the median of its state).
        standardise: what "standardised" is: "joint", by the mean and standard deviation of image and text together, each
            weighing half, so that two modalities on different sides of that mean have a negative cosine; "scale", without
            taking off a mean; "modality", each by its own [?].
        inside: whether to measure the seven taps inside the blocks as well.
        vocabulary: whether to read states through the final norm and the head.
        n_ids: how many vocabulary ids to list per layer and modality.
        max_items: how many items similarities are over (the paper: 200); None for all.
        n_buckets: into how many buckets of images the sums of unit vectors over all items are split, for their intervals;
            the widths of these vary by about 1 in sqrt(2 n_buckets).
        token_items, max_tokens: of how many items how many tokens of each modality are kept.
        embedding: the picture of tokens: "tsne" (with PCA), "pca" or "none".
        embedding_layers: its layers; None for the first, the middle and the last.
        embedding_tokens: how many tokens of each modality are in it.
        n_draws: how many random targets a causal check has.
        seed: of the samples, the bootstrap, the picture and the random targets.
        n_resamples: of the bootstrap, over images (`Batch.groups`).
    """

    text: TextTokens = "after_image"
    generated: GeneratedTokens = "with"
    first_token: bool = False
    reductions: Sequence[Reduction] = REDUCTIONS
    intervals: Sequence[int] = (1, 8)
    massive_k: int | None = None
    standardise: Standardise = "joint"
    inside: bool = True
    vocabulary: bool = True
    n_ids: int = 12
    max_items: int | None = 200
    n_buckets: int = 50
    token_items: int = 16
    max_tokens: int = 64
    embedding: Embedding = "tsne"
    embedding_layers: Sequence[int] | None = None
    embedding_tokens: int = 200
    n_draws: int = N_DRAWS
    seed: int = 0
    n_resamples: int = 2000
    _gathered: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    name: ClassVar[str] = "implicit_alignment"

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The residual stream of every layer and, with `inside`, the taps that this family has."""
        check_parameters(self, anatomy)
        return [
            sites.resid_pre(layers=0),
            sites.resid_post(),
            *(getattr(sites, tap)() for tap in self._taps(anatomy) if tap != "resid_post"),
        ]

    def _taps(self, anatomy: Anatomy) -> list[str]:
        return [tap for tap in TAPS if anatomy.layers(tap)] if self.inside else []

    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch; labels are not needed."""
        assert trace.source is not None
        anatomy = trace.source.anatomy
        masks = token_masks(batch, self.text, self.generated, self.first_token)
        self._check_rows(batch, masks)
        post = trace["resid_post"]
        stream = [trace["resid_pre"][0], *(post[layer] for layer in post.layers)]
        steps = [one for one in self.intervals if one < max(anatomy.n_layers, 2)]
        hashes = np.array([item_hash(self.seed, one) for one in batch.ids], dtype=np.int64)
        slots = token_slots(masks, batch.ids, self.max_tokens, self.seed)
        self._constants(steps=np.array(steps), n_layers=np.array(anatomy.n_layers), d_vocab=np.array(anatomy.d_vocab))

        found = measure(stream, masks, steps)
        items = {"item": np.array(batch.ids, dtype=str), "group": np.array(batch.groups, dtype=str)}
        self._rows(**items, norm=found.norm, change=found.change)
        self._sums(moments_stream=found.moments, massive_stream=found.massive)
        buckets = np.array([item_hash(self.seed, "bucket", one) % self.n_buckets for one in batch.groups])
        self._sums(
            grid_sums=bucket_sums(found.pooled, found.units, buckets, self.n_buckets),
            grid_counts=np.bincount(buckets, minlength=self.n_buckets),
        )
        vectors = {"vector_stream": found.pooled}
        for tap in self._taps(anatomy):
            record = trace[tap]
            inner = measure([record[layer] for layer in record.layers], masks, [1])
            self._constants(**{f"layers_{tap}": np.array(record.layers)})
            self._rows(**{f"norm_{tap}": inner.norm, f"change_{tap}": inner.change[:, 0]})
            self._sums(**{f"moments_{tap}": inner.moments, f"massive_{tap}": inner.massive})
            vectors[f"vector_{tap}"] = inner.pooled
        self._rows(
            vector_hash=hashes,
            vector_item=items["item"],
            vector_group=items["group"],
            **vectors,
        )

        rows = self._candidates(hashes)
        tokens = {"token_states": take_tokens(stream, rows, slots[rows]), "token_slots": slots[rows]}
        if self.vocabulary:
            self._constants(texts=token_texts(trace.source))
            lens = Lens(trace.source)
            read = [read_vocabulary(lens, stream, masks, row, slots[row], steps) for row in range(batch.size)]
            self._rows(
                kl=np.stack([one.kl for one in read]),
                entropy=np.stack([one.entropy for one in read]),
                lens_change=np.stack([one.change for one in read]),
            )
            tokens["token_top"] = np.stack([one.top for one in read])[rows]
        self._rows(
            token_hash=hashes[rows],
            token_item=items["item"][rows],
            token_group=items["group"][rows],
            **tokens,
        )
        self._trim()

    def _check_rows(self, batch: Batch, masks: Any) -> None:
        for modality, name in enumerate(MODALITIES):
            empty = [
                one for one, there in zip(batch.ids, masks[modality].any(dim=1).tolist(), strict=True) if not there
            ]
            if empty:
                raise InputError(
                    f"{', '.join(empty)}: no {name} token to measure (text={self.text!r}, generated={self.generated!r}, "
                    f"first_token={self.first_token})"
                )

    def _candidates(self, hashes: Array) -> Array:
        """The rows of a batch that may be among the kept `token_items`: no more than that many."""
        order = np.argsort(hashes, kind="stable")[: self.token_items]
        return np.sort(order)

    def _trim(self) -> None:
        """Keep the items of the smallest hashes, in the order of the hashes: the same whatever the batches were."""
        for kind, limit in (("vector", self.max_items), ("token", self.token_items)):
            order = np.lexsort((self._get(f"{kind}_item"), self._get(f"{kind}_hash")))[:limit]
            for key in [one for one in self._gathered if one.startswith(f"rows.{kind}_")]:
                self._gathered[key] = [self._get(key.removeprefix("rows."))[order]]

    def merge(self, other: Probe) -> None:
        """Add what another probe gathered; of the kept items, those of the smallest hashes stay."""
        super().merge(other)
        if self._gathered:
            self._trim()

    def sample(self) -> Sample:
        """What is kept of the examples.

        Raises:
            InputError: nothing was taken in.
        """
        n_items = len(self._get("item"))
        places = [STREAM, *self._measured_taps()]
        return Sample(
            groups=self._get("vector_group"),
            vectors={one: self._get(f"vector_{one}") for one in places},
            spaces={
                one: Space.of(
                    self._get(f"moments_{one}"),
                    self._get(f"massive_{one}"),
                    n_items,
                    self.massive_k,
                    self.standardise,
                )
                for one in places
            },
            token_groups=self._get("token_group"),
            tokens=self._get("token_states"),
            real=self._get("token_slots") >= 0,
            bootstrap=Bootstrap(self.n_resamples, self.seed),
        )

    def _measured_taps(self) -> list[str]:
        return [tap for tap in TAPS if self._has(f"layers_{tap}")]

    def _missing(self) -> list[str]:
        """Taps that this family does not have."""
        return [tap for tap in TAPS if self.inside and not self._has(f"layers_{tap}")]

    def result(self) -> ProbeResult:
        """The ten quantities of IMA that are of activations, by table (7 to 9, of weights and of skipping, are elsewhere).

        1: `similarity` (avg, by layer, with baselines), `whole_grid` (avg and mean of all items), `reductions`.
        2: `ima` (both variants of the score). 3: `change` and, in all spaces and with controls, `token_change`. 4: `norms`.
        5: `inside`, `inside_similarity`. 6: `kl`, `entropy`, `vocabulary_change`, `vocabulary_histogram`. 10: `compare`.
        Besides: `massive` (what "removed" removes) and `tokens` (in two dimensions).
        """
        sample = self.sample()
        groups, bootstrap, steps = self._get("group"), sample.bootstrap, self._get("steps").tolist()
        tables = dict(zip(("similarity", "ima"), similarity(sample), strict=True))
        tables["whole_grid"] = whole_grid(
            self._get("grid_sums"), self._get("grid_counts"), n_resamples=self.n_resamples, seed=self.seed
        )
        tables["reductions"] = reductions(sample, self.reductions)
        tables["change"] = self._change("change", steps, groups, bootstrap)
        tables["token_change"] = token_change(sample, steps)
        tables["norms"] = tables_of.norms(self._get("norm"), groups, bootstrap)
        tables["massive"] = tables_of.massive_dimensions(sample)
        if self._measured_taps():
            tables["inside"] = self._inside(groups, bootstrap)
            tables["inside_similarity"] = pd.concat(
                [inside_similarity(sample, tap, self._get(f"layers_{tap}")) for tap in self._measured_taps()],
                ignore_index=True,
            )
        if self.vocabulary:
            tables["kl"] = tables_of.divergences(self._get("kl"), groups, bootstrap)
            n_vocabulary = int(self._get("d_vocab"))
            tables["entropy"] = tables_of.entropies(self._get("entropy"), groups, bootstrap, n_vocabulary)
            tables["vocabulary_change"] = self._change("lens_change", steps, groups, bootstrap)
            tables["vocabulary_histogram"] = tables_of.histogram(
                self._get("token_top"), self._get("texts"), sample.token_groups, bootstrap, self.n_ids
            )
        if self.embedding != "none":
            last = int(self._get("n_layers"))
            layers = (
                sorted({0, (last + 1) // 2, last}) if self.embedding_layers is None else list(self.embedding_layers)
            )
            tables["tokens"] = tables_of.points(sample, layers, self.embedding_tokens, self.embedding, self.seed)
        return ProbeResult(name=self.name, tables=tables, summary=tables_of.summary(tables, self._missing()))

    def _change(self, name: str, steps: Sequence[int], groups: Array, bootstrap: Bootstrap) -> pd.DataFrame:
        """Over all items: interval, modality, layer (of the earlier state), value, low, high, n_items."""
        values = self._get(name)
        axes = {"interval": steps, "modality": MODALITIES, "layer": range(values.shape[3])}
        return tables_of.labelled(values, axes, groups, bootstrap)

    def _inside(self, groups: Array, bootstrap: Bootstrap) -> pd.DataFrame:
        """Over all items, raw: tap, measure ("norm", or "change" to the same tap of the next layer), modality, layer, ..."""
        found = []
        for tap in self._measured_taps():
            for measured in ("norm", "change"):
                axes = {"modality": MODALITIES, "layer": self._get(f"layers_{tap}").tolist()}
                values = self._get(f"{measured}_{tap}")
                if np.isnan(values).all():  # one layer: nothing to compare with
                    continue
                table = tables_of.labelled(values, axes, groups, bootstrap)
                table.insert(0, "tap", tap)
                table.insert(1, "measure", measured)
                found.append(table)
        return pd.concat(found, ignore_index=True)

    def causal_targets(self, anatomy: Anatomy) -> list[CausalTarget]:
        """Image tokens moved onto the mean of the text where alignment rises most, or kept out of the block that raises it."""
        return causal_targets(self.sample(), anatomy, self.n_draws, self.seed)

    @classmethod
    def compare(cls, parts: Mapping[Part, Probe], scores: pd.DataFrame | None = None) -> ProbeResult | None:
        """Similarities across data sets, curves over models, and alignment against the models' scores."""
        samples = {part: probe.sample() for part, probe in parts.items() if isinstance(probe, cls)}
        return compare(cls.name, samples, scores)
