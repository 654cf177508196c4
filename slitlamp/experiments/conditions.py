"""The conditions of an experiment: the reference, the treatments, their matched controls, and what is compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import pandas as pd

from slitlamp.errors import InputError, unknown
from slitlamp.experiments.names import check_name

if TYPE_CHECKING:
    from slitlamp.decoding import Intervention

Role = Literal["reference", "treatment", "control"]


@dataclass(frozen=True)
class Condition:
    """Interventions under one name; `control_of` names the treatment that a control belongs to."""

    name: str
    interventions: tuple[Intervention, ...]
    role: Role
    control_of: str | None = None

    def describe(self) -> str:
        """What is done, in plain words."""
        # From copies: what an earlier run left in an intervention is no part of it.
        fresh = [replace(one) for one in self.interventions]  # type: ignore[type-var]
        return "; ".join(one.describe() for one in fresh) or "the model as it is"


def make_conditions(
    given: Mapping[str, Sequence[Intervention]], controls: bool | Sequence[str] = False
) -> list[Condition]:
    """The conditions in order, the first as the reference, every treatment followed by its controls.

    Args:
        given: interventions by the name of the condition.
        controls: whether to add, for every treatment, the matched controls that its interventions declare (as
            `<condition>_<control>`); a list keeps those of these names.

    Raises:
        InputError: no condition, a name that cannot be used, two conditions of one name, or `controls` that no
            intervention declares.
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
            result += [one for short, one in own if wanted is None or short in wanted]
    for short in wanted or ():
        if short not in declared:
            raise (
                unknown("control", short, declared)
                if declared
                else InputError(f"no intervention declares controls; found {short!r}")
            )
    seen: set[str] = set()
    for one in result:
        if one.name in seen:
            raise InputError(f"two conditions are called {one.name!r}; a control is called <condition>_<control>")
        seen.add(one.name)
    return result


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
