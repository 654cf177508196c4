"""Tables from predictions: every number of a small case is worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from slitlamp.errors import InputError
from slitlamp.evaluation import GroundTruth, Synonyms
from slitlamp.experiments.datasets import Dataset, Item
from slitlamp.experiments.scores import score

WORDS = Synonyms({name: (name,) for name in ("dog", "cat", "cup")})
TRUTH = GroundTruth({1: frozenset({"dog", "cup"}), 2: frozenset({"cat"})})
CAPTIONS = Dataset(
    "set/captions", "captions", tuple(Item(str(i), Path(f"{i}.png"), "?", i) for i in (1, 2)), TRUTH, WORDS
)


def pope(name: str) -> Dataset:
    items = [("1", "a.png", "yes"), ("2", "a.png", "no"), ("3", "b.png", "yes"), ("4", "b.png", "no")]
    return Dataset(name, "pope", tuple(Item(i, Path(image), "?", image, label, "dog") for i, image, label in items))


def predictions(condition: str, data: Dataset, *texts: str) -> dict[tuple[str, str], pd.DataFrame]:
    frame = pd.DataFrame({"item": [item.id for item in data.items], "text": texts})
    return {(condition, data.name): frame}


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    one, two = pope("set/pope_one"), pope("set/pope_two")
    found = {
        **predictions("base", CAPTIONS, "a dog and a cat", "a cat and a cat and a dog"),
        **predictions("edit", CAPTIONS, "a dog and a cup", "a cat"),
        **predictions("base", one, "yes", "yes", "yes", "no"),
        **predictions("edit", one, "yes", "no", "yes", "no"),
        **predictions("base", two, "yes", "yes", "no", "maybe"),
        **predictions("edit", two, "yes", "yes", "no", "maybe"),
    }
    return score([CAPTIONS, one, two], ["base", "edit"], [("edit", "base")], found, n_resamples=100, level=0.95, seed=0)


def value(table: pd.DataFrame, **where: str) -> float:
    for column, wanted in where.items():
        table = table[table[column] == wanted]
    assert len(table) == 1
    return float(table["value"].iloc[0])


def test_levels(tables: dict[str, pd.DataFrame]) -> None:
    table = tables["conditions"]
    assert value(table, condition="base", dataset="set/captions", metric="chair_i") == pytest.approx(2 / 5)
    assert value(table, condition="base", dataset="set/captions", metric="recall") == pytest.approx(2 / 3)
    assert value(table, condition="edit", dataset="set/captions", metric="chair_i") == 0
    assert value(table, condition="base", dataset="set/pope_one", metric="accuracy") == pytest.approx(3 / 4)
    assert value(table, condition="base", dataset="set/pope_two", metric="accuracy") == pytest.approx(1 / 4)
    assert set(table["task"]) == {"pope", "captions"}


def test_the_strict_parser_has_a_table_of_its_own(tables: dict[str, pd.DataFrame]) -> None:
    assert value(
        tables["pope_strict"], condition="base", dataset="set/pope_two", metric="unparseable"
    ) == pytest.approx(1 / 4)


def test_splits_of_one_set_are_pooled_by_image(tables: dict[str, pd.DataFrame]) -> None:
    table = tables["conditions"]
    row = table[(table["dataset"] == "set/pope_all") & (table["metric"] == "accuracy") & (table["condition"] == "base")]
    assert row[["value", "n_questions", "n_images"]].iloc[0].tolist() == [0.5, 8, 2]


def test_differences_are_condition_minus_reference(tables: dict[str, pd.DataFrame]) -> None:
    table = tables["differences"]
    assert value(table, condition="edit", reference="base", dataset="set/pope_one", metric="accuracy") == pytest.approx(
        1 / 4
    )
    assert value(table, condition="edit", reference="base", dataset="set/captions", metric="chair_i") == pytest.approx(
        -2 / 5
    )
    assert value(table, condition="edit", reference="base", dataset="set/pope_all", metric="accuracy") == pytest.approx(
        1 / 8
    )


def test_rows_per_item_and_mention(tables: dict[str, pd.DataFrame]) -> None:
    assert len(tables["pope_items"]) == 2 * 2 * 4
    assert list(tables["pope_items"].columns[:3]) == ["condition", "dataset", "question_id"]
    rows = tables["chair_rows"].set_index(["condition", "image_id"])
    assert rows.loc[("base", 2), "n_hallucinated"] == 1
    assert rows.loc[("base", 1), "n_true_mentioned"] == 1
    assert len(tables["chair_mentions"]) == 5 + 3


def test_matched_recall_compares_at_the_lower_recall(tables: dict[str, pd.DataFrame]) -> None:
    matched = tables["matched_recall"].set_index("condition")
    assert matched["recall"].tolist() == pytest.approx([2 / 3, 2 / 3])
    pair = tables["matched_differences"].iloc[0]
    assert (pair["condition"], pair["reference"], pair["dataset"]) == ("edit", "base", "set/captions")
    assert pair["value"] == pytest.approx(matched.loc["edit", "value"] - matched.loc["base", "value"])
    assert pair["low"] <= pair["value"] <= pair["high"]


def test_predictions_of_other_items_are_refused() -> None:
    one = pope("set/pope_one")
    wrong = predictions("base", one, "yes", "yes", "yes", "no")
    wrong["base", one.name] = wrong["base", one.name].iloc[::-1]
    with pytest.raises(InputError, match="are not those of its items"):
        score([one], ["base"], [], wrong, n_resamples=100)
