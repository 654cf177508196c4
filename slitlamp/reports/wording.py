"""Sentences computed from numbers: right for every sign, and honest about intervals that contain zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MINUS = "\N{MINUS SIGN}"
NBSP = "\N{NO-BREAK SPACE}"
"""Between the ends of an interval, so that no line ends there."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @staticmethod
    def of(row: Mapping[str, Any], value: str = "value", low: str = "low", high: str = "high") -> Estimate:
        """From a row of a table."""
        return Estimate(*(_float(row.get(key)) for key in (value, low, high)))

    @property
    def defined(self) -> bool:
        """Whether there is a value at all."""
        return math.isfinite(self.value)

    @property
    def has_interval(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def excludes(self, point: float) -> bool:
        """Whether the interval lies on one side of a point and does not touch it."""
        return self.has_interval and (self.low > point or self.high < point)

    @property
    def direction(self) -> str:
        """Either "up" or "down", or "" where zero is inside the interval, or where nothing is known."""
        if not self.defined or not self.excludes(0.0):
            return ""
        return "up" if self.low > 0 else "down"

    def text(self, digits: int = 3, *, signed: bool = False) -> str:
        """The value and its interval, as in ".242 [.214, .271]"."""
        if not self.defined:
            return "not defined"
        digits = self.digits(digits)
        value = number(self.value, digits, signed=signed)
        if not self.has_interval:
            return value
        return f"{value} [{number(self.low, digits, signed=signed)},{NBSP}{number(self.high, digits, signed=signed)}]"

    def digits(self, digits: int) -> int:
        """Digits that keep a bound close to zero from being printed as zero (which would read as "includes zero")."""
        if self.has_interval and self.excludes(0.0):
            nearest = min(abs(self.low), abs(self.high))
            while digits < 8 and round(nearest, digits) == 0:
                digits += 1
        return digits


def number(value: float, digits: int = 3, *, signed: bool = False) -> str:
    """A number with a true minus sign and no zero before the point; an en dash where it is not defined."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}" if value is None or math.isnan(value) else ("∞" if value > 0 else f"{MINUS}∞")
    size = f"{abs(value):.{digits}f}"
    if size.startswith("0.") and digits:
        size = size[1:]
    zero = float(f"{abs(value):.{digits}f}") == 0
    sign = "" if zero else MINUS if value < 0 else "+" if signed else ""
    return sign + size


def count(n: float, singular: str, plural: str | None = None) -> str:
    """As in "1 image", "1,500 images"."""
    return f"{int(n):,} {singular if int(n) == 1 else plural or singular + 's'}"


def join(parts: Sequence[str]) -> str:
    """As in "a", "a and b", "a, b and c"."""
    items = list(parts)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def change(subject: str, measure: str, difference: Estimate, digits: int = 3) -> str:
    """What a condition does to a number, as a clause: raises, lowers, or not distinguishable from zero."""
    if not difference.defined:
        return f"the effect of {subject} on {measure} is not defined here"
    if not difference.has_interval:
        shown = number(difference.value, digits, signed=True)
        return f"{subject} changes {measure} by {shown}, with too few images for an interval"
    if difference.value == difference.low == difference.high == 0:
        return f"{subject} does not change {measure} at all"
    if not difference.direction:
        return f"the change of {measure} by {subject}, {difference.text(digits, signed=True)}, is not distinguishable from zero"
    verb = "raises" if difference.direction == "up" else "lowers"
    return f"{subject} {verb} {measure} {_amount(difference, digits)}"


def changes(effects: Sequence[tuple[str, Estimate]], measure: str, digits: int = 3) -> str:
    """What several conditions do to one number, as a clause: who lowers it, who raises it, of whom nothing can be said."""
    if len(effects) == 1:
        return change(effects[0][0], measure, effects[0][1], digits)
    clauses: list[str] = []
    for direction, verb in (("down", "lowers"), ("up", "raises")):
        group = [(name, one) for name, one in effects if one.direction == direction]
        if group:
            (name, first), rest = group[0], group[1:]
            parts = [f"{name} {verb} {measure} {_amount(first, digits)}"] + [
                f"{name} {_amount(one, digits)}" for name, one in rest
            ]
            clauses.append(join(parts))
    unclear = [
        f"{name} ({one.text(digits, signed=True)})" for name, one in effects if one.has_interval and not one.direction
    ]
    if unclear:
        clauses.append(f"for {join(unclear)} no change of {measure} is distinguishable from zero")
    unknown = [name for name, one in effects if not one.has_interval]
    if unknown:
        clauses.append(f"for {join(unknown)} there is no interval, so nothing can be said about {measure}")
    return "; ".join(clauses)


def _amount(difference: Estimate, digits: int) -> str:
    digits = difference.digits(digits)
    interval = f"[{number(difference.low, digits, signed=True)},{NBSP}{number(difference.high, digits, signed=True)}]"
    return f"by {number(abs(difference.value), digits)} {interval}"


def beyond_control(
    subject: str,
    control: str,
    measure: str,
    effect: Estimate,
    of_control: Estimate,
    direct: Estimate | None,
    digits: int = 3,
) -> str:
    """Whether the effect of a condition goes beyond that of its control, from the paired difference of the two.

    `effect` and `of_control` are differences to the reference, `direct` is condition minus control.
    """
    first = f"{change(control, measure, of_control, digits)}"
    if direct is None or not direct.defined:
        return (
            f"{first}; the two were not compared with each other, so nothing follows about what is special in {subject}"
        )
    if not direct.has_interval:
        return f"{first}; between the two there is no interval, so nothing follows about what is special in {subject}"
    shown = direct.text(digits, signed=True)
    if not direct.direction:
        return (
            f"{first}; the difference between the two, {shown}, is not distinguishable from zero: this run does not "
            f"show that {subject} does more to {measure} than {control}"
        )
    lower = direct.direction == "down"
    relation = "lower" if lower else "higher"
    sentence = f"{first}; with {subject} {measure} is {relation} than with {control}, {_amount(direct, digits)}"
    if effect.direction == direct.direction:
        return f"{sentence}: the effect of {subject} goes beyond this control"
    if of_control.direction == ("up" if lower else "down"):
        return f"{sentence}: the control is the one that moves {measure} {'up' if lower else 'down'} more"
    if not effect.direction:
        which = f"the effect of {subject} itself is not" if of_control.direction else "neither effect is"
        return f"{sentence}, although {which} distinguishable from zero"
    return sentence


def against_others(subject: str, measure: str, differences: Sequence[tuple[str, Estimate]], digits: int = 3) -> str:
    """A number of a condition minus that of several controls, and which of these differences exclude zero, as a clause."""
    known = [(name, one) for name, one in differences if one.has_interval]
    if not known:
        return ""
    shown = join([f"{one.text(digits, signed=True)} ({name})" for name, one in known])
    clear = [name for name, one in known if one.direction]
    if len(known) == 1:
        verdict = "distinguishable from zero" if clear else "not distinguishable from zero"
        return f"{measure} of {subject} minus that of another control is {shown}, {verdict}"
    if not clear:
        verdict = "none of these is distinguishable from zero"
    elif len(clear) == len(known):
        verdict = "all of these are distinguishable from zero"
    else:
        verdict = f"only the difference to {join(clear)} is distinguishable from zero"
    return f"{measure} of {subject} minus that of the other controls is {shown}: {verdict}"


def against_chance(
    subject: str, estimate: Estimate, chance: float, chance_name: str = "chance", digits: int = 3
) -> str:
    """Whether a number is above, below or not distinguishable from its value by chance, as a clause."""
    level = f"{chance_name} ({number(chance, digits)})"
    if not estimate.defined:
        return f"{subject} is not defined here"
    shown = estimate.text(digits)
    if not estimate.has_interval:
        return f"{subject} is {shown}, without an interval; {level} cannot be ruled out"
    if not estimate.excludes(chance):
        return f"{subject} is {shown}, not distinguishable from {level}"
    return f"{subject} is {shown}, {'above' if estimate.low > chance else 'below'} {level}"


def sentence(clause: str) -> str:
    """A clause as a sentence: first letter in upper case, full stop at the end. Names belong in quotation marks."""
    stripped = clause.strip()
    if not stripped:
        return ""
    stripped = stripped[0].upper() + stripped[1:]
    return stripped if stripped[-1] in ".!?" else stripped + "."


def _float(value: Any) -> float:
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        return math.nan
