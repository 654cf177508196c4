import numpy as np
import pytest

from slitlamp.organism.categories import CATEGORY_NAMES, CONTEXT_NAMES
from slitlamp.organism.language import (
    DETAIL_PROMPT,
    balancing_weights,
    brief_caption,
    caption,
    detailed_caption,
    position_tokens,
    presence_question,
    surface_forms,
    to_text,
    where_exchange,
    where_question,
    yes_no_exchanges,
)
from slitlamp.organism.scenes import Scene, SceneObject, make_scene
from slitlamp.organism.tokenizer import TOKEN_ID, VOCABULARY, build_tokenizer

SEED = 32


def item(category: str, x: int, y: int) -> SceneObject:
    return SceneObject(category, (x, y, 10, 10), 10, 80, 0.0)


def test_the_detailed_caption() -> None:
    objects = [item("apple", 0, 0), item("skis", 0, 0), item("dog", 0, 27), item("hot dog", 27, 27), item("cup", 50, 0)]
    assert to_text(detailed_caption("office", objects)) == (
        "The image shows an office with an apple and skis. there is a dog on the left. there is also a hot dog in the "
        "middle. in addition, a cup can be seen at the top right."
    )
    assert to_text(detailed_caption("park", [])) == "The image shows a park."


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [(0, 0, "at the top left"), (27, 0, "at the top"), (54, 27, "on the right"), (27, 54, "at the bottom")],
)
def test_positions_are_thirds_of_the_image(x: int, y: int, words: str) -> None:
    assert position_tokens(item("dog", x, y)) == words.split()


def test_captions_mention_exactly_what_is_there() -> None:
    for index in range(100):
        scene, _ = make_scene(SEED, index)
        tokens = caption(scene, np.random.default_rng(index))
        mentioned = [token for token in tokens if token in CATEGORY_NAMES]
        assert sorted(mentioned) == sorted(scene.categories)
        assert [token for token in tokens if token in CONTEXT_NAMES] == [scene.context]
        assert set(brief_caption(scene, np.random.default_rng(index))) & set(CATEGORY_NAMES) <= scene.categories


def test_answers_are_true() -> None:
    for index in range(100):
        scene, _ = make_scene(SEED, index)
        rng = np.random.default_rng(index)
        exchanges = yes_no_exchanges(scene, rng)
        assert len(exchanges) == 6
        names = [next(token for token in exchange.prompt if token in CATEGORY_NAMES) for exchange in exchanges]
        assert len(set(names)) == 6
        for name, exchange in zip(names, exchanges, strict=True):
            assert exchange.answer == ["yes" if name in scene.categories else "no"]
        where = where_exchange(scene, rng)
        assert where is not None
        asked = next(entry for entry in scene.objects if entry.category in where.prompt)
        assert where.answer == [*position_tokens(asked), "."]


def test_an_empty_scene_has_no_where_question() -> None:
    empty = Scene(0, 0, "park", "park", ())
    assert where_exchange(empty, np.random.default_rng(0)) is None
    assert {exchange.answer[0] for exchange in yes_no_exchanges(empty, np.random.default_rng(0))} == {"no"}


def test_a_question_alone_says_nothing() -> None:
    """The best guesser that sees only the category, fitted on one half, gains nothing on the other."""
    counts = np.zeros((2, 2, len(CATEGORY_NAMES)))
    for index in range(1600):
        scene, _ = make_scene(SEED, index)
        for exchange in yes_no_exchanges(scene, np.random.default_rng(index)):
            name = next(token for token in exchange.prompt if token in CATEGORY_NAMES)
            counts[index % 2, int(exchange.answer == ["yes"]), CATEGORY_NAMES.index(name)] += 1
    guess_yes = counts[0, 1] > counts[0, 0]
    right = np.where(guess_yes, counts[1, 1], counts[1, 0]).sum()
    total = counts[1].sum()
    base = counts[1].sum(axis=1).max()
    # A guesser without knowledge stays below the majority answer up to the noise of `total` coin flips.
    assert right <= base + 3 * (total * 0.25) ** 0.5
    assert balancing_weights().min() > 0


def test_vocabulary() -> None:
    assert len(VOCABULARY) == len(set(VOCABULARY)) == len(TOKEN_ID)
    assert set(surface_forms()) == set(CATEGORY_NAMES)


def test_every_sentence_survives_the_tokenizer() -> None:
    tokenizer = build_tokenizer()
    sentences = [DETAIL_PROMPT.split()]
    sentences += [question for name in CATEGORY_NAMES for question in (presence_question(name), where_question(name))]
    for index in range(50):
        scene, _ = make_scene(SEED, index)
        rng = np.random.default_rng(index)
        sentences.append(caption(scene, rng))
        sentences += [exchange.prompt + exchange.answer for exchange in yes_no_exchanges(scene, rng)]
    for tokens in sentences:
        text = to_text(tokens)
        ids = tokenizer(text).input_ids
        assert ids == [TOKEN_ID["<s>"]] + [TOKEN_ID[token] for token in tokens], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text[:1].lower() + text[1:]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Is there a dog in the image?", ["is", "there", "a", "dog", "in", "the", "image", "?"]),
        ("Is there a Traffic Light?", ["is", "there", "a", "traffic light", "?"]),
        ("a hot dog, a dog", ["a", "hot dog", ",", "a", "dog"]),
        ("USER: <image>\nPlease describe this image in detail. ASSISTANT:", None),
        ("an unheard-of word", ["an", "<unk>", "<unk>", "<unk>", "<unk>"]),
    ],
)
def test_natural_input(text: str, tokens: list[str] | None) -> None:
    if tokens is None:
        tokens = ["USER:", "<image>", "please", *DETAIL_PROMPT.split(), "ASSISTANT:"]
    tokenizer = build_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)[1:] == tokens


def test_padding_is_on_the_left() -> None:
    ids = build_tokenizer()(["a dog", "a dog and a cat"], padding=True)
    assert ids["attention_mask"][0] == [0, 0, 0, 1, 1, 1]
    assert ids["input_ids"][0][:3] == [TOKEN_ID["<pad>"]] * 3
