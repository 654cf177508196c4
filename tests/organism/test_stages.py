import numpy as np
import pytest
import torch

from slitlamp.organism.categories import CATEGORY_INDEX
from slitlamp.organism.scenes import make_scene_with_owners
from slitlamp.organism.stages import BACKGROUND, PATCH_MIN_PIXELS, StepData, patch_labels


@pytest.mark.parametrize("stage", ["vision", "text", "joint"])
def test_a_batch_is_a_pure_function_of_seed_stage_and_step(stage: str) -> None:
    def flat(batch: object) -> list[torch.Tensor]:
        if isinstance(batch, dict):
            return list(batch.values())
        images, packed = batch
        return [images, packed.input_ids, packed.targets, packed.branch]

    first, again = flat(StepData(stage, 1, 4)[7]), flat(StepData(stage, 1, 4)[7])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = flat(StepData(stage, 2, 4)[7])
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_unknown_stage() -> None:
    with pytest.raises(ValueError, match="vision, text, joint"):
        StepData("sleep", 0, 4)


def test_patch_labels_name_the_largest_owner() -> None:
    for index in range(30):
        scene, _, owners = make_scene_with_owners(35, index)
        labels = patch_labels(scene, owners)
        for row, column in np.ndindex(8, 8):
            block = owners[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            counts = np.bincount(block.ravel() + 1, minlength=len(scene.objects) + 1)[1:]
            if counts.size and counts.max() >= PATCH_MIN_PIXELS:
                best = {CATEGORY_INDEX[scene.objects[i].category] for i in np.flatnonzero(counts == counts.max())}
                assert labels[row, column] in best
            else:
                assert labels[row, column] == BACKGROUND
