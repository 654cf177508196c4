"""CHAIR's words: plurals, double words and the special rules, on the names of all COCO categories."""

import pytest

from slitlamp.errors import InputError, UnknownNameError
from slitlamp.evaluation import Synonyms
from slitlamp.evaluation.synonyms import n_words

# The 80 categories of COCO with their plurals, and a few synonyms of our own choosing.
COCO = """
person people, bicycle bicycles, car cars, motorcycle motorcycles, airplane airplanes, bus buses, train trains,
truck trucks, boat boats, traffic_light traffic_lights, fire_hydrant fire_hydrants, stop_sign stop_signs,
parking_meter parking_meters, bench benches, bird birds, cat cats, dog dogs, horse horses, sheep sheep, cow cows,
elephant elephants, bear bears, zebra zebras, giraffe giraffes, backpack backpacks, umbrella umbrellas,
handbag handbags, tie ties, suitcase suitcases, frisbee frisbees, skis skis, snowboard snowboards,
sports_ball sports_balls, kite kites, baseball_bat baseball_bats, baseball_glove baseball_gloves,
skateboard skateboards, surfboard surfboards, tennis_racket tennis_rackets, bottle bottles, wine_glass wine_glasses,
cup cups, fork forks, knife knives, spoon spoons, bowl bowls, banana bananas, apple apples, sandwich sandwiches,
orange oranges, broccoli broccoli, carrot carrots, hot_dog hot_dogs, pizza pizzas, donut donuts, cake cakes,
chair chairs, couch couches, potted_plant potted_plants, bed beds, dining_table dining_tables, toilet toilets, tv tvs,
laptop laptops, mouse mice, remote remotes, keyboard keyboards, cell_phone cell_phones, microwave microwaves,
oven ovens, toaster toasters, sink sinks, refrigerator refrigerators, book books, clock clocks, vase vases,
scissors scissors, teddy_bear teddy_bears, hair_drier hair_driers, toothbrush toothbrushes
"""
PLURALS = {
    name.replace("_", " "): plural.replace("_", " ")
    for name, plural in (pair.split() for pair in COCO.replace("\n", " ").split(","))
}
EXTRA = {
    "person": "man, woman, child, baby, adult, passenger, policeman, lady, people",
    "airplane": "plane, jet, air plane",
    "dog": "puppy",
    "bird": "goose",
    "cow": "calf, cattle, ox",
    "bus": "minibus",
    "chair": "seat, stool",
    "tie": "bow tie, bow",
    "dining table": "table",
    "cell phone": "phone, mobile phone, iPhone",
    "oven": "stove, stove top oven",
    "couch": "sofa, loveseat",
    "traffic light": "stop light",
    "sports ball": "ball",
    "donut": "doughnut",
    "skis": "ski",
}


@pytest.fixture(scope="module")
def synonyms(tmp_path_factory):
    path = tmp_path_factory.mktemp("coco") / "synonyms.txt"
    path.write_text("".join(f"{name}, {EXTRA[name]} \n" if name in EXTRA else f"{name}\n" for name in PLURALS))
    return Synonyms.read(path)


def categories(synonyms, caption):
    return [mention.category for mention in synonyms.mentions(caption)]


def test_all_categories_are_found_in_singular_and_plural(synonyms):
    assert len(PLURALS) == len(synonyms.categories) == 80
    for name, plural in PLURALS.items():
        for form in (name, plural, name.upper(), plural.title()):
            assert categories(synonyms, f"There might be {form}, or not.") == [name], form
            assert synonyms.category(form) == name


@pytest.mark.parametrize(
    ("word", "category"),
    [
        ("men", "person"),
        ("women", "person"),
        ("children", "person"),
        ("babies", "person"),
        ("policemen", "person"),
        ("ladies", "person"),
        ("puppies", "dog"),
        ("geese", "bird"),
        ("calves", "cow"),
        ("oxen", "cow"),
        ("cattle", "cow"),
        ("minibus", "bus"),
        ("minibuses", "bus"),
        ("doughnuts", "donut"),
        ("ski", "skis"),
        ("iPhones", "cell phone"),
        ("sofas", "couch"),
        ("air planes", "airplane"),
    ],
)
def test_irregular_plurals_and_synonyms(synonyms, word, category):
    assert categories(synonyms, f"two {word} here") == [category]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a hot dog on a table", ["hot dog", "dining table"]),
        ("a hot, dog-tired man", ["person"]),
        ("a hot. dog", ["dog"]),
        ("hot dogs and dogs", ["hot dog", "dog"]),
        ("a baby elephant beside an adult elephant", ["elephant", "elephant"]),
        ("baby birds", ["bird"]),
        ("a baby and a bird", ["person", "bird"]),
        ("an adult animal and a baby cub", []),
        ("a passenger jet over a passenger train", ["airplane", "train"]),
        ("a passenger in a car", ["person", "car"]),
        ("a man in a bow tie", ["person", "tie"]),
        ("a toilet seat", ["toilet"]),
        ("the seat of the toilet beside a chair", ["toilet", "chair"]),
        ("a seat", ["chair"]),
        ("two wine glasses", ["wine glass"]),
        ("a glass of wine in glasses", []),
        ("a runner slides into home plate", []),
        ("train tracks beside a train", ["train"]),
        ("a teddy bear and a bear", ["teddy bear", "bear"]),
        ("stop lights", ["traffic light"]),
        ("a street light", []),
        ("a stove top oven", ["oven"]),
        ("a stove and an oven", ["oven", "oven"]),
        ("a dining table, tables", ["dining table", "dining table"]),
        ("a dog, a dog and the dog's ball", ["dog", "dog", "dog", "sports ball"]),
        ("a car/truck and a stop_sign", ["car", "truck", "stop sign"]),
        ("scarves, carpets, buses", ["bus"]),
        ("", []),
        ("...", []),
    ],
)
def test_rules(synonyms, caption, expected):
    assert categories(synonyms, caption) == expected


def test_words_that_only_look_like_plurals_mention_nothing(synonyms):
    assert (
        categories(synonyms, "this is his, as was tennis; it does its gas, lens, canvas, always across the grass") == []
    )


def test_mentions_know_their_place(synonyms):
    caption = "Three big  Hot Dogs , a man's tie - and\nhot dog."
    mentions = synonyms.mentions(caption)
    assert [(item.category, item.text, item.word) for item in mentions] == [
        ("hot dog", "Hot Dogs", 2),
        ("person", "man", 5),
        ("tie", "tie", 6),
        ("hot dog", "hot dog", 8),
    ]
    assert all(caption[item.start : item.end] == item.text for item in mentions)
    assert n_words(caption) == 10
    assert n_words(" . ") == 0


def test_a_double_word_that_the_file_lacks_is_still_one_word(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text("dog, puppy\ntrain\nbear\n")
    assert categories(Synonyms.read(path), "a hot dog on a train track with a teddy bear and a puppy") == ["dog"]


def test_file_is_read_leniently_in_space_and_strictly_in_sense(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text("dog,  puppy ,Hound, dog\n\n  wine   glass\n")
    synonyms = Synonyms.read(path)
    assert dict(synonyms.words) == {"dog": ("dog", "puppy", "hound"), "wine glass": ("wine glass",)}
    for text, message in [
        ("dog, puppy\ncat, puppy\n", r"synonyms\.txt:2: 'puppy' already stands for 'dog' on line 1"),
        ("dog\ndog\n", r"synonyms\.txt:2: 'dog' already"),
        ("dog,,puppy\n", r"synonyms\.txt:1: has an empty entry"),
        ("\n", "holds no category"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            Synonyms.read(path)
    with pytest.raises(InputError, match="both 'dog' and 'cat'"):
        Synonyms({"dog": ("pet",), "cat": ("pet",)})
    with pytest.raises(UnknownNameError, match="did you mean 'dog'"):
        synonyms.category("dogg")
