"""What every probe is: it says what to record, takes recordings batch by batch, and ends in tables and figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from slitlamp.models.anatomy import Anatomy
from slitlamp.models.batch import Batch
from slitlamp.tracing.session import Edit
from slitlamp.tracing.sites import Site
from slitlamp.tracing.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

View = Callable[[Batch], tuple[Batch, list[Edit]]]
"""Another version of a batch (its image removed, say), and the edits to run it with."""

Labels = Sequence[pd.DataFrame | None]
"""Per row of a batch, a table with a row per generated token: `token` (from 0), `word`, `label`; None where unknown."""


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

        What draws them is found by the probe's name among the entry points `slitlamp.probe_figures`: functions of the
        tables that return figures by name. A probe that declares none has no figures.
        """
        drawn: dict[str, Figure] = {}
        for point in entry_points(group="slitlamp.probe_figures", name=self.name):
            drawn |= point.load()(self.tables)
        return drawn

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {table.shape}" for name, table in self.tables.items())
        return f"{self.name}: {self.summary}\n  tables: {shapes}"


class Probe(ABC):
    """A measurement of what a VLM computes.

    Subclasses are dataclasses whose fields are the parameters; making one does no work. `update` streams: it may keep
    sums and one small row per item, never the recordings. What it keeps is given by `state` and taken back by
    `load_state`, so that a killed run can go on; `merge` joins the states of two parts of a data set, in order.
    """

    name: ClassVar[str]

    @abstractmethod
    def sites(self, anatomy: Anatomy) -> list[Site]:
        """What to record."""

    def views(self, anatomy: Anatomy) -> dict[str, View]:
        """Other versions of each batch in which the same sites are recorded; `trace.views[name]` holds them."""
        return {}

    @abstractmethod
    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch.

        Raises:
            InputError: the batch cannot be measured.
        """

    @abstractmethod
    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """What `update` has gathered, as arrays of numbers or fixed-width text."""

    @abstractmethod
    def load_state(self, state: dict[str, np.ndarray[Any, Any]]) -> None:
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

    def parameters(self) -> dict[str, Any]:
        """The parameters by name."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}  # type: ignore[arg-type]
