from __future__ import annotations

from slitlamp.evaluation import GroundTruth, Synonyms
from slitlamp.experiments.labels import token_labels

SYNONYMS = Synonyms({"dog": ("dog",), "hot dog": ("hot dog",), "toaster": ("toaster",)})
TRUTH = GroundTruth({7: frozenset({"dog", "toaster"})})


def spans(*tokens: str) -> tuple[str, list[tuple[int, int]]]:
    """The text that the tokens make, and the range of each."""
    text, found = "", []
    for token in tokens:
        start = len(text) + (len(token) - len(token.lstrip()))
        text += token
        found.append((start, len(text)))
    return text, found


def test_a_mention_is_labelled_at_its_first_token_and_once() -> None:
    text, places = spans("a", " dog", " ,", " a", " hot", " dog", " and", " a", " to", "aster", ".")
    table = token_labels(text, places, 7, TRUTH, SYNONYMS)
    assert table["word"].tolist() == ["a", "dog", ",", "a", "hot", "dog", "and", "a", "to", "aster", "."]
    assert table["label"].tolist() == [
        "other",
        "object",
        *["other"] * 2,
        "hallucinated",
        *["other"] * 3,
        "object",
        *["other"] * 2,
    ]
    assert table["category"].dropna().tolist() == ["dog", "hot dog", "toaster"]


def test_tokens_without_characters_have_no_row() -> None:
    text, places = spans("a", " dog")
    table = token_labels(text, [*places, (len(text), len(text))], 7, TRUTH, SYNONYMS)
    assert table["token"].tolist() == [0, 1]
    assert token_labels("", [(0, 0)], 7, TRUTH, SYNONYMS).empty


def test_a_token_of_several_words_is_one_mention() -> None:
    table = token_labels("a hot dog", [(0, 1), (2, 9)], 7, TRUTH, SYNONYMS)
    assert table["label"].tolist() == ["other", "hallucinated"]
