from __future__ import annotations

import re

import numpy as np
import pandas as pd

from slitlamp.reports.words import Scale, coloured_words, words_legend

EVIL = "<script>alert('x')</script>\"&"


def words(**columns: list[object]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "word": ["a", EVIL, "dog"],
            "t_vhd": [1.0, np.nan, 3.0],
            "label": ["other", "hallucinated", "object"],
            **columns,
        }
    )


def text_of(html: str) -> str:
    return re.sub(r"<[^>]*>", "", re.sub(r"<sup.*?</sup>", "", html))


def test_words_are_escaped_and_marked() -> None:
    html = str(coloured_words(words()))
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert html.count('class="word ') == 3
    assert "not measured; hallucinated object" in html
    assert html.count("style=") == 2


def test_exact_text_is_kept_with_the_places_of_words() -> None:
    caption = "a  b<i>,dog!"
    table = pd.DataFrame(
        {
            "word": ["a", "b<i>", "dog"],
            "t_vhd": [1.0, 2.0, 3.0],
            "label": "other",
            "start": [0, 3, 8],
            "end": [1, 7, 11],
        }
    )
    assert text_of(str(coloured_words(table, caption))) == "a  b&lt;i&gt;,dog!"
    assert text_of(str(coloured_words(table.drop(columns="start"), caption))) == "a b&lt;i&gt; dog"


def test_labels_cannot_break_out_of_attributes() -> None:
    html = str(coloured_words(words(label=['"><script>', "x", None])))
    assert "<script" not in html
    assert 'class="word other"' in html


def test_scale() -> None:
    scale = Scale.of([2.0, np.nan, 4.0])
    assert (scale.place(2), scale.place(3), scale.place(9)) == (0, 0.5, 1)
    assert Scale.of([5.0]).place(5.0) == 0
    assert Scale.of([]) == Scale(0, 1)
    assert scale.colours(2.0)[1] == "#000000"
    assert scale.colours(4.0)[1] == "#ffffff"


def test_legend_says_range_and_marks() -> None:
    html = str(words_legend(words()))
    assert "T-VHD 1.0" in html
    assert "3.0" in html
    assert "hallucinated object" in html
    assert "hallucinated object" not in str(words_legend(words(label=["other", "other", "object"])))
