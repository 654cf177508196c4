"""What every probe is: it says what to record, takes recordings batch by batch, and ends in tables and figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple

import numpy as np
import pandas as pd

from slitlamp.errors import InputError
from slitlamp.models.anatomy import Anatomy
from slitlamp.models.batch import Batch
from slitlamp.models.images import Window
from slitlamp.reporters import html_of
from slitlamp.tracing.gradients import Scalar
from slitlamp.tracing.session import AnyEdit
from slitlamp.tracing.sites import Site
from slitlamp.tracing.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]

Labels = Sequence[pd.DataFrame | None]
"""Per row of a batch, a table with a row per generated token; None where unknown.

Columns: `token` (from 0), `word`, `label` ("object", "hallucinated" or "other" in captions; "correct" or "wrong" at the
answer of a yes/no question), and where the data set knows them `category` (the object that is named or asked for),
`frequency` (the share of the data set's images that hold it), `truth` (the right answer of a question) and `boxes` (where
it is: a list of (left, top, right, bottom) in shares of the image; where a probe takes them in, of what the model sees of it).
"""


def labels_as_seen(batch: Batch, labels: Labels | None) -> Labels | None:
    """The labels with boxes in shares of what the model sees of the first image; boxes that are wholly outside are left out."""
    if labels is None or batch.crop is None:
        return labels
    return [
        table.assign(boxes=[_seen(boxes, batch.window(row)) for boxes in table["boxes"]])
        if table is not None and "boxes" in table and batch.images[row]
        else table
        for row, table in enumerate(labels)
    ]


def _seen(boxes: Any, window: Window) -> Any:
    """Boxes of one label, cut to a window and in shares of it; what is no list of them (None, NaN) as it is."""
    if not isinstance(boxes, Sequence):
        return boxes
    start, size = np.array(window[:2]), np.array(window[2:]) - np.array(window[:2])
    moved = ((np.array(box).reshape(2, 2) - start) / size for box in boxes)
    cut = (np.clip(one, 0.0, 1.0) for one in moved)
    return tuple(tuple(one.ravel().tolist()) for one in cut if (one[1] > one[0]).all())


EditsOf = Callable[[Batch], Sequence[AnyEdit]]
"""From a batch to the edits of a run on it."""

N_DRAWS: Final = 19
"""Random targets of a causal check, where there are so many: a target like them is the largest of 20 one time in 20."""


@dataclass(frozen=True)
class View:
    """Another run that a probe wants beside the main one: without the image, say, or with something knocked out.

    Attributes:
        change: (batch, recordings so far) -> the batch to run, and the edits to run it with. `trace` holds the main run,
            and in `trace.views` the views before this one.
        sites: what to record in it; None for the probe's own sites.
        gradient_of: (batch, recordings so far) -> the scalar whose gradients with respect to what is recorded are put into
            `trace.views[name].gradients` (see `VLM.trace`); None for no gradients.
    """

    change: Callable[[Batch, Trace], tuple[Batch, Sequence[AnyEdit]]]
    sites: Sequence[Site] | None = None
    gradient_of: Callable[[Batch, Trace], Scalar] | None = None


@dataclass(frozen=True)
class CausalTarget:
    """What a probe points at, as something that can be intervened on, with matched random targets beside it.

    Attributes:
        name: what is done to it, in a few words: "the 4 most divergent heads set to zero".
        target: the edits of a run in which that is done.
        controls: the same done to random targets of the same kind, number and size; several draws.
        control_name: what they are: "4 random heads of the same layers".
    """

    name: str
    target: EditsOf
    controls: tuple[EditsOf, ...]
    control_name: str


class Part(NamedTuple):
    """Which part of an experiment a probe has measured."""

    model: str
    condition: str
    dataset: str


@dataclass
class ProbeResult:
    """What a probe found.

    Attributes:
        name: the probe's name.
        tables: tidy tables by name.
        summary: what was found, in a sentence or two, with intervals.
    """

    name: str
    tables: dict[str, pd.DataFrame]
    summary: str

    def figures(self) -> dict[str, Figure]:
        """The figures by name, drawn now from the tables.

        What draws them is found by the probe's name among the entry points `slitlamp.probe_figures`: mappings from the
        names of figures to `slitlamp.reports.drawing.Drawing`. A probe that declares none has no figures.
        """
        drawn: dict[str, Figure] = {}
        for point in entry_points(group="slitlamp.probe_figures", name=self.name):
            for name, drawing in point.load().items():
                figure = drawing.draw(self.tables)
                if figure is not None:
                    drawn[name] = figure
        return drawn

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {table.shape}" for name, table in self.tables.items())
        return f"{self.name}: {self.summary}\n  tables: {shapes}"

    def _repr_html_(self) -> str | None:
        return html_of("probe_html", self)


class Probe(ABC):
    """A measurement of what a VLM computes.

    Subclasses are dataclasses whose fields are the parameters; making one does no work. `update` streams: it may keep
    sums and one small row per item, never the recordings. What it keeps is given by `state` and taken back by
    `load_state`, so that a killed run can go on; `merge` joins the states of two parts of a data set, in order. Most
    probes inherit these three from `GatheringProbe`.
    """

    name: ClassVar[str]
    no_target: ClassVar[str] = ""
    """Why what this kind of probe finds is no place that could be intervened on; empty where `causal_targets` are given."""
    targets_of: ClassVar[Literal["model", "items"]] = "model"
    """Whether `causal_targets` hold for any item, or are places in the measured items themselves (some image tokens)."""

    @abstractmethod
    def sites(self, anatomy: Anatomy) -> list[Site]:
        """What to record.

        Raises:
            InputError: a parameter that cannot be used, on this model or at all.
        """

    def views(self, anatomy: Anatomy) -> dict[str, View]:
        """Other runs on each batch, in their order; `trace.views[name]` holds their recordings."""
        return {}

    @abstractmethod
    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch.

        Raises:
            InputError: the batch cannot be measured.
        """

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """What `update` has gathered, as arrays of numbers or fixed-width text."""

    @abstractmethod
    def load_state(self, state: dict[str, Array]) -> None:
        """Take back what `state` gave."""

    @abstractmethod
    def merge(self, other: Probe) -> None:
        """Add what another probe of the same parameters gathered on the items that follow.

        Raises:
            InputError: another kind of probe, or other parameters.
        """

    @abstractmethod
    def result(self) -> ProbeResult:
        """The tables and figures of everything taken in.

        Raises:
            InputError: nothing was taken in.
        """

    def causal_targets(self, anatomy: Anatomy) -> list[CausalTarget]:
        """What the finding points at, to be intervened on against matched random targets (see `slitlamp.causal`).

        Called after everything was taken in, on other items than those that are intervened on (but see `targets_of`). None
        where nothing is pointed at on these items; a probe whose finding is never a place says so in `no_target`.
        """
        return []

    @classmethod
    def compare(cls, parts: Mapping[Part, Probe], scores: pd.DataFrame | None = None) -> ProbeResult | None:
        """What follows from several measurements together: models, conditions or data sets against each other.

        Args:
            parts: probes of this class that have taken everything in.
            scores: the experiment's scores with their intervals, where there are any: columns model, condition, dataset,
                metric, value, low, high.

        Returns:
            None where there is nothing to compare.
        """
        return None

    def parameters(self) -> dict[str, Any]:
        """The parameters by name."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}  # type: ignore[arg-type]


class GatheringProbe(Probe):
    """A probe whose state is rows, sums and constants, by name.

    A dataclass that inherits this declares the field

        _gathered: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """

    _gathered: dict[str, Any]

    def _rows(self, **arrays: Array) -> None:
        """Put arrays [row, ...] after those of the same name."""
        for name, array in arrays.items():
            self._gathered.setdefault(f"rows.{name}", []).append(np.asarray(array))

    def _sums(self, **arrays: Array) -> None:
        """Add arrays, in float64, to those of the same name; their order must not matter to the result."""
        for name, array in arrays.items():
            key = f"sums.{name}"
            found = self._gathered.get(key)
            value = np.asarray(array, dtype=np.float64)
            self._gathered[key] = value.copy() if found is None else found + value

    def _constants(self, **arrays: Array) -> None:
        """Keep arrays that are the same for every batch.

        Raises:
            InputError: they are not.
        """
        for name, array in arrays.items():
            found = self._gathered.setdefault(f"constants.{name}", np.asarray(array))
            if not np.array_equal(found, np.asarray(array)):
                raise InputError(f"{self.name}: {name!r} differs between batches; one probe measures one model")

    def _has(self, name: str) -> bool:
        """Whether anything of that name was gathered."""
        return any(f"{kind}.{name}" in self._gathered for kind in ("rows", "sums", "constants"))

    def _get(self, name: str) -> Array:
        """What was gathered under a name.

        Raises:
            InputError: nothing was.
        """
        for kind in ("rows", "sums", "constants"):
            found = self._gathered.get(f"{kind}.{name}")
            if found is not None:
                if kind != "rows":
                    return np.asarray(found)
                if len(found) > 1:
                    found[:] = [np.concatenate(found)]
                return np.asarray(found[0])
        raise InputError(f"{type(self).__name__} has taken in nothing: call update, or vlm.measure, first")

    def state(self) -> dict[str, Array]:
        """What was gathered, by kind and name."""
        return {
            key: np.concatenate(value) if isinstance(value, list) else value for key, value in self._gathered.items()
        }

    def load_state(self, state: dict[str, Array]) -> None:
        """Take back what `state` gave."""
        self._gathered = {
            key: [np.asarray(value)] if key.startswith("rows.") else np.asarray(value) for key, value in state.items()
        }

    def merge(self, other: Probe) -> None:
        """Add what another probe gathered."""
        if type(other) is not type(self) or other != self:
            raise InputError(
                f"cannot merge {other!r} into {self!r}: they are not the same probe with the same parameters"
            )
        for key, value in other.state().items():
            kind, _, name = key.partition(".")
            {"rows": self._rows, "sums": self._sums, "constants": self._constants}[kind](**{name: value})
