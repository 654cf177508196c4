"""The experiments that come with slitlamp: each is right as far as can be seen without running it, and so are their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import interventions
from interventions import SubnetMask
from probes import Subnetworks, TruthfulDirection
from probes.truthful_file import TruthfulFile
from probes.wanda import load_masks
from slitlamp.errors import MissingModelError
from slitlamp.experiments import Experiment, load_dataset, read_config
from slitlamp.experiments.conditions import make_conditions
from slitlamp.experiments.places import data_folders
from slitlamp.experiments.probing import labels_of
from slitlamp.organism.training import TrainingConfig
from slitlamp.vlm import VLM

FOLDER = data_folders("experiments")[0]
MASKS = sorted((FOLDER / "masks").glob("*.safetensors"))


@pytest.fixture(scope="module")
def organism() -> VLM:
    return VLM.organism()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_fits_the_embedded_model(
    path: Path, organism: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, parameters, files and data sets; only the checkpoints of a training may be missing."""
    monkeypatch.chdir(tmp_path)
    made = Experiment.from_config(read_config(path), output=tmp_path / "run", folders=[FOLDER])
    missing = ""
    try:
        made.prepare()
    except MissingModelError as error:
        missing = str(error)
    assert not missing or "`slitlamp train-organism`" in missing
    for condition in make_conditions(made.conditions, made.controls):
        for one in condition.interventions:
            one.check(organism.anatomy)
    for probe in made.probes:
        probe.sites(organism.anatomy)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_treatment_is_without_a_control_unless_the_experiment_says_so(path: Path) -> None:
    made = Experiment.from_config(read_config(path), folders=[FOLDER])
    if made.controls is False:
        assert "controls: false" in path.read_text()
        return
    conditions = make_conditions(made.conditions, made.controls)
    controlled = {one.control_of for one in conditions}
    for one in conditions:
        if one.role == "treatment" and any(each.controls() for each in one.interventions):
            assert one.name in controlled


def test_the_checkpoints_are_those_that_a_training_leaves() -> None:
    config = TrainingConfig()
    steps = [*config.checkpoint_steps("joint"), config.joint_steps]
    models = read_config(FOLDER / "ima_fig7_checkpoints.yaml").models
    assert models is not None
    assert [one.id for one in models] == [*(f"runs/organism/checkpoints/step-{step:05d}" for step in steps), "organism"]


def test_masks_were_calibrated_on_other_images_than_they_are_measured_on() -> None:
    calibrated = {
        path
        for name, n_images in (("emoji_scenes/captions", 128), ("emoji_scenes/pope_random", 64))
        for path in load_dataset(name).images[-n_images:]
    }
    measured = Experiment.from_config(read_config(FOLDER / "ima_fig12_subnet.yaml"), folders=[FOLDER]).dataset
    assert len(calibrated) == 128
    assert all(calibrated.isdisjoint(data.images) for data in measured)  # type: ignore[union-attr]
    card = (FOLDER / "masks" / "README.md").read_text()
    assert '("emoji_scenes/captions", 128' in card
    assert '("emoji_scenes/pope_random", 64' in card


@pytest.mark.parametrize("path", MASKS, ids=lambda path: path.stem)
def test_masks_are_of_the_weights_that_the_embedded_model_activates(path: Path, organism: VLM) -> None:
    """Of eight captions' prompts alone, so not to the bit: the masks that four kinds of tokens share lie within those of two.

    The masks of a model trained anew would share with them what chance gives, the share that is kept.
    """
    sparsity = float(path.stem.removeprefix("alpha_"))
    SubnetMask(path, sparsity=sparsity).check(organism.anatomy)
    probe = Subnetworks()
    items = load_dataset("emoji_scenes/captions").items[-8:]
    batch = organism.encode(images=[one.image for one in items], prompts=[one.prompt for one in items])
    organism.measure(probe, batch)
    sets = [probe.token_set(kind) for kind in ("image", "text")]
    for key, mask in load_masks(path).items():
        found = torch.stack([one.masks(key, [sparsity])[0] for one in sets]).all(dim=0)
        assert found[mask].float().mean() > 0.85, key
        assert found.float().mean() < 1 - sparsity + 1e-6


def test_vectors_were_made_from_other_images_than_they_are_measured_on() -> None:
    made_from = set(load_dataset("emoji_scenes/captions").images[-128:])
    users = [path for path in FOLDER.glob("*.yaml") if "vectors/" in path.read_text()]
    assert users
    for path in users:
        measured = Experiment.from_config(read_config(path), folders=[FOLDER]).dataset
        assert all(made_from.isdisjoint(data.images) for data in measured)  # type: ignore[union-attr]
    assert "data.items[-128:]" in (FOLDER / "vectors" / "README.md").read_text()


def test_every_intervention_of_the_package_is_ranked() -> None:
    config = read_config(FOLDER / "interventions.yaml")
    ranked = [one.name for components in config.conditions.values() for one in components]
    assert set(ranked) == {name for name in interventions.__all__ if hasattr(getattr(interventions, name), "edits")}
    assert config.controls is True


DIRECTION = FOLDER / "directions" / "truthful_seed0.safetensors"


def test_the_direction_was_fitted_on_other_images_than_it_is_measured_on() -> None:
    fitted = set(load_dataset("emoji_scenes/captions").images[-128:])
    users = [path for path in FOLDER.glob("*.yaml") if "directions/" in path.read_text()]
    assert users
    for path in users:
        measured = Experiment.from_config(read_config(path), folders=[FOLDER]).dataset
        assert all(fitted.isdisjoint(data.images) for data in measured)  # type: ignore[union-attr]
    card = (FOLDER / "directions" / "README.md").read_text()
    assert "data.images[-128:]" in card
    assert "532 mentions, 125 of them" in card


def test_the_direction_scores_mentions_of_the_embedded_model_as_its_file_says(organism: VLM) -> None:
    """On 24 of its images: fitted scores are a little better than those out of fold in the file, and of the same size."""
    file, data = TruthfulFile.read(DIRECTION, "the file"), load_dataset("emoji_scenes/captions")
    detector, probe = file.detectors["probe"], TruthfulDirection(layers=[file.layer], anchors=False)
    items = [one for one in data.items if one.image in data.images[-24:]]
    written = organism.generate(data.encode(organism, items), max_new_tokens=64)
    labels = labels_of(written.texts, written.spans, data, items)
    organism.measure(probe, written.teacher_forced(), labels)
    scores = detector.score(probe.states(file.layer))
    true = torch.from_numpy(~probe.mentions()["hallucinated"].to_numpy())
    assert float(scores[true].mean()) < float(scores[~true].mean())
    assert abs(float(scores[true].mean() - detector.true_scores.mean())) < float(detector.true_scores.std()) / 2
    assert set(probe.mentions()["word"]) <= set(file.words)
    assert len(detector.true_scores) == 532 - 125
