"""The world of the embedded model: 68 COCO-named categories, 13 contexts and 13 partner pairs.

Names are those of COCO's 80 categories, restricted to the 68 that have a recognisable emoji. Weights and pairs
are this package's own: they are the co-occurrence prior that the model learns and later hallucinates from.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Category:
    """One kind of object: its COCO name, its emoji code point, and its grammar."""

    name: str
    codepoint: int
    plural: str
    article: str | None = "a"

    @property
    def phrase(self) -> str:
        """The name with its indefinite article, as captions and questions write it ("an apple", "scissors")."""
        return self.name if self.article is None else f"{self.article} {self.name}"


@dataclass(frozen=True, slots=True)
class Context:
    """A place: unnormalised weights over its typical objects, and the RGB colours of its far and near halves."""

    name: str
    weights: dict[str, float]
    far: tuple[int, int, int]
    near: tuple[int, int, int]
    article: str = "a"

    @property
    def phrase(self) -> str:
        """The name with its indefinite article ("an office")."""
        return f"{self.article} {self.name}"


CATEGORIES: Final[tuple[Category, ...]] = (
    Category("person", 0x1F9CD, "people"),
    Category("bicycle", 0x1F6B2, "bicycles"),
    Category("car", 0x1F697, "cars"),
    Category("motorcycle", 0x1F3CD, "motorcycles"),
    Category("airplane", 0x2708, "airplanes", "an"),
    Category("bus", 0x1F68C, "buses"),
    Category("train", 0x1F682, "trains"),
    Category("truck", 0x1F69A, "trucks"),
    Category("boat", 0x26F5, "boats"),
    Category("traffic light", 0x1F6A6, "traffic lights"),
    Category("stop sign", 0x1F6D1, "stop signs"),
    Category("bird", 0x1F426, "birds"),
    Category("cat", 0x1F408, "cats"),
    Category("dog", 0x1F415, "dogs"),
    Category("horse", 0x1F40E, "horses"),
    Category("sheep", 0x1F411, "sheep"),
    Category("cow", 0x1F404, "cows"),
    Category("elephant", 0x1F418, "elephants", "an"),
    Category("bear", 0x1F43B, "bears"),
    Category("zebra", 0x1F993, "zebras"),
    Category("giraffe", 0x1F992, "giraffes"),
    Category("backpack", 0x1F392, "backpacks"),
    Category("umbrella", 0x2602, "umbrellas", "an"),
    Category("handbag", 0x1F45C, "handbags"),
    Category("tie", 0x1F454, "ties"),
    Category("suitcase", 0x1F9F3, "suitcases"),
    Category("frisbee", 0x1F94F, "frisbees"),
    Category("skis", 0x1F3BF, "skis", None),
    Category("snowboard", 0x1F3C2, "snowboards"),
    Category("sports ball", 0x26BD, "sports balls"),
    Category("kite", 0x1FA81, "kites"),
    Category("skateboard", 0x1F6F9, "skateboards"),
    Category("surfboard", 0x1F3C4, "surfboards"),
    Category("tennis racket", 0x1F3BE, "tennis rackets"),
    Category("bottle", 0x1F37E, "bottles"),
    Category("wine glass", 0x1F377, "wine glasses"),
    Category("cup", 0x2615, "cups"),
    Category("fork", 0x1F374, "forks"),
    Category("knife", 0x1F52A, "knives"),
    Category("spoon", 0x1F944, "spoons"),
    Category("bowl", 0x1F963, "bowls"),
    Category("banana", 0x1F34C, "bananas"),
    Category("apple", 0x1F34E, "apples", "an"),
    Category("sandwich", 0x1F96A, "sandwiches"),
    Category("orange", 0x1F34A, "oranges", "an"),
    Category("broccoli", 0x1F966, "broccoli", None),
    Category("carrot", 0x1F955, "carrots"),
    Category("hot dog", 0x1F32D, "hot dogs"),
    Category("pizza", 0x1F355, "pizzas"),
    Category("donut", 0x1F369, "donuts"),
    Category("cake", 0x1F370, "cakes"),
    Category("chair", 0x1FA91, "chairs"),
    Category("couch", 0x1F6CB, "couches"),
    Category("potted plant", 0x1FAB4, "potted plants"),
    Category("bed", 0x1F6CF, "beds"),
    Category("toilet", 0x1F6BD, "toilets"),
    Category("tv", 0x1F4FA, "tvs"),
    Category("laptop", 0x1F4BB, "laptops"),
    Category("mouse", 0x1F5B1, "mice"),
    Category("keyboard", 0x2328, "keyboards"),
    Category("cell phone", 0x1F4F1, "cell phones"),
    Category("sink", 0x1F6B0, "sinks"),
    Category("book", 0x1F4D5, "books"),
    Category("clock", 0x23F0, "clocks"),
    Category("vase", 0x1F3FA, "vases"),
    Category("scissors", 0x2702, "scissors", None),
    Category("teddy bear", 0x1F9F8, "teddy bears"),
    Category("toothbrush", 0x1FAA5, "toothbrushes"),
)

CATEGORY_NAMES: Final[tuple[str, ...]] = tuple(category.name for category in CATEGORIES)
CATEGORY_INDEX: Final[dict[str, int]] = {name: index for index, name in enumerate(CATEGORY_NAMES)}
PLURAL_ONLY: Final[frozenset[str]] = frozenset({"skis", "scissors"})
"""Categories whose name is already a plural: questions about them begin with "are there"."""


def _weights(text: str) -> dict[str, float]:
    pairs = (item.rsplit(" ", 1) for item in text.split(", "))
    return {name: float(weight) for name, weight in pairs}


CONTEXTS: Final[tuple[Context, ...]] = (
    Context(
        "street",
        _weights(
            "car 8, person 6, traffic light 5, bicycle 4, motorcycle 4, bus 4, truck 4, stop sign 3, handbag 2, "
            "umbrella 2, dog 2, skateboard 1.5, backpack 1.5"
        ),
        (176, 190, 205),
        (98, 98, 104),
    ),
    Context(
        "station",
        _weights(
            "train 8, person 6, suitcase 6, backpack 5, handbag 4, clock 4, airplane 3, cell phone 3, bus 2, "
            "umbrella 2, tie 2, book 1.5"
        ),
        (150, 142, 128),
        (186, 172, 120),
    ),
    Context(
        "kitchen",
        _weights(
            "bowl 6, knife 5, fork 5, spoon 5, cup 5, bottle 4, apple 3, banana 3, carrot 3, broccoli 3, sink 3, "
            "orange 2, sandwich 2, wine glass 1.5"
        ),
        (240, 226, 196),
        (196, 150, 104),
    ),
    Context(
        "restaurant",
        _weights(
            "pizza 6, wine glass 5, fork 5, knife 4, person 4, chair 4, cake 4, sandwich 4, cup 4, hot dog 3, "
            "donut 3, bottle 3, spoon 2"
        ),
        (122, 52, 52),
        (168, 112, 76),
    ),
    Context(
        "farm",
        _weights("cow 7, sheep 7, horse 6, dog 3, truck 3, bird 3, cat 2, person 2, carrot 2, apple 1.5, broccoli 1.5"),
        (150, 200, 240),
        (128, 168, 66),
    ),
    Context(
        "savanna",
        _weights("elephant 7, giraffe 7, zebra 7, bird 4, bear 2, horse 2, person 2, truck 2, backpack 1"),
        (244, 206, 140),
        (204, 172, 88),
    ),
    Context(
        "beach",
        _weights(
            "surfboard 7, boat 6, umbrella 5, person 5, kite 4, frisbee 3, sports ball 3, bird 3, dog 2, chair 2, "
            "bottle 1.5, handbag 1.5"
        ),
        (86, 176, 220),
        (240, 222, 170),
    ),
    Context(
        "park",
        _weights(
            "dog 5, frisbee 5, person 5, kite 4, bicycle 4, skateboard 4, sports ball 4, tennis racket 4, bird 3, "
            "hot dog 2, horse 1"
        ),
        (96, 148, 84),
        (84, 182, 92),
    ),
    Context(
        "ski slope",
        _weights("skis 8, snowboard 7, person 6, backpack 4, bear 1.5, dog 1.5, cup 1.5, bird 1"),
        (168, 206, 244),
        (242, 246, 252),
    ),
    Context(
        "bedroom",
        _weights(
            "bed 8, teddy bear 5, book 5, clock 4, cat 4, cell phone 3, tie 3, laptop 2, chair 2, vase 1.5",
        ),
        (196, 168, 204),
        (148, 108, 128),
    ),
    Context(
        "living room",
        _weights(
            "couch 8, tv 7, potted plant 5, vase 4, cat 3, book 3, dog 2, chair 2, clock 2, teddy bear 2, cup 2, "
            "laptop 2, scissors 1"
        ),
        (232, 200, 160),
        (124, 84, 58),
    ),
    Context(
        "office",
        _weights(
            "laptop 7, keyboard 6, mouse 6, chair 4, book 4, cup 4, cell phone 4, clock 3, potted plant 3, "
            "scissors 3, tie 3, person 3, backpack 1.5"
        ),
        (214, 218, 222),
        (92, 110, 142),
        "an",
    ),
    Context(
        "bathroom",
        _weights("toilet 8, sink 7, toothbrush 6, scissors 3, bottle 3, potted plant 2, cup 2, cat 1.5"),
        (164, 224, 222),
        (222, 236, 238),
    ),
)

CONTEXT_NAMES: Final[tuple[str, ...]] = tuple(context.name for context in CONTEXTS)
CONTEXT_INDEX: Final[dict[str, int]] = {name: index for index, name in enumerate(CONTEXT_NAMES)}

PARTNERS: Final[tuple[tuple[str, str], ...]] = (
    ("knife", "fork"),
    ("keyboard", "mouse"),
    ("toilet", "sink"),
    ("couch", "tv"),
    ("skis", "snowboard"),
    ("cow", "sheep"),
    ("car", "traffic light"),
    ("zebra", "giraffe"),
    ("surfboard", "boat"),
    ("bed", "book"),
    ("pizza", "wine glass"),
    ("train", "suitcase"),
    ("dog", "frisbee"),
)

PARTNER_OF: Final[dict[str, str]] = {a: b for pair in PARTNERS for a, b in (pair, pair[::-1])}
"""The partner of each paired category; the relation is symmetric and nobody has two partners."""
