"""What every intervention is: what it changes, when it may be used, and what to compare it with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from slitlamp.errors import InputError
from slitlamp.models.anatomy import Anatomy
from slitlamp.models.batch import Batch
from slitlamp.tracing.gradients import Scalar
from slitlamp.tracing.session import AnyEdit
from slitlamp.tracing.sites import Site
from slitlamp.tracing.trace import Source, Trace

Kind = Literal["input", "visual_tokens", "blocks", "logits"]
KINDS: tuple[Kind, ...] = ("input", "visual_tokens", "blocks", "logits")


class ExtraPass(Protocol):
    """An extra forward pass of the model, with nothing but the edits that it is given."""

    def __call__(
        self, batch: Batch, sites: Sequence[Site], edits: Sequence[AnyEdit], gradient_of: Scalar | None = None
    ) -> Trace:
        """The recordings of some sites; with `gradient_of`, also the gradients with respect to them, in `trace.gradients`."""


@dataclass(frozen=True)
class RunContext:
    """What an intervention may use when a run starts.

    Attributes:
        batch: what the model is about to run on.
        anatomy: the model's anatomy.
        trace: (batch, sites, edits, gradient_of=None) -> recordings of an extra forward pass with only those edits.
        source: the model itself, for interventions that read its weights. Nothing may be written into it.
        given: the batch as it was given, where edits of image tokens have changed it; None where none have.
        kept: per row, int64 [image token]: which of the image tokens of `given` each of the batch's is; None where it has all.
    """

    batch: Batch
    anatomy: Anatomy
    trace: ExtraPass
    source: Source
    given: Batch | None = None
    kept: tuple[Tensor, ...] | None = None

    @property
    def whole(self) -> Batch:
        """The batch with all its image tokens and their pixels."""
        return self.batch if self.given is None else self.given


class Intervention(ABC):
    """A change of what a VLM does, made for the time of `vlm.apply(...)`.

    Subclasses are dataclasses whose fields are the parameters; making one does no work. A run (`forward` or
    `generate`) asks for its edits once, before the model's first call; nothing outlives the run. The neutral setting
    must reproduce the unmodified model token for token.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]

    def check(self, anatomy: Anatomy) -> None:  # noqa: B027  most interventions fit every model
        """Refuse what cannot work on a model.

        Raises:
            InputError: a parameter is out of range for this model.
            UnsupportedError: the model lacks what the intervention changes.
        """

    @abstractmethod
    def edits(self, run: RunContext) -> Sequence[AnyEdit]:
        """The edits of one run, in order."""

    def controls(self) -> dict[str, Intervention]:
        """Matched controls, by a short name: the same strength on other targets."""
        return {}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        parameters = [one.name for one in fields(self) if one.init]  # type: ignore[arg-type]
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in parameters)
        return f"{self.name}({values})"


def in_order(interventions: Sequence[Any]) -> list[Intervention]:
    """Interventions by kind (input, visual tokens, blocks, logits) and, within a kind, as given.

    Raises:
        InputError: something that is not an intervention.
    """
    for one in interventions:
        if not isinstance(one, Intervention):
            raise InputError(f"apply takes interventions, found {one!r}")
    return sorted(interventions, key=lambda one: KINDS.index(one.kind))
