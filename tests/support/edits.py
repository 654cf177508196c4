"""An intervention made of given edits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from slitlamp.decoding import Intervention, RunContext
from slitlamp.decoding.intervention import Kind
from slitlamp.tracing import Edit


@dataclass
class Edits(Intervention):
    """Given edits as they are."""

    given: list[Edit] = field(default_factory=list)
    name: ClassVar[str] = "edits"
    kind: ClassVar[Kind] = "blocks"

    def edits(self, run: RunContext) -> list[Edit]:
        return self.given
