"""What each number of a run is called, what it means in one sentence, its unit, and its value by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Metric:
    """One number of a run: label on axes, unit, digits, which way is better ("" where neither), chance, meaning."""

    name: str
    label: str
    unit: str
    better: str
    meaning: str
    digits: int = 3
    chance: float | None = None
    chance_name: str = ""

    @property
    def axis(self) -> str:
        """Axis label with its unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


_METRICS: Final = (
    Metric(
        "chair_i",
        "CHAIR_i",
        "share of mentions",
        "lower",
        "share of the objects named in captions that are not in the image",
    ),
    Metric(
        "chair_i_matched",
        "CHAIR_i at equal recall",
        "share of mentions",
        "lower",
        "CHAIR_i with every caption cut so that both sides of a comparison name the same share of the true objects",
    ),
    Metric(
        "chair_s",
        "CHAIR_s",
        "share of captions",
        "lower",
        "share of captions that name at least one object that is not in the image",
    ),
    Metric(
        "recall", "Recall", "share of objects", "higher", "share of the objects in the images that the captions name"
    ),
    Metric("precision", "Precision", "share of mentions", "higher", "share of the positive statements that are right"),
    Metric("f1", "F1", "0 to 1", "higher", "harmonic mean of precision and recall"),
    Metric(
        "accuracy",
        "Accuracy",
        "share of questions",
        "higher",
        "share of the questions answered rightly",
        3,
        0.5,
        "chance",
    ),
    Metric(
        "yes_ratio",
        "Yes ratio",
        "share of answers",
        "",
        "share of the answers that are yes; half of them should be",
        3,
        0.5,
        "truth",
    ),
    Metric(
        "unparseable",
        "Unparseable",
        "share of answers",
        "lower",
        "share of the answers that are neither a clear yes nor a clear no",
    ),
    Metric("mean_words", "Length", "words per caption", "", "mean length of a caption", 1),
    Metric(
        "perplexity",
        "Perplexity",
        "unmodified model",
        "",
        "how surprised the unmodified model is by a token of the captions, on average: 1 if it were certain of each",
        2,
    ),
    Metric("mean_mentions", "Mentions", "objects per caption", "", "mean number of objects named in a caption", 2),
)
METRICS: Final = {metric.name: metric for metric in _METRICS}

POPE_F1: Final = Metric("f1", "F1", "positive class: yes", "higher", METRICS["f1"].meaning, 3, 2 / 3, "always yes")
"""F1 on POPE has a chance line of its own: half of the answers are yes, so a model that always says yes reaches 2/3."""


def metric(name: str, dataset: str = "") -> Metric:
    """The description of a metric, a plain one where it is not known."""
    if name == "f1" and is_pope(dataset):
        return POPE_F1
    return METRICS.get(name, Metric(name, name, "", "", ""))


def is_pope(dataset: str) -> bool:
    """Whether a data set is one of POPE's splits, by its name."""
    return "pope" in dataset.lower()


def split_name(dataset: str) -> str:
    """The split of a POPE data set ("emoji_scenes/pope_random" -> "random"); other names without their folder."""
    last = str(dataset).rsplit("/", 1)[-1]
    return last[5:] if last.lower().startswith("pope_") else last


DEFINITIONS: Final = {
    "POPE": (
        "POPE asks yes/no questions (“Is there a dog in the image?”), half of them about objects that are not there: "
        "absent objects are drawn at random, from the most popular ones, or (adversarial) from those that usually "
        "appear together with what the image does show."
    ),
    "CHAIR": (
        "CHAIR counts hallucinated objects in free captions: CHAIR_i is the share of named objects that are not in the "
        "image, CHAIR_s the share of captions with at least one such object, and recall says how many of the true "
        "objects were named."
    ),
    "VHD": (
        "VHD (vision-aware head divergence) is how far the output of an attention head moves (L2 distance) when the "
        "image is taken away and the words so far are kept: heads with a high VHD read the image, heads with a low VHD "
        "read the text."
    ),
    "T-VHD": (
        "T-VHD of a word is the sum of VHD, at the moment of writing that word, over the most divergent heads of every "
        "layer: a high T-VHD says that the word was written with the image in view."
    ),
    "VHR": (
        "VHR (vision-aware head reinforcement) multiplies the outputs of the half of the heads with the highest VHD, "
        "chosen anew for every prompt, so that what they read in the image weighs more."
    ),
    "matched recall": (
        "A model that names fewer objects hallucinates fewer; so all conditions are also compared at the same recall: "
        "every caption is cut after its k-th mention, with k such that all conditions name the same share of the true "
        "objects."
    ),
    "control": (
        "A control makes an equally large change that does not use the idea under test (as many heads, tokens or layers "
        "drawn at random, say, or another image); only what goes beyond it speaks for the idea."
    ),
    "interval": (
        "Brackets hold {level} intervals from a bootstrap over images; differences are paired (the same images on both "
        "sides). A difference whose interval contains zero is not a finding."
    ),
}
"""One sentence for each term of the report, for a reader who has never met it."""
