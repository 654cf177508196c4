"""Probes in a run: their states can be had again, their findings are intervened on, and several models are compared."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from probes import HeadDivergence
from slitlamp.decoding.edits import scale_heads
from slitlamp.errors import InputError, RunFolderError, UnknownNameError
from slitlamp.experiments import Dataset, Experiment, Run, labelled_batches, pope_dataset
from slitlamp.experiments.config import ModelConfig
from slitlamp.experiments.publish import publish
from slitlamp.experiments.summary import summary
from slitlamp.models import Anatomy
from slitlamp.tracing import CausalTarget, Probe, ProbeResult
from slitlamp.tracing.trace import Source


class Pointing(HeadDivergence):
    """A probe that points at a head, compares its parts and asks for its model."""

    name: ClassVar[str] = "pointing"
    __hash__ = None  # type: ignore[assignment]

    def causal_targets(self, anatomy: Anatomy) -> list[CausalTarget]:
        return [
            CausalTarget("head 0.0", lambda batch: scale_heads([(0, 0)]), (lambda batch: scale_heads([(1, 1)]),), "1.1")
        ]

    @classmethod
    def compare(cls, parts: Any, scores: pd.DataFrame | None = None) -> ProbeResult:
        assert scores is not None
        rows = [(*part, probe.result().tables["heads"]["vhd"].mean()) for part, probe in parts.items()]
        table = pd.DataFrame(rows, columns=["model", "condition", "dataset", "vhd"])
        return ProbeResult("pointing", {"means": table}, f"{len(rows)} parts, {scores['model'].nunique()} models")


def experiment(model: Any, data: list[Dataset], output: Path, probe: Probe, **options: Any) -> Experiment:
    settings = {"max_new_tokens": {"captions": 6, "pope": 2}, "batch_size": 3, "n_resamples": 100, "progress": False}
    return Experiment(model=model, dataset=data, output=output, probes=[probe], **{**settings, **options})


@pytest.fixture(scope="module")
def run(vlm: Any, captions: Dataset, pope: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    names = [captions.name, pope.name]
    folder = tmp_path_factory.mktemp("probing") / "run"
    return experiment(vlm, [captions, pope], folder, Pointing(n_resamples=50), probe_datasets=names, causal=True).run()


def test_tables_of_both_data_sets_and_their_comparison(run: Run, captions: Dataset, pope: Dataset) -> None:
    heads = run.table("pointing_heads")
    assert list(heads["dataset"].unique()) == [captions.name, pope.name]
    means = run.table("pointing_compare_means").set_index("dataset")["vhd"]
    for name, rows in heads.groupby("dataset"):
        assert means[name] == pytest.approx(rows["vhd"].mean())
    assert run.table("pointing_compare_summary")["summary"].tolist() == ["2 parts, 1 models"]
    assert "pointing: 2 parts, 1 models" in summary(run)


def test_the_finding_is_intervened_on(run: Run, captions: Dataset) -> None:
    table = run.table("pointing_causal")
    assert set(table["target"]) == {"head 0.0"}
    assert set(table["dataset"]) == {captions.name}
    assert (table.loc[table["outcome"] == "kl", "effect"] > 0).all()
    said = run.table("pointing_summary")["summary"]
    assert "Causal check: Head 0.0: the next token changes by" in said[0]
    assert "Causal check" not in said[1]


def test_texts_of_a_saved_run_and_own_texts_are_taken_in_as_the_run_took_them(
    run: Run, vlm: Any, captions: Dataset
) -> None:
    """The same states and labels from the predictions on disk; from the texts alone, as this model's tokens of them."""
    probes = {name: Pointing(n_resamples=50) for name in ("tokens", "text", "backwards")}
    rows = run.predictions.drop(columns="condition")
    given = {"tokens": rows, "text": rows[["dataset", "item", "text"]], "backwards": rows.iloc[::-1]}
    for name, probe in probes.items():
        for batch, labels in labelled_batches(vlm, captions, given[name], batch_size=3):
            vlm.measure(probe, batch, labels)
    expected = run.table("pointing_heads").query("dataset == @captions.name")["vhd"].to_numpy()
    for name in ("tokens", "backwards"):  # the order is that of the data set
        found = probes[name].result().tables["heads"]["vhd"].to_numpy()
        assert found == pytest.approx(expected, rel=1e-5)
    generation = vlm.generate(captions.encode(vlm), max_new_tokens=4)
    plain = pd.DataFrame({"item": generation.batch.ids, "tokens": list(generation.tokens)})
    (one,), (other,) = (list(labelled_batches(vlm, captions, given, batch_size=64)) for given in (generation, plain))
    assert torch.equal(one[0].input_ids, other[0].input_ids)
    assert all(a.equals(b) for a, b in zip(one[1], other[1], strict=True))
    said = f"a picture with a {sorted(captions.truth.objects[captions.items[0].image_id])[0]} and a cat ."
    own = pd.DataFrame({"item": [captions.items[0].id], "text": [said]})
    ((batch, (table,)),) = labelled_batches(vlm, captions, own)
    assert table is not None
    assert "object" in set(table["label"])
    assert "".join(table["word"]) == said.replace(" ", "")
    assert batch.n_generated == (len(table),)
    with pytest.raises(InputError, match="no token for"):
        next(labelled_batches(vlm, captions, own.assign(text="a picture with a hedgehog .")))


def test_captions_and_questions_about_an_image_are_of_one_group(vlm: Any, captions: Dataset, data_folder: Path) -> None:
    """Captions know an image by its id, questions by its file: what is held out of one must be held out of the other."""
    truth = {"instances": data_folder / "instances.json", "synonyms": data_folder / "synonyms.txt"}
    questions = pope_dataset(data_folder / "pope.jsonl", data_folder / "images", name="q", **truth)
    groups = [data.encode(vlm, data.items).groups for data in (captions, questions)]
    assert list(dict.fromkeys(groups[1])) == list(groups[0])
    bare = pope_dataset(data_folder / "pope.jsonl", data_folder / "images", name="q")
    assert bare.encode(vlm, bare.items).groups[0] == bare.items[0].image.name


def test_texts_that_cannot_be_placed_are_refused(run: Run, vlm: Any, captions: Dataset) -> None:
    rows = run.predictions.query("dataset == @captions.name")
    for given, match in (
        (rows.drop(columns="item"), "columns item, and tokens or text"),
        (rows.assign(item="nobody"), "nobody"),
        (rows.assign(item=rows["item"].iloc[0]), "repeated"),
        (rows.assign(dataset="other"), "0 rows"),
        (rows.assign(condition=[f"c{one}" for one in range(len(rows))]), "several conditions"),
    ):
        with pytest.raises(InputError, match=match):
            next(labelled_batches(vlm, captions, given))


def test_a_probe_of_the_run_gives_the_same_tables_again(
    vlm: Any, captions: Dataset, pope: Dataset, tmp_path: Path
) -> None:
    names = [captions.name, pope.name]
    probe = HeadDivergence(n_resamples=50, top_k=(1, 2))
    run = experiment(vlm, [captions, pope], tmp_path / "run", probe, probe_datasets=names).run()
    again = run.probe("head_divergence", dataset=pope.name)
    assert list(again.top_k) == [1, 2]
    heads = run.table("head_divergence_heads")
    own = heads[heads["dataset"] == pope.name].drop(columns=["condition", "dataset"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(again.result().tables["heads"], own)
    with pytest.raises(UnknownNameError, match="head_divergence"):
        run.probe("head_divergance")
    with pytest.raises(UnknownNameError, match="scenes"):
        run.probe("head_divergence", dataset="elsewhere")


def test_a_probe_that_asks_for_its_model_gets_it(vlm: Any, captions: Dataset, tmp_path: Path) -> None:
    seen: list[Source] = []

    from dataclasses import dataclass, field

    @dataclass
    class Asking(HeadDivergence):
        source_: Source | None = field(default=None, init=False, repr=False, compare=False)
        name: ClassVar[str] = "asking"

        def result(self) -> ProbeResult:
            assert self.source_ is not None
            seen.append(self.source_)
            return super().result()

    experiment(vlm, [captions], tmp_path / "run", Asking(n_resamples=50)).run()
    assert seen[0].model is vlm.model


@pytest.fixture(scope="module")
def other_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights."""
    folder = tmp_path_factory.mktemp("other") / "other"
    shutil.copytree(model_folder, folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def test_several_models_are_run_and_put_together(
    model_folder: Path, other_folder: Path, captions: Dataset, tmp_path: Path
) -> None:
    models = [str(model_folder), str(other_folder)]
    make = lambda: experiment(models, [captions], tmp_path / "run", HeadDivergence(n_resamples=50))  # noqa: E731
    run = make().run()
    names = [model_folder.name, "other"]
    assert run.finished
    assert list(run.table("scores")["model"].unique()) == names
    heads = run.table("head_divergence_heads")
    for name in names:
        own = Run(tmp_path / "run" / "models" / name)
        pd.testing.assert_frame_equal(
            heads[heads["model"] == name].drop(columns="model").reset_index(drop=True),
            own.table("head_divergence_heads"),
        )
    hashes = {one["weights_hash"] for one in run.environment["models"].values()}
    assert len(hashes) == 2
    before = (tmp_path / "run" / "tables" / "scores.parquet").read_bytes()
    make().run()  # a finished run is not done again
    assert (tmp_path / "run" / "tables" / "scores.parquet").read_bytes() == before
    assert any("head_divergence:" in line for line in summary(run))
    run.report()
    assert " s on cpu, seed 0." in (publish(run, tmp_path / "results") / "README.md").read_text()
    with pytest.raises(RunFolderError, match="models"):
        experiment(models[::-1], [captions], tmp_path / "run", HeadDivergence(n_resamples=50)).run()


def test_models_are_named_by_what_tells_them_apart() -> None:
    from slitlamp.experiments.across import model_names

    def named(*ids: str) -> list[str]:
        return model_names([ModelConfig(id=one) for one in ids])

    assert named("organism", "organism/seed1") == ["organism", "seed1"]
    assert named("a/x/final", "a/y/final") == ["x/final", "y/final"]
    with pytest.raises(InputError, match="same model twice"):
        named("a/x", "a/x")


def test_lists_of_models_that_cannot_run_are_refused_before_anything_is_loaded(
    captions: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="empty"):
        experiment([], [captions], tmp_path / "a", HeadDivergence()).run()
    with pytest.raises(InputError, match="train-organism"):
        experiment(["organism", "runs/organism/checkpoints/step-1"], [captions], tmp_path / "b", HeadDivergence()).run()
    with pytest.raises(InputError, match="showcase"):
        experiment(["organism", "organism/seed1"], [captions], tmp_path / "c", HeadDivergence(), showcase=True).run()
    assert not any(tmp_path.iterdir())


def test_a_small_copy_of_a_run_is_published(vlm: Any, captions: Dataset, tmp_path: Path) -> None:
    run = experiment(vlm, [captions], tmp_path / "mine", HeadDivergence(n_resamples=50)).run()
    with pytest.raises(RunFolderError, match="slitlamp report"):
        publish(run, tmp_path / "results")
    run.report()
    target = publish(run, tmp_path / "results")
    assert target == tmp_path / "results" / "mine"
    heads = pd.read_csv(target / "tables" / "head_divergence_heads.csv")
    assert heads["vhd"].to_numpy() == pytest.approx(run.table("head_divergence_heads")["vhd"].to_numpy(), rel=1e-5)
    assert (target / "head_divergence.png").stat().st_size < (
        run.folder / "figures" / "head_divergence.png"
    ).stat().st_size
    page, index = (one.read_text() for one in (target / "README.md", tmp_path / "results" / "README.md"))
    for line in summary(run):
        assert line in re.sub(r"\\(.)", r"\1", page)
    assert "(head_divergence.png)" in page
    assert "(mine/README.md)" in index
    first = {path.name: path.read_bytes() for path in target.rglob("*.*") if path.is_file()}
    publish(run, tmp_path / "results")
    assert {path.name: path.read_bytes() for path in target.rglob("*.*") if path.is_file()} == first
