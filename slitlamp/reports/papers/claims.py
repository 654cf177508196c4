"""What a paper found, and what the tables of a run say about it: judged from intervals, never by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import pandas as pd

from slitlamp.reports.wording import Estimate

Tables = Mapping[str, pd.DataFrame]
"""Tables of a run by name; `timing` (columns step, seconds) is what its environment says of time."""
Verdict = Literal["agrees", "differs", "not testable at this size"]
Side = Literal["above", "below"]

AGREES: Final[Verdict] = "agrees"
DIFFERS: Final[Verdict] = "differs"
OPEN: Final[Verdict] = "not testable at this size"


class Lacking(LookupError):
    """The tables of a run do not hold what a claim asks for; the message says what, as the end of "the run has ..."."""


@dataclass(frozen=True)
class Finding:
    """A verdict, and a sentence (without its full stop) that gives the numbers it rests on."""

    verdict: Verdict
    text: str


@dataclass(frozen=True)
class Claim:
    """One figure or table of a paper.

    Attributes:
        paper: its short name.
        figure: the figure or table, as the paper numbers it where it has a number.
        experiment: the name of the YAML file.
        found: what the paper found, one sentence without its full stop.
        judge: tables of a run -> what they say about it. Raises Lacking where they hold too little.
        only: what the experiment needs that only the embedded model has; empty where it runs on any model.
    """

    paper: str
    figure: str
    experiment: str
    found: str
    judge: Callable[[Tables], Finding]
    only: str = ""

    def finding(self, tables: Tables) -> Finding:
        """What the tables say; not testable where they hold too little."""
        try:
            return self.judge(tables)
        except Lacking as lacking:
            return Finding(OPEN, f"the run has {lacking}")


def lies(estimate: Estimate, side: Side, than: float, text: str) -> Finding:
    """Whether an interval lies on the paper's side of a number: agrees; on the other side: differs; on both: not testable."""
    if not estimate.has_interval:
        return Finding(OPEN, f"{text} {estimate.text()} (no interval)")
    on_side = estimate.low > than if side == "above" else estimate.high < than
    on_other = estimate.high < than if side == "above" else estimate.low > than
    return Finding(AGREES if on_side else DIFFERS if on_other else OPEN, f"{text} {estimate.text()}")


def changes(estimate: Estimate, side: Side, text: str) -> Finding:
    """The same of a difference, against 0; the number is written with its sign."""
    judged = lies(estimate, side, 0.0, text)
    return Finding(judged.verdict, f"{text} {estimate.text(signed=True)}")


def apart(first: Estimate, side: Side, second: Estimate, text: str) -> Finding:
    """Whether the whole interval of one number lies above (or below) that of another.

    For numbers whose difference no table has: intervals that overlap are not testable, which is stricter than a paired test.

    Args:
        first, second: the numbers.
        side: where the paper has the first.
        text: with `{first}` and `{second}` for the numbers.
    """
    upper, lower = (first, second) if side == "above" else (second, first)
    verdict = AGREES if upper.low > lower.high else DIFFERS if upper.high < lower.low else OPEN
    return Finding(verdict, text.format(first=first.text(), second=second.text()))


def together(*findings: Finding) -> Finding:
    """Several findings as one: agrees where all agree, differs where one differs, else not testable."""
    verdicts = [one.verdict for one in findings]
    verdict = DIFFERS if DIFFERS in verdicts else OPEN if OPEN in verdicts else AGREES
    return Finding(verdict, "; ".join(one.text for one in findings))


def rows(tables: Tables, name: str, **where: Any) -> pd.DataFrame:
    """The rows of a table whose columns have these values. Raises Lacking where there is none."""
    if name not in tables:
        raise Lacking(f"no table {name}")
    found = tables[name]
    for column, value in where.items():
        if column not in found:
            raise Lacking(f"no column {column} in the table {name}")
        found = found[found[column] == value]
    if found.empty:
        asked = ", ".join(f"{column} {value}" for column, value in where.items())
        raise Lacking(f"no {asked} in the table {name}")
    return found


def estimate(found: pd.DataFrame, value: str = "value", low: str = "low", high: str = "high") -> Estimate:
    """The number of the first row, with its interval."""
    return Estimate.of(found.iloc[0].to_dict(), value, low, high)


def best(found: pd.DataFrame, column: str) -> pd.DataFrame:
    """The row with the largest number. Raises Lacking where all are unknown."""
    known = found[found[column].notna()]
    if known.empty:
        raise Lacking(f"no known {column}")
    return known.loc[[known[column].idxmax()]]


def difference(
    tables: Tables,
    condition: str,
    reference: str,
    metric: str = "chair_i",
    task: Literal["captions", "pope"] = "captions",
) -> Estimate:
    """Condition minus reference, paired by image; of POPE all splits together where they are."""
    found = rows(tables, "differences", condition=condition, reference=reference, metric=metric, task=task)
    whole = found[found["dataset"].astype(str).str.endswith("pope_all")]
    return estimate(found if whole.empty else whole)


def chair(tables: Tables, condition: str, reference: str, side: Side) -> Finding:
    """CHAIR_i of a condition against another, with recall beside it, without which a low CHAIR says nothing."""
    judged = changes(difference(tables, condition, reference), side, f"CHAIR_i of {condition} minus {reference}")
    recall = difference(tables, condition, reference, "recall")
    return Finding(judged.verdict, f"{judged.text}, recall {recall.text(signed=True)}")


def seconds(tables: Tables, condition: str) -> float:
    """How long a condition took to generate. Raises Lacking where the run does not say."""
    return float(rows(tables, "timing", step=f"generate {condition}")["seconds"].iloc[0])


def paper_findings(claims: Sequence[Claim], experiment: str, tables: Tables) -> list[str]:
    """A sentence per claim of an experiment, for a report: what the paper found, what this run shows, and the verdict."""
    said = []
    for claim in claims:
        if claim.experiment == experiment:
            finding = claim.finding(tables)
            said.append(
                f"{claim.paper}, {claim.figure}. The paper: {claim.found}. Here: {finding.text}: {finding.verdict}."
            )
    return said
