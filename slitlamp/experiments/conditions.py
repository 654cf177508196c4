"""The conditions of an experiment: the reference, the treatments, their matched controls and pairs, and what is compared."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import pandas as pd

from slitlamp.errors import InputError, unknown
from slitlamp.experiments.names import check_name

if TYPE_CHECKING:
    from slitlamp.decoding import Intervention

logger = logging.getLogger(__name__)

Role = Literal["reference", "treatment", "control", "pair"]


@dataclass(frozen=True)
class Condition:
    """Interventions under one name; `control_of` names the treatment of a control, `pair_of` the two treatments of a pair."""

    name: str
    interventions: tuple[Intervention, ...]
    role: Role
    control_of: str | None = None
    pair_of: tuple[str, str] | None = None

    def describe(self) -> str:
        """What is done, in plain words."""
        # From copies: what an earlier run left in an intervention is no part of it.
        fresh = [replace(one) for one in self.interventions]  # type: ignore[type-var]
        return "; ".join(one.describe() for one in fresh) or "the model as it is"


def make_conditions(
    given: Mapping[str, Sequence[Intervention]],
    controls: bool | Sequence[str] = True,
    pairs: bool | Sequence[str] = False,
) -> list[Condition]:
    """The conditions in order, the first as the reference, every treatment followed by its controls, the pairs last.

    Args:
        given: interventions by the name of the condition.
        controls: whether to add, for every treatment, the matched controls that its interventions declare (as
            `<condition>_<control>`); a list keeps those of these names, and a treatment of whose controls it keeps none is
            named in a warning.
        pairs: whether to add, for every two treatments in their order, both together (as `<first>+<second>`, the interventions
            of the first before those of the second); a list keeps the pairs among these treatments. Pairs have no controls.

    Raises:
        InputError: no condition, a name that cannot be used, two conditions of one name, `controls` that no intervention
            declares, or `pairs` of fewer than two treatments.
    """
    if not given:
        raise InputError("an experiment needs at least one condition, for example {'baseline': []}")
    wanted = None if isinstance(controls, bool) else list(controls)
    result: list[Condition] = []
    declared: set[str] = set()
    for i, (name, interventions) in enumerate(given.items()):
        check_name("condition", name)
        role: Role = "reference" if i == 0 else "treatment"
        result.append(Condition(name, tuple(interventions), role))
        if role == "treatment" and controls:
            own = _controls(name, interventions)
            declared |= {short for short, _ in own}
            kept = [one for short, one in own if wanted is None or short in wanted]
            if own and not kept:
                logger.warning(
                    "the treatment %r runs without a control: it declares %s, of which 'controls' keeps none",
                    name,
                    ", ".join(short for short, _ in own),
                )
            result += kept
    for short in wanted or ():
        if short not in declared:
            raise (
                unknown("control", short, declared)
                if declared
                else InputError(f"no intervention declares controls; found {short!r}")
            )
    result += _pairs([one for one in result if one.role == "treatment"], pairs)
    seen: set[str] = set()
    for one in result:
        if one.name in seen:
            raise InputError(
                f"two conditions are called {one.name!r}; a control is called <condition>_<control>, a pair <first>+<second>"
            )
        seen.add(one.name)
    return result


def _pairs(treatments: Sequence[Condition], wanted: bool | Sequence[str]) -> list[Condition]:
    if not wanted and isinstance(wanted, bool):
        return []
    names = [one.name for one in treatments]
    if not isinstance(wanted, bool):
        for name in wanted:
            if name not in names:
                raise unknown("treatment in 'pairs'", name, names)
        treatments = [one for one in treatments if one.name in wanted]
    if len(treatments) < 2:
        raise InputError(f"'pairs' needs at least two treatments; found {len(treatments)}")
    return [
        Condition(f"{a.name}+{b.name}", (*a.interventions, *b.interventions), "pair", pair_of=(a.name, b.name))
        for a, b in combinations(treatments, 2)
    ]


def _controls(name: str, interventions: Sequence[Intervention]) -> list[tuple[str, Condition]]:
    """Each control replaces one intervention of the condition and leaves the others as they are."""
    declared = [(i, short, one) for i, entry in enumerate(interventions) for short, one in entry.controls().items()]
    shorts = [short for _, short, _ in declared]
    result = []
    for i, short, one in declared:
        full = short if shorts.count(short) == 1 else f"{interventions[i].name}{i + 1}_{short}"
        changed = (*interventions[:i], one, *interventions[i + 1 :])
        result.append((short, Condition(f"{name}_{full}", changed, "control", name)))
    return result


def make_comparisons(
    conditions: Sequence[Condition], extra: Sequence[tuple[str, str]] | None = None
) -> list[tuple[str, str]]:
    """Pairs (condition, reference) to compare on the same items.

    Every condition against the first, every treatment against each of its controls, and `extra`.
    """
    names = [one.name for one in conditions]
    pairs = [(name, names[0]) for name in names[1:]]
    pairs += [(one.control_of, one.name) for one in conditions if one.control_of]
    for condition, reference in extra or ():
        for name in (condition, reference):
            if name not in names:
                raise unknown("condition in 'comparisons'", name, names)
        if condition == reference:
            raise InputError(f"'comparisons' compares {condition!r} with itself")
        pairs.append((condition, reference))
    return list(dict.fromkeys(pairs))


def condition_table(conditions: Sequence[Condition]) -> pd.DataFrame:
    """The table `condition_info`: condition, role, control_of, description, in order."""
    rows = [(one.name, one.role, one.control_of, one.describe()) for one in conditions]
    return pd.DataFrame(rows, columns=["condition", "role", "control_of", "description"])
