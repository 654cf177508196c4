"""POPE's files: questions and answers in every format in use, each error with its file and line."""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from slitlamp.errors import InputError
from slitlamp.evaluation.files import read_records, read_text, write_lines

Label = Literal["yes", "no"]

_OBJECT = re.compile(r"(?:is|are)\s+there\s+(?:(?:an?|any)\s+)?(.+?)\s+in\s+the\s+ima(?:n?)ge\b", re.IGNORECASE)
"""The object of a question; some published files say "imange"."""


@dataclass(frozen=True)
class PopeQuestion:
    """One yes/no question about one image; `label` is None in files that carry no ground truth."""

    question_id: int
    image: str
    text: str
    label: Label | None
    object: str | None = None
    category: str | None = None
    """The split, in files that hold several ("adversarial,popular" where a question belongs to two)."""


def read_pope(path: str | Path) -> list[PopeQuestion]:
    """Read POPE questions; the format is recognised by the file's content (and TSV by the name's ending).

    - official: JSON Lines, or one JSON array, with question_id, image, text, label
    - llava_pope_test.jsonl: question_id, image, text, category and no label (`label` is None)
    - POPEv2: image_id, image_name, target_object, query, label "Yes" or "No"; numbered 1, 2, ... in file order
    - VLMEvalKit TSV: index, question, answer, category, and image as base64 or as the index of the row that holds it;
      `image` is a name made from the content, under which `read_tsv_images` gives the image

    `object` comes from the file or, failing that, from a question of POPE's form.
    """
    if str(path).lower().endswith(".tsv"):
        return [_from_tsv(path, line, row) for line, row in _tsv_rows(path)]
    questions = [_from_record(path, line, record, i) for i, (line, record) in enumerate(read_records(path), start=1)]
    if not questions:
        raise InputError(f"{path}: holds no question")
    return questions


def write_pope(path: str | Path, questions: Sequence[PopeQuestion]) -> None:
    """Write questions as official JSON Lines (question_id, image, text, label; category where a question has one)."""
    write_lines(
        path,
        (
            {"question_id": item.question_id, "image": item.image, "text": item.text}
            | ({"label": item.label} if item.label else {})
            | ({"category": item.category} if item.category else {})
            for item in questions
        ),
    )


def read_pope_answers(path: str | Path, questions: Sequence[PopeQuestion]) -> pd.DataFrame:
    """Answers joined to their questions: columns image, question_id, label, text, ready for `pope_items`.

    With {question_id, text} answers are matched by id. With {question, answer} (the authors' form, which names neither
    image nor id) there must be one per question in the same order, and each question must read the same.
    """
    records = read_records(path)
    if all("question_id" in record for _, record in records):
        texts = _answers_by_id(path, records, questions)
    else:
        texts = _answers_in_order(path, records, questions)
    rows = [
        {"image": item.image, "question_id": item.question_id, "label": item.label, "text": text}
        for item, text in zip(questions, texts, strict=True)
    ]
    return pd.DataFrame(rows, columns=["image", "question_id", "label", "text"])


def read_tsv_images(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """The images inside a VLMEvalKit TSV, each once: its name in `read_pope` and its encoded bytes (PNG or JPEG)."""
    seen: set[str] = set()
    for line, row in _tsv_rows(path):
        name = _image_name(row["image"])
        if name not in seen:
            seen.add(name)
            try:
                yield name, base64.b64decode(row["image"], validate=True)
            except binascii.Error as error:
                raise InputError(f"{path}:{line}: image is not base64 ({error})") from error


def _from_record(path: str | Path, line: int, record: dict[str, Any], number: int) -> PopeQuestion:
    if "query" in record or "target_object" in record:
        _need(path, line, record, ("image_name", "target_object", "query"))
        text, image, name = str(record["query"]), str(record["image_name"]), str(record["target_object"])
        return PopeQuestion(number, image, text, _label(path, line, record, required=True), name)
    _need(path, line, record, ("question_id", "image", "text"))
    if not isinstance(record["text"], str) or not isinstance(record["image"], str):
        raise InputError(f"{path}:{line}: image and text must be strings")
    category = record.get("category")
    return PopeQuestion(
        _integer(path, line, "question_id", record["question_id"]),
        record["image"],
        record["text"],
        _label(path, line, record, required=category is None),
        _object_of(record["text"]),
        None if category is None else str(category),
    )


def _from_tsv(path: str | Path, line: int, row: dict[str, str]) -> PopeQuestion:
    return PopeQuestion(
        _integer(path, line, "index", row["index"]),
        row.get("image_path") or _image_name(row["image"]),
        row["question"],
        _label(path, line, {"label": row["answer"]}, required=True),
        _object_of(row["question"]),
        row.get("category") or None,
    )


def _tsv_rows(path: str | Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with their first line; an image that is given as the index of another row is replaced by that image."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t")
        rows: list[tuple[int, dict[str, str]]] = []
        line = 1
        for row in reader:
            line, begins = reader.line_num, line + 1
            if None in row or None in row.values():
                raise InputError(f"{path}:{begins}: expected {len(reader.fieldnames or ())} tab-separated fields")
            rows.append((begins, row))
    except csv.Error as error:
        raise InputError(f"{path}: is not a TSV file ({error})") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise InputError(f"{path}: holds no question")
    _need(path, 1, rows[0][1], ("index", "image", "question", "answer"))
    by_index = {row["index"]: row["image"] for _, row in rows}
    for begins, row in rows:
        if len(row["image"]) <= 64 and row["image"] in by_index:
            row["image"] = by_index[row["image"]]
        if len(row["image"]) <= 64:
            raise InputError(f"{path}:{begins}: image {row['image']!r} is neither base64 nor the index of such a row")
        yield begins, row


def _answers_by_id(
    path: str | Path, records: list[tuple[int, dict[str, Any]]], questions: Sequence[PopeQuestion]
) -> list[str]:
    texts: dict[int, str] = {}
    known = {item.question_id for item in questions}
    if len(known) != len(questions):
        raise InputError("question ids repeat (several splits?): match the answers of each split on their own")
    for line, record in records:
        number = _integer(path, line, "question_id", record["question_id"])
        if number not in known:
            raise InputError(f"{path}:{line}: there is no question {number}")
        if number in texts:
            raise InputError(f"{path}:{line}: question {number} is answered twice")
        texts[number] = _answer(path, line, record)
    missing = [item.question_id for item in questions if item.question_id not in texts]
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(questions)} questions have no answer, first {missing[0]}")
    return [texts[item.question_id] for item in questions]


def _answers_in_order(
    path: str | Path, records: list[tuple[int, dict[str, Any]]], questions: Sequence[PopeQuestion]
) -> list[str]:
    if len(records) != len(questions):
        raise InputError(f"{path}: {len(records)} answers without ids to {len(questions)} questions")
    texts = []
    for (line, record), item in zip(records, questions, strict=True):
        _need(path, line, record, ("question",))
        if _plain(str(record["question"])) != _plain(item.text):
            raise InputError(
                f"{path}:{line}: answers {record['question']!r}, but question {item.question_id} is {item.text!r}"
            )
        texts.append(_answer(path, line, record))
    return texts


def _answer(path: str | Path, line: int, record: dict[str, Any]) -> str:
    text = record.get("answer", record.get("text"))
    if not isinstance(text, str):
        raise InputError(f"{path}:{line}: expected the answer as a string under 'answer' or 'text', found {text!r}")
    return text


def _plain(question: str) -> str:
    return " ".join(question.lower().split())


def _object_of(text: str) -> str | None:
    match = _OBJECT.search(text)
    return match.group(1).lower() if match else None


def _image_name(encoded: str) -> str:
    return f"sha256-{hashlib.sha256(encoded.encode()).hexdigest()[:16]}"


def _label(path: str | Path, line: int, record: dict[str, Any], required: bool) -> Label | None:
    label = record.get("label")
    if label is None and not required:
        return None
    if isinstance(label, str) and label.strip().lower() in ("yes", "no"):
        return "yes" if label.strip().lower() == "yes" else "no"
    raise InputError(f"{path}:{line}: label must be 'yes' or 'no', found {label!r}")


def _integer(path: str | Path, line: int, key: str, value: Any) -> int:
    try:
        if isinstance(value, (bool, float)):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise InputError(f"{path}:{line}: {key} must be an integer, found {value!r}") from None


def _need(path: str | Path, line: int, record: dict[str, Any], keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in record]
    if missing:
        found = ", ".join(map(str, record)) or "nothing"
        raise InputError(f"{path}:{line}: lacks {', '.join(missing)}; found {found}")
