"""Run folders with made-up numbers of the size that the embedded model gives, and nasty names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from slitlamp.experiments.pairs import interaction_table
from slitlamp.experiments.verdicts import verdict_tables

CONDITIONS = ("baseline", "vhr", "vhr_random", "vhr_least", "vhr_all")
SPLITS = (
    "emoji_scenes/pope_random",
    "emoji_scenes/pope_popular",
    "emoji_scenes/pope_adversarial",
    "emoji_scenes/pope_all",
)
CAPTIONS = "emoji_scenes/captions"
NASTY = (
    "<script>alert(1)</script>",
    "vhr \"x2\" & 'y' $\\alpha_{$",
    "a very long name of a condition that does not fit anywhere at all",
    "条件 ünïcode ☃",
)
CHAIR = {
    "baseline": (0.242, 0.58, 0.71, 30.1),
    "vhr": (0.196, 0.50, 0.654, 27.9),
    "vhr_random": (0.209, 0.52, 0.673, 28.8),
    "vhr_least": (0.233, 0.57, 0.680, 29.4),
    "vhr_all": (0.224, 0.55, 0.710, 30.0),
}
HALF = {"chair_i": 0.028, "chair_s": 0.055, "recall": 0.024, "mean_words": 0.8}


def chair_scores(names: tuple[str, ...]) -> pd.DataFrame:
    rows = []
    for name, values in zip(names, list(CHAIR.values()), strict=False):
        for metric, value in zip(HALF, values, strict=True):
            rows.append(
                (name, CAPTIONS, metric, value, value - HALF[metric], value + HALF[metric], 300, None, "captions")
            )
    return pd.DataFrame(
        rows, columns=["condition", "dataset", "metric", "value", "low", "high", "n_images", "n_questions", "task"]
    )


def pope_scores(names: tuple[str, ...]) -> pd.DataFrame:
    rows = []
    for i, name in enumerate(names):
        for dataset, accuracy in zip(SPLITS, (0.889, 0.869, 0.818, 0.859), strict=True):
            for metric, value in {
                "accuracy": accuracy - 0.007 * i,
                "f1": accuracy + 0.01 - 0.004 * i,
                "yes_ratio": 0.46 + 0.03 * i,
                "unparseable": 0.0,
            }.items():
                n = 4500 if dataset.endswith("all") else 1500
                rows.append((name, dataset, metric, value, value - 0.018, value + 0.019, 250, n, "pope"))
    return pd.DataFrame(
        rows, columns=["condition", "dataset", "metric", "value", "low", "high", "n_images", "n_questions", "task"]
    )


def differences(scores: pd.DataFrame, pairs: list[tuple[str, str]]) -> pd.DataFrame:
    wide = scores.pivot(index=["dataset", "metric"], columns="condition", values="value")
    rows = []
    for condition, reference in pairs:
        for (dataset, metric), row in wide.iterrows():
            half = 0.7 * HALF.get(metric, 0.012)
            value = row[condition] - row[reference]
            rows.append((condition, reference, dataset, metric, value, value - half, value + half, 0.04, 300))
    return pd.DataFrame(
        rows, columns=["condition", "reference", "dataset", "metric", "value", "low", "high", "p", "n_images"]
    )


def mentions(names: tuple[str, ...], n_images: int = 300) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    rows = []
    for i, name in enumerate(names):
        for image in range(n_images):
            for index in range(1, int(rng.integers(2, 7))):
                wrong = rng.random() < 0.08 + 0.07 * index - 0.01 * i
                rows.append((name, CAPTIONS, f"{image:06d}", index, "dog", bool(wrong), True))
    return pd.DataFrame(
        rows, columns=["condition", "dataset", "image_id", "index", "category", "hallucinated", "first"]
    )


def recall_curve(names: tuple[str, ...]) -> pd.DataFrame:
    rows = []
    for i, name in enumerate(names):
        for cut in range(7):
            recall = (0.71 - 0.012 * i) * (1 - np.exp(-cut / 2)) / (1 - np.exp(-3))
            rows.append(
                (name, CAPTIONS, cut, recall, np.nan if cut == 0 else (0.09 + 0.025 * cut) * (1 - 0.06 * i), 300)
            )
    return pd.DataFrame(rows, columns=["condition", "dataset", "cut", "recall", "chair_i", "n_images"])


def matched_recall(names: tuple[str, ...]) -> pd.DataFrame:
    rows = []
    for i, name in enumerate(names):
        value = 0.21 - 0.006 * i
        missing = (np.nan,) * 3 if i == 0 else (value - 0.21, value - 0.21 - 0.02, value - 0.21 + 0.02)
        rows.append((name, CAPTIONS, 0.654, 4.2, value, value - 0.03, value + 0.03, *missing, 0.3, 300))
    return pd.DataFrame(
        rows,
        columns=[
            "condition",
            "dataset",
            "recall",
            "cut",
            "value",
            "low",
            "high",
            "difference",
            "difference_low",
            "difference_high",
            "p",
            "n_images",
        ],
    )


TREATMENTS = ("vhr", "boost", "vdd", "mask", "m3id")
"""Of `composed`: what each is at CHAIR_i (difference to the reference; differences to its controls), half an interval .02."""
EFFECTS = {
    "vhr": (-0.06, {"random": -0.05, "least": -0.03}),
    "boost": (-0.05, {"text": -0.01}),
    "vdd": (-0.03, {}),
    "mask": (0.3, {"random": 0.1}),
    "m3id": (0.0, {"noise": 0.01}),
}


def composed(folder: Path, treatments: tuple[str, ...] = TREATMENTS) -> Path:
    """A run of treatments with their controls, and of pairs: vdd and m3id are refused, vhr+boost falls short of the sum."""
    info: list[tuple[str, str, str | None]] = [("baseline", "reference", None)]
    rows: list[tuple[object, ...]] = []

    def add(condition: str, reference: str, value: float) -> None:
        for name, sign in (("chair_i", 1), ("chair_s", 1), ("recall", -0.5)):
            rows.append((condition, reference, CAPTIONS, "captions", name, sign * value, 300))
        for name in ("accuracy", "f1"):
            rows.append((condition, reference, SPLITS[2], "pope", name, -0.3 * value, 250))

    for name in treatments:
        value, controls = EFFECTS[name]
        info += [(name, "treatment", None), *((f"{name}_{one}", "control", name) for one in controls)]
        add(name, "baseline", value)
        for one, direct in controls.items():
            add(f"{name}_{one}", "baseline", value - direct)
            add(name, f"{name}_{one}", direct)
    pairs = [(a, b) for i, a in enumerate(treatments) for b in treatments[i + 1 :] if (a, b) != ("vdd", "m3id")]
    beyond = {pair: 0.04 if pair == ("vhr", "boost") else 0.005 for pair in pairs}
    for a, b in pairs:
        info.append((f"{a}+{b}", "pair", None))
        add(f"{a}+{b}", "baseline", EFFECTS[a][0] + EFFECTS[b][0] + beyond[a, b])
    columns = ["condition", "reference", "dataset", "task", "metric", "value", "n_images"]
    differences = pd.DataFrame(rows, columns=columns)
    differences["low"], differences["high"] = differences["value"] - 0.02, differences["value"] + 0.02
    differences["p"] = np.where(differences["value"].abs() > 0.02, 0.001, 0.5)
    scores = differences[differences["reference"] == "baseline"].drop(columns=["reference", "p"])
    levels = {"chair_i": 0.25, "chair_s": 0.6, "recall": 0.7, "accuracy": 0.8, "f1": 0.8}
    base = scores[scores["condition"] == treatments[0]].assign(condition="baseline", value=0.0, low=-0.02, high=0.02)
    scores = pd.concat([base, scores], ignore_index=True)
    for column in ("value", "low", "high"):
        scores[column] += scores["metric"].map(levels)
    tables = {
        "conditions": scores.assign(n_questions=None),
        "differences": differences,
        "condition_info": pd.DataFrame(info, columns=["condition", "role", "control_of"]),
        "matched_differences": differences[differences["metric"] == "chair_i"].drop(columns=["task", "metric"]),
        "refused_pairs": pd.DataFrame(
            [("vdd+m3id", "vdd", "m3id", "ImageContrast and M3ID are both contrasts")],
            columns=["condition", "first", "second", "reason"],
        ),
    }
    tables |= verdict_tables(tables)
    found = [
        (f"{a}+{b}", a, b, dataset, task, name, sign * beyond[a, b], n)
        for a, b in pairs
        for dataset, task, name, sign, n in (
            (CAPTIONS, "captions", "chair_i", 1, 300),
            (CAPTIONS, "captions", "recall", -0.5, 300),
            (SPLITS[2], "pope", "f1", -0.3, 250),
        )
    ]
    columns = ["condition", "first", "second", "dataset", "task", "metric", "value", "n_images"]
    interactions = pd.DataFrame(found, columns=columns)
    interactions["low"], interactions["high"] = interactions["value"] - 0.015, interactions["value"] + 0.015
    interactions["p"] = np.where(interactions["value"].abs() > 0.015, 0.001, 0.6)
    tables["interactions"] = interaction_table(interactions, differences, "baseline")
    (folder / "tables").mkdir(parents=True)
    for name, table in tables.items():
        table.to_parquet(folder / "tables" / f"{name}.parquet")
    config = {
        "title": "Two at a time",
        "conditions": {one: [] for one in ("baseline", *treatments)},
        "seed": 0,
        "level": 0.95,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"model": "organism", "device": "cpu", "finished": True}))
    return folder


def head_tables(n_layers: int = 6, n_heads: int = 8) -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(2)
    vhd = rng.gamma(3.0, 0.5, (n_layers, n_heads))
    heads = pd.DataFrame(
        {
            "layer": np.repeat(np.arange(n_layers), n_heads),
            "head": np.tile(np.arange(n_heads), n_layers),
            "vhd": vhd.ravel(),
            "low": vhd.ravel() * 0.93,
            "high": vhd.ravel() * 1.07,
            "selected": (vhd > np.median(vhd, axis=1, keepdims=True)).ravel() * 0.9,
            "n_items": 300,
        }
    )
    label = rng.choice(["object", "hallucinated", "other"], size=4000, p=[0.1, 0.04, 0.86])
    centre = pd.Series(label).map({"object": 14.0, "hallucinated": 12.5, "other": 9.0}).to_numpy()
    values = centre + rng.normal(0, 2, 4000)
    tokens = pd.DataFrame({"item": rng.integers(0, 300, 4000).astype(str), "token": 0, "word": "dog", "label": label})
    means, areas = [], []
    for k in (1, 2, 4, 8):
        tokens[f"t_vhd_{k}"] = values * k**0.7
        for kind, rows in tokens.groupby("label"):
            mean, half = rows[f"t_vhd_{k}"].mean(), 2 * rows[f"t_vhd_{k}"].std() / len(rows) ** 0.5
            means.append((k, kind, mean, mean - half, mean + half, len(rows), 300))
        areas.append((k, 0.66, 0.61, 0.71, 160, 400, 280))
    return {
        "head_divergence_heads": heads,
        "head_divergence_tokens": tokens,
        "head_divergence_t_vhd": pd.DataFrame(
            means, columns=["k", "label", "mean", "low", "high", "n_tokens", "n_items"]
        ),
        "head_divergence_t_vhd_auroc": pd.DataFrame(
            areas, columns=["k", "auroc", "low", "high", "n_hallucinated", "n_true", "n_items"]
        ),
        "head_divergence_consistency": pd.DataFrame(
            {"comparison": ["first token, between items"], "spearman": [0.81], "n_maps": [300]}
        ),
    }


def showcase(
    folder: Path,
    condition: str,
    words: str = "the image shows a kitchen with a fork and a knife . there is a cup on the left .",
) -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(3)
    (folder / "showcase").mkdir(parents=True, exist_ok=True)
    pixels = np.full((64, 64, 3), (200, 190, 170), np.uint8)
    pixels[10:30, 8:26], pixels[35:60, 34:58] = (180, 40, 40), (40, 60, 180)
    Image.fromarray(pixels + rng.integers(0, 12, pixels.shape, dtype=np.uint8)).save(folder / "showcase" / "scene.png")
    items = pd.DataFrame(
        [("000012", "showcase/scene.png", condition, "describe this image in detail .", words, ["fork", "cup"], 4)],
        columns=["item", "image", "condition", "prompt", "caption", "truth", "k"],
    )
    rows, place = [], 0
    for i, word in enumerate(words.split()):
        start = words.index(word, place)
        place = start + len(word)
        label = {"fork": "object", "cup": "object", "knife": "hallucinated"}.get(word, "other")
        value = np.nan if i == 2 else {"object": 15.0, "hallucinated": 12.0, "other": 7.0}[label] + rng.normal()
        rows.append(("000012", i, word, start, place, value, label))
    table = pd.DataFrame(rows, columns=["item", "index", "word", "start", "end", "t_vhd", "label"])
    cells = []
    for index in table.loc[table["label"] != "other", "index"]:
        for layer, head, chosen in ((3, 1, True), (3, 4, True), (4, 0, False), (4, 2, False)):
            weights = rng.dirichlet(np.full(64, 0.15)) * (0.7 if chosen else 0.45)
            cells += [("000012", index, layer, head, chosen, p // 8, p % 8, w) for p, w in enumerate(weights)]
    attention = pd.DataFrame(cells, columns=["item", "index", "layer", "head", "chosen", "row", "column", "attention"])
    return {"showcase_items": items, "showcase_words": table, "showcase_attention": attention}


def _task(differences: pd.DataFrame) -> pd.Series:
    return differences["dataset"].map(lambda name: "pope" if "pope" in name else "captions")


def write_run(
    folder: Path, names: tuple[str, ...] = CONDITIONS, without: tuple[str, ...] = (), **replaced: pd.DataFrame
) -> Path:
    """A run folder; `without` leaves tables out by the beginning of their names."""
    scores = pd.concat([chair_scores(names), pope_scores(names)], ignore_index=True)
    pairs = [(name, names[0]) for name in names[1:]] + [(names[1], name) for name in names[2:]]
    info = [
        (
            name,
            "reference" if i == 0 else "treatment" if i == 1 else "control",
            names[1] if i > 1 else None,
            f"what {name} does",
        )
        for i, name in enumerate(names)
    ]
    tables = {
        "conditions": scores,
        "differences": differences(scores, pairs),
        "condition_info": pd.DataFrame(info, columns=["condition", "role", "control_of", "description"]),
        "matched_recall": matched_recall(names),
        "recall_curve": recall_curve(names),
        "chair_mentions": mentions(names),
        **head_tables(),
        **showcase(folder, names[0]),
        **replaced,
    }
    if len(pairs):
        rows = [(one, other, 0.65, -0.004, -0.02, 0.012, 0.6, 300) for one, other in pairs]
        tables["matched_differences"] = pd.DataFrame(
            rows, columns=["condition", "reference", "recall", "value", "low", "high", "p", "n_images"]
        ).assign(dataset=CAPTIONS)
    tables |= verdict_tables({**tables, "differences": tables["differences"].assign(task=_task)})
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        if not name.startswith(tuple(without)):
            table.to_parquet(folder / "tables" / f"{name}.parquet")
    config = {
        "title": "VHR on the embedded model",
        "model": {"id": "organism"},
        "conditions": {name: [] for name in names},
        "seed": 0,
        "level": 0.95,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    environment = {
        "model": "slitlamp/organism-seed0",
        "revision": None,
        "weights_hash": "0123456789abcdef" * 4,
        "device": "cpu",
        "dtype": "float32",
        "seed": 0,
        "versions": {"python": "3.11.2", "torch": "2.9.0"},
        "git_commit": "abc",
        "data": {CAPTIONS: "ffff"},
        "timing": {"total": 61.2},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Make a run folder; see `write_run`."""
    made: list[Path] = []

    def make(*args: object, **kwargs: object) -> Path:
        made.append(tmp_path / f"run{len(made)}")
        return write_run(made[-1], *args, **kwargs)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run; not to be changed."""
    return write_run(tmp_path_factory.mktemp("reports") / "demo")


@pytest.fixture(scope="session")
def composed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of several treatments and their pairs; not to be changed."""
    return composed(tmp_path_factory.mktemp("reports") / "composed")
