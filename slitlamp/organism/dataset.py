"""The shipped data set `emoji_scenes`: held-out scenes as images, with ground truth, POPE questions and captions.

Every file that is made here is a pure function of `SEED`; the card and the licence beside them are written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slitlamp.evaluation.files import write_text
from slitlamp.evaluation.pope import SPLITS, build_pope
from slitlamp.evaluation.pope_files import write_pope
from slitlamp.organism.categories import CATEGORIES, CATEGORY_INDEX
from slitlamp.organism.language import caption, presence_question, surface_forms, to_text
from slitlamp.organism.scenes import IMAGE_SIZE, Scene, make_scene

SEED: Final = 2026
"""The stream of the shipped scenes; no training seed and no tuning uses it."""
N_IMAGES: Final = 256
N_CAPTIONS: Final = 5
"""Reference captions per image, as in COCO."""

# Third and fourth words of the generators below keep them apart from the one that draws the scene.
_ORDER_STREAM: Final = 1
_CAPTION_STREAM: Final = 2


def build_emoji_scenes(path: str | Path, *, n_images: int = N_IMAGES) -> list[Path]:
    """Write the data set into the folder `path` and return the files written, the same bits every time.

    images/000000.png, ...; instances.json and captions.json as COCO has them; pope_random.jsonl, pope_popular.jsonl,
    pope_adversarial.jsonl as POPE has them; synonyms.txt as CHAIR has it. Image files of the first `n_images` scenes
    only are those of the whole set; the other files depend on all scenes.
    """
    folder = Path(path)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    scenes: list[Scene] = []
    written: list[Path] = []
    for index in range(n_images):
        scene, pixels = make_scene(SEED, index)
        scenes.append(scene)
        written.append(folder / "images" / image_name(index))
        written[-1].write_bytes(encode_png(pixels))
    texts = {
        "instances.json": _coco_text(coco_instances(scenes)),
        "captions.json": _coco_text(coco_captions(scenes)),
        "synonyms.txt": "".join(f"{', '.join(forms)}\n" for forms in surface_forms().values()),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    objects = pope_objects(scenes)
    for split in SPLITS:
        questions = build_pope(objects, split, seed=SEED, n_images=None, template=question_text)
        write_pope(folder / f"pope_{split}.jsonl", questions)
    return written + [folder / name for name in (*texts, *(f"pope_{split}.jsonl" for split in SPLITS))]


def image_name(index: int) -> str:
    """The file name of a scene: "000007.png"."""
    return f"{index:06d}.png"


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """An RGB image uint8 `[height, width, 3]` as a small PNG.

    The pixels read back are exact; the bytes depend on the compression library that Pillow was built with.
    """
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def question_text(name: str) -> str:
    """The model's question about a category, as a person writes it: "Are there scissors in the image?"."""
    return to_text(presence_question(name))


def pope_objects(scenes: Sequence[Scene]) -> dict[str, list[str]]:
    """The categories of each image, in random order.

    POPE asks about the first three. Scenes list their objects from back to front, which is from large to small; asked
    in that order, small objects would hardly ever be asked about.
    """
    objects = {}
    for scene in scenes:
        order = np.random.default_rng([scene.seed, scene.index, _ORDER_STREAM]).permutation(len(scene.objects))
        objects[image_name(scene.index)] = [scene.objects[i].category for i in order]
    return objects


def coco_instances(scenes: Sequence[Scene]) -> dict[str, Any]:
    """Boxes and categories in COCO's format; annotations of an image are listed from back to front.

    Beyond COCO's fields an image has `context` and `background_context`, an annotation `occlusion`, the share of the
    object's pixels that others cover. `area` counts the pixels that stay visible.
    """
    annotations: list[dict[str, Any]] = []
    for scene in scenes:
        for item in scene.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": scene.index,
                    "category_id": CATEGORY_INDEX[item.category] + 1,
                    "bbox": list(item.box),
                    "area": item.visible_area,
                    "iscrowd": 0,
                    "occlusion": item.occlusion,
                }
            )
    categories = [{"id": i, "name": category.name} for i, category in enumerate(CATEGORIES, start=1)]
    return _head() | {"images": _images(scenes), "annotations": annotations, "categories": categories}


def coco_captions(scenes: Sequence[Scene]) -> dict[str, Any]:
    """Reference captions in COCO's format: `N_CAPTIONS` orders of the same objects for every image."""
    annotations: list[dict[str, Any]] = []
    for scene in scenes:
        for number in range(N_CAPTIONS):
            rng = np.random.default_rng([scene.seed, scene.index, _CAPTION_STREAM, number])
            text = to_text(caption(scene, rng))
            annotations.append({"id": len(annotations) + 1, "image_id": scene.index, "caption": text})
    return _head() | {"images": _images(scenes), "annotations": annotations}


def _head() -> dict[str, Any]:
    return {
        "info": {"description": "slitlamp emoji_scenes", "version": "1.0", "seed": SEED},
        "licenses": [{"id": 1, "name": "MIT; drawings: SIL Open Font License 1.1", "url": ""}],
    }


def _images(scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    return [
        {
            "id": scene.index,
            "file_name": image_name(scene.index),
            "width": IMAGE_SIZE,
            "height": IMAGE_SIZE,
            "license": 1,
            "context": scene.context,
            "background_context": scene.background_context,
        }
        for scene in scenes
    ]


def _coco_text(data: Mapping[str, Any]) -> str:
    """JSON with one image, annotation or category a line: small, and readable as a difference."""
    parts = []
    for key, value in data.items():
        if isinstance(value, list):
            body = "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
        else:
            body = json.dumps(value)
        parts.append(f"{json.dumps(key)}: {body}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
