"""What the signals of the token ledger read: the recordings of a batch, at its object tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, get_args

import pandas as pd
import torch
from torch import Tensor

from probes.outlier_places import check_places, place_tokens
from probes.vision_heads import head_divergence
from slitlamp.decoding.views import image_free
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import Edit, Site, Trace, View, sites
from slitlamp.tracing.lens import lens_logits
from slitlamp.tracing.trace import Source

Need = Literal["heads", "logits", "without", "noised", "attention", "outliers", "lens", "state"]
NEEDS: Final[tuple[str, ...]] = get_args(Need)
"""Head outputs with and without the image; next-token logits with the image, without it, and with noise in it; attention on
the image; the tower's own outliers; states of image tokens; the state before the object."""


@dataclass(frozen=True)
class Settings:
    """The ledger's parameters that signals read; see `TokenLedger`."""

    top_k: int
    n_outliers: int
    noise_step: int
    seed: int


def sites_for(
    needs: set[Need], anatomy: Anatomy, *, lens_layers: list[int], truth_layer: int, vision_layer: int
) -> list[Site]:
    """What to record with the image.

    Raises:
        UnsupportedError: signals of attention and of image tokens in a family that reads the image by cross-attention.
    """
    inside = needs & {"heads", "attention", "outliers", "lens"}
    if inside and anatomy.layers("cross_attention"):
        raise UnsupportedError(
            f"this {anatomy.family.name} reads the image by cross-attention: it has no image tokens among its text; choose "
            f"signals that do not need {', '.join(sorted(inside))}"
        )
    if "outliers" in needs:
        check_places(anatomy)
    found: list[Site] = []
    if "heads" in needs:
        found.append(sites.z(positions="before_generated"))
    if needs & {"logits", "without", "noised"}:
        found.append(sites.logits(positions="before_generated"))
    if "attention" in needs:
        found.append(sites.attention(queries="before_generated", keys="image", reduce_heads="mean"))
    if "outliers" in needs and anatomy.has_cls:
        found.append(sites.vision_attention("cls", layers=[vision_layer], reduce_queries="mean", reduce_heads="mean"))
    elif "outliers" in needs:
        found.append(
            sites.vision_attention("patches", layers=[vision_layer], reduce_queries="mean", reduce_heads="mean")
        )
    if "lens" in needs:
        found.append(sites.resid_post(layers=lens_layers, positions="image", label="image_states"))
    # signals that read labels alone still want their batch run
    if "state" in needs or not found:
        found.append(sites.resid_post(layers=[truth_layer], positions="before_generated", label="state_before"))
    return found


def views_for(needs: set[Need], settings: Settings) -> dict[str, View]:
    """The other runs: the image deleted, and the image noised."""

    def without_image(batch: Batch, trace: Trace) -> tuple[Batch, list[Edit]]:
        return image_free(batch, "deleted")

    def noised(batch: Batch, trace: Trace) -> tuple[Batch, list[Edit]]:
        return diffused(batch, settings.noise_step, settings.seed), []

    before: Literal["before_generated"] = "before_generated"
    free = [sites.z(positions=before)] if "heads" in needs else []
    free += [sites.logits(positions=before)] if "without" in needs else []
    views = {"without": View(without_image, free)} if free else {}
    return views | ({"noised": View(noised, [sites.logits(positions=before)])} if "noised" in needs else {})


def diffused(batch: Batch, step: int, seed: int) -> Batch:
    """The batch with Gaussian noise in its images: sqrt(a) pixels + sqrt(1 - a) noise, a falling from 1 to .08 over 1000 steps.

    The schedule is that of VCD (Leng et al., CVPR 2024): beta_t = sigmoid(linspace(-6, 6)) (0.005 - 1e-5) + 1e-5. The noise
    is one draw, the same for all rows, on the normalised pixels.
    """
    if not 0 <= step < 1000:
        raise InputError(f"noise_step must be 0 to 999, found {step}")
    noise, _ = image_free(batch, "noise", seed)
    kept = (1 - (torch.linspace(-6, 6, 1000).sigmoid() * (0.005 - 1e-5) + 1e-5)).cumprod(dim=0)[step].item()
    pixels: Tensor = batch.extra["pixel_values"]
    return batch.with_pixels(math.sqrt(kept) * pixels + math.sqrt(1 - kept) * noise.extra["pixel_values"].to(pixels))


@dataclass(frozen=True, eq=False)
class Readings:
    """The recordings of a batch at its object tokens, of which there are n.

    Attributes:
        batch: the prompts with the generated tokens.
        trace: the recordings, with those of the views.
        row: int64 [n], the row of each token in the batch.
        step: int64 [n], its number in the generation, from 0.
        table: its rows of the labels, in the same order.
        settings: the ledger's parameters.
    """

    batch: Batch
    trace: Trace
    row: Tensor
    step: Tensor
    table: pd.DataFrame
    settings: Settings

    @staticmethod
    def of(batch: Batch, trace: Trace, table: pd.DataFrame, settings: Settings) -> Readings:
        """From a table of object tokens with columns row and token (and mention and frequency)."""
        row, step = (torch.tensor(table[name].to_numpy(dtype="int64")) for name in ("row", "token"))
        return Readings(batch, trace, row, step, table.reset_index(drop=True), settings)

    def at(self, values: Tensor) -> Tensor:
        """Of recordings [batch, position, ...] at "before_generated", those of the object tokens: [n, ...] in float32."""
        return values[self.row.to(values.device), self.step.to(values.device)].float()

    @property
    def source(self) -> Source:
        """The model that was recorded."""
        assert self.trace.source is not None
        return self.trace.source

    @cached_property
    def token(self) -> Tensor:
        """int64 [n], the ids of the tokens."""
        start = self.batch.length - torch.tensor(self.batch.n_generated)
        ids = self.batch.input_ids.cpu()
        return ids[self.row, start[self.row] + self.step]

    def of_token(self, values: Tensor) -> Tensor:
        """Of values [n, vocabulary], those of the tokens: [n]."""
        return values.gather(1, self.token.to(values.device)[:, None])[:, 0]

    @cached_property
    def logits(self) -> Tensor:
        """Next-token logits with the image [n, vocabulary], as the model gives them."""
        return self.at(self.trace["logits"][0])

    @cached_property
    def logits_noised(self) -> Tensor:
        """The same with the noised image."""
        return self.at(self.trace.views["noised"]["logits"][0])

    @cached_property
    def log_p(self) -> Tensor:
        """Log-probabilities of the next token with the image [n, vocabulary]."""
        return self.logits.log_softmax(dim=-1)

    @cached_property
    def log_p_without(self) -> Tensor:
        """The same without the image."""
        return self.at(self.trace.views["without"]["logits"][0]).log_softmax(dim=-1)

    @cached_property
    def divergence(self) -> Tensor:
        """VHD of every head [n, layer, head]."""
        found = [
            head_divergence(self.at(seen), self.at(self.trace.views["without"]["z"][layer]))
            for layer, seen in self.trace["z"].items()
        ]
        return torch.stack([one.to(found[0].device) for one in found], dim=1)

    @cached_property
    def attention(self) -> Tensor:
        """Attention weights on the image tokens [n, layer, image token], averaged over heads; 0 at padding."""
        found = [self.at(one) for one in self.trace["attention"].values()]
        return torch.stack([one.to(found[0].device) for one in found], dim=1)

    @cached_property
    def n_image_tokens(self) -> Tensor:
        """int64 [n], the number of image tokens of each token's prompt."""
        return self.batch.image_mask.sum(dim=1).cpu()[self.row]

    @cached_property
    def outliers(self) -> Tensor:
        """bool [n, image token]: the tokens of the whole-image view that the vision tower attends to most.

        By the CLS token's attention; in a tower without one by the mean attention that a patch receives from all patches.
        """
        record = self.trace["vision_attention"]
        (scores,) = record.values()  # [tile, patch]
        n_patches = [int(count) for count in record.key_mask.sum(dim=1)]
        found = torch.zeros(self.batch.size, self.attention.shape[-1], dtype=torch.bool)
        for row in self.row.unique().tolist():
            placed = place_tokens(self.source.anatomy, self.batch, row, n_patches)
            values = placed.of_patches(scores[placed.tile].float().cpu(), "mean")
            found[row, placed.token[values.argsort(descending=True, stable=True)[: self.settings.n_outliers]]] = True
        return found[self.row].to(self.attention.device)

    @cached_property
    def lens(self) -> Tensor:
        """The largest probability of each token over the logit lenses of its image's tokens [n]."""
        best = torch.zeros(len(self.row))
        mask = self.trace.mask("image_states").cpu()
        for states in self.trace["image_states"].values():
            for row in self.row.unique().tolist():
                mine = self.row == row
                for logits in lens_logits(self.source, states[row, mask[row].to(states.device)]):
                    log_p = logits[:, self.token[mine].to(logits.device)] - logits.logsumexp(dim=-1, keepdim=True)
                    best[mine] = torch.maximum(best[mine], log_p.exp().amax(dim=0).cpu())
        return best

    @cached_property
    def state(self) -> Tensor:
        """The residual stream before the object [n, d_model] in float32."""
        (found,) = self.trace["state_before"].values()
        return self.at(found)

    @property
    def position(self) -> Tensor:
        """The number of each token in the generation [n]."""
        return self.step.double()

    @property
    def mention(self) -> Tensor:
        """Which mention of an object in its caption each token is, from 1 [n]."""
        return torch.tensor(self.table["mention"].to_numpy(dtype="float64"))

    @property
    def frequency(self) -> Tensor:
        """How frequent its object is [n]; NaN where that is not known."""
        values: Any = self.table["frequency"] if "frequency" in self.table else float("nan")
        return torch.tensor(pd.Series(values, index=self.table.index, dtype="float64").to_numpy())


def checked_layer(layer: int | None, default: int, n_layers: int, name: str) -> int:
    """A layer counted from 0, from one that may count from the end.

    Raises:
        InputError: a layer outside the model.
    """
    found = default if layer is None else layer
    if not -n_layers <= found < n_layers:
        raise InputError(f"{name} must be {-n_layers} to {n_layers - 1} in this model, found {found}")
    return found % n_layers
