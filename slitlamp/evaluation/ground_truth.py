"""What is in each image according to COCO-format files, and the captions that are judged against it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slitlamp.errors import InputError
from slitlamp.evaluation.files import read_json, read_records, read_text
from slitlamp.evaluation.synonyms import Synonyms

ImageId = int | str
Box = tuple[float, float, float, float]
Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class GroundTruth:
    """What is in each image.

    Attributes:
        objects: the categories in each image.
        file_names: from an image's file name to its id.
        boxes: of each image and category, where its instances are, as (left, top, right, bottom) in shares of the image;
            empty where the files give no boxes or no sizes.
    """

    objects: Mapping[ImageId, frozenset[str]]
    file_names: Mapping[str, ImageId] = field(default_factory=dict)
    boxes: Mapping[ImageId, Mapping[str, tuple[Box, ...]]] = field(default_factory=dict)

    def __repr__(self) -> str:
        categories = set().union(*self.objects.values())
        boxes = ", with boxes" if self.boxes else ""
        return f"GroundTruth({len(self.objects)} images, {len(categories)} categories{boxes})"

    @classmethod
    def from_coco(cls, instances: Paths, captions: Paths | None = None, *, synonyms: Synonyms) -> GroundTruth:
        """Join the instance categories of each image with the objects that its reference captions mention.

        `instances` and `captions` are COCO annotation files, or several of them (train and val). The images are those
        that the instances files list, with or without an object in them.
        """
        objects: dict[ImageId, set[str]] = {}
        file_names: dict[str, ImageId] = {}
        boxes: dict[ImageId, dict[str, tuple[Box, ...]]] = {}
        for path in _paths(instances):
            data = _coco(path, ("images", "annotations", "categories"))
            for image in data["images"]:
                objects.setdefault(image["id"], set())
                if "file_name" in image:
                    file_names[str(image["file_name"])] = image["id"]
            sizes = {image["id"]: (image.get("width"), image.get("height")) for image in data["images"]}
            names = {item["id"]: _category(path, item["name"], synonyms) for item in data["categories"]}
            for item in data["annotations"]:
                if item["image_id"] not in objects or item["category_id"] not in names:
                    raise InputError(f"{path}: an annotation names image {item['image_id']!r} or category "
                                     f"{item['category_id']!r}, which the file does not list")  # fmt: skip
                name = names[item["category_id"]]
                objects[item["image_id"]].add(name)
                box = _box(item.get("bbox"), *sizes.get(item["image_id"], (None, None)))
                if box is not None:
                    of_image = boxes.setdefault(item["image_id"], {})
                    of_image[name] = (*of_image.get(name, ()), box)
        if captions is not None:
            _add_captions(objects, _paths(captions), synonyms)
        return cls({image: frozenset(found) for image, found in objects.items()}, file_names, boxes)

    def resolve(self, image: ImageId) -> ImageId:
        """The id of an image given by its id or by its file name; an unknown image is an error."""
        if image in self.objects:
            return image
        if image in self.file_names:
            return self.file_names[str(image)]
        known = ", ".join(repr(key) for key in list(self.objects)[:3])
        raise InputError(f"image {image!r} is not in the ground truth of {len(self.objects)} images ({known}, ...)")

    def subset(self, images: Iterable[ImageId]) -> GroundTruth:
        """The ground truth of some images only."""
        kept = [self.resolve(image) for image in images]
        boxes = {image: self.boxes[image] for image in kept if image in self.boxes}
        return GroundTruth({image: self.objects[image] for image in kept}, self.file_names, boxes)

    def frequency(self, category: str) -> float:
        """The share of the images that hold a category."""
        return sum(category in found for found in self.objects.values()) / len(self.objects)


def read_captions(path: str | Path) -> list[tuple[ImageId, str]]:
    """Read generated captions as (image_id, caption).

    Accepts a JSON list or JSON Lines of {image_id, caption}, and the {"imgToEval": {...}} of the original evaluation.
    """
    text = read_text(path)
    if re.match(r"\s*\{", text) and re.search(r'"imgToEval"\s*:', text):
        table = read_json(path).get("imgToEval")
        if not isinstance(table, dict):
            raise InputError(f"{path}: imgToEval must be an object with one entry per image")
        entries = [(f"{path}: imgToEval[{key!r}]", value) for key, value in table.items()]
    else:
        entries = [(f"{path}:{line}", record) for line, record in read_records(path)]
    captions: list[tuple[ImageId, str]] = []
    seen: set[ImageId] = set()
    for where, record in entries:
        image, caption = (record.get("image_id"), record.get("caption")) if isinstance(record, dict) else (None, None)
        if isinstance(image, bool) or not isinstance(image, (int, str)) or not isinstance(caption, str):
            raise InputError(
                f"{where}: expected image_id (integer or string) and caption (string), found {record!r}"[:300]
            )
        if image in seen:
            raise InputError(f"{where}: image {image!r} has a second caption")
        seen.add(image)
        captions.append((image, caption))
    if not captions:
        raise InputError(f"{path}: holds no caption")
    return captions


def _paths(paths: Paths) -> list[str | Path]:
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


def _coco(path: str | Path, lists: Sequence[str]) -> dict[str, Any]:
    """A COCO annotation file whose entries have the fields used here."""
    fields = {"images": ("id",), "annotations": ("image_id",), "categories": ("id", "name")}
    data = read_json(path)
    for name in lists:
        if not isinstance(data, dict) or not isinstance(data.get(name), list):
            raise InputError(f"{path}: is not a COCO annotation file of this kind: lacks the list {name!r}")
        needed = fields[name]
        if name == "annotations":
            needed += ("category_id",) if "categories" in lists else ("caption",)
        for i, item in enumerate(data[name]):
            if not isinstance(item, dict) or not set(needed) <= set(item):
                raise InputError(f"{path}: {name}[{i}] lacks one of {', '.join(needed)}")
    result: dict[str, Any] = data
    return result


def _box(bbox: Any, width: Any, height: Any) -> Box | None:
    """COCO's box (left, top, width, height in pixels) in shares of the image; None where one of them is missing."""
    if not (isinstance(bbox, list) and len(bbox) == 4 and width and height):
        return None
    left, top, wide, high = (float(one) for one in bbox)
    return left / width, top / height, (left + wide) / width, (top + high) / height


def _category(path: str | Path, name: str, synonyms: Synonyms) -> str:
    try:
        return synonyms.category(name)
    except InputError as error:
        raise InputError(f"{path}: no line of the synonyms file stands for its category {name!r} ({error})") from error


def _add_captions(objects: dict[ImageId, set[str]], paths: list[str | Path], synonyms: Synonyms) -> None:
    captioned: set[ImageId] = set()
    for path in paths:
        for item in _coco(path, ("annotations",))["annotations"]:
            if item["image_id"] in objects:
                captioned.add(item["image_id"])
                objects[item["image_id"]] |= {mention.category for mention in synonyms.mentions(str(item["caption"]))}
    missing = [image for image in objects if image not in captioned]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(objects)} images have no reference caption in {', '.join(map(str, paths))}, first "
            f"{missing[0]!r}; give the captions of the same images, or none (captions=None) to use instances alone"
        )
