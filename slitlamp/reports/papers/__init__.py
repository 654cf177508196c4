"""What four papers found, beside what a run shows: one claim per figure and table, judged from intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from slitlamp.reports.papers import damro, ima, truthprint, vhr
from slitlamp.reports.papers.claims import Claim, Finding, Tables, Verdict, paper_findings
from slitlamp.reports.papers.tables import FolderTables, experiment_of

CLAIMS: Final[tuple[Claim, ...]] = (*ima.CLAIMS, *vhr.CLAIMS, *truthprint.CLAIMS, *damro.CLAIMS)
"""In the order of the papers and of their figures."""


def run_findings(folder: str | Path) -> list[str]:
    """A sentence per claim that a run is about: what the paper found, what the run shows, the verdict; none for other runs.

    Args:
        folder: a run folder, or the published copy of one.
    """
    return paper_findings(CLAIMS, experiment_of(folder, CLAIMS), FolderTables(folder))


__all__ = ["CLAIMS", "Claim", "Finding", "FolderTables", "Tables", "Verdict", "paper_findings", "run_findings"]
