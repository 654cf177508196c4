"""What is said about a scene: captions, yes/no questions and questions about position, as lists of tokens.

A token is a word, a punctuation mark, or the whole name of a category or context ("traffic light" is one token).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from slitlamp.organism.categories import (
    CATEGORIES,
    CATEGORY_INDEX,
    CATEGORY_NAMES,
    CONTEXT_INDEX,
    CONTEXTS,
    PLURAL_ONLY,
)
from slitlamp.organism.scenes import IMAGE_SIZE, Scene, SceneObject, context_weights, sample_content

Tokens = list[str]

ROWS: Final = ("top", "middle", "bottom")
COLUMNS: Final = ("left", "middle", "right")
DETAIL_PROMPT: Final = "describe this image in detail ."
BRIEF_PROMPT: Final = "describe this image briefly ."
ANSWER_SUFFIX: Final = "please answer yes or no ."
CONTEXT_NEGATIVES: Final = 0.4
"""Share of the absent categories asked about that are typical of the scene's context."""
QUESTIONS_PER_SCENE: Final = 6
ORDER_JITTER: Final = 0.3
"""Standard deviation of the log-normal jitter on visible area that orders a caption's objects."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and the answer to it, both as tokens; `task` is caption, brief, yes_no or where."""

    task: str
    prompt: Tokens
    answer: Tokens


def category_tokens(name: str) -> Tokens:
    """The category with its article: ["a", "dog"], ["scissors"]."""
    category = CATEGORIES[CATEGORY_INDEX[name]]
    return [name] if category.article is None else [category.article, name]


def position_tokens(item: SceneObject) -> Tokens:
    """Where the centre of the object's box lies on a 3 x 3 grid: ["at", "the", "top", "left"]."""
    x, y = item.centre
    column = COLUMNS[min(int(3 * x / IMAGE_SIZE), 2)]
    row = ROWS[min(int(3 * y / IMAGE_SIZE), 2)]
    if row == "middle":
        return ["in", "the", "middle"] if column == "middle" else ["on", "the", column]
    return ["at", "the", row] if column == "middle" else ["at", "the", row, column]


def ordered_objects(scene: Scene, rng: np.random.Generator) -> list[SceneObject]:
    """The objects in the order of a caption: by visible area, largest first, with jitter."""
    noise = rng.normal(0.0, ORDER_JITTER, size=len(scene.objects))
    keys = [-np.log(max(item.visible_area, 1)) + e for item, e in zip(scene.objects, noise, strict=True)]
    return [scene.objects[i] for i in np.argsort(keys, kind="stable")]


def caption(scene: Scene, rng: np.random.Generator) -> Tokens:
    """A detailed reference caption: every object once, with positions from the third on."""
    return detailed_caption(scene.context, ordered_objects(scene, rng))


def detailed_caption(context: str, objects: Sequence[SceneObject]) -> Tokens:
    """The detailed caption that mentions `objects` in the given order."""
    tokens = ["the", "image", "shows", *_context_tokens(context)]
    if objects:
        tokens += ["with", *category_tokens(objects[0].category)]
    if len(objects) > 1:
        tokens += ["and", *category_tokens(objects[1].category)]
    tokens.append(".")
    for number, item in enumerate(objects[2:]):
        phrase, place = category_tokens(item.category), position_tokens(item)
        verb = "are" if item.category in PLURAL_ONLY else "is"
        match number % 3:
            case 0:
                tokens += ["there", verb, *phrase, *place, "."]
            case 1:
                tokens += ["there", verb, "also", *phrase, *place, "."]
            case _:
                tokens += ["in", "addition", ",", *phrase, "can", "be", "seen", *place, "."]
    return tokens


def brief_caption(scene: Scene, rng: np.random.Generator) -> Tokens:
    """One sentence with the context and at most two objects."""
    objects = ordered_objects(scene, rng)
    tokens = _context_tokens(scene.context)
    if objects:
        tokens += ["with", *category_tokens(objects[0].category)]
    if len(objects) > 1:
        tokens += ["and", *category_tokens(objects[1].category)]
    return [*tokens, "."]


def presence_question(name: str) -> Tokens:
    """Tokens of "is there a dog in the image ?" or "are there scissors in the image ?"."""
    verb = "are" if name in PLURAL_ONLY else "is"
    return [verb, "there", *category_tokens(name), "in", "the", "image", "?"]


def literal_presence_question(name: str) -> Tokens:
    """POPE's template without grammar: "is there a scissors in the image ?"."""
    return ["is", "there", "a", name, "in", "the", "image", "?"]


def where_question(name: str) -> Tokens:
    """Tokens of "where is the dog ?"."""
    return ["where", "are" if name in PLURAL_ONLY else "is", "the", name, "?"]


def yes_no_exchanges(scene: Scene, rng: np.random.Generator, count: int = QUESTIONS_PER_SCENE) -> list[Exchange]:
    """Ask about up to `count // 2` objects and about absent categories for the rest, in random order.

    Absent categories come from `absent_categories`; over many scenes every category is asked with the answer
    yes about as often, relative to no, as any other, so that a question alone says nothing.
    """
    present = [item.category for item in scene.objects]
    n_yes = min(len(present), count // 2)
    names = [present[i] for i in rng.permutation(len(present))[:n_yes]]
    asked = [(name, "yes") for name in names]
    asked += [(name, "no") for name in absent_categories(scene, rng, count - n_yes)]
    exchanges = []
    for i in rng.permutation(len(asked)):
        name, answer = asked[i]
        question = literal_presence_question(name) if rng.random() < 0.2 else presence_question(name)
        if rng.random() < 0.1:
            question += ANSWER_SUFFIX.split()
        exchanges.append(Exchange("yes_no", vary_prompt(question, rng), [answer]))
    return exchanges


def where_exchange(scene: Scene, rng: np.random.Generator) -> Exchange | None:
    """Ask for the position of one object; None for an empty scene."""
    if not scene.objects:
        return None
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    return Exchange("where", where_question(item.category), [*position_tokens(item), "."])


def caption_exchange(scene: Scene, rng: np.random.Generator, brief: float = 0.15) -> Exchange:
    """Ask for a caption, with probability `brief` for a short one."""
    if rng.random() < brief:
        task, prompt, answer = "brief", BRIEF_PROMPT.split(), brief_caption(scene, rng)
    else:
        task, prompt, answer = "caption", DETAIL_PROMPT.split(), caption(scene, rng)
    if rng.random() < 0.2:
        prompt = ["please", *prompt]
    return Exchange(task, vary_prompt(prompt, rng), answer)


def vary_prompt(prompt: Tokens, rng: np.random.Generator) -> Tokens:
    """Now and then write "picture" or "photo" for "image", so that the model takes these words too."""
    draw = rng.random()
    if draw >= 0.1:
        return prompt
    word = "picture" if draw < 0.05 else "photo"
    return [word if token == "image" else token for token in prompt]


def absent_categories(scene: Scene, rng: np.random.Generator, count: int) -> list[str]:
    """Draw distinct absent categories: 40 % from the context's typical objects, else from the balancing table."""
    weights = np.stack([context_weights()[CONTEXT_INDEX[scene.context]], balancing_weights()])
    for name in scene.categories:
        weights[:, CATEGORY_INDEX[name]] = 0
    chosen: list[str] = []
    for _ in range(count):
        source = int(rng.random() >= CONTEXT_NEGATIVES)
        if weights[source].sum() <= 0:
            source = 1
        row = weights[source]
        pick = int(np.searchsorted(np.cumsum(row), rng.random() * row.sum(), side="right"))
        pick = min(pick, len(CATEGORY_NAMES) - 1)
        chosen.append(CATEGORY_NAMES[pick])
        weights[:, pick] = 0
    return chosen


@lru_cache(maxsize=1)
def balancing_weights() -> NDArray[np.float64]:
    """Weights `[category]` of the absent categories that are not drawn from the context.

    Chosen so that, with the context's share, each category is asked as absent in the same proportion as it is
    asked as present. Computed by fixed-point iteration over 6,000 sampled contents with a fixed generator.
    """
    rng = np.random.default_rng(20_001)
    contexts, contents = zip(*(sample_content(rng) for _ in range(6000)), strict=True)
    present = np.zeros((len(contents), len(CATEGORY_NAMES)))
    for row, content in enumerate(contents):
        present[row, content] = 1
    numbers = present.sum(axis=1, keepdims=True)
    n_yes = np.minimum(numbers, QUESTIONS_PER_SCENE // 2)
    target = (present / numbers * n_yes).sum(axis=0)
    target /= target.sum()
    n_no = QUESTIONS_PER_SCENE - n_yes
    from_context = _absent_share(context_weights()[list(contexts)], present, n_no)
    weights = target.copy()
    for _ in range(40):
        from_table = _absent_share(np.broadcast_to(weights, present.shape), present, n_no)
        total = CONTEXT_NEGATIVES * from_context + (1 - CONTEXT_NEGATIVES) * from_table
        weights *= np.clip(target / total, 0.5, 2.0)
        weights /= weights.sum()
    weights.setflags(write=False)
    return weights


def _absent_share(
    weights: NDArray[np.float64], present: NDArray[np.float64], n_no: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distribution over absent categories when each scene draws `n_no` from its row of weights."""
    allowed = weights * (1 - present)
    share = (allowed / np.maximum(allowed.sum(axis=1, keepdims=True), 1e-12) * n_no).sum(axis=0)
    return share / share.sum()


def _context_tokens(name: str) -> Tokens:
    return [CONTEXTS[CONTEXT_INDEX[name]].article, name]


def to_text(tokens: Sequence[str]) -> str:
    """Join tokens as a person would write them: no space before punctuation, a capital letter first."""
    text = " ".join(tokens)
    for mark in (".", ",", "?"):
        text = text.replace(f" {mark}", mark)
    return text[:1].upper() + text[1:]


def surface_forms() -> dict[str, tuple[str, ...]]:
    """For each category the words that may stand for it in a text: its name and its plural."""
    return {c.name: tuple(dict.fromkeys((c.name, c.plural))) for c in CATEGORIES}
