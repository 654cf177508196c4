"""CHAIR on captions small enough to count by hand, its file formats, and comparisons at matched recall."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slitlamp.errors import InputError
from slitlamp.evaluation import (
    GroundTruth,
    Synonyms,
    chair_differences,
    chair_interactions,
    chair_mentions,
    chair_rows,
    chair_scores,
    matched_recall,
    read_captions,
    recall_curve,
)

SYNONYMS = Synonyms({"dog": ("puppy",), "cat": (), "cup": (), "bed": (), "tv": ("television",), "kite": ()})
TRUTH = GroundTruth(
    {1: frozenset({"dog", "cat"}), 2: frozenset({"bed", "tv", "cup"}), 3: frozenset()},
    {"one.png": 1, "two.png": 2, "three.png": 3},
)
CAPTIONS = pd.DataFrame(
    [
        (1, "A dog, a puppy and a cup."),  # dog, dog true; cup not; of dog, cat one is named
        (2, "A television beside a kite and a kite ; two beds"),  # tv, bed true; kite twice not
        (3, "Nothing at all"),
    ],
    columns=["image_id", "caption"],
)


def test_mentions_by_hand():
    table = chair_mentions(CAPTIONS, TRUTH, SYNONYMS)
    assert table["image_id"].tolist() == [1, 1, 1, 2, 2, 2, 2]
    assert table["index"].tolist() == [1, 2, 3, 1, 2, 3, 4]
    assert table["category"].tolist() == ["dog", "dog", "cup", "tv", "kite", "kite", "bed"]
    assert table["text"].tolist() == ["dog", "puppy", "cup", "television", "kite", "kite", "beds"]
    assert table["hallucinated"].tolist() == [False, False, True, False, True, True, False]
    assert table["first"].tolist() == [True, False, True, True, True, False, True]
    assert table["word"].tolist() == [1, 3, 6, 1, 4, 7, 9]
    assert [
        CAPTIONS["caption"][i][s:e] for i, s, e in zip([0, 0, 0, 1, 1, 1, 1], table["start"], table["end"], strict=True)
    ] == table["text"].tolist()


def test_rows_by_hand():
    rows = chair_rows(CAPTIONS, TRUTH, SYNONYMS).set_index("image_id")
    assert rows["n_words"].tolist() == [7, 10, 3]
    assert rows["n_mentions"].tolist() == [3, 4, 0]
    assert rows["n_hallucinated"].tolist() == [1, 2, 0]
    assert rows["hallucinated_mentions"].tolist() == [["cup"], ["kite", "kite"], []]
    assert rows["n_categories"].tolist() == [2, 3, 0]
    assert rows["n_true_objects"].tolist() == [2, 3, 0]
    assert rows["n_true_mentioned"].tolist() == [1, 2, 0]
    assert rows["any_hallucinated"].tolist() == [True, True, False]


def test_scores_by_hand():
    table = chair_scores(chair_rows(CAPTIONS, TRUTH, SYNONYMS)).set_index("metric")
    assert table["value"].to_dict() == pytest.approx(
        {
            "chair_i": 3 / 7,
            "chair_s": 2 / 3,
            "recall": 3 / 5,
            "precision": 3 / 5,
            "f1": 2 * 3 / (5 + 5),
            "mean_words": 20 / 3,
            "mean_mentions": 7 / 3,
        }
    )
    assert (table["n_images"] == 3).all()
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()


def test_captions_that_name_nothing_have_no_chair_i():
    silent = chair_scores(chair_rows(CAPTIONS.assign(caption="Nothing"), TRUTH, SYNONYMS)).set_index("metric")
    assert silent.loc[["chair_i", "precision"], ["value", "low", "high"]].isna().all(axis=None)
    assert silent.loc["chair_s", "value"] == 0  # three captions, none with a hallucination: this one is a number
    assert silent.loc["recall", "value"] == 0
    assert silent.loc["f1", "value"] == 0
    assert silent.loc["chair_i", "n_images"] == 3
    mentions = chair_mentions(CAPTIONS.assign(caption="Nothing"), TRUTH, SYNONYMS)
    assert len(mentions) == 0
    assert mentions["hallucinated"].dtype == bool


def test_differences_by_hand():
    better = CAPTIONS.assign(caption=["A dog and a cat", "A tv and a bed and a kite", "Nothing at all"])
    a, b = (chair_rows(captions, TRUTH, SYNONYMS) for captions in (CAPTIONS, better))
    table = chair_differences(a, b.sample(frac=1, random_state=1)).set_index("metric")
    assert table.loc["chair_i", "value"] == pytest.approx(1 / 5 - 3 / 7)
    assert table.loc["chair_s", "value"] == pytest.approx(1 / 3 - 2 / 3)
    assert table.loc["recall", "value"] == pytest.approx(4 / 5 - 3 / 5)
    assert {"low", "high", "p", "n_images"} <= set(table.columns)
    assert (chair_differences(a, a)["p"] == 1).all()
    with pytest.raises(InputError, match="2 on one side only"):
        chair_differences(a, b.assign(image_id=[1, 2, 4]))


def test_interactions_by_hand():
    """chair_i of captions as they are, of two that each mend one, and of both at once: 3/7, 1/5, 3/7 and 1/5."""
    mended = CAPTIONS.assign(caption=["A dog and a cat", "A tv and a bed and a kite", "Nothing at all"])
    same, better = (chair_rows(captions, TRUTH, SYNONYMS) for captions in (CAPTIONS, mended))
    shuffled = better.sample(frac=1, random_state=1)
    redundant = chair_interactions(same, better, shuffled, better).set_index("metric")  # both mend the same
    assert redundant.loc["chair_i", "value"] == pytest.approx(-(1 / 5 - 3 / 7))
    assert redundant.loc["recall", "value"] == pytest.approx(-(4 / 5 - 3 / 5))
    additive = chair_interactions(same, shuffled, same, better)  # the second does nothing
    assert (additive["value"] == 0).all()
    assert (additive["p"] == 1).all()
    with pytest.raises(InputError, match="2 on one side only"):
        chair_interactions(same, better, same, better.assign(image_id=[1, 2, 4]))


def test_images_may_be_given_by_file_name():
    named = CAPTIONS.assign(image_id=["one.png", "two.png", "three.png"])
    rows = chair_rows(named, TRUTH, SYNONYMS)
    assert rows["image_id"].tolist() == ["one.png", "two.png", "three.png"]
    assert rows["n_hallucinated"].tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (CAPTIONS.iloc[:0], "at least one caption"),
        (CAPTIONS.drop(columns="caption"), "columns image_id, caption: found image_id"),
        (CAPTIONS.assign(image_id=1), "image 1 has several"),
        (CAPTIONS.assign(image_id=[1, 2, 99]), "image 99 is not in the ground truth of 3 images"),
        (CAPTIONS.assign(caption=["a", None, "b"]), "caption of image 2 is not text"),
    ],
)
def test_bad_captions_are_refused(captions, message):
    for judge in (chair_rows, chair_mentions):
        with pytest.raises(InputError, match=message):
            judge(captions, TRUTH, SYNONYMS)


def test_bad_rows_are_refused():
    rows = chair_rows(CAPTIONS, TRUTH, SYNONYMS)
    with pytest.raises(InputError, match="lacks n_words"):
        chair_scores(rows.drop(columns="n_words"))
    with pytest.raises(InputError, match="found none"):
        chair_scores(rows.iloc[:0])
    with pytest.raises(InputError, match="image 1 has several rows"):
        chair_scores(pd.concat([rows, rows]))


# --- files ---------------------------------------------------------------------------------------------------------

INSTANCES = {
    "images": [{"id": 1, "file_name": "one.png"}, {"id": 2, "file_name": "two.png"}],
    "annotations": [
        {"image_id": 1, "category_id": 18},
        {"image_id": 1, "category_id": 18},
        {"image_id": 1, "category_id": 72},
    ],
    "categories": [{"id": 18, "name": "dog"}, {"id": 72, "name": "tv"}],
}
REFERENCES = {
    "annotations": [
        {"image_id": 1, "caption": "A puppy with a cup"},
        {"image_id": 2, "caption": "an empty bed"},
        {"image_id": 2, "caption": "no kite"},
        {"image_id": 3, "caption": "an image of another set"},
    ]
}


@pytest.fixture
def coco(tmp_path):
    def write(name, value):
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return tmp_path / name

    return write


def test_ground_truth_joins_instances_and_captions(coco):
    instances, captions = coco("instances.json", INSTANCES), coco("captions.json", REFERENCES)
    alone = GroundTruth.from_coco(instances, synonyms=SYNONYMS)
    assert dict(alone.objects) == {1: {"dog", "tv"}, 2: set()}
    joined = GroundTruth.from_coco(instances, captions, synonyms=SYNONYMS)
    # A word counts even under "no": the published rule reads words only.
    assert dict(joined.objects) == {1: {"dog", "tv", "cup"}, 2: {"bed", "kite"}}
    assert joined.resolve("two.png") == 2
    assert dict(joined.subset(["two.png"]).objects) == {2: {"bed", "kite"}}


def test_ground_truth_joins_several_files(coco):
    later = INSTANCES | {"images": [{"id": 5}], "annotations": [{"image_id": 5, "category_id": 72}]}
    paths = [coco("val.json", INSTANCES), coco("train.json", later)]
    assert dict(GroundTruth.from_coco(paths, synonyms=SYNONYMS).objects) == {1: {"dog", "tv"}, 2: set(), 5: {"tv"}}


@pytest.mark.parametrize(
    ("instances", "message"),
    [
        ('{"images": [],\n"annotations": [}', r"instances\.json:2: is not valid JSON"),
        ({"images": []}, r"instances\.json: is not a COCO .* lacks the list 'annotations'"),
        ([1], "lacks the list 'images'"),
        (INSTANCES | {"annotations": [{"image_id": 1}]}, r"annotations\[0\] lacks one of image_id, category_id"),
        (INSTANCES | {"annotations": [{"image_id": 9, "category_id": 18}]}, "names image 9 or category 18"),
        (
            INSTANCES | {"categories": [{"id": 18, "name": "dgo"}, {"id": 72, "name": "tv"}]},
            "'dgo'.*did you mean 'dog'",
        ),
    ],
)
def test_bad_instances_are_refused(coco, instances, message):
    with pytest.raises(InputError, match=message):
        GroundTruth.from_coco(coco("instances.json", instances), synonyms=SYNONYMS)


def test_captions_of_other_images_are_refused(coco):
    half = {"annotations": [{"image_id": 1, "caption": "a dog"}]}
    with pytest.raises(InputError, match=r"1 of 2 images have no reference caption in .*first 2"):
        GroundTruth.from_coco(coco("i.json", INSTANCES), coco("c.json", half), synonyms=SYNONYMS)


GENERATED = [{"image_id": 7, "caption": "a dog"}, {"image_id": "x.png", "caption": 'a "cat" in imgToEval'}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(GENERATED),
        json.dumps(GENERATED, indent=2),
        "".join(json.dumps(record) + "\n" for record in GENERATED),
        json.dumps({"overall": {"CIDEr": 1}, "imgToEval": {str(r["image_id"]): r for r in GENERATED}}, indent=1),
    ],
    ids=["list", "indented-list", "lines", "imgToEval"],
)
def test_generated_captions(coco, text):
    assert read_captions(coco("out.json", text)) == [(7, "a dog"), ("x.png", 'a "cat" in imgToEval')]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 2 "caption": "b"}\n', r"out\.json:2: is not valid JSON"),
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 2}\n', r"out\.json:2: expected image_id .* and caption"),
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 1, "caption": "b"}\n', r"out\.json:2: image 1 has a second"),
        ('[\n{"image_id": 1.5, "caption": "a"}]', r"out\.json:2: expected image_id \(integer or string\)"),
        ('{"imgToEval": {"3": {"image_id": 3}}}', r"imgToEval\['3'\]: expected image_id"),
        ('{"imgToEval": [1]}', "must be an object"),
        ('{"imgToEval": {}}', "holds no caption"),
        ("", "is empty"),
    ],
)
def test_malformed_captions_name_the_place(coco, text, message):
    with pytest.raises(InputError, match=message):
        read_captions(coco("out.json", text))


# --- matched recall ------------------------------------------------------------------------------------------------


def mention_table(images):
    """From {image: [categories in order]} to the table of chair_mentions, against MATCH_TRUTH."""
    captions = pd.DataFrame([(k, ", ".join(v) or "-") for k, v in images.items()], columns=["image_id", "caption"])
    return chair_mentions(captions, MATCH_TRUTH, SYNONYMS)


MATCH_TRUTH = GroundTruth({1: frozenset({"dog", "cat"}), 2: frozenset({"bed", "cup"})})
LONG = {1: ["dog", "kite", "cat", "cup"], 2: ["bed", "bed", "tv"]}
SHORT = {1: ["dog"], 2: ["kite", "bed"]}


def test_recall_curve_by_hand():
    curve = recall_curve(mention_table(LONG), MATCH_TRUTH)
    # cut 1: dog, bed; cut 2: + kite (not there), bed again; cut 3: + cat, tv (not there); cut 4: + cup (not there)
    assert curve["cut"].tolist() == [0, 1, 2, 3, 4]
    assert curve["recall"].tolist() == [0, 2 / 4, 2 / 4, 3 / 4, 3 / 4]
    assert curve["chair_i"].tolist()[1:] == pytest.approx([0, 1 / 4, 2 / 6, 3 / 7])
    assert np.isnan(curve["chair_i"][0])
    assert (curve["n_images"] == 2).all()


def test_matched_recall_by_hand():
    tables = {"long": mention_table(LONG), "short": mention_table(SHORT)}
    # Full recalls 3/4 and 2/4: compared at 2/4, where short is whole (1 of 3). Long has it at cuts 1 and 2: the later.
    result = matched_recall(tables, MATCH_TRUTH, n_resamples=50).set_index("condition")
    assert result["recall"].tolist() == [0.5, 0.5]
    assert result["cut"].tolist() == [2, 2]
    assert result["value"].tolist() == pytest.approx([1 / 4, 1 / 3])
    assert result.loc["short", "difference"] == pytest.approx(1 / 3 - 1 / 4)
    assert np.isnan(result.loc["long", "difference"])
    assert result["full_recall"].tolist() == [0.75, 0.5]
    assert result["full_chair_i"].tolist() == pytest.approx([3 / 7, 1 / 3])
    # At recall 3/8 = 1.5 objects: long lies at cut 0.75 with 0 of 1.5 mentions; short at cut 1.5 with 1 of 2.5.
    at = matched_recall(tables, MATCH_TRUTH, 3 / 8, n_resamples=50).set_index("condition")
    assert at["cut"].tolist() == pytest.approx([0.75, 1.5])
    assert at["value"].tolist() == pytest.approx([0, 1 / 2.5])
    # At 5/8 = 2.5 objects long lies half-way between cuts 2 and 3: 1.5 of 5; short never gets there.
    alone = matched_recall({"long": tables["long"]}, MATCH_TRUTH, 5 / 8, n_resamples=50)
    assert alone["value"].tolist() == pytest.approx([1.5 / 5])
    with pytest.raises(InputError, match=r"full recalls are long 0\.750, short 0\.500"):
        matched_recall(tables, MATCH_TRUTH, 5 / 8)


def test_images_without_mentions_count_for_recall():
    truth = GroundTruth({**MATCH_TRUTH.objects, 3: frozenset({"tv", "kite", "cat", "dog"})})
    assert recall_curve(mention_table(LONG), truth)["recall"].max() == 3 / 8
    assert recall_curve(mention_table(LONG), truth, image_ids=[1, 2])["recall"].max() == 3 / 4
    with pytest.raises(InputError, match="image 2, which is not among the 1 images"):
        recall_curve(mention_table(LONG), truth, image_ids=[1])


def test_recall_outside_the_images_and_broken_tables_are_refused():
    table = mention_table(LONG)
    for recall in (0, -0.1, 0.76):
        with pytest.raises(InputError, match="not reached"):
            matched_recall({"a": table}, MATCH_TRUTH, recall)
    with pytest.raises(InputError, match="at least one condition"):
        matched_recall({}, MATCH_TRUTH)
    with pytest.raises(InputError, match="lacks first"):
        recall_curve(table.drop(columns="first"), MATCH_TRUTH)
    with pytest.raises(InputError, match="several conditions in one table"):
        recall_curve(pd.concat([table, table]), MATCH_TRUTH)
    with pytest.raises(InputError, match="at least one image"):
        recall_curve(table, MATCH_TRUTH, image_ids=[])


def world(rng, n_images, n_mentions):
    """Ground truth and captions over SYNONYMS's categories, the first mentions more often right."""
    names = np.array(SYNONYMS.categories)
    truth = {i: frozenset(rng.choice(names, size=3, replace=False).tolist()) for i in range(n_images)}
    captions = []
    for i in range(n_images):
        words = []
        for k in range(int(rng.integers(0, n_mentions + 1))):
            words.append(rng.choice(sorted(truth[i])) if rng.random() > 0.15 + 0.1 * k else rng.choice(names))
        captions.append((i, " ".join(words) or "-"))
    return GroundTruth(truth), pd.DataFrame(captions, columns=["image_id", "caption"])


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000))
def test_full_recall_gives_the_chair_of_full_captions_and_the_curve_is_monotone(seed):
    truth, captions = world(np.random.default_rng(seed), 12, 6)
    rows, mentions = chair_rows(captions, truth, SYNONYMS), chair_mentions(captions, truth, SYNONYMS)
    if not rows["n_true_mentioned"].sum():
        return
    scores = chair_scores(rows, n_resamples=20).set_index("metric")["value"]
    curve = recall_curve(mentions, truth)
    assert curve["recall"].is_monotonic_increasing
    assert curve["recall"].iloc[-1] == pytest.approx(scores["recall"])
    assert curve["chair_i"].iloc[-1] == pytest.approx(scores["chair_i"])
    full = matched_recall({"only": mentions}, truth, n_resamples=20)
    assert full["value"][0] == full["full_chair_i"][0] == pytest.approx(scores["chair_i"])
    assert full["recall"][0] == pytest.approx(scores["recall"])
    # Between two cuts the cut grows with the recall asked for, and CHAIR_i stays between its values at the two cuts.
    asked = np.linspace(0.05, 1, 12) * curve["recall"].iloc[-1]
    results = [matched_recall({"only": mentions}, truth, r, n_resamples=2).iloc[0] for r in asked]
    positions = [result["cut"] for result in results]
    assert positions == sorted(positions)
    for result in results:
        low, high = int(np.floor(result["cut"])), int(np.ceil(result["cut"]))
        around = curve["chair_i"].iloc[[max(low, 1), high]]
        assert around.min() - 1e-9 <= result["value"] <= around.max() + 1e-9


def test_matched_recall_of_a_condition_with_itself_shortened():
    # Captions that only stop earlier are no better at matched recall, though their CHAIR_i is much lower.
    truth, captions = world(np.random.default_rng(0), 400, 6)
    mentions = chair_mentions(captions, truth, SYNONYMS)
    result = matched_recall({"whole": mentions, "short": mentions[mentions["index"] <= 3]}, truth, n_resamples=300)
    result = result.set_index("condition")
    assert result.loc["short", "full_chair_i"] < result.loc["whole", "full_chair_i"] - 0.03
    assert result.loc["short", "difference"] == pytest.approx(0, abs=1e-9)
    assert result.loc["short", "difference_low"] <= 1e-9
    assert result.loc["short", "difference_high"] >= -1e-9
    assert (result["share_reached"] == 1).all()


def test_matched_intervals_cover_and_a_recall_at_the_edge_is_missed_by_half_of_the_resamples():
    truth, captions = world(np.random.default_rng(1), 200, 6)
    mentions = chair_mentions(captions, truth, SYNONYMS)
    whole = matched_recall({"only": mentions}, truth, n_resamples=1000).iloc[0]
    scores = chair_scores(chair_rows(captions, truth, SYNONYMS), n_resamples=1000).set_index("metric")
    # At its own full recall, redrawn in every resample, a condition has the very interval of its CHAIR_i.
    assert (whole["low"], whole["high"]) == pytest.approx(tuple(scores.loc["chair_i", ["low", "high"]]))
    edge = matched_recall({"only": mentions}, truth, whole["full_recall"], n_resamples=1000).iloc[0]
    # Half, with a binomial error of .016, and a recall that is not quite symmetric.
    assert edge["share_reached"] == pytest.approx(0.5, abs=0.08)
    assert matched_recall({"only": mentions}, truth, 0.7 * whole["full_recall"]).iloc[0]["share_reached"] == 1
