"""POPE: construction on worlds small enough to work out, both parsers, scores against hand counts and scikit-learn."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from slitlamp.errors import InputError, UnknownNameError
from slitlamp.evaluation import build_pope, parse_answer, pope_differences, pope_interactions, pope_items, pope_scores
from slitlamp.evaluation.pope import indefinite_article

# All but d.png have three objects. Frequencies without it: dog 3, cat 3, cup 2, bed 2, and one each of the others.
WORLD = {
    "a.png": ["dog", "cat", "cup"],
    "b.png": ["dog", "cat", "bed", "fork"],
    "c.png": ["apple", "dog", "cat", "cup", "bed"],
    "d.png": ["zebra", "cup"],
    "e.png": ["kite", "bus", "van"],
}


def asked(questions, image):
    return [(question.object, question.label) for question in questions if question.image == image]


def test_positives_are_the_first_three_each_followed_by_a_negative():
    questions = build_pope(WORLD, "random", seed=0, n_images=None)
    assert [question.question_id for question in questions] == list(range(1, 25))
    assert [question.image for question in questions] == ["a.png"] * 6 + ["b.png"] * 6 + ["c.png"] * 6 + ["e.png"] * 6
    assert [question.label for question in questions] == ["yes", "no"] * 12
    assert [name for name, label in asked(questions, "c.png") if label == "yes"] == ["apple", "dog", "cat"]


def test_popular_negatives_by_hand():
    questions = build_pope(WORLD, "popular", seed=0, n_images=None)
    # dog, cat, cup, bed, fork, apple, kite, bus, van: by frequency, ties in order of appearance.
    negatives = {image[0]: [name for name, label in asked(questions, image) if label == "no"] for image in WORLD}
    assert negatives == {
        "a": ["bed", "fork", "apple"],
        "b": ["cup", "apple", "kite"],
        "c": ["fork", "kite", "bus"],
        "d": [],
        "e": ["dog", "cat", "cup"],
    }


def test_adversarial_negatives_by_hand_and_their_fallback():
    world = {
        "a": ["dog", "cat", "cup"],
        "b": ["dog", "bed", "fork"],
        "c": ["dog", "bed", "kite"],
        "d": ["bus", "van", "jet"],
    }
    for seed in range(20):
        questions = build_pope(world, "adversarial", seed=seed, n_images=None)
        a = [name for name, label in asked(questions, "a") if label == "no"]
        # With dog: bed twice. With cat and cup only objects of the same image occur, so these two fall back.
        assert a[0] == "bed"
        assert set(a[1:]) <= {"fork", "kite", "bus", "van", "jet"}
        assert a[1] != a[2]
        b = [name for name, label in asked(questions, "b") if label == "no"]
        # With dog: bed is present, cat comes next; with bed: dog and fork are present, kite is left; fork falls back.
        assert b[:2] == ["cat", "kite"]
        assert b[2] in {"cup", "bus", "van", "jet"}
    fallbacks = {asked(build_pope(world, "adversarial", seed=s, n_images=None), "a")[3][0] for s in range(40)}
    # A uniform draw from five misses one of them in 40 trials with probability below 5 x .8^40 = .0007.
    assert fallbacks == {"fork", "kite", "bus", "van", "jet"}


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
@settings(max_examples=40, deadline=None)
@given(
    world=st.dictionaries(
        st.text("abcdef", min_size=1, max_size=3),
        st.lists(st.sampled_from([f"thing{i}" for i in range(9)]), max_size=5),
        min_size=1,
        max_size=8,
    ),
    seed=st.integers(0, 5),
)
def test_every_split_is_sound(split, world, seed):
    world = world | {"z1": ["thing0", "thing1", "thing2"], "z2": [f"thing{i}" for i in (3, 4, 5, 6, 7)]}
    world |= {"z3": ["thing8", "thing9", "thing10"]}
    questions = build_pope(world, split, seed=seed, n_images=None)
    assert {question.image for question in questions} == {name for name in world if len(set(world[name])) >= 3}
    for image in {question.image for question in questions}:
        pairs = asked(questions, image)
        assert len(pairs) == 6
        assert len({name for name, _ in pairs}) == 6
        assert all((name in world[image]) == (label == "yes") for name, label in pairs)


def test_images_are_drawn_alike_for_all_splits_and_frequencies_come_from_them():
    world = {f"{i}.png": [f"x{i}", f"y{i % 3}", f"z{i % 4}"] for i in range(40)}
    drawn = {
        split: {question.image for question in build_pope(world, split, seed=7, n_images=9)}
        for split in ("random", "popular", "adversarial")
    }
    assert drawn["random"] == drawn["popular"] == drawn["adversarial"]
    assert len(drawn["random"]) == 9
    assert drawn["random"] != {question.image for question in build_pope(world, "random", seed=8, n_images=9)}
    seen = {name for image in drawn["random"] for name in world[image]}
    assert {question.object for question in build_pope(world, "random", seed=7, n_images=9)} <= seen
    assert build_pope(world, "random", seed=7, n_images=9) == build_pope(world, "random", seed=7, n_images=9)


def test_question_text():
    world = {"a": ["apple", "dog", "umbrella"], "b": ["cat", "bed", "cup"]}
    texts = [question.text for question in build_pope(world, "random", seed=0, n_images=None)]
    assert texts[0] == "Is there an apple in the image?"
    assert texts[2] == "Is there a dog in the image?"
    other = build_pope(world, "random", seed=0, n_images=None, template=lambda name: f"Any {name}?")
    assert other[0].text == "Any apple?"
    assert indefinite_article("Owl") == "an"
    with pytest.raises(InputError, match="template"):
        build_pope(world, "random", seed=0, n_images=None, template="Is there {thing}?")


def test_build_pope_refuses_what_cannot_be_built():
    with pytest.raises(UnknownNameError, match="adversarial"):
        build_pope(WORLD, "adverserial", seed=0)
    with pytest.raises(InputError, match="500 images with at least 3 objects: found 4 among 5"):
        build_pope(WORLD, "random", seed=0)
    with pytest.raises(InputError, match="found 0 among 1"):
        build_pope({"a": ["dog", "dog", "dog"]}, "random", seed=0, n_images=None)
    with pytest.raises(InputError, match="n_positive"):
        build_pope(WORLD, "random", seed=0, n_positive=0)
    with pytest.raises(InputError, match="no absent object"):
        build_pope({"a": ["dog", "cat", "cup"]}, "random", seed=0, n_images=None)


@pytest.mark.parametrize(
    ("text", "official", "strict"),
    [
        ("yes", "yes", "yes"),
        ("Yes.", "yes", "yes"),
        ("YES", "yes", "yes"),
        ("no", "no", "no"),
        ("No.", "no", "no"),
        ("No, there is no dog in the image.", "no", "no"),
        ("no,there", "yes", "no"),  # taking the comma out leaves "nothere", which is no word of the official list
        ("NO", "yes", "no"),  # the official list is case-sensitive
        ("Not", "yes", None),
        ("There is not a dog.", "no", None),
        ("I see a cat. There is no dog.", "yes", "no"),  # the official rule reads the first sentence only
        ("Yes, and no.", "no", None),
        ("", "yes", None),
        ("I cannot tell", "yes", None),
        ("nothing, knots and yesterday", "yes", None),
        ("no\nanswer", "yes", "no"),  # only spaces separate words officially
    ],
)
def test_both_parsers(text, official, strict):
    assert parse_answer(text, "official") == official
    assert parse_answer(text, "strict") == strict


def test_parse_answer_refuses_other_rules_and_types():
    with pytest.raises(UnknownNameError, match="strict"):
        parse_answer("yes", "strickt")
    with pytest.raises(InputError, match="must be text"):
        parse_answer(None)


def predictions(rows):
    return pd.DataFrame(rows, columns=["image", "question_id", "label", "text"])


ANSWERS = predictions(
    [
        ("a", 1, "yes", "Yes."),  # true positive
        ("a", 2, "no", "yes"),  # false positive
        ("a", 3, "yes", "no"),  # false negative
        ("b", 4, "no", "No, there is no cup."),  # true negative
        ("b", 5, "yes", "Perhaps"),  # officially yes (true positive), strictly unparseable
        ("b", 6, "no", "dunno"),  # officially yes (false positive), strictly unparseable
    ]
)


def test_items_keep_other_columns_and_judge_both_rules():
    items = pope_items(ANSWERS.assign(split="random"))
    assert items["answer_official"].tolist() == ["yes", "yes", "no", "no", "yes", "yes"]
    assert items["answer_strict"].tolist() == ["yes", "yes", "no", "no", None, None]
    assert items["correct_official"].tolist() == [True, False, False, True, True, False]
    assert items["correct_strict"].tolist() == [True, False, False, True, False, False]
    assert items["split"].unique().tolist() == ["random"]
    assert "answer_strict" not in ANSWERS


def test_scores_by_hand():
    items = pope_items(ANSWERS)
    official = pope_scores(items).set_index("metric")
    # TP 2, FP 2, FN 1, TN 1.
    assert official["value"].to_dict() == pytest.approx(
        {
            "accuracy": 3 / 6,
            "precision": 2 / 4,
            "recall": 2 / 3,
            "f1": 4 / 7,
            "yes_ratio": 4 / 6,
            "unparseable": 2 / 6,
        }
    )
    strict = pope_scores(items, "strict").set_index("metric")
    # TP 1, FP 1; of three labelled yes one is found; 2 of 4 readable answers are yes.
    assert strict["value"].to_dict() == pytest.approx(
        {
            "accuracy": 2 / 6,
            "precision": 1 / 2,
            "recall": 1 / 3,
            "f1": 2 / 5,
            "yes_ratio": 2 / 4,
            "unparseable": 2 / 6,
        }
    )
    assert (strict["n_questions"] == 6).all()
    assert (strict["n_images"] == 2).all()
    assert (strict["low"] <= strict["value"]).all()
    assert (strict["value"] <= strict["high"]).all()


def random_items(rng, n_images=30, error=0.25):
    rows = []
    for image in range(n_images):
        for question in range(6):
            label = "yes" if question % 2 == 0 else "no"
            flip = rng.random() < error
            rows.append((f"{image:03d}", image * 6 + question + 1, label, "yes" if (label == "yes") != flip else "no"))
    return pope_items(predictions(rows))


def test_scores_agree_with_scikit_learn():
    items = random_items(np.random.default_rng(0))
    scores = pope_scores(items).set_index("metric")["value"]
    truth, said = items["label"], items["answer_official"]
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(truth, said, pos_label="yes", average="binary")
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(truth, said))
    assert (scores["precision"], scores["recall"], scores["f1"]) == pytest.approx((precision, recall, f1))
    assert scores["yes_ratio"] == pytest.approx((said == "yes").mean())
    assert scores["unparseable"] == 0


def test_interval_resamples_images_and_not_questions():
    # All six answers of an image are right or all are wrong: six times fewer independent observations than questions.
    rows = [(f"{i}", 6 * i + q, "yes", "yes" if i % 2 else "no") for i in range(50) for q in range(6)]
    accuracy = pope_scores(pope_items(predictions(rows))).set_index("metric").loc["accuracy"]
    # Standard error over images sqrt(.25 / 50) = .071; over questions it would be .029.
    assert accuracy["high"] - accuracy["low"] == pytest.approx(2 * 1.96 * 0.0707, rel=0.15)


def test_empty_denominators_are_nan():
    items = pope_items(predictions([("a", 1, "no", "no"), ("b", 2, "no", "No.")]))
    scores = pope_scores(items).set_index("metric")
    assert scores.loc["accuracy", "value"] == 1
    assert scores.loc[["precision", "recall", "f1"], ["value", "low", "high"]].isna().all(axis=None)
    nothing = pope_scores(pope_items(predictions([("a", 1, "no", "?"), ("b", 2, "yes", "?")])), "strict")
    assert np.isnan(nothing.set_index("metric").loc["yes_ratio", "value"])
    assert nothing.set_index("metric").loc["unparseable", "value"] == 1


def test_differences_by_hand_and_paired():
    rng = np.random.default_rng(2)
    a = random_items(rng, error=0.3)
    b = a.copy()
    wrong = b.index[~b["correct_official"]][::2]
    b.loc[wrong, "text"] = b.loc[wrong, "label"]
    b = pope_items(b[["image", "question_id", "label", "text"]])
    table = pope_differences(a, b.sample(frac=1, random_state=0)).set_index("metric")
    before, after = pope_scores(a).set_index("metric")["value"], pope_scores(b).set_index("metric")["value"]
    assert table["value"].to_dict() == pytest.approx((after - before).to_dict())
    assert table.loc["accuracy", "value"] == pytest.approx(len(wrong) / len(a))
    assert table.loc["accuracy", "low"] > 0
    assert table.loc["accuracy", "p"] < 0.01
    assert table.loc["unparseable", "p"] == 1
    same = pope_differences(a, a)
    assert (same["value"] == 0).all()
    assert (same["p"] == 1).all()


def test_interactions_by_hand_and_paired():
    rng = np.random.default_rng(4)
    four = [random_items(rng, error=error) for error in (0.4, 0.3, 0.35, 0.1)]
    four = [one.assign(label=four[0]["label"]) for one in four]
    four = [pope_items(one[["image", "question_id", "label", "text"]]) for one in four]
    levels = [pope_scores(one).set_index("metric")["value"] for one in four]
    table = pope_interactions(four[0], four[1].sample(frac=1, random_state=0), *four[2:]).set_index("metric")
    expected = (levels[3] - levels[0]) - (levels[1] - levels[0]) - (levels[2] - levels[0])
    assert table["value"].to_dict() == pytest.approx(expected.to_dict())
    assert (table["low"] <= table["value"]).all()
    with pytest.raises(InputError, match="on one side only"):
        pope_interactions(four[0], four[1], four[2].iloc[:-1], four[3])


def test_differences_refuse_other_questions():
    items = pope_items(ANSWERS)
    with pytest.raises(InputError, match="on one side only, for example image 'b', question_id 6"):
        pope_differences(items, items.iloc[:-1])
    with pytest.raises(InputError, match="labels differ"):
        pope_differences(items, pope_items(ANSWERS.assign(label=["no"] + ["yes"] * 5)))
    twice = pd.concat([items, items])
    with pytest.raises(InputError, match="twice"):
        pope_differences(twice, twice)
    # The same ids in two splits are different questions.
    both = pd.concat([items.assign(split="random"), items.assign(split="popular")])
    assert pope_differences(both, both)["n_questions"].eq(12).all()


def test_bad_tables_are_refused():
    with pytest.raises(InputError, match="lack the column"):
        pope_items(pd.DataFrame({"image": ["a"]}))
    with pytest.raises(InputError, match="question 1; files without labels"):
        pope_items(predictions([("a", 1, None, "yes")]))
    with pytest.raises(InputError, match="at least one question"):
        pope_scores(pope_items(ANSWERS).iloc[:0])
    with pytest.raises(UnknownNameError, match="official"):
        pope_scores(pope_items(ANSWERS), "oficial")
