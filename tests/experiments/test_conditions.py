from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest

from slitlamp.decoding import Intervention
from slitlamp.errors import InputError
from slitlamp.experiments.conditions import condition_table, make_comparisons, make_conditions


@dataclass
class Push(Intervention):
    """Does nothing, and has two controls."""

    strength: float = 1.0
    seen_: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    name: ClassVar[str] = "Push"
    kind: ClassVar[Any] = "blocks"

    def edits(self, run: Any) -> list[Any]:
        return []

    def controls(self) -> dict[str, Intervention]:
        return {"weak": replace(self, strength=0.1), "none": replace(self, strength=0.0)}


@dataclass
class Plain(Intervention):
    """Does nothing, and has no controls."""

    name: ClassVar[str] = "Plain"
    kind: ClassVar[Any] = "logits"

    def edits(self, run: Any) -> list[Any]:
        return []


def test_controls_follow_their_treatment_and_replace_one_intervention() -> None:
    made = make_conditions({"base": [], "push": [Push(2.0), Plain()], "plain": [Plain()]}, controls=True)
    assert [(one.name, one.role, one.control_of) for one in made] == [
        ("base", "reference", None),
        ("push", "treatment", None),
        ("push_weak", "control", "push"),
        ("push_none", "control", "push"),
        ("plain", "treatment", None),
    ]
    assert made[2].interventions == (Push(0.1), Plain())
    assert [one.name for one in make_conditions({"base": [], "push": [Push()]}, controls=["none"])] == [
        "base",
        "push",
        "push_none",
    ]
    assert [one.name for one in make_conditions({"base": [], "push": [Push()]}, controls=False)] == ["base", "push"]


def test_controls_run_unless_they_are_said_not_to(caplog: pytest.LogCaptureFixture) -> None:
    assert [one.name for one in make_conditions({"base": [], "push": [Push()]})][1:] == [
        "push",
        "push_weak",
        "push_none",
    ]
    assert not caplog.records


def test_a_treatment_whose_controls_a_list_leaves_out_is_named(caplog: pytest.LogCaptureFixture) -> None:
    @dataclass
    class Pull(Push):
        def controls(self) -> dict[str, Intervention]:
            return {"other": Plain()}

    make_conditions({"base": [], "push": [Push()], "pull": [Pull()], "plain": [Plain()]}, controls=["weak"])
    (record,) = caplog.records
    assert "the treatment 'pull' runs without a control: it declares other" in record.getMessage()


def test_pairs_put_two_treatments_together_in_their_order_without_controls() -> None:
    given: dict[str, list[Intervention]] = {"base": [], "a": [Push(2.0)], "b": [Plain()], "c": [Push(3.0), Plain()]}
    made = make_conditions(given, controls=["weak"], pairs=True)
    assert [one.name for one in made] == ["base", "a", "a_weak", "b", "c", "c_weak", "a+b", "a+c", "b+c"]
    pairs = made[-3:]
    assert {one.role for one in pairs} == {"pair"}
    assert [one.pair_of for one in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs[1].interventions == (Push(2.0), Push(3.0), Plain())
    assert not any(one.control_of for one in pairs)
    some = make_conditions(given, controls=False, pairs=["c", "a"])
    assert [one.name for one in some if one.role == "pair"] == ["a+c"]
    assert [pair for pair in make_comparisons(made) if "a+b" in pair] == [("a+b", "base")]


@pytest.mark.parametrize(
    ("names", "pairs", "message"),
    [
        (["base", "a"], True, "'pairs' needs at least two treatments; found 1"),
        (["base", "a", "b"], ["a"], "'pairs' needs at least two treatments; found 1"),
        (["base", "a", "b"], [], "'pairs' needs at least two treatments; found 0"),
        (["base", "long", "b"], ["lnog"], "unknown treatment in 'pairs' 'lnog'; did you mean 'long'"),
        (["base", "a", "b"], ["base", "a"], "unknown treatment in 'pairs' 'base'"),
        (["base", "a", "b", "a+b"], True, r"two conditions are called 'a\+b'"),
    ],
)
def test_wrong_pairs(names: list[str], pairs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_conditions({name: [Plain()] for name in names}, pairs=pairs)


def test_two_interventions_with_the_same_controls_get_names_of_their_own() -> None:
    made = make_conditions({"base": [], "both": [Push(2.0), Push(3.0)]}, controls=True)
    assert [one.name for one in made][2:] == [
        "both_Push1_weak",
        "both_Push1_none",
        "both_Push2_weak",
        "both_Push2_none",
    ]
    assert made[4].interventions == (Push(2.0), Push(0.1))


@pytest.mark.parametrize(
    ("given", "controls", "message"),
    [
        ({}, False, "at least one condition"),
        ({"a b": []}, False, "condition 'a b'"),
        ({"../x": []}, False, "condition '../x'"),
        ({"base": [], "push": [Push()]}, ["weka"], "unknown control 'weka'; did you mean 'weak'"),
        ({"base": [], "plain": [Plain()]}, ["weak"], "no intervention declares controls"),
        ({"base": [], "push": [Push()], "push_weak": []}, True, "two conditions are called 'push_weak'"),
    ],
)
def test_wrong_conditions(given: dict[str, list[Intervention]], controls: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_conditions(given, controls)


def test_all_against_the_first_and_treatments_against_their_controls() -> None:
    made = make_conditions({"base": [], "push": [Push()]}, controls=True)
    pairs = make_comparisons(made, [("push_weak", "push_none"), ("push", "base")])
    assert pairs == [
        ("push", "base"),
        ("push_weak", "base"),
        ("push_none", "base"),
        ("push", "push_weak"),
        ("push", "push_none"),
        ("push_weak", "push_none"),
    ]
    with pytest.raises(InputError, match="unknown condition in 'comparisons' 'psh'; did you mean 'push'"):
        make_comparisons(made, [("psh", "base")])
    with pytest.raises(InputError, match="with itself"):
        make_comparisons(made, [("push", "push")])


def test_the_description_does_not_depend_on_earlier_runs() -> None:
    used = Push()
    before = condition_table(make_conditions({"base": [], "push": [used]}))
    used.seen_.append(1)
    after = condition_table(make_conditions({"base": [], "push": [used]}))
    assert before.equals(after)
    assert before["description"][0] == "the model as it is"
