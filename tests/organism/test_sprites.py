from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slitlamp.organism import sprites
from slitlamp.organism.categories import CATEGORY_NAMES, CONTEXTS, PARTNER_OF, PARTNERS

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


def test_world_is_closed() -> None:
    assert len(CATEGORY_NAMES) == len(set(CATEGORY_NAMES)) == 68
    assert len(CONTEXTS) == 13
    for context in CONTEXTS:
        assert set(context.weights) <= set(CATEGORY_NAMES)
    assert set().union(*(context.weights for context in CONTEXTS)) == set(CATEGORY_NAMES)
    assert len(PARTNERS) == 13
    assert len(PARTNER_OF) == 26  # nobody has two partners
    assert all(PARTNER_OF[PARTNER_OF[name]] == name for name in PARTNER_OF)


@pytest.mark.parametrize("size", [6, 12, 27])
def test_sprites_fill_their_box(size: int) -> None:
    for name in CATEGORY_NAMES:
        drawing = sprites.sprite(name, size)
        opaque = drawing[..., 3] >= sprites.OPAQUE
        assert drawing.dtype == np.uint8
        # Trimming to opaque pixels may cost the faint outermost row on each side.
        assert size - 2 <= max(drawing.shape[:2]) <= size, name
        assert opaque.any(axis=0)[[0, -1]].all()
        assert opaque.any(axis=1)[[0, -1]].all()
        # Premultiplied: no colour exceeds its alpha (one level of rounding per resize step).
        assert (drawing[..., :3].astype(int) <= drawing[..., 3:].astype(int) + 2).all(), name


def test_sprites_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        sprites.sprite("dog", 12)[0, 0] = 0


def test_sprites_differ_from_each_other() -> None:
    thumbnails = {}
    for name in CATEGORY_NAMES:
        drawing = sprites.sprite(name, 20)
        square = np.zeros((20, 20, 4), dtype=int)
        square[: drawing.shape[0], : drawing.shape[1]] = drawing
        thumbnails[name] = square
    for i, a in enumerate(CATEGORY_NAMES):
        for b in CATEGORY_NAMES[i + 1 :]:
            assert np.abs(thumbnails[a] - thumbnails[b]).mean() > 10, (a, b)


@pytest.mark.skipif(not FONT.exists(), reason="Noto Color Emoji is not installed")
def test_committed_atlas_is_what_the_builder_draws() -> None:
    built = np.asarray(sprites.build_atlas(FONT).convert("RGBA"))
    path = Path(sprites.__file__).parent / "atlas.png"
    committed = np.asarray(Image.open(path).convert("RGBA"))
    np.testing.assert_array_equal(built, committed)
