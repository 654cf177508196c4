"""What a trace gives back: recordings by site, layer and forward call."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slitlamp.errors import InputError, unknown
from slitlamp.models.anatomy import Anatomy
from slitlamp.models.batch import Batch
from slitlamp.models.patches import BASE_VIEW
from slitlamp.reporters import html_of
from slitlamp.tracing.gradients import Scalar
from slitlamp.tracing.nonfinite import NonFinite
from slitlamp.tracing.sites import _CANONICAL, Site

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformer_lens import ActivationCache
    from transformers import PreTrainedModel

    from slitlamp.tracing.nnsight_backend import NNsight


@dataclass(frozen=True, eq=False)
class Source:
    """What a trace was recorded from: the model, its anatomy, its tokenizer."""

    model: PreTrainedModel
    anatomy: Anatomy
    tokenizer: Any


@dataclass
class Step:
    """The recordings of one forward call: call 0 runs over the prompt, call t over generated token t - 1.

    `step[label][layer]` is a tensor; `masks[label]` is bool [row, position] (attention: [row, query]), true where a
    recording is real; `key_masks[label]` the same for the keys of attention.
    """

    values: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    key_masks: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, label: str) -> dict[int, Tensor]:
        if label not in self.values:
            raise unknown("recording in this step", label, self.values)
        return self.values[label]

    def __contains__(self, label: str) -> bool:
        return label in self.values

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.values)


class SiteRecord(Mapping[int, Tensor]):
    """The recordings of one site, by layer.

    The forward calls of a generation are joined along the position (or query) axis; where that was reduced away, along an
    axis "step" of their own.
    """

    def __init__(self, site: Site, steps: list[Step], decoding: bool = False) -> None:
        self.site = site
        self._joined = "query" if site.is_attention else "position"
        self._stacked = decoding and not site.is_vision and self._joined not in site.axes
        self._steps = [step for step in steps if site.label in step.values]

    @property
    def layers(self) -> tuple[int, ...]:
        """The recorded layers."""
        return tuple(sorted(self._steps[0].values[self.site.label])) if self._steps else ()

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes."""
        row, *others = self.site.axes
        return (row, "step", *others) if self._stacked else self.site.axes

    def __getitem__(self, layer: int) -> Tensor:
        if not self._steps:
            raise InputError(
                f"{self.site.label!r} recorded nothing: no position of this run is among {self._asked()!r}"
            )
        self._check_ran([layer])
        if layer not in self.layers:
            raise InputError(f"layer {layer} of {self.site.label!r} was not recorded; recorded: {list(self.layers)}")
        parts = [step.values[self.site.label][layer] for step in self._steps]
        if "key" in self.axes:
            width = max(part.shape[-1] for part in parts)
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts]
        if self._stacked:
            return torch.stack(parts, dim=1)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.axes.index(self._joined))

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def stack(self) -> Tensor:
        """All layers as one tensor [layer, ...], on the device of the first, which the masks are on too.

        A recording stays on the device of its layer, and the layers of a large model may be on several.

        Raises:
            InputError: a layer that did not run: the tensor would be taken for one of all layers.
        """
        self._check_ran(self.site.layers or ())
        layers = [self[layer] for layer in self.layers]
        return torch.stack([one.to(layers[0].device) for one in layers])

    @property
    def mask(self) -> Tensor:
        """bool [row, position] (attention: [row, query]), true where a recording is real rather than padding."""
        masks = [self._beside(step.masks[self.site.label], step) for step in self._steps]
        return torch.cat(masks, dim=1) if masks else torch.zeros(0, 0, dtype=torch.bool)

    @property
    def key_mask(self) -> Tensor:
        """bool [row, key] of the last forward call, true where a key is real (attention only)."""
        return self._beside(self._steps[-1].key_masks[self.site.label], self._steps[-1])

    def _beside(self, mask: Tensor, step: Step) -> Tensor:
        """A mask on the device of the first layer's recording."""
        return mask.to(next(iter(step.values[self.site.label].values())).device)

    def _check_ran(self, layers: Iterable[int]) -> None:
        """Refuse layers that were asked for and have no recording although others have."""
        missing = [one for one in layers if one in (self.site.layers or ()) and one not in self.layers]
        if self.layers and missing:
            raise InputError(
                f"layers {missing} of {self.site.label!r} did not run: a model that reads the image by cross-attention skips "
                "those layers for text without an image (in place of deleting the image, take noise); layers that ran: "
                f"{list(self.layers)}"
            )

    def _asked(self) -> object:
        site = self.site
        return (site.queries, site.keys) if site.is_attention else site.positions

    def __repr__(self) -> str:
        shape = tuple(self[self.layers[0]].shape) if self.layers else ()
        return f"{self.site.label}: layers {list(self.layers)}, axes {self.axes}, shape {shape}"


class Trace:
    """Recordings of one run. `trace["resid_post"][2]` is a tensor; `trace.steps[t]` holds those of one forward call.

    TransformerLens's names are taken too: `trace["blocks.2.hook_resid_post"]`. `trace.gradients` holds, for a trace
    opened with `gradient_of`, the gradients with respect to what was recorded, chosen and reduced in the same way.
    `trace.generated` holds per row the ids that `generate` wrote; None in a forward pass.
    """

    def __init__(self, sites: list[Site], gradient_of: Scalar | None = None) -> None:
        self.sites = {site.label: site for site in sites}
        self.steps: list[Step] = []
        self.batch: Batch | None = None
        self.generated: tuple[tuple[int, ...], ...] | None = None
        self.labels: Any = None  # of the batch's rows, for the views of a probe (`slitlamp.tracing.probe.Labels`)
        self.decoding = False
        self.views: dict[str, Trace] = {}
        self.source: Source | None = None
        self.backend: NNsight | None = None
        self.nonfinite: NonFinite = "warn"
        self.gradient_of = gradient_of
        self.gradients: Trace | None = None if gradient_of is None else Trace(sites)

    def admit(self, batch: Batch) -> None:
        """Refuse a run that this trace cannot take, before anything runs.

        Raises:
            InputError: a run in a trace that holds one already.
        """
        if self.batch is not None:
            raise InputError("a trace holds one run; open a new one for the next")

    def start(self, batch: Batch, *, decoding: bool) -> None:
        """A run begins."""
        self.batch = batch
        self.decoding = decoding
        self.generated = None

    def finish(self) -> None:
        """The run has ended well."""

    def pending(self, ids: Iterable[str]) -> list[str]:
        """Those of some items that are not in the trace's store yet, in their order; without a store, all of them."""
        return list(ids)

    def record(self, label: str) -> SiteRecord:
        """The recordings of one site.

        Raises:
            UnknownNameError: no such recording was asked for.
            InputError: nothing has run inside the trace yet.
        """
        if label not in self.sites:
            raise unknown("recording", label, self.sites)
        if self.batch is None:
            raise InputError("this trace has recorded nothing: call vlm.forward or vlm.generate inside its with-block")
        return SiteRecord(self.sites[label], self.steps, self.decoding)

    def __getitem__(self, label: str) -> SiteRecord:
        found = _layer_of(label)
        return self.record(label) if found is None else self.record(found[0])[found[1]]  # type: ignore[return-value]

    def __contains__(self, label: str) -> bool:
        return label in self.sites

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.sites)

    def mask(self, label: str) -> Tensor:
        """bool [row, position], true where a recording is real; shorter rows are padded on the right."""
        return self.record(label).mask

    def attention_map(
        self,
        query: int = -1,
        row: int = 0,
        *,
        layers: Iterable[int] | None = None,
        heads: Iterable[int] | None = None,
        label: str = "attention",
        image: int = 0,
        view: int = BASE_VIEW,
    ) -> Tensor:
        """Attention over an image, as recorded with `keys="image"`: the mean over layers and heads, on the grid of the patches.

        Args:
            query: which of the recorded query rows: of a generation with `queries="last"`, the number of the generated token
                that it predicts (see `Generation.token_of`).
            row: of the batch.
            layers, heads: which of the recorded ones; by default all. Heads by their place in the recording.
            label: of the recording.
            image, view: which image of the row, and which of its grids (see `Patches.to_grid`).

        Returns:
            [row of patches, column of patches], float32 on the CPU.

        Raises:
            InputError: a recording of another kind, a query that was not recorded, an image without such a grid, or a model that
                was given other image tokens than those of the batch.
        """
        record = self.record(label)
        site = record.site
        if not site.is_attention or site.is_vision or site.keys != "image" or site.reduce_keys or site.reduce_queries:
            raise InputError(f"a map needs attention from single queries to keys='image'; {label!r} is {site!r}")
        maps = torch.stack(
            [record[layer][row].float().cpu() for layer in (record.layers if layers is None else layers)]
        )
        if site.reduce_heads is not None and heads is not None:
            raise InputError(
                f"{label!r} holds no single heads: it was recorded with reduce_heads={site.reduce_heads!r}"
            )
        if site.reduce_heads is None:
            maps = maps[:, list(heads) if heads is not None else slice(None)].mean(dim=1)
        real = record.mask[row].cpu().nonzero().flatten()
        if not -len(real) <= query < len(real):
            raise InputError(f"query {query} of row {row}: {len(real)} were recorded, counted from 0")
        assert self.batch is not None
        patches = self.batch.patches[row]
        if (image, view) not in patches.grids:
            raise InputError(f"row {row} has no grid {(image, view)}: (image, view) are {sorted(patches.grids)}")
        if maps.shape[-1] < len(patches):
            raise InputError(
                f"{maps.shape[-1]} keys were recorded for {len(patches)} image tokens: an intervention changed which of them the "
                "model was given"
            )
        return patches.to_grid(maps.mean(dim=0)[real[query], : len(patches)], image=image, view=view)

    def to_activation_cache(self, labels: Iterable[str] | None = None) -> ActivationCache:
        """The recordings of one forward pass as a `transformer_lens.ActivationCache`; see
        `slitlamp.tracing.activation_cache.activation_cache`.

        Args:
            labels: which recordings; by default all that TransformerLens has a name for.
        """
        from slitlamp.tracing.activation_cache import activation_cache

        return activation_cache(self, labels)

    def nbytes(self) -> int:
        """Bytes of all recordings."""
        tensors = (one for step in self.steps for layers in step.values.values() for one in layers.values())
        return sum(one.element_size() * one.numel() for one in tensors)

    def __repr__(self) -> str:
        if self.batch is None:
            return f"Trace({', '.join(self.sites)}; nothing has run yet)"
        lines = [f"Trace of {self.batch.size} rows, {len(self.steps)} forward calls, {self.nbytes() / 1e6:.1f} MB"]
        return "\n  ".join([*lines, *(repr(self.record(label)) for label in self.sites)])

    def _repr_html_(self) -> str | None:
        return html_of("trace_html", self)


def _layer_of(name: str) -> tuple[str, int] | None:
    """Site and layer of a TransformerLens name, or None."""
    for site, pattern in _CANONICAL.items():
        found = re.fullmatch(re.escape(pattern).replace(re.escape("{layer}"), r"(\d+)"), name)
        if found:
            return site, int(found.group(1))
    return None
