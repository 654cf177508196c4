"""What is wrong is said before the model is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from interventions import HeadReinforcement, SubnetMask
from probes import HeadDivergence
from slitlamp.errors import InputError, SlitlampError
from slitlamp.experiments import Dataset, Experiment, runner
from slitlamp.experiments.config import parse_config
from slitlamp.experiments.yaml_file import YamlFile


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""

    def refuse(*_: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(runner, "load_model", refuse)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": []}, "at least one data set"),
        ({"dataset": "emoji_scenes/captons"}, "unknown data set 'emoji_scenes/captons'; did you mean"),
        ({"conditions": {}}, "at least one condition"),
        ({"conditions": {"base": ["x"]}}, "condition 'base': expected an intervention, found 'x'"),
        ({"conditions": {"base": [HeadDivergence()]}}, "expected an intervention"),
        ({"probes": [HeadReinforcement()]}, "expected a probe"),
        ({"probe_conditions": ["bse"]}, "unknown condition in 'probe_conditions' 'bse'; did you mean 'base'"),
        ({"probe_datasets": ["x"]}, "unknown data set in 'probe_datasets'"),
        ({"comparisons": [("base", "x")]}, "unknown condition in 'comparisons'"),
        ({"controls": ["weird"]}, "no intervention declares controls"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"max_new_tokens": {"captions": 0}}, "max_new_tokens must be 1 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"generation": {"temprature": 1.0}}, "unknown generation option 'temprature'; did you mean 'temperature'"),
        ({"generation": {"seed": 1}}, "'seed' is set by the experiment"),
        ({"showcase": ["99"]}, "unknown caption item in 'showcase'"),
        ({"model": "organism/seed9"}, "no embedded model of seed 9"),
    ],
)
def test_wrong_settings(change: dict[str, Any], message: str, captions: Dataset, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": "some/model", "dataset": captions, "conditions": {"base": []}, **change}
    with pytest.raises(InputError, match=message):
        Experiment(**settings, output=tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_images_prompts_and_folders(captions: Dataset, pope: Dataset, tmp_path: Path) -> None:
    missing = replace(captions.items[1], image=tmp_path / "none.png")
    silent = replace(captions.items[1], prompt="")
    (tmp_path / "file").touch()
    (tmp_path / "model").mkdir()
    for settings, message in [
        ({"dataset": replace(captions, items=(missing,))}, "no such image"),
        ({"dataset": replace(captions, items=(silent,))}, "the prompt is empty"),
        ({"dataset": [captions, captions]}, "two data sets are called 'scenes/captions'"),
        ({"dataset": pope, "showcase": True}, "no data set of this experiment asks for captions"),
        ({"dataset": pope, "output": tmp_path / "file"}, "is a file"),
        ({"dataset": pope, "model": str(tmp_path / "model")}, r"it has no config\.json"),
    ]:
        with pytest.raises(SlitlampError, match=message):
            Experiment(**{"model": "some/model", "output": tmp_path / "run", **settings}).run()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: [emoji_scenes/caption]", "did you mean 'emoji_scenes/captions'"),
        (
            "datasets: [emoji_scenes/captions]\nprobes: [HeadDivergense]",
            "unknown probe 'HeadDivergense'; did you mean 'HeadDivergence'",
        ),
        (
            "datasets: [emoji_scenes/captions]\nconditions: {b: [{HeadReinforcement: {alfa: 1}}]}",
            "'alfa'; did you mean 'alpha'",
        ),
        (
            "datasets: [emoji_scenes/captions]\nconditions: {b: [{HeadReinforcement: {alpha: big}}]}",
            "parameter 'alpha': .*found 'big'",
        ),
        ("datasets: [{name: mine, task: pope, questions: q.jsonl, images: images}]", "'mine', questions: no such file"),
        (
            "datasets: [{name: mine, task: pope, questions: ../q.jsonl, images: images}]",
            "'mine', questions: .* lies outside",
        ),
        (
            "datasets: [emoji_scenes/captions]\nconditions: {b: [{SubnetMask: {masks: ../alpha.safetensors}}]}",
            r"intervention SubnetMask, masks: \.\./alpha\.safetensors lies outside",
        ),
        (
            "datasets: [emoji_scenes/captions]\nconditions: {b: [{SubnetMask: {masks: alpha.safetensors}}]}",
            r"intervention SubnetMask, masks: no such file: .*alpha\.safetensors",
        ),
    ],
)
def test_wrong_configurations(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        Experiment.from_config(parse_config(YamlFile.parse(text)), output=tmp_path / "run", folders=[tmp_path])


def test_a_file_of_an_intervention_is_part_of_what_a_run_is(captions: Dataset, tmp_path: Path) -> None:
    """A run does not go on with other masks under the same name."""
    path = tmp_path / "alpha.safetensors"
    found = []
    for content in (b"one", b"two", b"one"):
        path.write_bytes(content)
        experiment = Experiment(
            "some/model", captions, {"base": [], "masked": [SubnetMask(path)]}, output=tmp_path / "run"
        )
        found.append(experiment.check().fingerprints())
    assert found[0] == found[2] != found[1]
    assert found[0].keys() == {captions.name, str(path)}
    assert found[0][captions.name] == found[1][captions.name]


def test_take_of_the_experiment_and_of_a_data_set_both_hold() -> None:
    text = "take: 3\ndatasets: [emoji_scenes/captions, {name: emoji_scenes/pope_random, take: 2}]"
    made = Experiment.from_config(parse_config(YamlFile.parse(text)))
    assert [len(data.images) for data in made.dataset] == [3, 2]  # type: ignore[union-attr, arg-type]
