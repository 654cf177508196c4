"""POPE's file formats, and the line that every malformed file is reported at."""

import base64
import json

import pytest

from slitlamp.errors import InputError
from slitlamp.evaluation import (
    PopeQuestion,
    build_pope,
    pope_items,
    read_pope,
    read_pope_answers,
    read_tsv_images,
    write_pope,
)

OFFICIAL = [
    {"question_id": 1, "image": "x.jpg", "text": "Is there a snowboard in the image?", "label": "yes"},
    {"question_id": 2, "image": "x.jpg", "text": "Is there an apple in the imange?", "label": "no"},
]
EXPECTED = [
    PopeQuestion(1, "x.jpg", "Is there a snowboard in the image?", "yes", "snowboard"),
    PopeQuestion(2, "x.jpg", "Is there an apple in the imange?", "no", "apple"),
]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    "text",
    [
        lines(OFFICIAL),
        lines(OFFICIAL).replace("\n", "\r\n"),
        "\n" + lines(OFFICIAL) + "\n\n",
        "\ufeff" + lines(OFFICIAL),
        json.dumps(OFFICIAL),
        json.dumps(OFFICIAL, indent=4),
    ],
    ids=["lines", "crlf", "blank-lines", "byte-order-mark", "array", "indented-array"],
)
def test_official_questions(tmp_path, text):
    path = tmp_path / "pope.json"
    path.write_bytes(text.encode())
    assert read_pope(path) == EXPECTED


def test_llava_questions_have_a_category_and_no_label(tmp_path):
    path = tmp_path / "llava_pope_test.jsonl"
    text = "Is there a dining table in the image?\nAnswer the question using a single word or phrase."
    path.write_text(lines([{"question_id": 7, "image": "x.jpg", "text": text, "category": "adversarial"}]))
    assert read_pope(path) == [PopeQuestion(7, "x.jpg", text, None, "dining table", "adversarial")]


def test_popev2_questions(tmp_path):
    path = tmp_path / "annotations.json"
    record = {"image_id": 46207, "target_object": "remote", "query": "Is there a remote in the image?"}
    records = [
        record | {"image_name": "/images/46207.jpg", "label": "No"},
        record | {"image_name": "/coco/46207.jpg", "label": "Yes"},
    ]
    path.write_text(json.dumps(records, indent=4))
    assert read_pope(path) == [
        PopeQuestion(1, "/images/46207.jpg", "Is there a remote in the image?", "no", "remote"),
        PopeQuestion(2, "/coco/46207.jpg", "Is there a remote in the image?", "yes", "remote"),
    ]


def test_vlmevalkit_questions_and_their_images(tmp_path):
    path = tmp_path / "POPE.tsv"
    first, second = (base64.b64encode(bytes([n]) * 200).decode() for n in (1, 2))
    rows = [
        ("0", first, "Is there a cat in the image?", "Yes", "adversarial,popular"),
        ("1", "0", "Is there a\tdog in the image?".replace("\t", " "), "No", "random"),
        ("2", second, '"Is there a ""bed"" in the image?"', "No", "random"),
    ]
    path.write_text("index\timage\tquestion\tanswer\tcategory\n" + "".join("\t".join(row) + "\n" for row in rows))
    questions = read_pope(path)
    assert [question.label for question in questions] == ["yes", "no", "no"]
    assert [question.category for question in questions] == ["adversarial,popular", "random", "random"]
    assert questions[0].image == questions[1].image != questions[2].image
    assert questions[2].text == 'Is there a "bed" in the image?'
    assert dict(read_tsv_images(path)) == {questions[0].image: b"\1" * 200, questions[2].image: b"\2" * 200}


def test_written_questions_are_official_and_read_back(tmp_path):
    world = {"a": ["apple", "dog", "tv"], "b": ["cat", "bed", "wine glass"]}
    questions = build_pope(world, "random", seed=0, n_images=None)
    path = tmp_path / "pope.json"
    write_pope(path, questions)
    assert read_pope(path) == questions
    first = '{"question_id": 1, "image": "a", "text": "Is there an apple in the image?", "label": "yes"}'
    assert path.read_text().splitlines()[0] == first
    assert [item.name for item in tmp_path.iterdir()] == ["pope.json"]
    with pytest.raises(InputError, match="cannot be written"):
        write_pope(tmp_path / "missing" / "pope.json", questions)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines(OFFICIAL) + '{"question_id": 3,\n', r"pope\.json:3: is not valid JSON"),
        (lines(OFFICIAL) + "\nnot json\n", r"pope\.json:4: is not valid JSON"),
        (lines(OFFICIAL) + "[1]\n", r"pope\.json:3: expected a JSON object, found list"),
        (lines([*OFFICIAL, {"question_id": 3}]), r"pope\.json:3: lacks image, text; found question_id"),
        (lines([OFFICIAL[0] | {"label": "maybe"}]), r"pope\.json:1: label must be 'yes' or 'no', found 'maybe'"),
        (lines([{k: v for k, v in OFFICIAL[0].items() if k != "label"}]), r"pope\.json:1: label .* found None"),
        (lines([OFFICIAL[0] | {"question_id": "one"}]), r"pope\.json:1: question_id must be an integer"),
        (lines([OFFICIAL[0] | {"image": 3}]), r"pope\.json:1: image and text must be strings"),
        (
            "[\n" + json.dumps(OFFICIAL[0]) + ",\n\n{}\n]",
            r"pope\.json:4: lacks question_id, image, text; found nothing",
        ),
        ("[\n" + json.dumps(OFFICIAL[0]) + ",\n3]", r"pope\.json:3: expected a JSON object, found int"),
        ("[\n" + json.dumps(OFFICIAL[0]) + ",\n{]", r"pope\.json:3: is not valid JSON"),
        ("[]", "holds no question"),
        (" \n", "is empty"),
    ],
)
def test_malformed_questions_name_the_line(tmp_path, text, message):
    path = tmp_path / "pope.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_pope(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match=r"missing\.json: cannot be read"):
        read_pope(tmp_path / "missing.json")
    path = tmp_path / "latin.json"
    path.write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(InputError, match="not UTF-8"):
        read_pope(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index\timage\tquestion\n0\tx\ty\n", "lacks answer"),
        ("index\timage\tquestion\tanswer\n", "holds no question"),
        ("index\timage\tquestion\tanswer\n0\t1\tq\tYes\n", r"POPE\.tsv:2: image '1' is neither base64"),
        ("index\timage\tquestion\tanswer\n0\t1\tq\n", r"POPE\.tsv:2: expected 4 tab-separated fields"),
        ("index\timage\tquestion\tanswer\n0\t" + "A" * 80 + "\tq\t\n", r"POPE\.tsv:2: label must be"),
    ],
)
def test_malformed_tsv(tmp_path, text, message):
    path = tmp_path / "POPE.tsv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_pope(path)


def test_answers_by_id_and_in_order(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(lines([{"question_id": 2, "text": "No"}, {"question_id": 1, "text": "Yes", "model_id": "m"}]))
    by_id = read_pope_answers(path, EXPECTED)
    assert by_id["text"].tolist() == ["Yes", "No"]
    assert pope_items(by_id)["correct_official"].all()
    path.write_text(
        lines(
            [
                {"question": "is there a snowboard in the image?", "answer": "yes"},
                {"question": "Is there an apple in the imange?", "answer": "no"},
            ]
        )
    )
    assert read_pope_answers(path, EXPECTED)["text"].tolist() == ["yes", "no"]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"question_id": 1, "text": "Yes"}], "1 of 2 questions have no answer, first 2"),
        ([{"question_id": 1, "text": "Yes"}, {"question_id": 9, "text": "Yes"}], ":2: there is no question 9"),
        ([{"question_id": 1, "text": "Yes"}, {"question_id": 1, "text": "No"}], ":2: question 1 is answered twice"),
        ([{"question_id": 1, "text": None}, {"question_id": 2, "text": "No"}], ":1: expected the answer as a string"),
        ([{"question": EXPECTED[0].text, "answer": "yes"}], "1 answers without ids to 2 questions"),
        ([{"question": EXPECTED[0].text, "answer": "y"}, {"question": "Why?", "answer": "n"}], ":2: answers 'Why"),
    ],
)
def test_answers_that_do_not_fit(tmp_path, records, message):
    path = tmp_path / "answers.jsonl"
    path.write_text(lines(records))
    with pytest.raises(InputError, match=message):
        read_pope_answers(path, EXPECTED)
