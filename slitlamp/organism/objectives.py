"""Losses of the training stages and the forward passes they need."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from slitlamp.organism.build import VISION_FEATURE_LAYER
from slitlamp.organism.categories import CATEGORY_NAMES, CONTEXT_NAMES
from slitlamp.organism.packing import IGNORE, TASKS, PackedBatch
from slitlamp.organism.stages import BACKGROUND, GRID, to_pixel_values

OBJECT_LOSS_WEIGHT = 10.0
CONTEXT_LOSS_WEIGHT = 0.3
BACKGROUND_WEIGHT = 0.3
OBJECT_POSITIVE_WEIGHT = 3.0


class VisionHeads(nn.Module):
    """Linear read-outs that train the vision tower and are then thrown away."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.patches = nn.Linear(width, len(CATEGORY_NAMES) + 1)
            self.position = nn.Linear(width, 2)
            self.objects = nn.Linear(width, len(CATEGORY_NAMES))
            self.context = nn.Linear(width, len(CONTEXT_NAMES))


def vision_loss(
    model: LlavaForConditionalGeneration, heads: VisionHeads, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Dense and pooled supervision of the vision tower.

    Category of each patch and its (x, y) from `hidden_states[-2]`, the layer that the language model reads; objects
    and context from the pooled CLS. Without the (x, y) term the features keep no horizontal position.
    """
    output = model.model.vision_tower(to_pixel_values(batch["images"]), output_hidden_states=True)
    features = output.hidden_states[VISION_FEATURE_LAYER][:, 1:]
    pooled = output.pooler_output
    logits = heads.patches(features).float()
    class_weights = torch.ones(BACKGROUND + 1)
    class_weights[BACKGROUND] = BACKGROUND_WEIGHT
    patches = F.cross_entropy(logits.flatten(0, 1), batch["patches"].flatten(), weight=class_weights)
    axis = (torch.arange(GRID) + 0.5) / GRID * 2 - 1
    place = torch.stack([axis.repeat(GRID), axis.repeat_interleave(GRID)], dim=1)
    position = F.mse_loss(heads.position(features).float(), place.expand(features.shape[0], -1, -1))
    objects = F.binary_cross_entropy_with_logits(
        heads.objects(pooled).float(), batch["objects"], pos_weight=torch.tensor(OBJECT_POSITIVE_WEIGHT)
    )
    context = F.cross_entropy(heads.context(pooled).float(), batch["context"])
    total = patches + position + OBJECT_LOSS_WEIGHT * objects + CONTEXT_LOSS_WEIGHT * context
    return total, {"patches": patches, "position": position, "objects": objects, "context": context}


@torch.no_grad()
def vision_features(model: LlavaForConditionalGeneration, images: Tensor) -> Tensor:
    """What the projector reads, `[image, patch, width]`: `hidden_states[-2]` without CLS; later layers are not run."""
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(to_pixel_values(images)))
    for layer in tower.encoder.layers[: VISION_FEATURE_LAYER + 1]:
        hidden = layer(hidden, attention_mask=None)
    return hidden[:, 1:]


def packed_hidden(model: LlavaForConditionalGeneration, images: Tensor, batch: PackedBatch) -> Tensor:
    """Last hidden state of every packed position, `[row, position, d_model]`."""
    embeddings = model.model.language_model.embed_tokens(batch.input_ids)
    if images.shape[0]:
        features = model.model.multi_modal_projector(vision_features(model, images)).to(embeddings.dtype)
        slots = features.shape[1]
        embeddings = torch.cat([embeddings[:, :2], features, embeddings[:, 2 + slots :]], dim=1)
    mask = batch.attention()
    additive = torch.zeros(mask.shape, dtype=_compute_dtype(embeddings)).masked_fill_(~mask, float("-inf"))
    return model.model.language_model(
        inputs_embeds=embeddings, attention_mask=additive, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state


def language_loss(
    model: LlavaForConditionalGeneration, images: Tensor, batch: PackedBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted next-token loss of the answers; the head runs on supervised positions only."""
    hidden = packed_hidden(model, images, batch)
    chosen = torch.nonzero(batch.targets.flatten() != IGNORE).squeeze(1)
    logits = model.lm_head(hidden.flatten(0, 1).index_select(0, chosen)).float()
    targets = batch.targets.flatten()[chosen]
    weights = batch.weights.flatten()[chosen]
    losses = F.cross_entropy(logits, targets, reduction="none")
    tasks = batch.tasks.flatten()[chosen]
    parts = {
        name: losses.detach()[tasks == number].mean() for number, name in enumerate(TASKS) if (tasks == number).any()
    }
    return (losses * weights).sum() / weights.sum(), parts


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else tensor.dtype
