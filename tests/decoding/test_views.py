"""Versions of a batch that say nothing of the image."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from edits import Edits
from tiny_models import BUILDERS

from slitlamp.decoding import image_free
from slitlamp.decoding.views import IMAGE_FREE, blocked, diffused, only_tokens, soft_prompt
from slitlamp.errors import InputError, UnknownNameError, UnsupportedError
from slitlamp.tracing import sites
from slitlamp.vlm import VLM


def trace_of(vlm: VLM, batch, edits):
    return vlm._extra_pass(batch, [sites.resid_pre(layers=[0]), sites.resid_post()], edits)


def pair(vlm, image, seeds):
    pictures = [[image(seeds[0]), image(seeds[1], 30, 9)], [image(seeds[2])]]
    batch = vlm.encode(pictures, ["is <image> in <image> ?", "<image> describe this ."])
    return batch.with_continuation([[5, 6], []])


@pytest.mark.parametrize("how", ["deleted", "zero", "noise"])
def test_what_the_model_sees_does_not_depend_on_the_image(how, any_vlm, image):
    found = []
    for seeds in [(0, 1, 2), (3, 4, 5)]:
        trace = trace_of(any_vlm, *image_free(pair(any_vlm, image, seeds), how))
        found.append(trace["resid_post"][2])
    assert torch.equal(found[0], found[1])


def test_deleted_is_the_prompt_without_image_tokens(any_vlm, image):
    batch = pair(any_vlm, image, (0, 1, 2))
    free, edits = image_free(batch)
    assert edits == []
    assert torch.equal(free.input_ids, batch.without_images().input_ids)
    assert free.n_generated == batch.n_generated


def test_zero_and_mean_change_image_embeddings_alone(any_vlm, image):
    batch = pair(any_vlm, image, (0, 1, 2))
    plain = trace_of(any_vlm, batch, [])
    mask = torch.zeros_like(plain.mask("resid_pre"))
    for row in range(batch.size):
        mask[row, : batch.lengths[row]] = batch.image_mask[row][batch.real_mask[row]]
    before = plain["resid_pre"][0]
    for how in ("zero", "mean"):
        free, edits = image_free(batch, how)
        assert free is batch
        after = trace_of(any_vlm, free, edits)["resid_pre"][0]
        assert torch.equal(after[~mask], before[~mask])
        for row in range(batch.size):
            own = before[row][mask[row]]
            wanted = torch.zeros_like(own) if how == "zero" else own.mean(dim=0).expand_as(own)
            torch.testing.assert_close(after[row][mask[row]], wanted, rtol=0, atol=1e-5)


def test_noise_is_one_image_for_all_rows_and_repeats_by_seed(llava, image):
    batch = pair(llava, image, (0, 1, 2))
    pixels = [image_free(batch, "noise", seed)[0].extra["pixel_values"] for seed in (0, 0, 1)]
    assert pixels[0].shape == batch.extra["pixel_values"].shape
    assert torch.equal(pixels[0], pixels[1])
    assert not torch.equal(pixels[0], pixels[2])
    assert all(torch.equal(pixels[0][0], one) for one in pixels[0])
    assert abs(float(pixels[0][0].mean())) < 0.2  # 768 standard normal draws: five standard errors
    assert abs(float(pixels[0][0].std()) - 1) < 0.2


def test_views_leave_decode_steps_alone(any_vlm, image):
    """The edits of "zero" act on the prompt: what is generated is the same as by a model fed the whole text at once."""
    from dataclasses import dataclass
    from typing import ClassVar

    from slitlamp.decoding import Intervention

    @dataclass
    class Blind(Intervention):
        name: ClassVar[str] = "blind"
        kind: ClassVar = "blocks"

        def edits(self, run):
            return image_free(run.batch, "zero")[1]

    batch = pair(any_vlm, image, (0, 1, 2)).prompt_only()
    with any_vlm.apply(Blind()):
        generation = any_vlm.generate(batch, max_new_tokens=3, eos_token_id=[])
        logits = any_vlm.forward(generation.teacher_forced()).logits[:, -4:-1]
    logits[..., [0, 1, 4]] = -torch.inf  # the tiny models may not say these
    assert [list(tokens) for tokens in generation.tokens] == logits.argmax(dim=-1).tolist()


def test_rows_without_an_image_and_unknown_ways_are_refused(llava, image):
    batch = llava.encode([image(0), None], ["<image> what ?", "a dog ?"], ids=["scene 1", "scene 2"])
    for how in IMAGE_FREE:
        with pytest.raises(InputError, match="rows without one: scene 2"):
            image_free(batch, how)
    with pytest.raises(UnknownNameError, match="unknown way of removing the image 'delete'; did you mean 'deleted'"):
        image_free(batch, "delete")


@functools.cache
def built(name) -> VLM:
    return BUILDERS[name]()


def encoded(vlm, pictures):
    """One row per list of images: its placeholders, and a question."""
    family = vlm.anatomy.family
    placeholder = "" if family.placeholder is None else getattr(vlm.processor, family.placeholder)
    return vlm.encode(pictures, [f"{placeholder} " * len(row) + "is this red ?" for row in pictures])


def states_of(vlm, batch, edits):
    """The residual stream after every layer that ran (Mllama skips those that would read the image)."""
    record = trace_of(vlm, batch, edits)["resid_post"]
    return torch.stack([record[layer] for layer in record.layers])


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("how", IMAGE_FREE)
def test_in_every_family_nothing_of_the_image_is_left(how, name, image):
    vlm = built(name)
    if vlm.anatomy.family.cross is not None and how in ("zero", "mean"):
        with pytest.raises(UnsupportedError, match="cross-attention"):
            image_free(encoded(vlm, [[image(0)]]), how)
        return
    found = []
    for seed in (0, 10):
        batch = encoded(vlm, [[image(seed, 40, 24)], [image(seed + 1)]])
        free, edits = image_free(batch, how)
        found.append(states_of(vlm, free, edits))
        found.append(states_of(vlm, batch, []))
    assert not torch.equal(found[1], found[3])
    if how == "mean":  # says of the image what its mean says
        assert not torch.equal(found[0], found[1])
    else:
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", BUILDERS)
def test_noise_does_not_depend_on_the_rest_of_the_batch(name, image):
    vlm = built(name)
    small, large = [image(0)], [image(1, 44, 36)]
    alone, edits = image_free(encoded(vlm, [small]), "noise")
    assert edits == []
    both, _ = image_free(encoded(vlm, [large, small]), "noise")
    wanted = vlm.forward(alone).logits[0]
    torch.testing.assert_close(vlm.forward(both).logits[1, -alone.length :], wanted, rtol=0, atol=1e-4)
    other, _ = image_free(encoded(vlm, [small]), "noise", seed=1)
    assert not torch.allclose(vlm.forward(other).logits[0], wanted, atol=1e-3)


def test_noise_of_a_patch_is_the_same_in_its_frames(image):
    vlm = built("qwen2_vl")
    pixels = image_free(encoded(vlm, [[image(0)]]), "noise")[0].extra["pixel_values"]
    frames = pixels.view(len(pixels), 3, 2, 16)  # as the image processor lays patches out
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
    assert len(torch.unique(frames[:, :, 0])) == len(pixels) * 3 * 16


def test_zero_and_mean_replace_what_deepstack_adds(image):
    vlm = built("qwen3_vl")
    batch = encoded(vlm, [[image(0, 40, 24)], [image(1)]])
    for how in ("zero", "mean"):
        trace = vlm._extra_pass(batch, [sites.resid_pre(), sites.resid_post()], image_free(batch, how)[1])
        for layer in (0, 1):
            added = trace["resid_pre"][layer + 1] - trace["resid_post"][layer]
            for row in range(2):
                of_image = added[row][batch.image_mask[row][batch.real_mask[row]].nonzero()[:, 0]]
                assert torch.all(of_image == 0) == (how == "zero")
                torch.testing.assert_close(of_image, of_image[:1].expand_as(of_image), rtol=0, atol=1e-5)


def test_diffusion_is_that_of_the_schedule(llava, image):
    """abar step by step in the plain words of the formula; the noise is that of "noise", the same for all images."""
    batch = pair(llava, image, (0, 1, 2))
    pixels = batch.extra["pixel_values"]
    eps = image_free(batch, "noise", 4)[0].extra["pixel_values"]
    for step in (0, 500, 999):
        kept = 1.0
        for t in range(step + 1):
            place = -6 + 12 * t / 999
            kept *= 1 - ((0.005 - 1e-5) / (1 + math.exp(-place)) + 1e-5)
        found = diffused(batch, step, 4).extra["pixel_values"]
        torch.testing.assert_close(found, kept**0.5 * pixels + (1 - kept) ** 0.5 * eps, rtol=0, atol=1e-5)
    assert torch.equal(diffused(batch, 500, 4).extra["pixel_values"], diffused(batch, 500, 4).extra["pixel_values"])
    assert not torch.equal(diffused(batch, 500, 4).extra["pixel_values"], diffused(batch, 500, 5).extra["pixel_values"])
    for step in (-1, 1000):
        with pytest.raises(InputError, match=f"one of 0 to 999, found {step}"):
            diffused(batch, step)


@pytest.mark.parametrize("name", BUILDERS)
def test_diffusion_does_not_depend_on_the_rest_of_the_batch(name, image):
    vlm = built(name)
    small, large = [image(0)], [image(1, 44, 36)]
    alone, both = encoded(vlm, [small]), encoded(vlm, [large, small])
    wanted = vlm.forward(diffused(alone)).logits[0]
    found = vlm.forward(diffused(both)).logits[1, -alone.length :]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert not torch.allclose(wanted, vlm.forward(alone).logits[0], atol=1e-3)


def embedded(vlm, batch):
    return vlm._extra_pass(batch, [sites.resid_pre(layers=0, positions="image")], [])["resid_pre"][0]


@pytest.mark.parametrize("name", BUILDERS)
def test_all_image_tokens_in_their_order_are_the_image(name, image):
    vlm = built(name)
    batch = encoded(vlm, [[image(0, 40, 24)], [image(1)]])
    if vlm.anatomy.family.cross is not None or batch.deepstack_layers:
        with pytest.raises(UnsupportedError, match="cannot be given some image tokens alone"):
            only_tokens(batch, [torch.tensor([0])] * 2, torch.zeros(2, 1, vlm.anatomy.d_model))
        return
    if vlm.anatomy.family.first_position is None:  # positions by row and column, in place of which these count as text
        batch = encoded(vlm, [[image(0, 40, 24)]])
        states = vlm._extra_pass(batch, [sites.resid_pre(layers=0)], [])["resid_pre"][0]
        positions = torch.arange(batch.length).expand(3, 1, -1)
        with torch.no_grad():
            wanted = vlm.model(inputs_embeds=states, position_ids=positions).logits
    else:
        wanted = vlm.forward(batch).logits
    every = [torch.arange(int(row.sum())) for row in batch.image_mask]
    whole = only_tokens(batch, every, embedded(vlm, batch))
    torch.testing.assert_close(vlm.forward(whole).logits, wanted, rtol=0, atol=1e-5)


def test_only_some_tokens_are_the_prompt_with_these_alone(llava, image):
    """Against the decoder on the embeddings of what is left, row by row; in the order asked for, with a continuation."""
    batch = pair(llava, image, (0, 1, 2))
    features = embedded(llava, batch)
    chosen = [torch.tensor([20, 3, 17]), torch.tensor([5])]
    shorter = only_tokens(batch, chosen, features)
    logits = llava.forward(shorter).logits
    assert shorter.image_mask.sum(dim=1).tolist() == [3, 1]
    assert shorter.patches[0].table.tolist() == batch.patches[0].table[[20, 3, 17]].tolist()
    assert shorter.n_generated == batch.n_generated
    table = llava.model.get_input_embeddings()
    for row, numbers in enumerate(chosen):
        states, left = [], iter(numbers.tolist())
        places = batch.image_mask[row].nonzero()[:, 0].tolist()
        for place in batch.real_mask[row].nonzero()[:, 0].tolist():
            if not batch.image_mask[row, place]:
                states.append(table(batch.input_ids[row, place]))
            elif places.index(place) in numbers:
                states.append(features[row, next(left)])
        with torch.no_grad():
            wanted = llava.model(inputs_embeds=torch.stack(states)[None]).logits[0]
        assert shorter.lengths[row] == len(states)
        torch.testing.assert_close(logits[row, -len(states) :], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_unk_is_the_deleted_prompt_with_one_word_more_per_image(name, image):
    """Where each image stood; a row of two images has two of them."""
    vlm = built(name)
    one_image = vlm.anatomy.family.max_images == 1
    pictures = [[image(0, 40, 24)], [image(1)]] if one_image else [[image(0, 40, 24), image(2)], [image(1)]]
    batch = encoded(vlm, pictures).with_continuation([[9, 10], []])
    unk, edits = image_free(batch, "unk")
    deleted, _ = image_free(batch)
    assert edits == []
    assert not unk.image_mask.any()
    assert unk.n_generated == batch.n_generated
    is_unk = (unk.input_ids == 3) & unk.real_mask  # "<unk>" of the tiny tokenizers
    for row, images in enumerate(pictures):
        assert is_unk[row].sum() == len(images)
        rest = unk.input_ids[row][unk.real_mask[row] & ~is_unk[row]]
        assert rest.tolist() == deleted.input_ids[row][deleted.real_mask[row]].tolist()
        before = batch.image_mask[row].long().argmax() - (batch.length - batch.lengths[row])
        assert is_unk[row].long().argmax() - (unk.length - unk.lengths[row]) == before
    assert vlm.forward(unk).logits.isfinite().all()
    assert "pixel_values" not in unk.extra or vlm.anatomy.family.always_pixels


@pytest.mark.parametrize("fixture", ["llava", "llava_next"])
def test_unk_is_a_prompt_that_says_so(fixture, request, image):
    vlm = request.getfixturevalue(fixture)
    unk, _ = image_free(vlm.encode([image(0)], ["is <image> there ?"]), "unk")
    said = vlm.encode(prompts=["is <unk> there ?"])
    assert torch.equal(unk.input_ids, said.input_ids)
    assert torch.equal(vlm.forward(unk).logits, vlm.forward(said).logits)


def test_unk_without_such_a_word_is_refused(llava, image):
    batch = dataclasses.replace(llava.encode([image(0)], ["<image> what ?"]), unk_token_id=None)
    with pytest.raises(UnsupportedError, match="no token for unknown words"):
        image_free(batch, "unk")


@pytest.mark.parametrize("name", BUILDERS)
def test_a_soft_prompt_is_all_that_is_left_of_the_image(name, image):
    """Against the decoder on the embeddings put together by hand; longer and shorter than the image."""
    vlm = built(name)
    pictures = [[image(0, 40, 24)], [image(1)]]
    batch = encoded(vlm, pictures)
    soft = torch.randn(5, vlm.anatomy.d_model, generator=torch.Generator().manual_seed(0))
    if vlm.anatomy.family.cross is not None:
        with pytest.raises(UnsupportedError, match="no image embeddings for a soft prompt"):
            soft_prompt(batch, soft)
        return
    plain = trace_of(vlm, batch, [])["resid_pre"][0]
    for embeddings in (soft, soft.repeat(8, 1)):
        short = soft_prompt(batch, embeddings)
        after = trace_of(vlm, short, [])["resid_pre"][0]
        for row in range(2):
            real = batch.image_mask[row][batch.real_mask[row]]
            first = int(real.long().argmax())
            text = plain[row][: batch.lengths[row]][~real]
            if name != "blip-2":  # whose embeddings hold positions, which shift
                wanted = torch.cat([text[:first], embeddings, text[first:]])
                torch.testing.assert_close(after[row, : len(wanted)], wanted, rtol=0, atol=1e-5)
            assert short.lengths[row] == len(text) + len(embeddings)
            assert short.image_mask[row].sum() == len(embeddings)


def test_a_soft_prompt_of_the_images_embeddings_is_the_image(llava, image):
    batch = llava.encode([image(0)], ["is <image> there ?"])
    short = soft_prompt(batch, embedded(llava, batch)[0])
    torch.testing.assert_close(llava.forward(short).logits, llava.forward(batch).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_nobody_attends_to_blocked_tokens(name, image):
    vlm = built(name)
    batch = encoded(vlm, [[image(0, 40, 24)], [image(1)]])
    if vlm.anatomy.family.cross is not None:
        with pytest.raises(UnsupportedError, match="does not attend to image tokens among its positions"):
            blocked(batch, vlm.anatomy)
        return
    rho = np.random.default_rng(7).random(int(batch.image_mask.sum(dim=1).max()))
    same, edits = blocked(batch, vlm.anatomy, 0.6, seed=7)
    assert same is batch
    site = sites.attention(queries="all", keys="all")
    weights = vlm._extra_pass(batch, [site], edits)["attention"]
    for row in range(2):
        real = batch.real_mask[row].nonzero()[:, 0]
        places = batch.image_mask[row][real].nonzero()[:, 0]
        n = len(real)
        for layer in weights.layers:
            received = weights[layer][row, :, :n, :n].amax(dim=0)
            shown = received.fill_diagonal_(0)[:, places].amax(dim=0) > 0
            assert shown.tolist() == (rho[: len(places)] >= 0.6).tolist()


def test_blocking_all_of_the_image_leaves_the_prior(llava, image):
    """Text says the same whatever the image; with none blocked, nothing changes; later draws do not change earlier ones."""
    found = []
    for seed in (0, 5):
        batch = llava.encode([image(seed)], ["is <image> there ?"])
        found.append(llava.forward(batch, edits=blocked(batch, llava.anatomy, 1.0)[1]).logits[:, -1])
        none = llava.forward(batch, edits=blocked(batch, llava.anatomy, 0.0)[1]).logits
        torch.testing.assert_close(none, llava.forward(batch).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=r"must be between 0 and 1, found 1\.5"):
        blocked(batch, llava.anatomy, 1.5)


def test_blocked_tokens_stay_so_in_decode_steps(llava, image):
    batch = llava.encode([image(0), image(1)], ["<image> is there a dog ?", "what <image> ?"])
    edits = blocked(batch, llava.anatomy, 0.5, seed=1)[1]
    with llava.apply(Edits(edits)):
        generation = llava.generate(batch, max_new_tokens=4, eos_token_id=[])
    forced = generation.teacher_forced()
    again = blocked(forced, llava.anatomy, 0.5, seed=1)[1]
    logits = llava.forward(forced, edits=again).logits[:, -5:-1]
    logits[..., [0, 1, 4]] = -torch.inf  # the tiny models may not say these
    assert [list(tokens) for tokens in generation.tokens] == logits.argmax(dim=-1).tolist()
