"""What the tables of a run say, in plain sentences: one function per figure, from tables to a list of sentences."""

from __future__ import annotations

import numpy as np
import pandas as pd

from slitlamp.reports.data import RunData
from slitlamp.reports.metrics import is_pope, metric, split_name
from slitlamp.reports.summaries import mention_index_trend
from slitlamp.reports.wording import (
    Estimate,
    against_chance,
    against_others,
    beyond_control,
    change,
    changes,
    count,
    join,
    number,
    sentence,
)

FEW_IMAGES = 30
"""Below this many images a bootstrap over images is not to be trusted, and the report says so."""

MANY_TREATMENTS = 6
"""Beyond as many, what is said of each treatment and each of its controls is left to the verdicts."""


def quoted(name: str) -> str:
    """The name of a condition in quotation marks, so that it stands apart from the sentence."""
    return f"“{name}”"


def estimate(table: pd.DataFrame | None, **wanted: str) -> Estimate | None:
    """The first row with these values, as an estimate; None where there is none."""
    if table is None:
        return None
    keep = np.ones(len(table), dtype=bool)
    for column, value in wanted.items():
        if column not in table.columns:
            return None
        keep &= (table[column].astype(str) == value).to_numpy()
    rows = table[keep]
    return Estimate.of(rows.iloc[0].to_dict()) if len(rows) else None


def difference(data: RunData, condition: str, reference: str, dataset: str, name: str) -> Estimate | None:
    """The paired difference condition - reference of a metric, from the table of differences."""
    table = data.table("differences", "condition", "dataset", "metric", "value")
    if table is not None and "reference" not in table.columns and reference == data.reference:
        return estimate(table, condition=condition, dataset=dataset, metric=name)
    return estimate(table, condition=condition, reference=reference, dataset=dataset, metric=name)


def fewest_images(data: RunData) -> int | None:
    """The least number of images that a score rests on; None where the tables do not say."""
    table = data.table("conditions", "n_images")
    return None if table is None or table["n_images"].isna().all() else int(table["n_images"].min())


def headline(data: RunData) -> list[str]:
    """The few sentences at the top: the effect on CHAIR_i beside the first control, at equal recall, and on POPE."""
    reference, sentences = data.reference, list[str]()
    if reference is None:
        return []
    first, n = data.conditions[0], fewest_images(data)
    if n is not None and n < FEW_IMAGES:
        sentences.append(f"Only {count(n, 'image')}: too few for any conclusion, whatever the intervals say.")
    captioned, splits = caption_datasets(data), pope_datasets(data)
    for name in treatments(data):
        own = [one for one in data.conditions if one.role == "control" and one.control_of in (name, None)]
        for dataset in captioned[:1]:
            effect = difference(data, name, reference, dataset, "chair_i")
            if effect is None:
                continue
            sentences.append(sentence(change(quoted(name), "CHAIR_i", effect)))
            recall = difference(data, name, reference, dataset, "recall")
            if recall is not None and recall.direction:
                sentences.append(sentence(change(quoted(name), "recall", recall)))
            for control in own[:1]:
                other, direct = (
                    difference(data, control.name, reference, dataset, "chair_i"),
                    difference(data, name, control.name, dataset, "chair_i"),
                )
                if other is not None:
                    words = f"the control {quoted(control.name)}"
                    sentences.append(sentence(beyond_control(quoted(name), words, "CHAIR_i", effect, other, direct)))
            others = [(quoted(one.name), difference(data, name, one.name, dataset, "chair_i")) for one in own[1:]]
            rest = against_others(
                quoted(name), "CHAIR_i", [(one, direct) for one, direct in others if direct is not None]
            )
            sentences += [sentence(rest)] if rest else []
        matched = data.table("matched_differences", "condition", "reference", "value", "low", "high")
        equal = estimate(matched, condition=name, reference=first.name)
        if equal is not None:
            sentences.append(sentence(f"at equal recall {change(quoted(name), 'CHAIR_i', equal)}"))
        pooled = next((one for one in splits if split_name(one) == "all"), splits[0] if splits else "")
        accuracy = difference(data, name, reference, pooled, "accuracy")
        if accuracy is not None:
            questions = (
                "all POPE questions" if split_name(pooled) == "all" else f"POPE questions ({split_name(pooled)})"
            )
            sentences.append(sentence(f"on {questions} {change(quoted(name), 'accuracy', accuracy)}"))
    return sentences


def treatments(data: RunData) -> list[str]:
    """Names of the conditions that are tested."""
    return [one.name for one in data.conditions if one.role == "treatment"]


def caption_datasets(data: RunData) -> list[str]:
    """Data sets on which CHAIR was measured."""
    table = data.table("conditions", "dataset", "metric")
    return [] if table is None else list(dict.fromkeys(table.loc[table["metric"] == "chair_i", "dataset"].astype(str)))


def pope_datasets(data: RunData) -> list[str]:
    """POPE splits, in the order of the run."""
    table = data.table("conditions", "dataset", "metric")
    if table is None:
        return []
    named = table.loc[table["metric"] == "accuracy", "dataset"].astype(str).unique()
    return [name for name in named if is_pope(name)] or list(named)


def pope_findings(data: RunData) -> list[str]:
    """Accuracy of the reference by split, against chance, and what every condition does to it on the hardest split."""
    table, reference, datasets = (
        data.table("conditions", "condition", "dataset", "metric", "value"),
        data.reference,
        pope_datasets(data),
    )
    if table is None or reference is None or not datasets:
        return []
    found: dict[str, Estimate] = {}
    for name in datasets:
        one = estimate(table, condition=reference, dataset=name, metric="accuracy")
        if one is not None and one.defined:
            found[name] = one
    if not found:
        return [sentence(f"the accuracy of {quoted(reference)} is not defined here")]
    clauses = [
        against_chance(f"on {split_name(name)} questions accuracy", one, 0.5)
        for name, one in found.items()
        if split_name(name) != "all"
    ]
    hardest = min(found, key=lambda name: found[name].value)
    pooled = next((name for name in found if split_name(name) == "all"), hardest)
    where = "on all questions together" if pooled != hardest else f"on {split_name(hardest)} questions"
    sentences = [sentence(f"with {quoted(reference)} {join(clauses)}")]
    effects = [(one, difference(data, one, reference, pooled, "accuracy")) for one in data.drawn if one != reference]
    known = [(name, effect) for name, effect in effects if effect is not None]
    if known:
        sentences.append(sentence(f"{where} {changes([(quoted(name), one) for name, one in known], 'accuracy')}"))
    ratio = estimate(table, condition=reference, dataset=hardest, metric="yes_ratio")
    if ratio is not None and ratio.defined:
        lean = "as often as it should" if not ratio.excludes(0.5) else "too often" if ratio.low > 0.5 else "too seldom"
        questions = f"the {split_name(hardest)} questions; half of them deserve it"
        share = f"{quoted(reference)} answers yes to {ratio.text()} of {questions}"
        sentences.append(
            sentence(
                f"{share}, so it says yes {lean}" + (", as far as this run can tell" if not ratio.excludes(0.5) else "")
            )
        )
    unread = table[
        table["dataset"].astype(str).isin(datasets) & (table["metric"] == "unparseable") & table["value"].notna()
    ]
    if len(unread):
        worst = unread.loc[unread["value"].idxmax()]
        share = f"at most {number(float(worst['value']))} of the answers (with {quoted(str(worst['condition']))})"
        sentences.append(
            sentence(
                f"a strict reading finds no clear yes or no in {share}"
                if worst["value"] > 0
                else "every answer is a clear yes or no"
            )
        )
    return sentences


def chair_findings(data: RunData) -> list[str]:
    """CHAIR of the reference, and what every condition does to CHAIR_i, recall and length."""
    table, reference = data.table("conditions", "condition", "dataset", "metric", "value"), data.reference
    sentences: list[str] = []
    for dataset in caption_datasets(data):
        base = estimate(table, condition=str(reference), dataset=dataset, metric="chair_i")
        if reference is None or base is None:
            continue
        first = f"of the objects that {quoted(reference)} names, a share of {base.text()} is not in the image"
        whole = estimate(table, condition=reference, dataset=dataset, metric="chair_s")
        if whole is not None and whole.defined:
            first += f"; {whole.text()} of its captions name at least one such object"
        sentences.append(sentence(first if base.defined else f"CHAIR_i of {quoted(reference)} is not defined here"))
        for name in ("chair_i", "recall"):
            effects = [(one, difference(data, one, reference, dataset, name)) for one in data.drawn if one != reference]
            known = [(one, effect) for one, effect in effects if effect is not None]
            if known:
                sentences.append(
                    sentence(
                        changes(
                            [(quoted(name), one) for name, one in known],
                            metric(name).label if name == "chair_i" else "recall",
                        )
                    )
                )
    return sentences


def control_findings(data: RunData, name: str = "chair_i") -> list[str]:
    """For every treatment: its effect, and whether the effect goes beyond that of each of its controls.

    Of many treatments, the effects in one sentence: the verdicts say what goes beyond controls.
    """
    reference, label = data.reference, metric(name).label
    sentences: list[str] = []
    for dataset in caption_datasets(data) if name.startswith("chair") else pope_datasets(data):
        if len(treatments(data)) > MANY_TREATMENTS:
            known = [(one, difference(data, one, str(reference), dataset, name)) for one in treatments(data)]
            text = changes([(quoted(one), effect) for one, effect in known if effect is not None], label)
            sentences += [sentence(text)] if text else []
            continue
        for treatment in treatments(data):
            effect = None if reference is None else difference(data, treatment, reference, dataset, name)
            if effect is None or reference is None:
                continue
            sentences.append(sentence(change(quoted(treatment), label, effect)))
            for control in (
                one for one in data.conditions if one.role == "control" and one.control_of in (treatment, None)
            ):
                of_control = difference(data, control.name, reference, dataset, name)
                if of_control is None:
                    continue
                direct = difference(data, treatment, control.name, dataset, name)
                sentences.append(
                    sentence(
                        beyond_control(
                            quoted(treatment), f"the control {quoted(control.name)}", label, effect, of_control, direct
                        )
                    )
                )
            if not any(one.role == "control" for one in data.conditions):
                sentences.append(
                    "There is no control condition in this run, so nothing follows about what is special in the method."
                )
    return sentences


def matched_findings(data: RunData) -> list[str]:
    """CHAIR_i at the recall that all conditions reach, and treatments against their controls at equal recall."""
    table = data.table(
        "matched_recall", "condition", "recall", "value", "difference", "difference_low", "difference_high"
    )
    if table is None or len(table) < 2:
        return []
    rows = table.to_dict("records")
    first, recall = str(rows[0]["condition"]), float(rows[0]["recall"])
    known = [
        (str(row["condition"]), Estimate.of(row, "difference", "difference_low", "difference_high")) for row in rows[1:]
    ]
    base = f"at the same recall of {number(recall)}, CHAIR_i of {quoted(first)} is {Estimate.of(rows[0]).text()}"
    sentences = [
        sentence(f"{base}; {changes([(quoted(name), one) for name, one in known], 'CHAIR_i at equal recall')}")
    ]
    pairs = data.table("matched_differences", "condition", "reference", "value", "low", "high")
    for control in (one for one in data.conditions if one.role == "control" and one.control_of):
        direct = estimate(pairs, condition=str(control.control_of), reference=control.name)
        if direct is not None:
            versus = f"compared with the control {quoted(control.name)} at the highest recall that both reach,"
            sentences.append(sentence(f"{versus} {change(quoted(str(control.control_of)), 'CHAIR_i', direct)}"))
    return sentences


def mention_findings(data: RunData) -> list[str]:
    """Whether later mentions are hallucinated more often."""
    table, reference = data.table("chair_mentions", "condition", "image_id", "index", "hallucinated"), data.reference
    trend = None if table is None or reference is None else mention_index_trend(table, reference)
    if trend is None or reference is None:
        return []
    last, rise = trend
    shown = rise.text(signed=True)
    what = f"with {quoted(reference)} the share of hallucinated objects at mention {last}, compared with the first mention,"
    if not rise.defined or not rise.has_interval:
        return [sentence(f"{what} cannot be judged here ({shown})")]
    if not rise.direction:
        return [sentence(f"{what} differs by {shown}, which is not distinguishable from zero")]
    if rise.direction == "up":
        return [
            sentence(f"{what} is higher by {shown}: the later a caption names an object, the less often it is there")
        ]
    return [sentence(f"{what} is lower by {shown}: the later a caption names an object, the more often it is there")]
