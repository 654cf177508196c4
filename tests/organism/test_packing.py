import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slitlamp.organism import stages
from slitlamp.organism.attention import use_training_attention
from slitlamp.organism.build import build_model
from slitlamp.organism.objectives import language_loss, packed_hidden, vision_features
from slitlamp.organism.packing import IGNORE, TASK_WEIGHTS, pack
from slitlamp.organism.tokenizer import TOKEN_ID


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    plain, training = build_model(4), build_model(4)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        # Far from initialisation, where attention is nearly uniform and masks matter little.
        for a, b in zip(plain.parameters(), training.parameters(), strict=True):
            a += 0.05 * torch.randn(a.shape, generator=generator)
            b.copy_(a)
    use_training_attention(training)
    return plain, training


def test_each_branch_equals_the_branch_run_alone(models, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, training = models
    monkeypatch.setattr(stages, "IMAGE_FREE_SHARE", 0.4)
    images, batch = stages.joint_batch(34, range(4), np.random.default_rng(2))
    pixels = stages.to_pixel_values(images)
    kinds = set()
    losses, weights = [], []
    with torch.no_grad():
        packed = training.lm_head(packed_hidden(training, images, batch))
        total, _ = language_loss(training, images, batch)
        for row in range(4):
            has_image = bool(batch.branch[row, 10] == 0)
            kinds.add(has_image)
            prefix = batch.input_ids[row, : 66 if has_image else 2]
            extra = {"pixel_values": pixels[row : row + 1]} if has_image else {}
            for number in range(1, int(batch.branch[row].max()) + 1):
                mine = batch.branch[row] == number
                ids = torch.cat([prefix, batch.input_ids[row][mine]])[None]
                alone = plain(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0, len(prefix) :]
                torch.testing.assert_close(packed[row][mine], alone, rtol=0, atol=1e-4)
                targets = batch.targets[row][mine]
                chosen = targets != IGNORE
                losses.append(F.cross_entropy(alone[chosen], targets[chosen], reduction="none"))
                weights.append(batch.weights[row][mine][chosen])
    assert kinds == {True, False}
    flat, scale = torch.cat(losses), torch.cat(weights)
    torch.testing.assert_close(total, (flat * scale).sum() / scale.sum(), rtol=0, atol=1e-4)


def test_targets_are_the_answer_and_the_end() -> None:
    _, batch = stages.joint_batch(34, range(8), np.random.default_rng(7))
    for row in range(8):
        for number in range(1, int(batch.branch[row].max()) + 1):
            mine = batch.branch[row] == number
            ids, targets = batch.input_ids[row][mine].tolist(), batch.targets[row][mine].tolist()
            start = ids.index(TOKEN_ID["ASSISTANT:"])
            assert targets[:start] == [IGNORE] * start
            assert targets[start:] == [*ids[start + 1 :], TOKEN_ID["</s>"]]
    assert set(batch.weights[batch.targets != IGNORE].tolist()) == set(TASK_WEIGHTS.values())
    assert (batch.targets[batch.branch <= 0] == IGNORE).all()


def test_text_rows_have_no_image_slots() -> None:
    images, batch = stages.text_batch(34, range(3), np.random.default_rng(8))
    assert images.shape[0] == 0
    assert (batch.input_ids != TOKEN_ID["<image>"]).all()
    assert batch.position_ids[:, :3].tolist() == [[0, 1, 2]] * 3


def test_rows_need_one_flag_each() -> None:
    with pytest.raises(ValueError, match="zip"):
        pack([[stages.Exchange("caption", ["a"], ["dog"])]], [True, False], image_slots=64)


def test_vision_features_are_what_the_language_model_reads(models) -> None:
    plain, training = models
    images, _ = stages.joint_batch(34, range(3), np.random.default_rng(9))
    tower = plain.model.vision_tower
    expected = tower(stages.to_pixel_values(images), output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(vision_features(training, images), expected, rtol=0, atol=1e-4)
