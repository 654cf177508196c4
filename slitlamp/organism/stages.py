"""The data of each training stage as a pure function of (seed, stage, step)."""

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from slitlamp.organism.build import IMAGE_MEAN, IMAGE_STD, N_IMAGE_TOKENS, PATCH_SIZE
from slitlamp.organism.categories import CATEGORY_INDEX, CATEGORY_NAMES, CONTEXT_INDEX
from slitlamp.organism.language import Exchange, caption_exchange, where_exchange, yes_no_exchanges
from slitlamp.organism.packing import REFINE_WEIGHTS, TASK_WEIGHTS, PackedBatch, pack
from slitlamp.organism.scenes import (
    IMAGE_SIZE,
    Scene,
    blank_image,
    make_scene,
    make_scene_with_owners,
    noise_image,
)

STAGES: Final = ("vision", "text", "joint", "refine")
"""`refine` is the joint stage once more, on fresh scenes, from a smaller learning rate (a warm restart) and with more
weight on yes/no answers."""
SCENE_SEED_OFFSET: Final = 1_000_000
"""Training seed s draws its scenes from stream 1,000,000 + s, apart from every held-out stream."""
STAGE_STRIDE: Final = 100_000_000
"""Each stage has its own range of scene indices."""
GRID: Final = IMAGE_SIZE // PATCH_SIZE
PATCH_MIN_PIXELS: Final = 10
"""A patch of 64 pixels is labelled with the object that owns most of it, if that is at least so many pixels."""
BACKGROUND: Final = len(CATEGORY_NAMES)
IMAGE_FREE_SHARE: Final = 0.04
BLANK_SHARE: Final = 0.04
NOISE_SHARE: Final = 0.02


VisionBatch = dict[str, Tensor]
LanguageBatch = tuple[Tensor, PackedBatch]


class StepData(Dataset[VisionBatch | LanguageBatch]):
    """Batches of one stage, indexed by step."""

    def __init__(self, stage: str, seed: int, batch_size: int) -> None:
        if stage not in STAGES:
            raise ValueError(f"unknown stage {stage!r}; expected one of {', '.join(STAGES)}")
        self.stage = stage
        self.seed = seed
        self.batch_size = batch_size

    def __getitem__(self, step: int) -> VisionBatch | LanguageBatch:
        stage = STAGES.index(self.stage)
        rng = np.random.default_rng([SCENE_SEED_OFFSET + self.seed, stage, step, 1])
        first = stage * STAGE_STRIDE + step * self.batch_size
        indices = range(first, first + self.batch_size)
        scene_seed = SCENE_SEED_OFFSET + self.seed
        if self.stage == "vision":
            return vision_batch(scene_seed, indices, rng)
        if self.stage == "text":
            return text_batch(scene_seed, indices, rng)
        weights = REFINE_WEIGHTS if self.stage == "refine" else TASK_WEIGHTS
        return joint_batch(scene_seed, indices, rng, weights)


def steps(data: StepData, start: int, stop: int, workers: int) -> Iterator[VisionBatch | LanguageBatch]:
    """Iterate over the batches of steps `start` to `stop`, made ahead by worker processes (0: in this process)."""
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)


def vision_batch(scene_seed: int, indices: range, rng: np.random.Generator) -> VisionBatch:
    """Images and dense labels of scenes, half of them mirrored.

    `images` uint8 `[scene, 64, 64, 3]`, `patches` `[scene, 64]` category of each patch (68 for background), `objects`
    `[scene, 68]` 0/1, `context` `[scene]`.
    """
    count = len(indices)
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    patches = np.empty((count, GRID, GRID), dtype=np.int64)
    objects = np.zeros((count, len(CATEGORY_NAMES)), dtype=np.float32)
    context = np.empty(count, dtype=np.int64)
    for row, index in enumerate(indices):
        scene, image, owners = make_scene_with_owners(scene_seed, index)
        labels = patch_labels(scene, owners)
        mirrored = rng.random() < 0.5
        images[row] = image[:, ::-1] if mirrored else image
        patches[row] = labels[:, ::-1] if mirrored else labels
        objects[row, [CATEGORY_INDEX[name] for name in scene.categories]] = 1
        context[row] = CONTEXT_INDEX[scene.context]
    return {
        "images": torch.from_numpy(images),
        "patches": torch.from_numpy(patches.reshape(count, -1)),
        "objects": torch.from_numpy(objects),
        "context": torch.from_numpy(context),
    }


def patch_labels(scene: Scene, owners: NDArray[np.int8]) -> NDArray[np.int64]:
    """Category of each patch, `[8, 8]`, from the map of owning objects; 68 for background."""
    counts = np.zeros((GRID, GRID, BACKGROUND + 1), dtype=np.int64)
    blocks = owners.reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE)
    for position, item in enumerate(scene.objects):
        counts[..., CATEGORY_INDEX[item.category]] += (blocks == position).sum(axis=(1, 3))
    best = counts.argmax(axis=2)
    return np.where(counts.max(axis=2) >= PATCH_MIN_PIXELS, best, BACKGROUND)


def text_batch(scene_seed: int, indices: range, rng: np.random.Generator) -> LanguageBatch:
    """Captions without images: an empty image tensor and rows of one exchange."""
    rows = [[caption_exchange(make_scene(scene_seed, index)[0], rng)] for index in indices]
    return torch.empty(0, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8), pack(rows, [False] * len(rows), image_slots=0)


def joint_batch(
    scene_seed: int, indices: range, rng: np.random.Generator, task_weights: Mapping[str, float] = TASK_WEIGHTS
) -> LanguageBatch:
    """Images, uint8 `[scene, 64, 64, 3]`, and their packed exchanges: a caption, six yes/no, one where.

    A few rows have no image, a blank one or pure noise, with the scene's own answers: there the best answer is the
    prior, and no condition of later experiments is out of distribution.
    """
    images = np.empty((len(indices), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    rows: list[list[Exchange]] = []
    with_image: list[bool] = []
    for row, index in enumerate(indices):
        scene, image = make_scene(scene_seed, index)
        draw = rng.random()
        with_image.append(draw >= IMAGE_FREE_SHARE)
        if IMAGE_FREE_SHARE <= draw < IMAGE_FREE_SHARE + BLANK_SHARE:
            image = blank_image(int(rng.integers(256)) if rng.random() < 0.5 else 128)
        elif IMAGE_FREE_SHARE + BLANK_SHARE <= draw < IMAGE_FREE_SHARE + BLANK_SHARE + NOISE_SHARE:
            image = noise_image(rng)
        images[row] = image
        where = where_exchange(scene, rng)
        exchanges = [caption_exchange(scene, rng), *yes_no_exchanges(scene, rng)]
        rows.append(exchanges if where is None else [*exchanges, where])
    return torch.from_numpy(images), pack(rows, with_image, N_IMAGE_TOKENS, task_weights)


def to_pixel_values(images: Tensor) -> Tensor:
    """Normalise uint8 `[image, 64, 64, 3]` to what the processor gives: float32 `[image, 3, 64, 64]`."""
    return (images.permute(0, 3, 1, 2).float() / 255 - IMAGE_MEAN) / IMAGE_STD
