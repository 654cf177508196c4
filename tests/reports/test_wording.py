from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

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

finite = st.floats(-1, 1, allow_nan=False)


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")


@pytest.mark.parametrize(
    ("value", "digits", "signed", "text"),
    [
        (0.2419, 3, False, ".242"),
        (-0.0314, 3, False, "-.031"),
        (0.0314, 3, True, "+.031"),
        (-0.0001, 3, True, ".000"),
        (0.0, 3, True, ".000"),
        (1.0, 3, False, "1.000"),
        (30.12, 1, False, "30.1"),
        (0.4, 0, False, "0"),
        (math.nan, 3, True, "–"),
        (-math.inf, 3, False, "-∞"),
    ],
)
def test_number(value: float, digits: int, signed: bool, text: str) -> None:
    assert plain(number(value, digits, signed=signed)) == text


@pytest.mark.parametrize(
    ("effect", "text"),
    [
        (Estimate(-0.031, -0.052, -0.010), "vhr lowers CHAIR_i by .031 [-.052, -.010]"),
        (Estimate(0.031, 0.010, 0.052), "vhr raises CHAIR_i by .031 [+.010, +.052]"),
        (
            Estimate(-0.007, -0.02, 0.01),
            "the change of CHAIR_i by vhr, -.007 [-.020, +.010], is not distinguishable from zero",
        ),
        (
            Estimate(0.02, 0.0, 0.04),
            "the change of CHAIR_i by vhr, +.020 [.000, +.040], is not distinguishable from zero",
        ),
        (Estimate(0.0, 0.0, 0.0), "vhr does not change CHAIR_i at all"),
        (Estimate(math.nan), "the effect of vhr on CHAIR_i is not defined here"),
        (Estimate(-0.031), "vhr changes CHAIR_i by -.031, with too few images for an interval"),
        # a bound that would be printed as zero gets more digits: it excludes zero
        (Estimate(0.0201, 0.0004, 0.04), "vhr raises CHAIR_i by .0201 [+.0004, +.0400]"),
    ],
)
def test_change(effect: Estimate, text: str) -> None:
    assert plain(change("vhr", "CHAIR_i", effect)) == text


@given(finite, st.floats(0, 0.5), st.floats(0, 0.5))
def test_change_agrees_with_its_interval(value: float, below: float, above: float) -> None:
    low, high = value - below, value + above
    text = change("x", "y", Estimate(value, low, high))
    assert ("raises" in text) == (low > 0)
    assert ("lowers" in text) == (high < 0)
    assert ("not distinguishable" in text) == (low <= 0 <= high and not value == low == high == 0)


EFFECT = Estimate(-0.031, -0.052, -0.010)


@pytest.mark.parametrize(
    ("of_control", "direct", "ending"),
    [
        (
            Estimate(-0.024, -0.045, -0.004),
            Estimate(-0.007, -0.02, 0.01),
            "C lowers m by .024 [-.045, -.004]; the difference between the two, -.007 [-.020, +.010], is not distinguishable "
            "from zero: this run does not show that T does more to m than C",
        ),
        (
            Estimate(0.002, -0.01, 0.012),
            Estimate(-0.033, -0.05, -0.02),
            "with T m is lower than with C, by .033 [-.050, -.020]: the effect of T goes beyond this control",
        ),
        (
            Estimate(-0.08, -0.1, -0.06),
            Estimate(0.049, 0.02, 0.07),
            "with T m is higher than with C, by .049 [+.020, +.070]: the control is the one that moves m down more",
        ),
        (
            Estimate(-0.024, -0.045, -0.004),
            None,
            "were not compared with each other, so nothing follows about what is special in T",
        ),
        (
            Estimate(-0.024),
            Estimate(-0.007),
            "between the two there is no interval, so nothing follows about what is special in T",
        ),
    ],
)
def test_beyond_control(of_control: Estimate, direct: Estimate | None, ending: str) -> None:
    assert plain(beyond_control("T", "C", "m", EFFECT, of_control, direct)).endswith(ending)


def test_an_effect_that_is_not_there_does_not_go_beyond_a_control() -> None:
    nothing = Estimate(0.001, -0.02, 0.02)
    text = beyond_control("T", "C", "m", nothing, Estimate(0.03, 0.01, 0.05), Estimate(-0.029, -0.05, -0.01))
    assert "goes beyond" not in text
    assert text.endswith("the control is the one that moves m up more")
    text = beyond_control("T", "C", "m", nothing, nothing, Estimate(-0.029, -0.05, -0.01))
    assert plain(text).endswith("by .029 [-.050, -.010], although neither effect is distinguishable from zero")
    text = beyond_control("T", "C", "m", nothing, EFFECT, Estimate(-0.029, -0.05, -0.01))
    assert text.endswith("although the effect of T itself is not distinguishable from zero")


def test_changes_group_conditions_by_what_can_be_said_of_them() -> None:
    effects = [
        ("a", Estimate(-0.046, -0.066, -0.026)),
        ("b", Estimate(0.02, 0.01, 0.03)),
        ("c", Estimate(-0.033, -0.053, -0.013)),
        ("d", Estimate(0.001, -0.01, 0.012)),
        ("e", Estimate(0.001)),
    ]
    assert plain(changes(effects, "m")) == (
        "a lowers m by .046 [-.066, -.026] and c by .033 [-.053, -.013]; b raises m by .020 [+.010, +.030]; "
        "for d (+.001 [-.010, +.012]) no change of m is distinguishable from zero; "
        "for e there is no interval, so nothing can be said about m"
    )
    assert changes(effects[:1], "m") == change("a", "m", effects[0][1])
    assert changes([], "m") == ""


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.8, 0.7, 0.9), "x is .800 [.700, .900], above chance (.500)"),
        (Estimate(0.3, 0.2, 0.4), "x is .300 [.200, .400], below chance (.500)"),
        (Estimate(0.52, 0.48, 0.56), "x is .520 [.480, .560], not distinguishable from chance (.500)"),
        (Estimate(0.52, 0.5, 0.56), "x is .520 [.500, .560], not distinguishable from chance (.500)"),
        (Estimate(math.nan), "x is not defined here"),
        (Estimate(0.9), "x is .900, without an interval; chance (.500) cannot be ruled out"),
    ],
)
def test_against_chance(estimate: Estimate, text: str) -> None:
    assert plain(against_chance("x", estimate, 0.5)) == text


def test_small_words() -> None:
    assert join([]) == ""
    assert join(["a"]) == "a"
    assert join(["a", "b", "c"]) == "a, b and c"
    assert count(1, "image") == "1 image"
    assert count(1500, "image") == "1,500 images"
    assert sentence("the image") == "The image."
    assert sentence("“vhr” lowers it") == "“vhr” lowers it."
    assert sentence("recall is not defined.") == "Recall is not defined."
    assert sentence("") == ""


def test_several_controls_in_one_clause() -> None:
    clear, unclear = Estimate(-0.03, -0.05, -0.01), Estimate(-0.01, -0.03, 0.01)
    both = "m of T minus that of the other controls is -.030 [-.050, -.010] (a) and -.010 [-.030, +.010] (b): "
    assert plain(against_others("T", "m", [("a", clear), ("b", unclear)])) == both + (
        "only the difference to a is distinguishable from zero"
    )
    assert against_others("T", "m", [("a", clear), ("b", clear)]).endswith("all of these are distinguishable from zero")
    assert against_others("T", "m", [("a", unclear), ("b", unclear)]).endswith(
        "none of these is distinguishable from zero"
    )
    assert plain(against_others("T", "m", [("a", unclear), ("b", Estimate(0.1))])) == (
        "m of T minus that of another control is -.010 [-.030, +.010] (a), not distinguishable from zero"
    )
    assert against_others("T", "m", []) == ""
