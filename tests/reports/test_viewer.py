"""What the viewer records and what the page holds: right numbers, bounded bytes, resumable, the same for every family."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import BUILDERS
from tiny_models.common import random_image

import slitlamp as sl
from interventions import ClsPruning, HeadReinforcement, ImageContrast
from probes import TokenLedger
from slitlamp.decoding import BacktrackingDecoding, Intervention, RunContext
from slitlamp.decoding.intervention import Kind
from slitlamp.errors import InputError, UnknownNameError, UnsupportedError
from slitlamp.experiments import Dataset, Experiment, Run, captions_dataset, load_dataset, storage, viewer_record
from slitlamp.experiments import viewer as recording
from slitlamp.experiments.conditions import Condition
from slitlamp.experiments.config import read_config
from slitlamp.experiments.perplexity import negative_log_likelihood
from slitlamp.experiments.viewer import item_paths, read_index, read_item, size_in_page
from slitlamp.experiments.viewer_detail import MAX_BYTES, Arrays, Cells, Maps, fitted, levels, packed, picture_bytes
from slitlamp.experiments.viewer_record import pieces
from slitlamp.models import Patches
from slitlamp.reports import viewer, write_report
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

N_ITEMS = 4


def experiment(vlm: VLM, output: Path, **changes: Any) -> Experiment:
    options: dict[str, Any] = {
        "model": vlm,
        "dataset": [
            load_dataset("emoji_scenes/captions").take(N_ITEMS),
            load_dataset("emoji_scenes/pope_random").take(1),
        ],
        "conditions": {
            "baseline": [],
            "vhr": [HeadReinforcement(alpha=2.0)],
            "pruned": [ClsPruning(keep=0.5)],
            "vcd": [ImageContrast(beta=0.5)],
        },
        "controls": False,
        "viewer": ["1", "emoji_scenes/pope_random:1", "0"],
        "batch_size": 4,
        "n_resamples": 100,
        "output": output,
        "progress": False,
    }
    return Experiment(**{**options, **changes})


@pytest.fixture(scope="module")
def organism() -> VLM:
    return sl.VLM.organism()


@pytest.fixture(scope="module")
def run(organism: VLM, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return experiment(organism, tmp_path_factory.mktemp("viewer") / "run").run()


def items(folder: Path) -> list[tuple[dict[str, Any], Arrays, bytes]]:
    index = read_index(folder)
    assert index is not None
    return [read_item(path) for path in item_paths(folder, index["n_items"])]


def teacher_forced(vlm: VLM, run: Run, condition: str, item: str) -> Any:
    data = load_dataset("emoji_scenes/captions").take(N_ITEMS)
    one = next(each for each in data.items if each.id == item)
    rows = run.predictions
    row = rows[(rows["condition"] == condition) & (rows["dataset"] == data.name) & (rows["item"] == item)].iloc[0]
    return vlm.encode([one.image], [one.prompt], ids=[item]).with_continuation([[int(t) for t in row["tokens"]]])


# -- what is recorded ---------------------------------------------------------------------------------------------------


def test_items_are_those_asked_for_in_order(run: Run) -> None:
    found = [(head["dataset"], head["item"]) for head, _, _ in items(run.folder)]
    captions, pope = "emoji_scenes/captions", "emoji_scenes/pope_random"
    assert found == [(captions, "1"), (pope, "1"), (captions, "0")]


def test_attention_is_that_of_the_trace(run: Run, organism: VLM) -> None:
    head, arrays, _ = items(run.folder)[0]
    batch = teacher_forced(organism, run, "baseline", "1")
    with organism.trace(sites.attention(queries="before_generated", keys="image")) as trace:
        organism.forward(batch)
    wanted = trace["attention"].stack()[:, 0].permute(2, 0, 1, 3).numpy()  # [token, layer, head, patch]
    assert head["detail"] == "all"
    found = arrays["heads"] / 255 * arrays["heads_max"][..., None]
    assert np.abs(found - wanted).max() <= wanted.max() / 255 / 2 + 1e-6  # half a step of the map's largest weight
    mean = arrays["mean"] / 255 * arrays["mean_max"][..., None]
    assert np.abs(mean - wanted.mean(axis=2)).max() <= wanted.mean(axis=2).max() / 255 / 2 + 1e-6
    mass = (arrays["mass"] / 255) ** 2
    assert np.abs(mass - wanted.sum(axis=-1)).max() <= 1 / 255  # a step of the root, twice the root of at most 1


def test_too_many_weights_are_recorded_as_their_mean(
    run: Run, organism: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viewer_record, "MOST_WEIGHTS", 10)
    one = experiment(organism, tmp_path / "mean", viewer=["1"], conditions={"baseline": []}).run()
    (head, arrays, _), (_, whole, _) = items(one.folder)[0], items(run.folder)[0]
    assert (head["detail"], head["head_tokens"], head["pooled"]) == ("mean", [], 1)
    assert "heads" not in arrays
    found, wanted = (each["mean"] / 255 * each["mean_max"][..., None] for each in (arrays, whole))
    np.testing.assert_allclose(found, wanted, atol=1 / 255)
    assert arrays["mass"].shape[-1] == 1
    np.testing.assert_allclose(
        (arrays["mass"][..., 0] / 255) ** 2, ((whole["mass"] / 255) ** 2).mean(axis=-1), atol=0.01
    )
    assert "mean over heads" in write_report(one.folder).read_text(encoding="utf-8")


def test_lens_ends_in_what_the_model_says(run: Run, organism: VLM) -> None:
    head, arrays, _ = items(run.folder)[0]
    batch = teacher_forced(organism, run, "baseline", "1")
    n = batch.n_generated[0]
    log_p = organism.forward(batch).logits[0, -n - 1 : -1].log_softmax(dim=-1)
    tokens = batch.input_ids[0, -n:]
    own = log_p.gather(1, tokens[:, None])[:, 0].exp().numpy()
    np.testing.assert_allclose(arrays["p"][:, -1], own, atol=1e-5)
    np.testing.assert_allclose(arrays["p"][:, -2], own, atol=1e-5)  # the lens after the last layer is the output
    assert (arrays["rank"][:, -1] == 1).all()  # greedy decoding took the likeliest
    said = [head["vocabulary"][one] for one in arrays["lens_id"][:, -1, 0]]
    assert said == [name for _, name in head["tokens"]]
    assert arrays["p"].shape == (n, organism.anatomy.n_layers + 1)


def test_tokens_join_to_the_text_and_objects_are_labelled(run: Run) -> None:
    for head, _, _ in items(run.folder):
        assert "".join(piece for piece, _ in head["tokens"]) == head["text"]
    head = items(run.folder)[0][0]
    at = {label: [name for (_, name), one in zip(head["tokens"], head["labels"], strict=True) if one == label]
          for label in ("object", "hallucinated")}  # fmt: skip
    assert at["object"] == [head["text"][a:b] for a, b, _, present in head["mentions"] if present]
    assert at["hallucinated"] == [head["text"][a:b] for a, b, _, present in head["mentions"] if not present]


def test_pieces_of_a_character_of_several_tokens() -> None:
    class Bytes:
        def decode(self, tokens: list[int], **_: Any) -> str:
            return bytes(tokens).decode("utf-8", errors="replace")

        def convert_ids_to_tokens(self, tokens: list[int]) -> list[str]:
            return [f"<0x{one:02X}>" for one in tokens]

    tokens = list("aé".encode())
    assert pieces(Bytes(), tokens, "aé", [(0, 1), (1, 2), (1, 2)]) == [["a", "a"], ["é", "<0xC3>"], ["", "<0xA9>"]]


def test_conditions_change_the_likelihood_of_the_same_text(run: Run, organism: VLM) -> None:
    head, arrays, _ = items(run.folder)[0]
    names = [one["name"] for one in head["conditions"]]
    assert names == ["baseline", "vhr", "pruned", "vcd"]
    assert (arrays["change"][0] == 0).all()
    batch = teacher_forced(organism, run, "baseline", "1")
    tokens = tuple(batch.input_ids[0, -batch.n_generated[0] :].tolist())
    generation = sl.decoding.Generation.of(batch.prompt_only(), organism.tokenizer, [list(tokens)], organism.end_tokens)
    for number, condition in ((1, HeadReinforcement(alpha=2.0)), (2, ClsPruning(keep=0.5))):
        with organism.apply(condition):
            (nll,) = negative_log_likelihood(organism, generation)
        total = float((arrays["log_p"].astype(float) + arrays["change"][number]).sum())
        assert total == pytest.approx(-nll, abs=1e-3)
    assert np.isneginf(arrays["change"][3]).any() or np.isfinite(arrays["change"][3]).all()
    assert not np.isnan(arrays["change"]).any()


@dataclass
class Refusing(Intervention):
    """An intervention that cannot run over a given text."""

    name: ClassVar[str] = "refusing"
    kind: ClassVar[Kind] = "blocks"

    def edits(self, run: RunContext) -> list[Any]:
        raise UnsupportedError("only while writing")


@dataclass
class GoingBack(BacktrackingDecoding):
    """Going back, as far as the viewer looks at it."""

    name: ClassVar[str] = "going_back"

    def watch(self, run: RunContext) -> Any:
        raise AssertionError("not asked in a forward pass")


@pytest.mark.parametrize(
    ("one", "note"),
    [(Refusing(), "cannot run over a given text: only while writing"), (GoingBack(), "goes back while it writes")],
)
def test_conditions_that_a_forward_pass_cannot_show(one: Intervention, note: str, run: Run, organism: VLM) -> None:
    batch = teacher_forced(organism, run, "baseline", "1")
    tokens = batch.input_ids[0, -batch.n_generated[0] :].tolist()
    condition = Condition("odd", (one,), "treatment")
    change, said = viewer_record.likelihood_change(organism, condition, batch, tokens, np.zeros(len(tokens)))
    assert np.isnan(change).all()
    assert said is not None
    assert note in said


def test_added_and_dropped_objects(run: Run) -> None:
    head = items(run.folder)[0][0]
    first = {one[2] for one in head["conditions"][0]["mentions"]}
    for one in head["conditions"]:
        here = {each[2] for each in one["mentions"]}
        assert (set(one["added"]), set(one["dropped"])) == (here - first, first - here)
        assert one["score"]["n_mentions"] == len(one["mentions"])
        assert one["score"]["n_hallucinated"] == sum(not each[3] for each in one["mentions"])


def test_pope_item(run: Run) -> None:
    head, arrays, _ = items(run.folder)[1]
    assert head["asked"]["answer"] in ("yes", "no")
    right = head["conditions"][0]["score"]["right"]
    assert head["labels"][0] == ("correct" if right else "wrong")
    assert head["head_tokens"] == list(range(len(head["tokens"])))
    assert arrays["change"].shape == (4, len(head["tokens"]))


def test_signals_are_the_ledgers_own(run: Run, organism: VLM, tmp_path: Path) -> None:
    """Measured on the item alone where the run has no ledger; of that ledger where it has one."""
    alone = items(run.folder)[0][0]["signals"]
    with_ledger = experiment(
        organism, tmp_path / "ledger", conditions={"baseline": []}, probes=[TokenLedger(n_resamples=100)], viewer=["1"]
    ).run()
    ledger = with_ledger.table("token_ledger_ledger")
    own = ledger[(ledger["item"] == "1") & (ledger["dataset"] == "emoji_scenes/captions")]
    signals = items(with_ledger.folder)[0][0]["signals"]
    assert (alone["source"], signals["source"]) == ("item", "run")
    assert [row["token"] for row in signals["rows"]] == own["token"].tolist() == [row["token"] for row in alone["rows"]]
    for name in ("t_vhd", "surprisal", "attention_image"):
        values = [row["values"][signals["names"].index(name)] for row in signals["rows"]]
        np.testing.assert_allclose(values, own[name])
        one = [row["values"][alone["names"].index(name)] for row in alone["rows"]]
        np.testing.assert_allclose(one, own[name], rtol=1e-3)  # a batch of one against a batch of many
    assert "random" not in signals["names"]


# -- choosing -----------------------------------------------------------------------------------------------------------


def test_a_number_takes_half_with_hallucinations(organism: VLM, tmp_path: Path) -> None:
    one = experiment(organism, tmp_path / "two", viewer=2, conditions={"baseline": []}).run()
    rows = one.table("chair_rows").set_index("image_id")["n_hallucinated"]
    wrong = [rows.loc[int(head["item"])] > 0 for head, _, _ in items(one.folder)]
    assert (rows > 0).any()
    assert (rows == 0).any()
    assert sorted(wrong) == [False, True]
    index = read_index(one.folder)
    assert index is not None
    assert "2 of the 4 items" in index["rule"]


@pytest.mark.parametrize(
    ("wanted", "error"), [(["nobody"], UnknownNameError), ([], InputError), (0, InputError), (-3, InputError)]
)
def test_items_that_cannot_be_shown(wanted: Any, error: type[Exception], organism: VLM, tmp_path: Path) -> None:
    with pytest.raises(error, match="viewer"):
        experiment(organism, tmp_path / "no", viewer=wanted).check()


def test_several_models_have_no_viewer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'viewer' looks into one model"):
        experiment(sl.VLM.organism(), tmp_path, model=["organism", "organism/seed1"], viewer=True).prepare()


@pytest.mark.parametrize(("text", "value"), [("true", True), ("7", 7), ("['3', '5']", ["3", "5"]), ("false", False)])
def test_configuration(text: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(f"datasets: [emoji_scenes/captions]\nviewer: {text}\n")
    found = read_config(path).viewer
    assert found == value
    assert type(found) is type(value)


def test_a_folder_without_a_viewer_keeps_its_configuration(organism: VLM, tmp_path: Path) -> None:
    plan = experiment(organism, tmp_path / "none", viewer=False).check()
    assert "viewer" not in plan.config()


# -- resuming -----------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    run: Run, organism: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    record = recording.record

    def counted(*arguments: Any) -> Any:
        if len(made) == 1 and not (tmp_path / "stopped").is_file():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        made.append(arguments[3].id)
        return record(*arguments)

    monkeypatch.setattr(recording, "record", counted)
    again = experiment(organism, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        again.run()
    assert made == ["1"]
    # what a kill in the middle of writing leaves behind
    (tmp_path / "run" / "viewer" / ".00001.safetensors.1.partial").write_bytes(b"half")
    experiment(organism, tmp_path / "run").run()
    assert made == ["1", "1", "0"]  # the item that was there is not made again; the second "1" is the question
    found, wanted = (
        {path.name: path.read_bytes() for path in sorted((folder / "viewer").iterdir())}
        for folder in (tmp_path / "run", run.folder)
    )
    assert found == wanted


def test_a_broken_item_is_recorded_again(run: Run, organism: VLM, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    broken = folder / "viewer" / "00002.safetensors"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    facts = storage.read_json(folder / "environment.json")
    storage.write_json(folder / "environment.json", {**facts, "finished": False})
    experiment(organism, folder).run()
    assert broken.read_bytes() == whole


def test_overwriting_deletes_the_viewer(run: Run, organism: VLM, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    experiment(organism, folder, viewer=False, conditions={"baseline": []}, overwrite=True).run()
    assert read_index(folder) is None
    assert not (folder / "viewer").exists()


# -- other families -----------------------------------------------------------------------------------------------------


def tiny_data(folder: Path, placeholder: str) -> Dataset:
    (folder / "images").mkdir(parents=True)
    names = ("dog", "cat")
    images = []
    for number in (1, 2):
        random_image(number, 30, 20).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 30, "height": 20})
    truth = {
        "images": images,
        "annotations": [{"id": 1, "image_id": 1, "category_id": 0, "bbox": [0, 0, 8, 8]}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }
    (folder / "instances.json").write_text(json.dumps(truth))
    (folder / "synonyms.txt").write_text("\n".join(names) + "\n")
    prompt = f"{placeholder} describe this image".strip()
    return captions_dataset(folder / "images", folder / "instances.json", folder / "synonyms.txt", prompt=prompt)


@pytest.mark.parametrize(
    ("family", "grids", "layers", "kind"),
    [
        ("llava_next", 2, [0, 1, 2], "grid"),
        ("mllama", 1, [1, 3], "grid"),
        ("blip-2", 0, [0, 1, 2], "tokens"),
        ("qwen2_5_vl", 1, [0, 1, 2], "grid"),
        ("aya_vision", 2, [0, 1, 2], "grid"),
    ],
)
def test_families(family: str, grids: int, layers: list[int], kind: str, tmp_path: Path) -> None:
    vlm = BUILDERS[family]()
    own = vlm.anatomy.family
    placeholder = "" if own.placeholder is None or own.images_first else getattr(vlm.processor, own.placeholder)
    data = tiny_data(tmp_path / "data", placeholder)
    found = Experiment(
        model=vlm,
        dataset=data,
        conditions={"baseline": [], "again": []},
        viewer=True,
        max_new_tokens=5,
        n_resamples=100,
        output=tmp_path / "run",
        progress=False,
    ).run()
    for head, arrays, picture in items(found.folder):
        assert picture.startswith(b"\x89PNG")
        assert (len(head["grids"]), head["kind"], head["detail"]) == (grids, kind, "all")
        assert head["attention_layers"] == layers[: vlm.anatomy.n_layers]
        n_tokens = len(head["tokens"])
        assert arrays["heads"].shape == (n_tokens, len(layers), vlm.anatomy.n_heads, head["cells"])
        np.testing.assert_allclose(arrays["change"], 0, atol=1e-4)  # the same condition twice
        laid = (arrays["heads"] / 255 * arrays["heads_max"][..., None]).sum(axis=-1)
        rounding = head["cells"] * arrays["heads_max"].max() / 255 / 2
        assert np.abs(laid - (arrays["mass"] / 255) ** 2).max() <= rounding + 1 / 255
    page = write_report(found.folder).read_text(encoding="utf-8")
    assert 'id="viewer-data"' in page


# -- detail and size ----------------------------------------------------------------------------------------------------


def test_cells_are_those_of_the_patches(llava_next: VLM) -> None:
    batch = llava_next.encode([random_image(0, 30, 20)], ["<image> what ?"])
    patches = batch.patches[0]
    values = torch.rand(2, 3, len(patches))
    cells = Cells.of(patches)
    laid = cells.lay(values.numpy())
    start = 0
    for grid in cells.grids:
        wanted = patches.to_grid(values, image=grid["image"], view=grid["view"]).flatten(-2).numpy()
        np.testing.assert_array_equal(laid[..., start : start + wanted.shape[-1]], wanted)
        start += wanted.shape[-1]
    np.testing.assert_allclose(laid.sum(axis=-1), values.sum(dim=-1), rtol=1e-5)  # ends of rows are in the last cell
    assert cells.n_cells == start + 1


def test_pooling_adds_up() -> None:
    patches = Patches(*(torch.zeros(15, dtype=torch.int64) for _ in range(4)))
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij")
    patches = Patches(patches.image, rows.flatten(), columns.flatten(), patches.view, {(0, 0): (3, 5)})
    cells = Cells.of(patches)
    pooled, values = cells.pooled(cells.lay(np.arange(15.0)[None]), 2)
    assert (pooled.grids[0]["rows"], pooled.grids[0]["columns"], pooled.n_cells) == (2, 3, 6)
    wanted = [0 + 1 + 5 + 6, 2 + 3 + 7 + 8, 4 + 9, 10 + 11, 12 + 13, 14]
    np.testing.assert_array_equal(values[0], wanted)


def made_maps(rng: np.random.Generator, n_tokens: int, side: int = 8) -> Maps:
    """Attention of the embedded model's shape: 6 layers of 8 heads over 8 x 8 patches."""
    weights = rng.gamma(0.3, size=(6, 8, n_tokens, side * side)).astype(np.float32)
    weights /= weights.sum(axis=-1, keepdims=True) * 1.2
    cells = Cells(
        ({"image": 0, "view": 0, "rows": side, "columns": side},), np.arange(side * side), side * side, "grid"
    )
    return Maps(weights, weights.sum(axis=-1), cells, tuple(range(6)))


def test_detail_falls_with_the_bytes_in_the_order_that_is_documented() -> None:
    maps = made_maps(np.random.default_rng(0), 30, side=16)
    order = [(head["detail"], head["pooled"]) for head, _ in levels(maps, [4, 9])]
    assert order == [("all", 1), ("named", 1), ("mean", 1), ("mean", 2), ("mean", 4), ("mean", 8)]
    arrays = {"lens_id": np.zeros((30, 7, 5), np.uint16), "lens_p": np.zeros((30, 7, 5), np.uint8)}
    seen = []
    for most in (2e6, 2e5, 6e4, 2e4, 5e3):
        head, own = fitted({"item": "0"}, arrays, maps, [4, 9], most)
        assert len(packed(head, own)) * 4 / 3 <= most
        seen.append((head["detail"], head["pooled"]))
    assert [order.index(one) for one in seen] == sorted(order.index(one) for one in seen)
    assert seen[0] == ("all", 1)
    assert len(set(seen)) >= 4


def test_a_page_unpacks_what_was_packed() -> None:
    arrays = {"a": np.arange(5, dtype=np.uint8), "b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.uint32([7])}
    raw = zlib.decompress(packed({"text": "é"}, arrays))
    length = int.from_bytes(raw[:4], "little")
    head = json.loads(raw[4 : 4 + length])
    assert head["text"] == "é"
    for one in head["arrays"]:
        start = 4 + length + one["start"]
        assert start % 4 == 0  # typed arrays start at a multiple of their width
        wanted = arrays[one["name"]]
        np.testing.assert_array_equal(
            np.frombuffer(raw, wanted.dtype, wanted.size, start).reshape(one["shape"]), wanted
        )


def test_pictures_are_bounded() -> None:
    image = random_image(0, 900, 700)  # noise, the worst there is
    small, kind = picture_bytes(image, 60_000)
    assert kind == "jpeg"
    assert len(small) * 4 / 3 <= 60_000
    assert picture_bytes(image, 1e9)[1] == "png"


def synthetic(folder: Path, n_items: int, text: str = "there is a dog and a cat") -> None:
    """A viewer of many items with noise for attention, of the embedded model's shape, five conditions and full signals."""
    rng = np.random.default_rng(0)
    share = MAX_BYTES / n_items
    picture, kind = picture_bytes(random_image(0, 64, 64), share / 3)
    words = (text.split() * 10)[:32]
    for number in range(n_items):
        named = [3, 6, 11, 17, 25]
        rows = [{"token": t, "word": words[t], "label": "object", "category": "dog", "values": [float(v) for v in rng.random(14)]}
                for t in named]  # fmt: skip
        conditions = [
            {"name": name, "role": "treatment", "control_of": None, "text": " ".join(words), "mentions": [[11, 14, "dog", True]],
             "note": None, "added": ["cat"], "dropped": [],
             "score": {"n_mentions": 2, "n_hallucinated": 0, "n_true_mentioned": 1, "n_true_objects": 2}}
            for name in ("baseline", "vhr", "vhr_random", "vhr_least", "vhr_all")
        ]  # fmt: skip
        header = {
            **{
                "item": str(number),
                "dataset": "d",
                "task": "captions",
                "prompt": "?",
                "condition": "baseline",
                "truth": ["dog"],
            },
            **{"asked": None, "text": " ".join(words), "tokens": [[f" {one}", one] for one in words], "mentions": []},
            **{"labels": ["object" if t in named else "other" for t in range(32)]},
            "signals": {"names": [f"s{i}" for i in range(14)], "rows": rows, "source": "item", "note": None},
            **{"vocabulary": [f"word{i}" for i in range(90)], "n_layers": 6, "n_heads": 8, "conditions": conditions},
            "picture": kind,
        }
        arrays = {
            "lens_id": rng.integers(0, 90, (32, 7, 5)).astype(np.uint16),
            "lens_p": rng.integers(0, 255, (32, 7, 5)).astype(np.uint8),
            "rank": rng.integers(1, 120, (32, 7)).astype(np.uint32),
            "p": rng.random((32, 7)).astype(np.float32),
            "log_p": rng.random(32).astype(np.float32),
            "change": rng.normal(size=(5, 32)).astype(np.float32),
        }
        head, own = fitted(header, arrays, made_maps(rng, 32), named, share - len(picture) * 4 / 3)
        storage.write_arrays(
            folder / "viewer" / f"{number:05d}.safetensors",
            {**own, "picture": np.frombuffer(picture, np.uint8)},
            {"header": json.dumps(head)},
        )
    storage.write_json(folder / "viewer" / "index.json", {"n_items": n_items, "rule": "All of them."})


@pytest.mark.slow
def test_two_hundred_items_stay_below_ten_megabytes(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    synthetic(folder, 200)
    sizes = [size_in_page(*one) for one in items(folder)]
    assert sum(sizes) <= MAX_BYTES
    assert {head["detail"] for head, _, _ in items(folder)} <= {"named", "mean"}  # noise does not compress
    path = write_report(folder)
    assert path.stat().st_size < 10e6
    assert path.stat().st_size > 2e6  # the items are in it


# -- the page -----------------------------------------------------------------------------------------------------------


def test_only_this_script_may_run(run: Run) -> None:
    page = write_report(run.folder).read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy.replace("style-src 'unsafe-inline'", "")
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\b|fetch\(|XMLHttp|import\(", scripts[0])
    assert "<noscript>" in page


def test_a_page_without_a_viewer_runs_no_script(demo_run: Path) -> None:
    page = write_report(demo_run).read_text(encoding="utf-8")
    assert "script" not in page


def test_what_a_model_wrote_cannot_leave_the_data(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    nasty = "</script><script>alert(1)</script> <!-- <img src=x onerror=alert(2)> \u2028"
    synthetic(folder, 2, text=nasty)
    page = write_report(folder).read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="viewer-data">(.*?)</script>', page, flags=re.S)
    assert "<" not in data
    assert json.loads(data)["items"][0]["text"].startswith("</script><script>alert(1)</script>")


def test_same_folder_same_bytes(run: Run, tmp_path: Path) -> None:
    first = write_report(run.folder).read_bytes()
    moved = tmp_path / run.folder.name
    shutil.copytree(run.folder, moved)
    assert write_report(moved).read_bytes() == first


def test_percentiles(tmp_path: Path) -> None:
    values = np.arange(40.0)
    ranked = viewer.Percentiles({"known": values, "few": values[:5]}, "among 40")
    row = {"token": 0, "word": "w", "label": "object", "category": "c", "values": [10.0, 3.0, None]}
    put = ranked.put({"names": ["known", "few", "known"], "rows": [row], "source": "item", "note": None})
    assert put["rows"][0]["percentiles"] == [26.2, None, None]  # 10 below and half of itself: 10.5 of 40
    assert put["among"] == "among 40"


def test_percentiles_are_among_the_runs_own_ledger(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    frame = pd.DataFrame(
        {"condition": "baseline", "dataset": "d", "item": "0", "token": 0, "surprisal": np.arange(100.0)}
    )
    storage.write_table(folder / "tables" / "token_ledger_ledger.parquet", frame)
    synthetic(folder, 1)
    path = folder / "viewer" / "00000.safetensors"
    head, arrays, picture = read_item(path)
    row = {"token": 3, "word": "w", "label": "object", "category": "c", "values": [49.5]}
    head["signals"] = {"names": ["surprisal"], "rows": [row], "source": "run", "note": None}
    storage.write_arrays(path, {**arrays, "picture": np.frombuffer(picture, np.uint8)}, {"header": json.dumps(head)})
    found = unpacked(viewer_data(folder)["items"][0]["data"])["signals"]
    assert found["rows"][0]["percentiles"] == [50.0]
    assert "100 named objects of this run" in found["among"]


def viewer_data(folder: Path) -> dict[str, Any]:
    made = viewer.viewer_of(viewer.RunData(folder))
    assert made is not None
    content: dict[str, Any] = json.loads(str(made.data))
    return content


def unpacked(text: str) -> dict[str, Any]:
    raw = zlib.decompress(base64.b64decode(text))
    length = int.from_bytes(raw[:4], "little")
    head: dict[str, Any] = json.loads(raw[4 : 4 + length])
    return head


def test_progress_is_drawn_when_asked(organism: VLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make: Callable[..., Experiment] = experiment
    make(organism, tmp_path / "bar", viewer=1, conditions={"baseline": []}, progress=True).run()
    assert "viewer" in capsys.readouterr().err
