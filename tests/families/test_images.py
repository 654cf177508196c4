"""What holds for every family's image tokens: which positions they are, of which image, and where on it."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import PIL.Image
import pytest
import torch
from contract import TEXTS, close, encode, prompt
from tiny_models import BUILDERS
from tiny_models.common import random_image

from slitlamp.errors import InputError
from slitlamp.models import BASE_VIEW, TILE_VIEW
from slitlamp.tracing import sites
from slitlamp.vlm import VLM


def seen(vlm, pictures, text=TEXTS[0]):
    """Patches of a prompt with these pictures, and what its image tokens say to the decoder: [token, width]."""
    batch = vlm.encode([pictures], [prompt(vlm, len(pictures), text)], chat=False)
    if vlm.anatomy.family.cross is None:
        with vlm.trace(sites.resid_pre(layers=[0], positions="image")) as trace:
            vlm.forward(batch)
        return batch.patches[0], trace["resid_pre"][0][0]
    keys = []
    module = vlm.model.get_submodule(vlm.anatomy.modules["projector"])
    handle = module.register_forward_hook(lambda m, a, out: keys.append(out))
    vlm.forward(batch)
    handle.remove()
    return batch.patches[0], keys[0].flatten(0, -2)[
        batch.cross_mask[0].nonzero()[:, 0] % keys[0].flatten(0, -2).shape[0]
    ]


def test_the_image_mask_is_where_the_model_puts_its_features(setting):
    """The decoder's input at image positions is the model's own features in order, and elsewhere the tokens' embeddings."""
    vlm, batch = setting.vlm, setting.batch
    assert torch.equal(batch.image_mask, (batch.input_ids == batch.image_token_id) & batch.real_mask)
    first = setting.trace["resid_pre"][0]
    states = torch.cat([first[row, : batch.lengths[row]] for row in range(batch.size)])
    image = torch.cat([batch.image_mask[row, -batch.lengths[row] :] for row in range(batch.size)])
    states = states - absolute_positions(vlm, batch)
    with torch.no_grad():
        embedded = vlm.model.get_input_embeddings()(batch.input_ids)[batch.real_mask]
    close(states[~image], embedded[~image])
    if vlm.anatomy.family.cross is not None:
        close(states[image], embedded[image])  # the placeholder itself
        return
    found = setting.eager.model.get_image_features
    taken = {*inspect.signature(found).parameters, "image_sizes"}
    with torch.no_grad():
        out = found(**{name: value for name, value in batch.extra.items() if name in taken}, return_dict=True)
        features = out.pooler_output
        if features is None:  # Llama 4's come before the projector
            projector = setting.eager.model.get_submodule(vlm.anatomy.modules["projector"])
            features = projector(out.last_hidden_state.flatten(0, -2))
    features = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
    close(states[image], features.flatten(0, -2))
    assert [int(one) for one in batch.image_mask.sum(dim=1)] == [len(one) for one in batch.patches]


def absolute_positions(vlm, batch):
    """What the decoder adds to every input for its position: nothing, but for OPT."""
    table = getattr(vlm.model.get_submodule(vlm.anatomy.modules["decoder"]), "embed_positions", None)
    if table is None:
        return 0
    with torch.no_grad():
        return torch.cat([table.weight[table.offset : table.offset + length] for length in batch.lengths])


def test_the_tower_and_the_projector_run_over_the_tiles(setting):
    """What is recorded of the tower is tile by tile: as many as the patches of all rows say, and as the pixels are."""
    batch, trace = setting.batch, setting.trace
    n_tiles = sum(one.n_tiles for one in batch.patches)
    assert n_tiles == sum(batch.tiles)
    assert trace["vision_resid_post"][0].shape[0] == n_tiles
    assert trace["projector_out"][0].shape[0] == n_tiles
    assert batch.tiles == tuple(one.n_tiles for one in encode(setting.vlm, setting.pictures).patches)
    assert [len(row) for row in batch.images] == [len(own) for own in setting.pictures]


def test_a_change_of_one_image_reaches_its_tokens_and_no_others(setting):
    vlm = setting.vlm
    pictures = [random_image(3, 32, 32), random_image(4, 20, 31)][: vlm.anatomy.family.max_images]
    patches, before = seen(vlm, pictures)
    for number in range(len(pictures)):
        other = list(pictures)
        other[number] = random_image(9, *pictures[number].size)
        _, after = seen(vlm, other)
        moved = (after - before).abs().amax(dim=-1) > 1e-4
        own = patches.image == number
        assert moved[own & patches.on_image].all()  # newline tokens and the like say nothing of their image
        assert moved[own].any()
        assert not moved[~own].any()


@pytest.fixture(scope="module", params=list(BUILDERS))
def unmixed(request):
    """A model whose tower passes nothing from one patch to another: what a token says is its own patches'."""
    vlm = BUILDERS[request.param]()
    model = copy.deepcopy(vlm.model)
    anatomy = vlm.anatomy
    for layer in range(anatomy.n_vision_layers):
        projection = model.get_submodule(anatomy.place("vision_z", layer).path)
        torch.nn.init.zeros_(projection.weight)
        if projection.bias is not None:
            torch.nn.init.zeros_(projection.bias)
    return VLM.wrap(model, vlm.processor)


@pytest.mark.parametrize(("width", "height"), [(48, 48), (32, 16), (16, 32)])
def test_pixels_reach_the_tokens_that_lie_over_them(width, height, unmixed):
    """A square of the picture is painted. In each view, the token that changes most is that of its row and column, and tokens
    further than one row and column from it do not change: resizing blurs over the border of a patch. Pictures are of sizes
    that no family fills up with padding.
    """
    pixels = np.full((height, width, 3), 110, dtype=np.uint8)
    plain = PIL.Image.fromarray(pixels)
    patches, before = seen(unmixed, [plain])
    if not patches.on_image.any():
        assert not patches.grids  # queries of a Q-Former, which read the whole image
        return
    assert {(0, int(view)) for view in patches.view} == set(patches.grids)
    for view in (BASE_VIEW, TILE_VIEW):
        if (0, view) not in patches.grids:
            continue
        rows, columns = patches.grids[0, view]
        of_view = patches.on_image & (patches.view == view)
        assert int(of_view.sum()) == rows * columns
        for row, column in {(0, 0), (rows - 1, 0), (rows // 2, columns - 1), (rows // 3, columns // 2)}:
            painted = pixels.copy()
            top, left = row * height // rows, column * width // columns
            painted[top : (row + 1) * height // rows, left : (column + 1) * width // columns] = (250, 20, 60)
            _, after = seen(unmixed, [PIL.Image.fromarray(painted)])
            change = patches.to_grid((after - before).abs().amax(dim=-1), view=view)
            assert divmod(int(change.argmax()), columns) == (row, column)
            near = torch.zeros_like(change, dtype=torch.bool)
            near[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = True
            assert change[~near].max() < 1e-4 if (~near).any() else True


def test_more_images_than_a_family_takes_are_refused(setting):
    vlm = setting.vlm
    family = vlm.anatomy.family
    if family.max_images is None:
        assert (
            len(vlm.encode([[random_image(0), random_image(1)]], [prompt(vlm, 2, TEXTS[0])], chat=False).images[0]) == 2
        )
        return
    with pytest.raises(InputError, match=rf"prompt 1: 2 images; {family.name} takes {family.max_images} per prompt"):
        vlm.encode([[], [random_image(0), random_image(1)]], list(TEXTS[:2]), chat=False)


def test_prompts_without_an_image_beside_others(setting):
    vlm = setting.vlm
    mixed = [[random_image(0)], []]
    if vlm.anatomy.family.cross is not None:
        with pytest.raises(InputError, match="equal numbers of images"):
            encode(vlm, mixed)
        return
    batch = encode(vlm, mixed)
    assert batch.image_mask.any(dim=1).tolist() == [True, False]
    assert [len(one) for one in batch.patches] == [int(batch.image_mask[0].sum()), 0]


def test_prompts_without_an_image_alone(setting):
    """A batch of text is the same whether the image was never there or was taken out."""
    vlm = setting.vlm
    texts = [TEXTS[0], TEXTS[2]]
    never = vlm.encode(None, texts, chat=False)
    assert not never.image_mask.any()
    assert never.tiles == (0, 0)
    with vlm.trace(sites.resid_post(), sites.vision_resid_post()) as trace:
        logits = vlm.forward(never).logits
    with pytest.raises(InputError, match="recorded nothing"):
        trace["vision_resid_post"][0]
    taken_out = vlm.encode([[random_image(0)], [random_image(1)]], [prompt(vlm, 1, text) for text in texts], chat=False)
    taken_out = taken_out.without_images()
    assert taken_out.lengths == [int(n) for n in taken_out.text_mask.sum(dim=1)]
    assert vlm.generate(never, max_new_tokens=2).tokens == vlm.generate(never, max_new_tokens=2).tokens
    alone = vlm.forward(vlm.encode(None, texts[:1], chat=False)).logits
    close(logits[0, -never.lengths[0] :], alone[0])
    if len(taken_out.input_ids[0]) == len(never.input_ids[0]) and torch.equal(taken_out.input_ids, never.input_ids):
        close(vlm.forward(taken_out).logits[taken_out.real_mask], logits[never.real_mask])
