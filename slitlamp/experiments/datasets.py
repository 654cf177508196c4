"""Data sets: what a model is asked, on which image, and what is true of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import PIL.Image

from slitlamp.errors import InputError, unknown
from slitlamp.evaluation.chair import GroundTruth, Synonyms
from slitlamp.evaluation.pope_files import read_pope
from slitlamp.experiments.names import check_name
from slitlamp.experiments.places import data_folders, inside

if TYPE_CHECKING:
    from slitlamp.models import Batch
    from slitlamp.vlm import VLM

Task = Literal["pope", "captions"]
DEFAULT_TOKENS: dict[Task, int] = {"pope": 8, "captions": 512}
CAPTION_PROMPT = "Please describe this image in detail."


@dataclass(frozen=True)
class Item:
    """One question about one image.

    Attributes:
        id: unique in its data set: the question's id (POPE), the image's id (captions).
        image: file of the image.
        prompt: the text given to the model with the image.
        image_id: the key of the image in the ground truth (captions), its file name (POPE).
        label: "yes" or "no" (POPE); None for captions.
        object: the object asked about (POPE), where it is known.
    """

    id: str
    image: Path
    prompt: str
    image_id: str | int
    label: str | None = None
    object: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Items of one task, and the ground truth and synonyms of CHAIR: for captions always, for questions where known.

    `max_new_tokens` is how long an answer may get unless the experiment says otherwise; `source` is the entry of a
    configuration that makes this data set again.
    """

    name: str
    task: Task
    items: tuple[Item, ...]
    truth: GroundTruth | None = None
    synonyms: Synonyms | None = None
    max_new_tokens: int = 0
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_name("data set", self.name, folders=True)
        if not self.items:
            raise InputError(f"the data set {self.name!r} is empty")
        if self.max_new_tokens < 1:
            object.__setattr__(self, "max_new_tokens", DEFAULT_TOKENS[self.task])

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        truth = "no ground truth of objects" if self.truth is None else repr(self.truth)
        return f"Dataset({self.name}: {self.task}, {len(self)} items on {len(self.images)} images; {truth})"

    @property
    def images(self) -> list[Path]:
        """The image files, each once, in the order of their first item."""
        return list(dict.fromkeys(item.image for item in self.items))

    def take(self, n: int | None = None, *, skip: int = 0) -> Dataset:
        """All items of `n` images (None: of all that follow) after the first `skip`, in order: the same choice every time."""
        if n is not None and n < 1:
            raise InputError(f"take({n}): expected at least one image")
        images = self.images
        if not 0 <= skip < len(images):
            raise InputError(f"skip={skip}: expected 0 to {len(images) - 1}, as {self.name!r} has {len(images)} images")
        chosen = set(images[skip:] if n is None else images[skip : skip + n])
        items = tuple(item for item in self.items if item.image in chosen)
        source = dict(self.source)
        if source and skip:
            source |= {"skip": source.get("skip", 0) + skip, "take": len(chosen)}
        elif source and n is not None:
            source["take"] = n
        return replace(self, items=items, source=source)

    def encode(self, vlm: VLM, items: Sequence[Item] | None = None) -> Batch:
        """Images and prompts of some items (None: of all, so `take` few) as one batch.

        Rows are grouped by image: by its key in the ground truth, which questions and captions about it share.
        """
        chosen = self.items if items is None else items
        batch = vlm.encode(
            images=[item.image for item in chosen],
            prompts=[item.prompt for item in chosen],
            ids=[item.id for item in chosen],
        )
        return batch.grouped([self._group(item) for item in chosen])

    def _group(self, item: Item) -> str:
        truth = self.truth
        known = truth is not None and (item.image_id in truth.objects or item.image_id in truth.file_names)
        return str(truth.resolve(item.image_id) if truth is not None and known else item.image_id)

    def check(self) -> None:
        """Raise InputError if a prompt is empty, an id appears twice or an image is missing or is not an image.

        Only the header of every image is read.
        """
        seen: set[str] = set()
        for item in self.items:
            if item.id in seen:
                raise InputError(f"data set {self.name!r}: the id {item.id!r} appears twice")
            seen.add(item.id)
            if not item.prompt.strip():
                raise InputError(f"data set {self.name!r}, item {item.id!r}: the prompt is empty")
            if self.task == "pope" and item.label not in ("yes", "no"):
                raise InputError(
                    f"data set {self.name!r}, question {item.id!r}: the label is {item.label!r}, expected 'yes' or 'no'"
                )
        for path in self.images:
            try:
                with PIL.Image.open(path):
                    pass
            except FileNotFoundError as error:
                raise InputError(f"data set {self.name!r}: no such image: {path}") from error
            except (OSError, PIL.Image.DecompressionBombError) as error:
                raise InputError(f"data set {self.name!r}: cannot read the image {path}: {error}") from error

    def fingerprint(self) -> str:
        """SHA-256 of all that can change a result: items, ground truth, synonyms and the bytes of the images."""
        digest = hashlib.sha256()
        for item in self.items:
            fields = [item.id, item.image.name, item.prompt, str(item.image_id), item.label, item.object]
            digest.update(json.dumps(fields).encode())
        if self.truth is not None:
            used = {item.image_id for item in self.items}
            known = {key: sorted(value) for key, value in self.truth.objects.items() if key in used}
            digest.update(json.dumps(sorted((str(key), value) for key, value in known.items())).encode())
            boxes = {str(key): dict(self.truth.boxes[key]) for key in used if key in self.truth.boxes}
            digest.update(json.dumps(boxes, sort_keys=True).encode())
        if self.synonyms is not None:
            digest.update(repr(self.synonyms).encode())
        for path in self.images:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def pope_dataset(
    questions: str | Path,
    images: str | Path,
    *,
    name: str | None = None,
    prompt: str = "{question}",
    instances: str | Path | None = None,
    synonyms: str | Path | None = None,
) -> Dataset:
    """POPE questions from a file in any of the formats of `slitlamp.evaluation.pope_files.read_pope`.

    Args:
        questions: the file of questions.
        images: the folder of their images; a file name in `questions` cannot lead out of it.
        name: the data set's name; by default the file's.
        prompt: the text around the question, for example "{question} Please answer yes or no."
        instances: COCO instances JSON of the images, which tells probes where the object asked for is.
        synonyms: CHAIR's synonyms file, needed with `instances`.
    """
    if (instances is None) != (synonyms is None):
        raise InputError(
            "instances and synonyms go together: what is in an image is known by the names of the synonyms"
        )
    if "{question}" not in prompt:
        raise InputError(f"the prompt {prompt!r} has no {{question}}")
    folder = _existing_folder(images)
    items = tuple(
        Item(
            id=str(question.question_id),
            image=_image_in(folder, question.image, questions),
            prompt=prompt.replace("{question}", question.text),
            image_id=question.image,
            label=question.label,
            object=question.object,
        )
        for question in read_pope(questions)
    )
    name = name or Path(questions).stem
    source = {"name": name, "task": "pope", "questions": str(questions), "images": str(images), "prompt": prompt}
    if instances is None or synonyms is None:
        return Dataset(name, "pope", items, source=source)
    words = Synonyms.read(synonyms)
    truth = GroundTruth.from_coco(instances, synonyms=words)
    source |= {"instances": str(instances), "synonyms": str(synonyms)}
    return Dataset(name, "pope", items, truth, words, source=source)


def captions_dataset(
    images: str | Path,
    instances: str | Path,
    synonyms: str | Path,
    *,
    captions: str | Path | None = None,
    prompt: str = CAPTION_PROMPT,
    name: str = "captions",
    ids: Iterable[int] | None = None,
) -> Dataset:
    """Images to describe, with CHAIR's ground truth in COCO's formats.

    Args:
        images: the folder of the images.
        instances: COCO instances JSON.
        synonyms: CHAIR's synonyms file.
        captions: COCO captions JSON; its objects count as true too.
        prompt: what the model is asked.
        name: the data set's name.
        ids: the image ids to keep, in this order; by default all of `instances`, in the file's order.
    """
    folder = _existing_folder(images)
    words = Synonyms.read(synonyms)
    truth = GroundTruth.from_coco(instances, captions, synonyms=words)
    files = {int(entry["id"]): str(entry["file_name"]) for entry in _coco_images(instances)}
    wanted = list(files) if ids is None else list(ids)
    if missing := [one for one in wanted if one not in files]:
        raise InputError(
            f"{instances}: no image with id {missing[0]} ({len(missing)} of {len(wanted)} ids are missing)"
        )
    items = tuple(
        Item(id=str(one), image=_image_in(folder, files[one], instances), prompt=prompt, image_id=one) for one in wanted
    )
    source = {"name": name, "task": "captions", "images": str(images), "instances": str(instances)}
    source |= {"synonyms": str(synonyms), "prompt": prompt} | ({} if captions is None else {"captions": str(captions)})
    return Dataset(name, "captions", items, truth, words, source={} if ids is not None else source)


def _coco_images(path: str | Path) -> list[dict[str, Any]]:
    entries = json.loads(Path(path).read_text(encoding="utf-8")).get("images")
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and "id" in e and "file_name" in e for e in entries
    ):
        raise InputError(f"{path}: expected 'images' with 'id' and 'file_name', as in COCO's instances files")
    return entries


def _existing_folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"no such folder of images: {folder}")
    return folder


def _image_in(folder: Path, name: str, source: str | Path) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{source}: the image {name!r} lies outside {folder}")
    return path


def _emoji_pope(split: str) -> Callable[[Path], Dataset]:
    return lambda folder: replace(
        pope_dataset(
            folder / f"pope_{split}.jsonl",
            folder / "images",
            name=f"emoji_scenes/pope_{split}",
            instances=folder / "instances.json",
            synonyms=folder / "synonyms.txt",
        ),
        max_new_tokens=4,
    )


def _emoji_captions(folder: Path) -> Dataset:
    data = captions_dataset(
        folder / "images",
        folder / "instances.json",
        folder / "synonyms.txt",
        captions=folder / "captions.json",
        prompt="Describe this image in detail.",
        name="emoji_scenes/captions",
    )
    return replace(data, max_new_tokens=64)


_KNOWN: dict[str, Callable[[Path], Dataset]] = {
    "emoji_scenes/pope_random": _emoji_pope("random"),
    "emoji_scenes/pope_popular": _emoji_pope("popular"),
    "emoji_scenes/pope_adversarial": _emoji_pope("adversarial"),
    "emoji_scenes/captions": _emoji_captions,
}


def dataset_names() -> list[str]:
    """The names that `load_dataset` knows."""
    return list(_KNOWN)


def load_dataset(name: str) -> Dataset:
    """A data set that comes with slitlamp, by name (see `dataset_names`).

    Raises UnknownNameError with the nearest names, or InputError when the data are not where they should be.
    """
    if name not in _KNOWN:
        raise unknown("data set", name, _KNOWN)
    folder_name = name.split("/")[0]
    folders = data_folders("datasets")
    for folder in folders:
        if (folder / folder_name).is_dir():
            return replace(_KNOWN[name](folder / folder_name), source={"name": name})
    looked: Sequence[object] = folders or ["no folder"]
    raise InputError(f"the files of {name!r} are missing; looked for {folder_name} in {', '.join(map(str, looked))}")


def make_dataset(entry: Mapping[str, Any], folders: Sequence[Path]) -> Dataset:
    """The data set of a configuration's entry: a known name, or `task` with files inside one of `folders`.

    Raises:
        UnknownNameError, InputError: no such data set or file, or a file outside the folders.
    """
    if "task" not in entry:
        return load_dataset(entry["name"])
    values = dict(entry)
    task, name = values.pop("task"), values.pop("name")
    for key in ("questions", "images", "instances", "captions", "synonyms"):
        if key in values:
            values[key] = inside(values[key], folders, f"data set {name!r}, {key}")
            if not values[key].exists():
                raise InputError(f"data set {name!r}, {key}: no such file or folder: {values[key]}")
    make = pope_dataset if task == "pope" else captions_dataset
    return replace(make(name=name, **values), source=dict(entry))
