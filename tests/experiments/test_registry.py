from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from slitlamp.errors import InputError, UnknownNameError
from slitlamp.experiments import registry
from slitlamp.experiments.places import data_folders


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


@dataclasses.dataclass
class Filed:
    """A component that reads a file."""

    weights: str | Path | None = None
    more: Path | None = None
    name: str = "weights.bin"


def test_files_that_a_configuration_names_lie_in_its_folders(tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    for folder in (near, far):
        folder.mkdir()
        (folder / "weights.bin").touch()

    def build(**parameters: str | None) -> Any:
        return registry.build("probe", "Filed", Filed, parameters, [near])

    made = build(weights="weights.bin", more=None, name="weights.bin")
    assert made == Filed(weights=near / "weights.bin", name="weights.bin")
    assert list(registry.files_of(made)) == [near / "weights.bin"]
    for key in ("weights", "more"):
        for outside in ("../far/weights.bin", str(far / "weights.bin")):
            with pytest.raises(InputError, match=f"probe Filed, {key}: .* lies outside the folders"):
                build(**{key: outside})
        with pytest.raises(InputError, match=f"probe Filed, {key}: no such file: .*none.bin"):
            build(**{key: "none.bin"})
    assert (
        registry.build("probe", "Filed", Filed, {"weights": "none.bin"}).weights == "none.bin"
    )  # from Python: as given


def test_files_are_recorded_as_seen_from_where_they_are_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder of this machine goes into a run's configuration where it need not."""
    (shipped,) = data_folders("experiments")[:1]
    monkeypatch.chdir(tmp_path)
    for path, expected in (
        (shipped / "masks" / "one.safetensors", "masks/one.safetensors"),
        (tmp_path / "own" / "two.safetensors", "own/two.safetensors"),
        (tmp_path.parent / "three.safetensors", str(tmp_path.parent / "three.safetensors")),
    ):
        assert registry.describe(Filed(weights=path))["Filed"]["weights"] == expected


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
