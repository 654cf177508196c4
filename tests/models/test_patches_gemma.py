"""PaliGemma and Gemma 3: grids, prompts as their processors make them, and who may look at whom."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import gemma
from tiny_models.common import IMAGE

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import BASE_VIEW
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

SIDES = {"paligemma": 4, "paligemma gemma2": 4, "gemma3": 2}  # tokens per side of an image of 16 px


@pytest.fixture(scope="module", params=list(gemma.BUILDERS))
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def vlm(name) -> VLM:
    return gemma.BUILDERS[name]()


@pytest.fixture(scope="module")
def pali() -> VLM:
    return gemma.build_paligemma()


def placeholders(vlm: VLM, count: int) -> str:
    return f"{vlm.processor.image_token} " * count


def test_pixels_of_a_patch_reach_the_token_of_its_row_and_column(name, vlm):
    """A vision tower without attention passes nothing from one patch to another."""
    model = copy.deepcopy(vlm.model)
    for path in vlm.anatomy.vision_blocks:
        projection = model.get_submodule(path).self_attn.out_proj
        torch.nn.init.zeros_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    alone = VLM.wrap(model, vlm.processor)

    def embeddings(pixels):
        batch = alone.encode([pixels], [placeholders(alone, 1) + "what ?"])
        with alone.trace(sites.resid_pre(layers=0, positions="image")) as trace:
            alone.forward(batch)
        return batch.patches[0], trace["resid_pre"][0][0]

    pixels = np.random.default_rng(0).integers(0, 200, (16, 16, 3), dtype=np.uint8)
    patches, before = embeddings(pixels)
    side = SIDES[name]
    assert patches.grids == {(0, BASE_VIEW): (side, side)}
    token = 16 // side
    for row, column in [(0, 0), (0, side - 1), (side - 1, 0), (1, 1)]:
        changed = pixels.copy()
        changed[token * row : token * row + token, token * column : token * column + token] = 255
        _, after = embeddings(changed)
        moved = (after - before).abs().amax(dim=-1) > 1e-4
        assert torch.equal(moved, (patches.row == row) & (patches.column == column))


def test_image_tokens_of_several_images_are_where_the_model_puts_its_features(vlm, image):
    batch = vlm.encode(
        [[image(0), image(1)], [image(2)]], [placeholders(vlm, 2) + "is there ?", placeholders(vlm, 1) + "what ?"]
    )
    assert [one.image.unique().tolist() for one in batch.patches] == [[0, 1], [0]]
    with torch.no_grad():
        features = vlm.model.get_image_features(batch.extra["pixel_values"], return_dict=True).pooler_output
    with vlm.trace(sites.resid_pre(layers=0)) as trace:
        vlm.forward(batch)
    embedded = torch.zeros(batch.size, batch.length, vlm.anatomy.d_model)
    embedded[batch.real_mask] = trace["resid_pre"][0][trace.mask("resid_pre")]
    torch.testing.assert_close(embedded[batch.image_mask], features.flatten(0, 1), rtol=0, atol=1e-5)


def test_text_enters_the_first_block_scaled(vlm, image):
    """Gemma multiplies its embeddings by the square root of the width; `resid_pre` is what the block gets."""
    batch = vlm.encode([image(0)], [placeholders(vlm, 1) + "what ?"])
    with vlm.trace(sites.resid_pre(layers=0, positions="text")) as trace:
        vlm.forward(batch)
    weight = vlm.model.get_input_embeddings().weight.detach()
    wanted = weight[batch.input_ids[batch.text_mask]] * vlm.anatomy.d_model**0.5
    torch.testing.assert_close(trace["resid_pre"][0][0], wanted, rtol=1e-5, atol=1e-6)


def attention(vlm: VLM, batch, layer: int) -> torch.Tensor:
    """Eager attention weights [batch, head, query, key]."""
    model = copy.deepcopy(vlm.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**batch.inputs(), output_attentions=True).attentions[layer]


def test_paligemma_reads_the_prompt_in_both_directions_and_its_answer_in_one(pali, image):
    batch = pali.encode([image(0)], ["what ?"]).with_continuation([[IMAGE + 3, IMAGE + 4, IMAGE + 5]])
    assert batch.aligned["token_type_ids"][0].tolist() == [0] * (batch.length - 3) + [1] * 3
    seen = attention(pali, batch, 0)[0].sum(dim=0) > 0
    prompt = batch.length - 3
    assert seen[:prompt, :prompt].all()
    assert not seen[:prompt, prompt:].any()
    assert torch.equal(seen[prompt:, prompt:], torch.ones(3, 3).tril().bool())


def test_gemma3_reads_an_image_in_both_directions_and_nothing_else(image):
    vlm = gemma.build_gemma3()
    batch = vlm.encode([[image(0), image(1)]], ["is <start_of_image> in <start_of_image> ?"])
    longer = batch.with_continuation([[IMAGE + 7, IMAGE + 8]])
    for one in (batch, longer, longer.prompt_only(), longer.without_images()):
        assert torch.equal(one.aligned["token_type_ids"] == 1, one.image_mask)
    full = vlm.anatomy.attention_types.index("full_attention")
    seen = attention(vlm, batch, full)[0].sum(dim=0) > 0
    block = torch.full((batch.length,), -1)
    block[batch.image_mask[0]] = batch.patches[0].image
    same_image = (block[:, None] == block[None, :]) & (block[:, None] >= 0)
    assert torch.equal(seen, torch.ones_like(seen).tril() | same_image)


@pytest.mark.parametrize("build", [gemma.build_gemma3, lambda: gemma.build_paligemma(second=True)])
def test_sliding_layers_are_named_and_see_less(build, image):
    vlm = build()
    types = vlm.anatomy.attention_types
    assert set(types) == {"sliding_attention", "full_attention"}
    batch = vlm.encode([image(0)], [placeholders(vlm, 1) + "is there a dog in the image ?"])
    # PaliGemma 2 sees the whole prompt from within the prompt, in sliding layers too
    batch = batch.with_continuation([[vlm.tokenizer.convert_tokens_to_ids("dog")]])
    for layer, kind in enumerate(types):
        first = attention(vlm, batch, layer)[0, :, -1, 0]  # of the last token on the first
        assert bool((first == 0).all()) == (kind == "sliding_attention")


def test_paligemma_2_caps_scores_and_logits(image):
    vlm = gemma.build_paligemma(second=True)
    assert (vlm.anatomy.attention_softcap, vlm.anatomy.logit_softcap) == (2.0, 3.0)
    logits = vlm.forward(vlm.encode([image(0)], ["what ?"])).logits
    assert 1.0 < float(logits.abs().max()) < 3.0
    assert gemma.build_paligemma().anatomy.logit_softcap is None


def test_paligemma_gets_the_prompt_that_its_processor_makes(pali, image):
    made = pali.processor(images=[image(0)], text=["is there a dog ?"], return_tensors="pt")
    for text in ("is there a dog ?", "<image>is there a dog ?"):
        batch = pali.encode([image(0)], [text])
        assert torch.equal(batch.input_ids, made["input_ids"])
    assert "labels" not in batch.inputs()
    with pytest.raises(InputError, match="2 placeholders"):
        pali.encode([image(0)], ["<image><image> is there ?"])


def test_paligemma_prompts_without_an_image(pali, image):
    """Its processor takes none; the tokens are those of the prompt whose image is deleted."""
    texts = ["is there a dog ?", "what ?", "describe this ."]
    alone = pali.encode(None, texts[:1])
    assert alone.extra == {}
    assert alone.images == ((),)
    deleted = pali.encode([image(0)], texts[:1]).without_images()
    assert torch.equal(alone.input_ids, deleted.input_ids)
    batch = pali.encode([None, [image(1), image(2)], None], texts)
    assert batch.image_mask.sum(dim=1).tolist() == [0, 32, 0]
    assert [len(one) for one in batch.patches] == [0, 32, 0]
    separate = pali.encode([[image(1), image(2)]], texts[1:2])
    assert torch.equal(batch.extra["pixel_values"], separate.extra["pixel_values"])
    logits = pali.forward(batch).logits[:, -1]
    torch.testing.assert_close(logits[0], pali.forward(alone).logits[0, -1], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[1], pali.forward(separate).logits[0, -1], rtol=0, atol=1e-4)


def test_a_generation_is_what_one_forward_pass_over_it_gives(vlm, image):
    """The answer is causal as it is generated; logits of steps and of one pass agree, positions included."""
    batch = vlm.encode(
        [image(0), image(1)], [placeholders(vlm, 1) + "is there a dog ?", placeholders(vlm, 1) + "what ?"]
    )
    options = {"return_dict_in_generate": True, "output_logits": True, "suppress_tokens": None}
    steps = vlm.model.generate(**batch.inputs(), max_new_tokens=5, min_new_tokens=5, do_sample=False, **options)
    tokens = steps.sequences[:, batch.length :]
    logits = vlm.forward(batch.with_continuation(tokens[:, :-1].tolist())).logits[:, -5:]
    torch.testing.assert_close(logits, torch.stack(steps.logits, dim=1), rtol=0, atol=1e-4)


def test_paligemma_counts_positions_from_1(pali, image):
    batch = pali.encode([image(0), image(1)], ["is there a dog ?", "what ?"])
    seen = []
    rotary = pali.model.model.language_model.rotary_emb
    handle = rotary.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    pali.forward(batch)
    pali.model.generate(**batch.inputs(), max_new_tokens=1, do_sample=False)
    handle.remove()
    for ids in seen:
        for row in range(batch.size):
            wanted = torch.arange(1, batch.lengths[row] + 1)
            assert torch.equal(ids.expand(batch.size, -1)[row, batch.real_mask[row]], wanted)


def test_pan_and_scan_is_refused(image):
    vlm = gemma.build_gemma3()
    vlm.processor.images_kwargs = {
        **vlm.processor.images_kwargs,
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 4,
    }
    with pytest.raises(UnsupportedError, match=r"4 pictures for 1 images.*pan and scan"):
        vlm.encode([image(0, 40, 16)], ["<start_of_image> what ?"])
