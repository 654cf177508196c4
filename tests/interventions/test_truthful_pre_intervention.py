"""TruthfulPreIntervention: its file, its thresholds, which steps it looks at, its controls, and a planted hallucination."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import slitlamp
from interventions import TruthfulPreIntervention
from interventions.truthful_pre_intervention import sentence_end, word_beginnings
from probes import TruthfulDirection
from probes.truthful_file import N_RANDOM, Detector, TruthfulFile
from slitlamp.errors import InputError, UnknownNameError
from slitlamp.evaluation.operating_points import threshold_at_fpr
from slitlamp.experiments.places import data_folders
from slitlamp.experiments.probing import labels_of
from slitlamp.models import Batch
from slitlamp.vlm import VLM

PLANTED = "person"
SHIPPED = data_folders("experiments")[0] / "directions" / "truthful_seed0.safetensors"


@pytest.fixture(scope="module")
def data() -> Any:
    return slitlamp.load_dataset("emoji_scenes/captions")


@pytest.fixture(scope="module")
def fitted(organism: VLM, data: Any) -> TruthfulDirection:
    """A planted truth: of everything that is named in the last 96 images, persons are hallucinations, and nothing else."""
    probe = TruthfulDirection(layers=[2, 3], anchors=False, n_folds=3, strengths=[1.0, 0.01], n_resamples=50)
    items = data.items[-96:]
    written = organism.generate(data.encode(organism, items), max_new_tokens=48)
    labels = labels_of(written.texts, written.spans, data, items)
    for table in labels:
        named = table["category"].notna()
        table.loc[named, "label"] = np.where(table.loc[named, "category"] == PLANTED, "hallucinated", "object")
    organism.measure(probe, written.teacher_forced(), labels)
    return probe


@pytest.fixture(scope="module")
def path(fitted: TruthfulDirection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted.save(tmp_path_factory.mktemp("direction") / "planted.safetensors")


@pytest.fixture(scope="module")
def batch(organism: VLM, data: Any) -> Batch:
    """Of other images, in some of whose captions there are persons."""
    return data.encode(organism, data.items[:48])


# -- the file -------------------------------------------------------------------------------------------------------


def test_the_file_holds_what_the_probe_says(fitted: TruthfulDirection, path: Path) -> None:
    file, layer = TruthfulFile.read(path, "it"), fitted.best_layer()
    assert file.layer == layer
    assert set(file.detectors) == {"probe", "shuffled", "random", *(f"random {n}" for n in range(1, N_RANDOM))}
    states = fitted.states(layer)
    torch.testing.assert_close(file.detectors["probe"].score(states), fitted.score(states), rtol=1e-5, atol=1e-5)
    mentions = fitted.mentions()
    true = ~mentions["hallucinated"].to_numpy()
    torch.testing.assert_close(
        file.detectors["probe"].true_scores, torch.from_numpy(fitted.fits().own_scores(layer)[true]).float()
    )
    assert set(file.words) == set(mentions["word"])
    for name in ("random", "random 3"):
        one = file.detectors[name]
        torch.testing.assert_close(one.true_scores, one.score(states[torch.from_numpy(true)]), rtol=1e-4, atol=1e-4)
    assert not torch.equal(file.detectors["random"].direction, file.detectors["random 3"].direction)
    with safe_open(path, framework="pt") as raw:
        assert raw.metadata()["method"] == "logistic"
    tensors = load_file(path)
    assert len(tensors["hallucinated_scores"]) + len(tensors["true_scores"]) == len(mentions)


def test_shuffled_labels_know_nothing(fitted: TruthfulDirection, path: Path) -> None:
    """Of what the true labels tell apart almost without error, they tell next to nothing."""
    label, states = fitted.mentions()["hallucinated"].to_numpy(), fitted.states(fitted.best_layer())
    auroc = {}
    for name, one in TruthfulFile.read(path, "it").detectors.items():
        scores = one.score(states).numpy()
        auroc[name] = float((scores[label][:, None] > scores[~label][None]).mean())
    assert auroc["probe"] > 0.95
    assert abs(auroc["shuffled"] - 0.5) < 0.35


def test_another_layer_and_method(fitted: TruthfulDirection, tmp_path: Path) -> None:
    other = 2 if fitted.best_layer("difference_of_means") == 3 else 3
    file = TruthfulFile.read(fitted.save(tmp_path / "a", other, "difference_of_means"), "it")
    assert file.layer == other
    assert torch.equal(file.detectors["probe"].direction, fitted.direction(other, "difference_of_means")[0])
    with pytest.raises(InputError, match="a perceptron has no direction"):
        fitted.save(tmp_path / "b", method="mlp")
    with pytest.raises(InputError, match="position='before', found 'at'"):
        TruthfulDirection(position="at").save(tmp_path / "c")


@pytest.mark.parametrize("fpr", [0.001, 0.01, 0.07, 0.29, 0.5, 0.999])
def test_thresholds_are_those_of_the_evaluation(fpr: float) -> None:
    rng = np.random.default_rng(0)
    for n in (100, 37):
        true = rng.normal(size=n).round(1)  # with ties
        score, positive = np.concatenate([true, [9.0]]), np.arange(n + 1) == n
        wanted = threshold_at_fpr(score, positive, np.arange(n + 1), fpr, n_resamples=1).value
        found = Detector(torch.zeros(2), 0.0, torch.from_numpy(true)).threshold(fpr)
        assert found == wanted
        assert (true > found).mean() <= fpr


def test_the_ends_of_the_thresholds() -> None:
    one = Detector(torch.zeros(2), 0.0, torch.tensor([3.0, 1.0, 2.0]))
    assert one.threshold(0.0) == np.inf
    assert one.threshold(0.01) == 3.0
    assert one.threshold(0.34) == 2.0
    assert one.threshold(1.0) == -np.inf


# -- which steps ----------------------------------------------------------------------------------------------------


def test_words_begin_where_a_word_does(organism: VLM, llava: VLM) -> None:
    tokenizer = organism.tokenizer
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("a", "dog", "hot dog", "traffic light", "tv")}
    begins = word_beginnings(tokenizer, ["dog", "traffic light", "unheard-of"], "it")
    assert [word for word, token in ids.items() if begins([ids["a"]], token)] == ["dog", "traffic light"]
    assert begins([], ids["dog"])
    ends = sentence_end(tokenizer)
    assert [tokenizer.decode([token]) for token in range(126) if ends(token)] == [".", "?"]
    with pytest.raises(InputError, match="knows none of the words unheard-of"):
        word_beginnings(tokenizer, ["unheard-of"], "it")


class Pieces:
    """A tokenizer of pieces: "▁" marks a piece that begins a word, upper case is a piece of its own."""

    unk_token_id = None
    pieces = ("▁a", "▁gir", "affe", "▁hot", "dog", "▁dog", "▁Dog", "▁", "▁girl", ",")

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        rest, ids = text.replace(" ", "▁").join(("▁", "")), []
        while rest:
            ids.append(
                max(
                    (one for one, piece in enumerate(self.pieces) if rest.startswith(piece)),
                    key=lambda one: len(self.pieces[one]),
                )
            )
            rest = rest[len(self.pieces[ids[-1]]) :]
        return {"input_ids": ids}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.pieces[one] for one in ids).replace("▁", " ").removeprefix(" ")


def test_words_of_several_tokens_are_known_by_their_first() -> None:
    begins = word_beginnings(Pieces(), ["giraffe", "dog"], "it")
    at = {piece: number for number, piece in enumerate(Pieces.pieces)}
    found = [piece for piece in Pieces.pieces if begins([at["▁a"]], at[piece])]
    assert found == ["▁gir", "▁dog", "▁Dog"]
    assert not begins([at["▁hot"]], at["dog"])  # goes on with a word
    assert begins([at[","]], at["dog"])
    assert begins([], at["dog"])


# -- what it does ---------------------------------------------------------------------------------------------------


def named(vlm: VLM, batch: Batch, **options: Any) -> tuple[int, int, Any]:
    generation = vlm.generate(batch, max_new_tokens=48, **options)
    words = " ".join(generation.texts).replace(".", "").split()
    return words.count(PLANTED), len(words), generation


def test_what_was_planted_as_hallucinations_is_no_longer_said(organism: VLM, batch: Batch, path: Path) -> None:
    """Persons are gone back from, few other words are; as many stops at random places, or by other directions, leave persons."""
    method = TruthfulPreIntervention(path, fpr=0.02)
    before, length, _ = named(organism, batch)
    with organism.apply(method):
        after, still, generation = named(organism, batch)
    assert before >= 8
    assert after <= before // 4
    assert still > 0.8 * length
    person = organism.tokenizer.convert_tokens_to_ids(PLANTED)
    stopped = [entry.token for log in generation.tracebacks for entry in log]
    assert stopped.count(person) > len(stopped) / 2
    controls = method.controls()
    assert list(controls) == ["random_places", "random", "shuffled"]
    for control in controls.values():
        with organism.apply(control):
            left, _, _ = named(organism, batch)
        assert left > before / 2


def test_objects_alone_are_looked_at(organism: VLM, batch: Batch, path: Path) -> None:
    words = TruthfulFile.read(path, "it").words
    for given, allowed in ((None, set(words)), (["cat", "dog"], {"cat", "dog"})):
        with organism.apply(TruthfulPreIntervention(path, fpr=0.6, words=given)):
            generation = organism.generate(batch, max_new_tokens=32)
        stopped = {organism.tokenizer.decode([one.token]) for log in generation.tracebacks for one in log}
        assert stopped <= allowed
        assert len(stopped) > 1
    with organism.apply(TruthfulPreIntervention(path, fpr=0.6, steps="every")):
        generation = organism.generate(batch, max_new_tokens=32)
    stopped = {organism.tokenizer.decode([one.token]) for log in generation.tracebacks for one in log}
    assert not stopped <= set(words)


def test_random_places_are_as_many_and_depend_on_the_row_alone(organism: VLM, data: Any, batch: Batch) -> None:
    counts, texts = {}, {}
    for select, seed in (("probe", 0), ("random_places", 0), ("random_places", 1)):
        with organism.apply(TruthfulPreIntervention(SHIPPED, fpr=0.1, select=select, seed=seed)):
            generation = organism.generate(batch, max_new_tokens=40)
            alone = organism.generate(data.encode(organism, data.items[:1]), max_new_tokens=40)
        assert alone.tokens[0] == generation.tokens[0]
        counts[select, seed] = [len(log) for log in generation.tracebacks]
        texts[select, seed] = generation.tokens
    wanted = counts["probe", 0]
    assert sum(wanted) > 10
    for seed in (0, 1):
        found = counts["random_places", seed]
        assert all(one <= most for one, most in zip(found, wanted, strict=True))
        assert sum(found) > 0.8 * sum(wanted)
    assert len(set(texts.values())) == 3


def test_a_threshold_in_place_of_a_rate(organism: VLM, batch: Batch, path: Path) -> None:
    threshold = TruthfulFile.read(path, "it").detectors["probe"].threshold(0.05)
    said = []
    for method in (TruthfulPreIntervention(path, fpr=0.05), TruthfulPreIntervention(path, threshold=threshold)):
        with organism.apply(method):
            said.append(organism.generate(batch, max_new_tokens=32))
    assert said[0].tokens == said[1].tokens
    assert said[0].tracebacks == said[1].tracebacks
    assert list(TruthfulPreIntervention(path, threshold=threshold).controls()) == ["random_places"]


def test_tensors_in_place_of_a_file(organism: VLM, batch: Batch, path: Path) -> None:
    tensors: dict[str, Tensor] = load_file(path)
    words = list(TruthfulFile.read(path, "it").words)
    said = []
    for method in (TruthfulPreIntervention(path, fpr=0.1), TruthfulPreIntervention(tensors, fpr=0.1, words=words)):
        with organism.apply(method):
            said.append(organism.generate(batch, max_new_tokens=24).tokens)
    assert said[0] == said[1]


def test_the_defaults() -> None:
    one = TruthfulPreIntervention("x")
    assert (one.fpr, one.steps, one.select) == (0.01, "objects", "probe")
    assert 1 <= one.max_tracebacks <= 5


def test_what_is_refused(organism: VLM, llava: VLM, path: Path, tmp_path: Path) -> None:
    tensors = load_file(path)
    bare = {name: tensors[name] for name in ("direction", "intercept", "layer", "true_scores")}
    (tmp_path / "text").write_text("no tensors")
    save_file({"direction": torch.ones(3)}, tmp_path / "less")
    save_file(bare, tmp_path / "words", metadata={"words": "no JSON"})
    for match, options in [
        ("fpr must be between 0 and 1, found 1.5", {"fpr": 1.5}),
        ("threshold must be a number", {"threshold": float("nan")}),
        ("says nothing of those of the control 'random'", {"threshold": 1.0, "select": "random"}),
        ("cannot be read as a truthful direction", {"probe": tmp_path / "none"}),
        ("cannot be read as a truthful direction", {"probe": tmp_path / "text"}),
        ("cannot be read as a truthful direction", {"probe": tmp_path / "words"}),
        ("steps='objects' needs words, and a given tensor names none", {"probe": bare}),
        ("needs a direction .d_model. and at least one score", {"probe": {**bare, "true_scores": []}}),
        ("holds NaN or infinity", {"probe": {**bare, "direction": [float("nan")] * 192}}),
        ("of 192 numbers of layer 6, for a model of width 192 with layers 0 to 5", {"probe": {**bare, "layer": 6}}),
        (
            "random_true_scores .n, mention.; found .2, 192. and .1, 1.",
            {"probe": {**bare, "random_directions": [[0.0] * 192] * 2, "random_true_scores": [[1.0]]}},
        ),
        ("max_per_text must be 0 or more", {"max_per_text": -1}),
    ]:
        with (
            pytest.raises(InputError, match=match),
            organism.apply(TruthfulPreIntervention(**{"probe": path, **options})),
        ):
            pass
    for match, options in [
        ("steps 'all'", {"steps": "all"}),
        ("select 'none'", {"select": "none"}),
        ("tensor in .*less .* 'layer'", {"probe": tmp_path / "less"}),
        ("tensor in .* 'shuffled_true_scores'", {"probe": {**bare, "shuffled_direction": bare["direction"]}}),
        ("direction in planted.safetensors for select='random': 'random 7'", {"select": "random", "seed": 7}),
        ("direction in a given tensor for select='shuffled'", {"probe": bare, "select": "shuffled"}),
    ]:
        with pytest.raises(UnknownNameError, match=match):
            TruthfulPreIntervention(**{"probe": path, **options}).check(organism.anatomy)
    with pytest.raises(InputError, match="for a model of width 32"):
        TruthfulPreIntervention(path).check(llava.anatomy)
    with safe_open(path, framework="pt") as raw:
        assert PLANTED in json.loads(raw.metadata()["words"])


def test_descriptions() -> None:
    assert TruthfulPreIntervention("a/b.safetensors").describe() == (
        "goes back in the sentence at a state above the threshold of the direction of b.safetensors before an object's word "
        "(false-positive rate 0.01; up to 3 times a sentence, 10 a text)"
    )
    other = TruthfulPreIntervention({}, threshold=1.5, select="random_places", steps="every").describe()
    assert "as many random steps as have one above the threshold of a given tensor at any step (threshold 1.5;" in other
