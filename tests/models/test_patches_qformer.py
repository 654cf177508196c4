"""BLIP-2 and InstructBLIP: queries in place of patches, one image per prompt, prompts that the Q-Former reads too."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import blip
from transformers import Blip2Config, Blip2ForConditionalGeneration, T5Config

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

PROMPTS = ["is there a dog ?", "describe this red cat in the image .", "what ?"]


@pytest.fixture(scope="module", params=list(blip.BUILDERS))
def vlm(request) -> VLM:
    return blip.BUILDERS[request.param]()


def test_image_tokens_are_the_queries_and_have_no_place_on_the_image(vlm, image):
    batch = vlm.encode([image(0), image(1), None], PROMPTS)
    assert batch.image_mask.sum(dim=1).tolist() == [blip.QUERIES, blip.QUERIES, 0]
    for patches in batch.patches[:2]:
        assert not patches.on_image.any()
        assert patches.grids == {}
        assert patches.n_tiles == 1
    with pytest.raises(KeyError, match="no view 0 of image 0"):
        batch.patches[0].to_grid(torch.zeros(blip.QUERIES))


def test_prompts_are_padded_before_the_image(vlm, image):
    """The processor puts the image tokens before the padding; a batch has its padding first."""
    batch = vlm.encode([image(0), image(1), image(2)], PROMPTS)
    assert (batch.real_mask[:, 1:] >= batch.real_mask[:, :-1]).all()
    for row, length in enumerate(batch.lengths):
        ids = batch.input_ids[row, -length:].tolist()
        assert ids[: blip.QUERIES] == [batch.image_token_id] * blip.QUERIES
        assert ids[blip.QUERIES] == vlm.tokenizer.bos_token_id
    logits = vlm.forward(batch).logits
    for row in range(3):
        alone = vlm.forward(vlm.encode([image(row)], [PROMPTS[row]])).logits[0]
        torch.testing.assert_close(logits[row, -batch.lengths[row] :], alone, rtol=0, atol=1e-4)


def test_the_batch_of_the_processor_gives_the_same_answers(vlm, image):
    """Hugging Face's own call, with its padding between image and text, for rows of equal length."""
    texts = ["is there a dog ?", "what is this cat ?"]
    batch = vlm.encode([image(0), image(1)], texts)
    made = vlm.processor(images=[image(0), image(1)], text=texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted = vlm.model(**made).logits
    torch.testing.assert_close(vlm.forward(batch).logits, wanted, rtol=0, atol=1e-4)
    tokens = vlm.model.generate(**made, max_new_tokens=4, do_sample=False)[:, made["input_ids"].shape[1] :]
    found = vlm.generate(batch, max_new_tokens=4).tokens
    for row, own in zip(found, tokens.tolist(), strict=True):
        assert list(row) == own[: len(row)]


def test_of_the_picture_that_a_text_only_batch_runs_with_nothing_comes(vlm, image):
    batch = vlm.encode([image(0), image(1)], PROMPTS[:2])
    other = vlm.encode([image(2), image(3)], PROMPTS[:2])
    assert torch.equal(vlm.forward(batch.without_images()).logits, vlm.forward(other.without_images()).logits)
    with vlm.trace(sites.vision_resid_post(), sites.projector_out(), sites.resid_post()) as trace:
        vlm.forward(batch.without_images())
    for site in ("vision_resid_post", "projector_out"):
        with pytest.raises(InputError, match="recorded nothing"):
            trace[site][0]


def test_the_qformer_of_instructblip_reads_the_prompt(image):
    vlm = blip.build_instructblip()
    inputs = vlm.encode([image(0), image(1)], PROMPTS[:2]).extra
    mask = inputs["qformer_attention_mask"]
    assert (mask[:, 1:] <= mask[:, :-1]).all()  # its positions count from the first token
    assert mask.sum(dim=1).tolist() == [len(text.split()) + 2 for text in PROMPTS[:2]]  # [CLS] and [SEP]
    # the text of a prompt without an image is not given to it
    assert len(vlm.encode([None, image(1)], PROMPTS[:2]).extra["qformer_input_ids"]) == 1


def test_several_images_and_placeholders_are_refused(vlm, image):
    with pytest.raises(InputError, match=r"prompt 0: 2 images; .* takes 1 per prompt"):
        vlm.encode([[image(0), image(1)]], ["what ?"])
    with pytest.raises(InputError, match="prompt 0: found the image token '<image>'"):
        vlm.encode([image(0)], ["<image> what ?"])


def test_the_start_token_is_left_to_the_tokenizers(image):
    """InstructBLIP's Q-Former has a start token of its own."""
    with pytest.raises(InputError, match="prompt 0 starts with the start token '<s>'"):
        blip.build_instructblip().encode([image(0)], ["<s> what ?"])
    vlm = blip.build_blip2()
    written, added = (vlm.encode([image(0)], [text]).input_ids for text in ("<s> what ?", "what ?"))
    assert torch.equal(written, added)


def test_an_encoder_decoder_is_refused_by_name(vlm):
    config = copy.deepcopy(vlm.model.config)
    if not isinstance(config, Blip2Config):
        config = blip.build_blip2().model.config
    t5 = T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=4)
    config = Blip2Config(
        vision_config=config.vision_config,
        qformer_config=config.qformer_config,
        text_config=t5,
        num_query_tokens=blip.QUERIES,
        image_token_index=4,
    )
    with pytest.raises(UnsupportedError, match="'t5' is an encoder-decoder"):
        VLM.wrap(Blip2ForConditionalGeneration(config).eval(), vlm.processor)
