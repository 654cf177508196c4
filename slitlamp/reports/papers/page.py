"""The page of all experiments: the figures of the four papers beside what the embedded model shows, and the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import yaml

from slitlamp.errors import RunFolderError
from slitlamp.experiments import storage
from slitlamp.experiments.folder import CONFIG, ENVIRONMENT
from slitlamp.experiments.publish import README, plain, seconds_of
from slitlamp.reports.papers.claims import AGREES, DIFFERS, OPEN, Claim
from slitlamp.reports.papers.tables import FolderTables

RESULTS: Final = "results"
INTRODUCTION: Final = """\
Each file is an experiment: `slitlamp run NAME`, or `slitlamp run experiments/NAME.yaml`. All run on the embedded model; another
one is `--set model=llava-hf/llava-1.5-7b-hf`. This page is written by `slitlamp publish` from [results](results/README.md): the
configuration, times and tables of runs on the embedded model. Seconds are those of the run, on two shared CPU cores."""
RULES: Final = """\
A verdict is decided from 95 % intervals by a rule that `slitlamp/reports/papers` states for each row: *agrees*: the interval lies
on the paper's side; *differs*: it lies on the other side; *not testable at this size*: it holds both, or the run has no interval.
A row of several parts agrees where all do, and differs where one does. Every row is judged by itself: of forty intervals of 95 %
two miss by chance. The embedded model is small and was trained in another way than the models of the papers: what differs here
says nothing against them."""
OF_OTHERS: Final = {
    "outliers_definitions": "Causal check",
    "outliers_norms": "The largest norm",
    "vhd_contrasts": "Ways of removing",
}
"""How the sentence of a summary begins that is shown of an experiment; of others the first is."""
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def write_page(experiments: str | Path, claims: Sequence[Claim]) -> Path:
    """Write README.md of a folder of experiments, and return its path."""
    path = Path(experiments) / README
    storage.write_bytes(path, page(experiments, claims).encode())
    return path


def page(experiments: str | Path, claims: Sequence[Claim]) -> str:
    """The page as Markdown.

    Args:
        experiments: a folder of YAML files, with the published copies of their runs in `results`.
        claims: the rows of the papers.

    Raises:
        RunFolderError: the folder holds no experiments.
    """
    folder = Path(experiments)
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if not names:
        raise RunFolderError(f"{folder} holds no experiments (*.yaml)")
    lines = ["# Experiments", "", INTRODUCTION, "", "## Figures and tables of four papers", "", RULES, ""]
    table, verdicts = _papers(folder / RESULTS, claims)
    counted = f"{verdicts[AGREES]} agree, {verdicts[DIFFERS]} differ, {verdicts[OPEN]} are not testable at this size"
    lines += [f"Of {len(claims)} rows {counted}.", "", *table, "", *_restrictions(claims), ""]
    lines += ["## The others", "", *_others(folder, [name for name in names if name not in _experiments(claims)])]
    return "\n".join(lines) + "\n"


def _experiments(claims: Sequence[Claim]) -> list[str]:
    return list(dict.fromkeys(claim.experiment for claim in claims))


def _papers(results: Path, claims: Sequence[Claim]) -> tuple[list[str], Counter[str]]:
    """A row per claim, and how often each verdict was given."""
    lines = [
        "| figure | command | seconds | what the paper found | what the embedded model shows |",
        "|---|---|---|---|---|",
    ]
    verdicts: Counter[str] = Counter()
    tables = {name: FolderTables(results / name) for name in _experiments(claims)}
    for claim in claims:
        finding = claim.finding(tables[claim.experiment])
        verdicts[finding.verdict] += 1
        lines.append(
            f"| {claim.paper}, {claim.figure} | {_command(results, claim.experiment)} | {_seconds(results, claim.experiment)} "
            f"| {plain(claim.found)} | **{finding.verdict}**: {plain(finding.text)} |"
        )
    return lines, verdicts


def _restrictions(claims: Sequence[Claim]) -> list[str]:
    """What a row needs that another model may lack."""
    needs: dict[str, list[str]] = {}
    for claim in claims:
        if claim.only and claim.experiment not in needs.setdefault(claim.only, []):
            needs[claim.only].append(claim.experiment)
    lines = ["All of these run on any family, but for what some need; without it the error says what to do:", ""]
    return lines + [f"- {', '.join(f'`{name}`' for name in names)}: {only}" for only, names in needs.items()]


def _others(folder: Path, names: Sequence[str]) -> list[str]:
    lines = ["| experiment | command | seconds | what was found |", "|---|---|---|---|"]
    for name in names:
        title = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")).get("title") or name
        lines.append(
            f"| {plain(str(title))} | {_command(folder / RESULTS, name)} | {_seconds(folder / RESULTS, name)} "
            f"| {_found(folder / RESULTS / name, name)} |"
        )
    return lines


def _found(copy: Path, name: str) -> str:
    """What was found in a line, as the page of the copy says it: the verdicts on CHAIR, or a sentence of a probe."""
    if not (copy / README).is_file():
        return "not published"
    said = [line[2:] for line in (copy / README).read_text(encoding="utf-8").splitlines() if line.startswith("- ")]
    verdicts = [line for line in said if line.startswith(plain("CHAIR_i: "))]
    if verdicts:
        return verdicts[0]
    probes = [line.split(": ", 1)[1] for line in said if not line.startswith(("baseline ", "CHAIR", "POPE"))]
    sentences = [sentence for line in probes for sentence in _SENTENCE.split(line)]
    wanted = [one for one in sentences if one.startswith(OF_OTHERS.get(name, ""))]
    changes = [line for line in said if line.startswith(plain("CHAIR_i against "))]
    return (wanted or sentences or changes[::-1] or said or ["nothing is said"])[0]


def _command(results: Path, name: str) -> str:
    command = f"`slitlamp run {name}`"
    return f"{command} ([figures]({RESULTS}/{name}/{README}))" if (results / name / README).is_file() else command


def _seconds(results: Path, name: str) -> str:
    copy = results / name
    if not (copy / CONFIG).is_file():
        return "not published"
    return str(seconds_of(storage.read_json(copy / ENVIRONMENT)))
