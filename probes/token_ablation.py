"""Image tokens replaced before the language model: those of an object, outliers, those of high attribution, random ones."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.ablation_tables import (
    ABLATED,
    ROLES,
    Ablated,
    completeness_table,
    contrasts_table,
    effects_table,
    sets_table,
    summary,
)
from probes.cls_outliers import feature_block
from probes.image_means import Images
from probes.outlier_definitions import norm_outliers, random_tokens, top_tokens
from probes.outlier_places import boxes_of, check_places, place_tokens
from probes.token_sets import object_tokens, shifted_tokens
from slitlamp.decoding.edits import replace_tokens
from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import Edit, GatheringProbe, ProbeResult, Site, Trace, View
from slitlamp.tracing.call import Calls
from slitlamp.tracing.probe import Labels
from slitlamp.tracing.sites import logits, resid_pre, vision_attention, vision_resid_post

if TYPE_CHECKING:
    from slitlamp.vlm import VLM

TokenSet = Literal["object", "object + 1", "object + 2", "encoder", "register", "integrated gradients"]
TOKEN_SETS: tuple[str, ...] = get_args(TokenSet)
BUFFERS = {"object": 0, "object + 1": 1, "object + 2": 2}
GRADIENTS: Literal["integrated gradients"] = "integrated gradients"


@dataclass
class TokenAblation(GatheringProbe):
    """How much the probability of an answer or of object words falls when some image tokens say nothing.

    Inputs of the language model at chosen image tokens (the projector's outputs) are replaced, and the given tokens are
    scored again. Each set of tokens is compared with random sets of the same size: "random", scattered tokens outside the
    set; "shifted", the set's own shape moved elsewhere on the grid (with the least overlap), for sets that hang together.

    The sets: the patches of one object (captions: one true object that was named, at random; questions: the object asked
    for, where it is in the image), with a margin of 0, 1 or 2 cells; the `top_k` tokens first in the encoder's attention;
    "register", those of outlying norm (as in `ClsOutliers`; with high-resolution tiles, these two of the whole-image view);
    "integrated gradients", the tokens of the largest integrated gradient (Sundararajan et al., ICML 2017) of the log
    probability of the object's word or the answer, as many as the object has, else `top_k`. Sets of objects need labels with
    boxes. The last set is chosen by the very quantity that it is then shown to change: it says how well the attribution finds
    what matters, and is no evidence that what matters is in one place.

    Integrated gradients follow a straight line from inputs in which every image token is replaced to the inputs as they are:
    (input - replacement) times the mean gradient at the midpoints of `n_steps` equal steps, added up over d_model. Complete ones
    add up to what replacing all image tokens costs: the table `completeness` holds both.

    All runs are those of the unmodified model, also under interventions. The logits of all sets are held at once: batches of
    large models must be small.

    Attributes:
        sets: which.
        replacement: what tokens are replaced by: "mean", of the row's own image tokens; "zero"; "given", `vector`. The usual
            choice, the mean of the whole data set, needs a pass before: `mean_image_token`.
        vector: [d_model], for "given".
        top_k: size of the sets that no object gives.
        min_cover: a token belongs to an object if its boxes cover this share of it, or more than of any other token [?].
        n_sd: of the norm rule.
        n_steps: of the integrated gradients; each is a forward and a backward pass.
        n_random, n_shifted: how many control sets of each kind.
        seed: of random sets, the choice of the object, and the bootstrap.
        n_resamples: of the bootstrap, over images.
    """

    sets: Sequence[TokenSet] = TOKEN_SETS  # type: ignore[assignment]  # get_args loses the literals
    replacement: Literal["mean", "zero", "given"] = "mean"
    vector: Sequence[float] | None = None
    top_k: int = 10
    min_cover: float = 0.1
    n_sd: float = 2.0
    n_steps: int = 20
    n_random: int = 3
    n_shifted: int = 2
    seed: int = 0
    n_resamples: int = 2000
    _gathered: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    name: ClassVar[str] = "token_ablation"
    no_target: ClassVar[str] = (
        "the finding is itself the effect of an intervention, given against as many random and shifted tokens."
    )

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The inputs of the language model, and what outliers are read off."""
        self._check(anatomy)
        queries: Literal["cls", "patches"] = "cls" if anatomy.has_cls else "patches"
        of_tower = vision_attention(queries=queries, reduce_heads="mean", reduce_queries="mean", label="encoder")
        found = [resid_pre(layers=0, positions="image", label="embedded")]
        found += [of_tower] if "encoder" in self.sets or "register" in self.sets else []
        return found + ([vision_resid_post(positions="patches", label="tower")] if "register" in self.sets else [])

    def _check(self, anatomy: Anatomy) -> None:
        for one in self.sets:
            if one not in TOKEN_SETS:
                raise unknown("set of tokens", one, TOKEN_SETS)
        if not self.sets or len(set(self.sets)) < len(self.sets):
            raise InputError(f"sets must name each set of tokens once, found {list(self.sets)}")
        if self.replacement not in ("mean", "zero", "given"):
            raise unknown("replacement", self.replacement, ("mean", "zero", "given"))
        if (self.replacement == "given") != (self.vector is not None):
            raise InputError("replacement='given' and vector go together")
        if self.vector is not None and len(self.vector) != anatomy.d_model:
            raise InputError(f"vector must have {anatomy.d_model} numbers (d_model), found {len(self.vector)}")
        for name, least in (("top_k", 1), ("n_steps", 1), ("n_random", 1), ("n_shifted", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, found {getattr(self, name)}")
        check_places(anatomy)
        if anatomy.deepstack_layers:
            raise UnsupportedError(
                f"{anatomy.family.name} adds features of the image again after later blocks (DeepStack), which a replaced "
                "input does not remove"
            )

    def views(self, anatomy: Anatomy) -> dict[str, View]:
        """The batch unchanged; the steps of its integrated gradients and their start; and a run per set and control."""
        scored = [logits(positions="before_generated")]

        def unchanged(batch: Batch, trace: Trace) -> tuple[Batch, list[Edit]]:
            _refuse_bare(batch)
            return batch, []

        found = {"unchanged": View(unchanged, scored)}
        if GRADIENTS in self.sets:
            inputs = [resid_pre(layers=0, positions="image", label="embedded")]
            inputs += [logits(positions="before_generated", reduce="sum")]  # have the model compute them
            found["all replaced"] = View(self._towards(0.0), scored)
            for step in range(self.n_steps):
                at = self._towards((step + 0.5) / self.n_steps)
                found[f"gradient {step}"] = View(at, inputs, gradient_of=self._log_probability)
        for name, ablated, draw in self._runs():
            found[f"{name}: {ablated} {draw}"] = View(self._replacing(name, ablated, draw), scored)
        return found

    def _runs(self) -> Iterator[tuple[str, str, int]]:
        """(set, what is ablated, draw) of all runs."""
        for name in self.sets:
            for ablated, count in zip(ABLATED, (1, self.n_random, self.n_shifted), strict=True):
                yield from ((name, ablated, draw) for draw in range(count))

    def _replacing(self, name: str, ablated: str, draw: int) -> Callable[[Batch, Trace], tuple[Batch, list[Edit]]]:
        def change(batch: Batch, trace: Trace) -> tuple[Batch, list[Edit]]:
            chosen = torch.zeros_like(batch.image_mask)
            for row in range(batch.size):
                mask = self._tokens(batch, trace, row, name)
                if mask.any() and ablated != "set":
                    mask = self._control(batch, row, mask, ablated, draw)
                chosen[row, batch.image_mask[row].nonzero()[:, 0]] = mask.to(chosen.device)
            return batch, replace_tokens(chosen, self._value(batch, trace))

        return change

    def _towards(self, share: float) -> Callable[[Batch, Trace], tuple[Batch, list[Edit]]]:
        """All image tokens between their replacement (0) and what they are (1)."""

        def change(batch: Batch, trace: Trace) -> tuple[Batch, list[Edit]]:
            value = torch.as_tensor(self._value(batch, trace))

            def move(values: Tensor, calls: Calls) -> Tensor:
                start = value.to(values)
                there = batch.image_mask.to(values.device)[..., None]
                return torch.where(there, start + share * (values - start), values)

            return batch, [Edit("resid_pre", 0, move)]

        return change

    def _value(self, batch: Batch, trace: Trace) -> Tensor | float:
        """What tokens are replaced by: a number, [d_model], or [batch, 1, d_model]."""
        if self.replacement == "zero":
            return 0.0
        if self.vector is not None:
            return torch.tensor(list(self.vector))
        values, mask = trace["embedded"][0], trace.mask("embedded")[..., None]
        return (values.double() * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)

    # -- which tokens -------------------------------------------------------------------------------------------------

    def _generator(self, item: str, *salt: int) -> np.random.Generator:
        """Randomness of one item, whatever batch it is in."""
        return np.random.default_rng([self.seed, *salt, zlib.crc32(item.encode())])

    def _target(self, batch: Batch, trace: Trace, row: int) -> tuple[int, pd.DataFrame | None]:
        """The token whose object is ablated, and its row of the labels; without such an object the first labelled word or
        the first token, and None.
        """
        table = None if trace.labels is None else trace.labels[row]
        if table is None:
            return 0, None
        named = table[table["label"].isin(["object", "correct", "wrong"])]
        seen = named[[len(boxes_of(named.iloc[[one]])) > 0 for one in range(len(named))]]
        if len(seen):
            one = int(self._generator(batch.ids[row]).integers(len(seen)))
            return int(seen["token"].iloc[one]), seen.iloc[[one]]
        some = table[table["label"] != "other"]
        return (int(some["token"].iloc[0]) if len(some) else 0), None

    def _tokens(self, batch: Batch, trace: Trace, row: int, name: str) -> Tensor:
        """bool [image token] of the row: the set of that name; all False where the row has none."""
        patches = batch.patches[row]
        if name in BUFFERS or name == GRADIENTS:
            _, labelled = self._target(batch, trace, row)
            of_object = object_tokens(patches, boxes_of(labelled), BUFFERS.get(name, 0), self.min_cover)
            if name in BUFFERS:
                return of_object
            score = self._integrated(batch, trace, row).masked_fill(~patches.on_image, -torch.inf)
            return top_tokens(score, int(of_object.sum()) or min(self.top_k, int(patches.on_image.sum())))
        assert trace.source is not None
        anatomy, mask = trace.source.anatomy, torch.zeros(len(patches), dtype=torch.bool)
        n_patches = trace["encoder"].key_mask.sum(dim=1).tolist()
        placed = place_tokens(anatomy, batch, row, n_patches)
        block = feature_block(trace.source.model.config, anatomy.n_vision_layers)
        if name == "encoder":
            weights = trace["encoder"][block][placed.tile].double().cpu()
            mask[placed.token] = top_tokens(placed.of_patches(weights, "sum"), self.top_k)
        else:
            norms = trace["tower"][block][placed.tile].double().norm(dim=-1).cpu()
            mask[placed.token] = norm_outliers(placed.of_patches(norms, "mean"), self.n_sd)
        return mask

    def _control(self, batch: Batch, row: int, mask: Tensor, ablated: str, draw: int) -> Tensor:
        rng, patches = self._generator(batch.ids[row], draw + 1, ABLATED.index(ablated)), batch.patches[row]
        if ablated == "shifted":
            return shifted_tokens(patches, mask, rng)
        chosen = torch.zeros_like(mask)
        for view in patches.view[mask].unique():  # as many in each view, so that as much of the image is gone
            here = (patches.on_image & (patches.view == view)).nonzero()[:, 0]
            drawn = random_tokens(len(here), int(mask[here].sum()), rng, avoid=mask[here].numpy())
            chosen[here[torch.from_numpy(drawn)]] = True
        return chosen

    def _integrated(self, batch: Batch, trace: Trace, row: int) -> Tensor:
        """Integrated gradients [image token] of the log probability of the row's target, in nats."""
        inputs = trace["embedded"][0][row].double()
        slope = torch.zeros_like(inputs)
        for step in range(self.n_steps):
            found = trace.views[f"gradient {step}"].gradients
            assert found is not None
            slope += found["embedded"][0][row].to(inputs)
        value = torch.as_tensor(self._value(batch, trace), device=inputs.device, dtype=torch.float64)
        away = inputs - (value[row] if value.ndim == 3 else value)
        return (slope / self.n_steps * away).sum(dim=-1)[trace.mask("embedded")[row]].cpu()

    def _log_probability(self, batch: Batch, trace: Trace) -> Callable[[Any], Tensor]:
        """Of the target token of every row, to be differentiated."""
        place = [
            batch.length - batch.n_generated[row] + self._target(batch, trace, row)[0] for row in range(batch.size)
        ]

        def scalar(output: Any) -> Tensor:
            rows, at = torch.arange(batch.size), torch.tensor(place)
            values = output.logits[rows, at - 1].float().log_softmax(dim=-1)
            return values[rows, batch.input_ids[rows, at]]

        return scalar

    # -- measuring ----------------------------------------------------------------------------------------------------

    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch; without `labels` there are no objects, and all words are other words."""
        before, best = self._scores(batch, trace.views["unchanged"])
        if GRADIENTS in self.sets:
            nothing, _ = self._scores(batch, trace.views["all replaced"])
        count = len(self.sets)
        shape = (batch.size, count, len(ABLATED))
        change, flipped = np.zeros((*shape, before.shape[1])), np.zeros((*shape, before.shape[1]))
        draws = dict(zip(ABLATED, (1, self.n_random, self.n_shifted), strict=True))
        for name, ablated, draw in self._runs():
            after, now = self._scores(batch, trace.views[f"{name}: {ablated} {draw}"])
            here = (slice(None), self.sets.index(name), ABLATED.index(ablated))
            change[here] += (after - before).cpu().numpy() / draws[ablated]
            flipped[here] += (now != best).double().cpu().numpy() / draws[ablated]
        for row in range(batch.size):
            sizes = np.array([int(self._tokens(batch, trace, row, name).sum()) for name in self.sets])
            roles = self._roles(batch, trace, row)
            sums, found = np.full((count, len(ABLATED), len(ROLES)), np.nan), np.zeros(len(ROLES), dtype=np.int64)
            flips = sums.copy()
            for number, role in enumerate(ROLES):
                tokens = [token for token, one in enumerate(roles) if one == role]
                found[number] = len(tokens)
                if tokens:
                    sums[:, :, number] = change[row][..., tokens].mean(axis=-1)
                    flips[:, :, number] = flipped[row][..., tokens].mean(axis=-1)
            absent = sizes == 0
            sums[absent], flips[absent] = np.nan, np.nan
            if GRADIENTS in self.sets:
                token = self._target(batch, trace, row)[0]
                self._rows(
                    attributed=np.array([float(self._integrated(batch, trace, row).sum())]),
                    all_replaced=np.array([float(before[row, token] - nothing[row, token])]),
                )
            self._rows(
                group=np.array([batch.groups[row]]),
                change=sums[None],
                flipped=flips[None],
                n_tokens=found[None],
                size=sizes[None],
                n_image_tokens=np.array([int(batch.patches[row].on_image.sum())]),
            )

    def _scores(self, batch: Batch, view: Trace) -> tuple[Tensor, Tensor]:
        """Log probabilities of the given tokens and the most likely ids: [batch, token], 0 behind the last."""
        values = view["logits"][0].float().log_softmax(dim=-1)
        real, given = view.mask("logits"), torch.zeros(values.shape[:2], dtype=torch.int64, device=values.device)
        for row, count in enumerate(batch.n_generated):
            given[row, :count] = batch.input_ids[row, batch.length - count :].to(values.device)
        scores = values.gather(-1, given[..., None])[..., 0].double().masked_fill(~real, 0.0)
        return scores, values.argmax(dim=-1).masked_fill(~real, 0)

    def _roles(self, batch: Batch, trace: Trace, row: int) -> list[str]:
        """What every given token is, for the ablation in this row."""
        roles = ["other words"] * batch.n_generated[row]
        table = None if trace.labels is None else trace.labels[row]
        if table is None:
            return roles
        target, labelled = self._target(batch, trace, row)
        for one in table.itertuples():
            if one.label == "hallucinated":
                roles[one.token] = "hallucinated objects"
            elif one.label == "object":
                named = labelled is not None and one.token == target
                roles[one.token] = "named object" if named else "other true objects"
            elif one.label in ("correct", "wrong"):
                roles[one.token] = (
                    f"answer, object {'' if getattr(one, 'truth', None) == 'yes' else 'not '}in the image"
                )
        return roles

    # -- tables -------------------------------------------------------------------------------------------------------

    def result(self) -> ProbeResult:
        """Tables `effects`, `contrasts`, `sets`, and with integrated gradients `completeness`."""
        images = Images(self._get("group"), self.n_resamples, self.seed)
        ablated = Ablated(
            list(self.sets),
            ABLATED[: 2 + (self.n_shifted > 0)],
            **{name: self._get(name) for name in ("change", "flipped", "n_tokens", "size", "n_image_tokens")},
        )
        tables = {
            "effects": effects_table(ablated, images),
            "contrasts": contrasts_table(ablated, images),
            "sets": sets_table(ablated, images),
        }
        if GRADIENTS in self.sets:
            tables["completeness"] = completeness_table(
                self._get("attributed"), self._get("all_replaced"), self.n_steps, images
            )
        text = summary(tables["contrasts"], tables.get("completeness"))
        return ProbeResult(name=self.name, tables=tables, summary=text)


def mean_image_token(vlm: VLM, batches: Iterable[Batch]) -> list[float]:
    """The mean input of the language model at the image tokens of a data set: [d_model], the `vector` of `TokenAblation`."""
    total, count = torch.zeros(vlm.anatomy.d_model, dtype=torch.float64), 0
    for batch in batches:
        if not batch.image_mask.any():
            continue
        with vlm.trace(resid_pre(layers=0, positions="image", label="embedded")) as trace:
            vlm.forward(batch, logits_to_keep=1)
        tokens = trace["embedded"][0][trace.mask("embedded")].double().cpu()
        total, count = total + tokens.sum(dim=0), count + len(tokens)
    if not count:
        raise InputError("there is no image token to take the mean of")
    mean: list[float] = (total / count).tolist()
    return mean


def _refuse_bare(batch: Batch) -> None:
    """Refuse rows without an image or without a continuation."""
    bare = [
        item
        for item, some, count in zip(batch.ids, batch.image_mask.any(dim=1).tolist(), batch.n_generated, strict=True)
        if not (some and count)
    ]
    if bare:
        raise InputError(
            "token ablation needs an image and generated tokens to score (Generation.teacher_forced()); items without: "
            + ", ".join(bare[:5])
        )
