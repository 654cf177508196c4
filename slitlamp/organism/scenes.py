"""Procedural emoji scenes: a pure function from (seed, index) to a 64 x 64 image and its ground truth."""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from slitlamp.organism.categories import CATEGORY_NAMES, CONTEXT_NAMES, CONTEXTS, PARTNER_OF
from slitlamp.organism.sprites import OPAQUE, sprite

IMAGE_SIZE: Final = 64
"""Side of every image in pixels."""
COUNT_PROBABILITIES: Final = (0.06, 0.12, 0.22, 0.27, 0.20, 0.13)
"""Probability of one to six objects."""
SIZE_RANGES: Final = ((6, 8), (12, 17), (18, 27))
"""Long sides in pixels, inclusive. The smallest are barely visible: they are a source of hallucination."""
SIZE_PROBABILITIES: Final = (0.30, 0.35, 0.35)
PARTNER_PROBABILITY: Final = 0.45
"""Probability that an object's partner is the next object."""
STRAY_OBJECT_PROBABILITY: Final = 0.12
"""Probability that an object is drawn from all categories instead of the context's."""
STRAY_BACKGROUND_PROBABILITY: Final = 0.12
MIN_VISIBLE: Final = 0.45
"""Least share of an object's opaque pixels that later objects leave visible."""
PLACEMENT_TRIES: Final = 30
BLANK_LEVEL: Final = 128

_N_CATEGORIES = len(CATEGORY_NAMES)
_CONTEXT_WEIGHTS = np.zeros((len(CONTEXTS), _N_CATEGORIES))
for _row, _context in enumerate(CONTEXTS):
    for _name, _weight in _context.weights.items():
        _CONTEXT_WEIGHTS[_row, CATEGORY_NAMES.index(_name)] = _weight
_CONTEXT_WEIGHTS /= _CONTEXT_WEIGHTS.sum(axis=1, keepdims=True)
_CONTEXT_WEIGHTS.setflags(write=False)
_PARTNER = np.array(
    [CATEGORY_NAMES.index(PARTNER_OF[name]) if name in PARTNER_OF else -1 for name in CATEGORY_NAMES], dtype=np.int64
)


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object: its box holds all of its opaque pixels, hidden ones included.

    `box` is (x, y, width, height) in pixels from the top left corner, `size` the long side of the drawing in
    pixels, `visible_area` the number of opaque pixels that no later object covers, `occlusion` the covered share.
    """

    category: str
    box: tuple[int, int, int, int]
    size: int
    visible_area: int
    occlusion: float

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the box (x, y) in pixels."""
        x, y, width, height = self.box
        return x + width / 2, y + height / 2


@dataclass(frozen=True, slots=True)
class Scene:
    """What is in an image: where it plays, what the background shows, and the objects from back to front."""

    seed: int
    index: int
    context: str
    background_context: str
    objects: tuple[SceneObject, ...]

    @property
    def categories(self) -> frozenset[str]:
        """Names of the objects; a scene holds each category at most once."""
        return frozenset(item.category for item in self.objects)


def context_weights() -> NDArray[np.float64]:
    """Probability of each category under each context, `[context, category]`; rows sum to one; read-only."""
    return _CONTEXT_WEIGHTS


def sample_content(rng: np.random.Generator) -> tuple[int, list[int]]:
    """Draw a context and the categories of its objects, as indices; no category twice."""
    context = int(rng.integers(len(CONTEXTS)))
    wanted = 1 + int(rng.choice(len(COUNT_PROBABILITIES), p=COUNT_PROBABILITIES))
    cumulative = np.cumsum(_CONTEXT_WEIGHTS[context])
    chosen: list[int] = []
    while len(chosen) < wanted:
        partner = int(_PARTNER[chosen[-1]]) if chosen else -1
        if partner >= 0 and partner not in chosen and rng.random() < PARTNER_PROBABILITY:
            chosen.append(partner)
            continue
        while True:
            if rng.random() < STRAY_OBJECT_PROBABILITY:
                candidate = int(rng.integers(_N_CATEGORIES))
            else:
                candidate = min(int(np.searchsorted(cumulative, rng.random(), side="right")), _N_CATEGORIES - 1)
            if candidate not in chosen:
                chosen.append(candidate)
                break
    return context, chosen


def make_scene(seed: int, index: int) -> tuple[Scene, NDArray[np.uint8]]:
    """Make scene `index` of the stream `seed`: its ground truth and its RGB image, uint8 `[64, 64, 3]`.

    A pure function of its arguments, bit for bit.
    """
    scene, image, _ = make_scene_with_owners(seed, index)
    return scene, image


def make_scene_with_owners(seed: int, index: int) -> tuple[Scene, NDArray[np.uint8], NDArray[np.int8]]:
    """Like `make_scene`, and the map of owners `[64, 64]`: the position in `objects` per pixel, -1 for background."""
    rng = np.random.default_rng([seed, index])
    context, categories = sample_content(rng)
    background = context
    if rng.random() < STRAY_BACKGROUND_PROBABILITY:
        background = int(rng.integers(len(CONTEXTS)))
    canvas = _background(background, rng)
    ranges = rng.choice(len(SIZE_RANGES), size=len(categories), p=SIZE_PROBABILITIES)
    sizes = [int(rng.integers(SIZE_RANGES[r][0], SIZE_RANGES[r][1] + 1)) for r in ranges]

    owners = np.full((IMAGE_SIZE, IMAGE_SIZE), -1, dtype=np.int8)
    placed: list[SceneObject] = []
    # Large objects first, so that small ones lie in front of them and are not swallowed.
    for position in sorted(range(len(categories)), key=lambda i: -sizes[i]):
        item = _place(CATEGORY_NAMES[categories[position]], sizes[position], canvas, owners, placed, rng)
        if item is not None:
            placed.append(item)

    brightness = np.float32(rng.uniform(0.8, 1.15))
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(6.0, 18.0))
    image = np.clip(np.rint(canvas * brightness + noise), 0, 255).astype(np.uint8)
    counts = np.bincount(owners.ravel() + 1, minlength=len(placed) + 1)[1:]
    objects = tuple(
        replace(item, visible_area=int(counts[i]), occlusion=round(1 - int(counts[i]) / item.visible_area, 4))
        for i, item in enumerate(placed)
    )
    return Scene(seed, index, CONTEXT_NAMES[context], CONTEXT_NAMES[background], objects), image, owners


def blank_image(level: int = BLANK_LEVEL) -> NDArray[np.uint8]:
    """A uniform grey image, uint8 `[64, 64, 3]`: an image that shows nothing."""
    return np.full((IMAGE_SIZE, IMAGE_SIZE, 3), level, dtype=np.uint8)


def noise_image(rng: np.random.Generator) -> NDArray[np.uint8]:
    """An image of independent pixel noise around a random grey, uint8 `[64, 64, 3]`."""
    level, spread = rng.uniform(60, 200), rng.uniform(6, 90)
    values = level + spread * rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _background(context: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Two tones that meet at a horizon, with 8-pixel blocks of texture; float32 `[64, 64, 3]` in 0..255."""
    jitter = rng.normal(0, 10, size=(2, 3))
    far = np.asarray(CONTEXTS[context].far) + jitter[0]
    near = np.asarray(CONTEXTS[context].near) + jitter[1]
    horizon = int(rng.integers(22, 43))
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    canvas[:horizon] = far
    canvas[horizon:] = near
    texture = rng.normal(0, 7, size=(8, 8, 1)).astype(np.float32)
    canvas.reshape(8, 8, 8, 8, 3)[...] += texture[:, None, :, None, :]
    return canvas


def _place(
    category: str,
    size: int,
    canvas: NDArray[np.float32],
    owners: NDArray[np.int8],
    placed: list[SceneObject],
    rng: np.random.Generator,
) -> SceneObject | None:
    """Draw the object where everything before it stays visible enough; None if no place was found.

    Until the scene is complete `visible_area` holds the number of all its opaque pixels.
    """
    drawing = sprite(category, size)
    height, width = drawing.shape[:2]
    opaque = drawing[..., 3] >= OPAQUE
    needed = [int(np.ceil(MIN_VISIBLE * item.visible_area)) for item in placed]
    visible = np.bincount(owners.ravel() + 1, minlength=len(placed) + 1)[1:] if placed else np.zeros(0, np.int64)
    for _ in range(PLACEMENT_TRIES):
        x = int(rng.integers(0, IMAGE_SIZE - width + 1))
        y = int(rng.integers(0, IMAGE_SIZE - height + 1))
        region = owners[y : y + height, x : x + width]
        covered = np.bincount(region[opaque] + 1, minlength=len(placed) + 1)[1:]
        if all(visible[i] - covered[i] >= needed[i] for i in range(len(placed))):
            region[opaque] = len(placed)
            paint = drawing.astype(np.float32)
            target = canvas[y : y + height, x : x + width]
            target *= 1 - paint[..., 3:] / np.float32(255)
            target += paint[..., :3]
            return SceneObject(category, (x, y, width, height), size, int(opaque.sum()), 0.0)
    return None
