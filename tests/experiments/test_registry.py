from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Literal

import numpy as np
import pytest

from slitlamp.errors import InputError, UnknownNameError
from slitlamp.experiments import registry


@dataclasses.dataclass
class Planted:
    """A probe with parameters of every kind that YAML can hold."""

    alpha: float = 1.0
    layers: Sequence[int] | None = None
    select: Literal["a", "b"] = "a"
    top_k: tuple[int, ...] = (1, 2)
    flag: bool = True
    hidden: int = dataclasses.field(default=0, init=False)


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> list[metadata.EntryPoint]:
    found = [metadata.EntryPoint("Planted", f"{__name__}:Planted", "slitlamp.probes")]
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [p for p in found if p.group == group])
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda self: {"Planted": Planted, "NotOne": print}[self.name])
    return found


def test_create_checks_and_converts_parameters(points: list[metadata.EntryPoint]) -> None:
    made = registry.create("probe", "Planted", {"alpha": 2, "layers": [1, 2], "top_k": [1, 4], "select": "b"})
    assert made == Planted(alpha=2.0, layers=[1, 2], top_k=(1, 4), select="b")
    assert registry.names("probe") == ["Planted"]
    assert registry.names("intervention") == []


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alfa": 2}, "unknown parameter of the probe Planted: 'alfa'; did you mean 'alpha'"),
        ({"hidden": 2}, "unknown parameter"),
        ({"alpha": "much"}, "parameter 'alpha': .*number.*found 'much'"),
        ({"select": "c"}, "parameter 'select': .*'a' or 'b'; found 'c'"),
        ({"layers": [1, "x"]}, "parameter 'layers'"),
    ],
)
def test_wrong_parameters(points: list[metadata.EntryPoint], parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        registry.create("probe", "Planted", parameters)


def test_unknown_names_and_things_that_are_no_probe(points: list[metadata.EntryPoint]) -> None:
    with pytest.raises(UnknownNameError, match="unknown probe 'Plantd'; did you mean 'Planted'"):
        registry.find("probe", "Plantd")
    points.append(metadata.EntryPoint("NotOne", "builtins:print", "slitlamp.probes"))
    with pytest.raises(InputError, match="is not a dataclass"):
        registry.find("probe", "NotOne")


def test_two_packages_with_one_name(points: list[metadata.EntryPoint]) -> None:
    points.append(points[0])  # the same entry seen twice (two copies of the metadata) is no conflict
    assert registry.names("probe") == ["Planted"]
    points.append(metadata.EntryPoint("Planted", "elsewhere:Planted", "slitlamp.probes"))
    with pytest.raises(InputError, match="two packages provide a probe named 'Planted'"):
        registry.names("probe")


def test_describe_is_the_inverse_of_build() -> None:
    one = Planted(alpha=0.1, layers=[3], top_k=(8,))
    ((name, parameters),) = registry.describe(one).items()
    assert parameters == {"alpha": 0.1, "layers": [3], "select": "a", "top_k": [8], "flag": True}
    assert registry.build("probe", name, Planted, parameters) == one
    assert registry.describe(Planted(layers=np.array([1, 2])))["Planted"]["layers"] == [1, 2]  # type: ignore[arg-type]
