"""Edits of image tokens, against the decoder on the embeddings of what is left, and on planted answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from contract import close, encode
from tiny_models import BUILDERS
from torch import Tensor

from interventions import (
    ClsPruning,
    FastVPruning,
    FocalPruning,
    HeadReinforcement,
    ImageContrast,
    ImageTokenAblation,
    InformedTokenBoost,
    TokenMerging,
)
from interventions.ranked_tokens import best, count_kept, of_tokens
from slitlamp.decoding.visual_tokens import ImageTokens
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import Batch
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

PROMPTS = ["<image> is there a dog ?", "describe this <image> .", "<image> what is in the image and where is it ?"]


@pytest.fixture
def batch(llava: VLM, image: Any) -> Batch:
    return llava.encode(images=[image(0), image(1), image(2)], prompts=PROMPTS)


def embedded(vlm: VLM, batch: Batch) -> Tensor:
    """[batch, position, d_model], the inputs of the first block, left-padded as the batch is."""
    states = vlm._extra_pass(batch, [sites.resid_pre(layers=0)], ())["resid_pre"][0]
    table = states.new_zeros(*batch.input_ids.shape, states.shape[-1])
    for row, length in enumerate(batch.lengths):
        table[row, batch.real_mask[row]] = states[row, :length]
    return table


def tower_attention(vlm: VLM, batch: Batch) -> list[Tensor]:
    """Per block of the tower, [image, head, query, key] with the CLS token, as transformers' eager attention gives it."""
    tower = vlm.model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = tower(batch.extra["pixel_values"], output_attentions=True).attentions
    finally:
        tower.set_attn_implementation(before)
    return list(found)


def by_hand(vlm: VLM, batch: Batch, row: int, kept: Tensor, positions: str) -> Tensor:
    """Logits [position, vocab] of a row with some image tokens alone, from embeddings and positions made by hand."""
    states = embedded(vlm, batch)[row]
    places = batch.image_mask[row].nonzero()[:, 0]
    stays = batch.real_mask[row] & ~batch.image_mask[row]
    stays[places[kept]] = True
    numbers = (batch.attention_mask[row].cumsum(0) - 1)[stays]
    if positions == "contiguous":
        numbers = torch.arange(len(numbers))
    with torch.no_grad():
        return vlm.model(inputs_embeds=states[stays][None], position_ids=numbers[None]).logits[0]


def said(vlm: VLM, logits: Tensor) -> int:
    """The greedy choice: the tiny models may not say special tokens."""
    logits = logits.clone()
    logits[vlm.model.generation_config.suppress_tokens] = -torch.inf
    return int(logits.argmax())


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_pruned_prompts_are_those_without_the_tokens(positions: Any, llava: VLM, batch: Batch) -> None:
    method = ClsPruning(0.25, positions=positions)
    with llava.apply(method):
        logits = llava.forward(batch).logits
        generation = llava.generate(batch, max_new_tokens=5, eos_token_id=[])
    for row, kept in enumerate(method.kept_):
        assert kept.tolist() == sorted(kept.tolist())
        wanted = by_hand(llava, batch, row, kept, positions)
        close(logits[row, -len(wanted) :], wanted, 1e-5)
        tokens: list[int] = []
        for _ in range(5):  # without a cache
            longer = batch.with_continuation([tokens if one == row else [] for one in range(batch.size)])
            tokens.append(said(llava, by_hand(llava, longer, row, kept, positions)[-1]))
        assert list(generation.tokens[row]) == tokens
    assert generation.n_image == tuple(len(kept) for kept in method.kept_)
    assert generation.seconds > 0
    assert generation.batch is batch


def test_contiguous_and_original_positions_differ(llava: VLM, batch: Batch) -> None:
    found = []
    for positions in ("contiguous", "original"):
        with llava.apply(ClsPruning(0.25, positions=positions)):  # type: ignore[arg-type]
            found.append(llava.forward(batch).logits[:, -1])
    assert (found[0] - found[1]).abs().max() > 1e-4


@pytest.mark.parametrize("combine", ["sum", "min", "max"])
def test_cls_pruning_goes_by_the_towers_own_attention(combine: Any, llava: VLM, batch: Batch) -> None:
    method = ClsPruning(0.5, layers=[0, 1], combine=combine)
    with llava.apply(method):
        llava.forward(batch)
    attention = [one[:, :, 0, 1:].mean(dim=1).numpy() for one in tower_attention(llava, batch)[:2]]
    score = {"sum": np.sum, "min": np.min, "max": np.max}[combine](attention, axis=0)
    for row, kept in enumerate(method.kept_):
        assert kept.tolist() == sorted(np.argsort(-score[row], kind="stable")[: len(kept)].tolist())
        assert len(kept) == score.shape[1] // 2


def test_the_blocks_of_cls_pruning_are_the_papers_for_clip_l() -> None:
    assert ClsPruning()._layers(24) == tuple(range(16, 23))
    assert [ClsPruning()._layers(n) for n in (1, 2, 3, 4)] == [(0,), (0,), (1,), (2,)]


def test_focal_pruning_takes_the_attention_that_varies_more(llava: VLM, batch: Batch) -> None:
    layer = 1
    attention = tower_attention(llava, batch)[layer].mean(dim=1)[:, 1:, 1:].double()
    received, given = attention.mean(dim=1), attention.mean(dim=2)
    for how, scores in (("received", received), ("given", given), ("auto", None)):
        method = FocalPruning(0.25, attention=how, layer=layer)  # type: ignore[arg-type]
        with llava.apply(method):
            llava.forward(batch)
        for row, kept in enumerate(method.kept_):
            if scores is None:
                own = max(received[row], given[row], key=lambda one: float(one.var()))
            else:
                own = scores[row]
            assert kept.tolist() == sorted(own.argsort(descending=True)[: len(kept)].tolist())


def test_focal_pruning_keeps_whole_rows(llava: VLM, batch: Batch) -> None:
    side = batch.patches[0].grids[0, 0][0]
    method = FocalPruning(0.5, unit="row", attention="received", layer=1)
    with llava.apply(method):
        llava.forward(batch)
    sums = tower_attention(llava, batch)[1].mean(dim=1)[:, 1:, 1:].mean(dim=1).unflatten(-1, (side, side)).sum(dim=-1)
    for row, kept in enumerate(method.kept_):
        rows = sorted(sums[row].argsort(descending=True)[: side // 2].tolist())
        assert kept.tolist() == [line * side + column for line in rows for column in range(side)]


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl", "paligemma"])
def test_what_stays_does_not_depend_on_the_batch(name: str, image: Any) -> None:
    vlm = BUILDERS[name]()
    images = [[image(0)], [image(1, 44, 36)]]
    for method in (FocalPruning(0.5, attention="received"), TokenMerging(0.5, encoder_attention="received")):
        with vlm.apply(method):
            together = vlm.forward(encode(vlm, images)).logits[:, -1]
            for row in range(2):
                close(vlm.forward(encode(vlm, images, [row])).logits[0, -1], together[row], 1e-4)


def test_fastv_gives_what_dropping_the_tokens_inside_the_decoder_gives(llava: VLM, batch: Batch) -> None:
    """Blocks run by hand: all tokens before the layer, those that are left from it on, at the positions that they had."""
    method = FastVPruning(0.25, layer=1)
    with llava.apply(method):
        logits = llava.forward(batch).logits
    decoder = llava.model.model.language_model
    for row in range(batch.size):
        real = batch.real_mask[row]
        states, image = embedded(llava, batch)[row][real][None], batch.image_mask[row][real]
        positions = torch.arange(states.shape[1])[None]
        decoder.config._attn_implementation = "eager"
        try:
            with torch.no_grad():
                whole = llava.model(inputs_embeds=states, position_ids=positions, output_attentions=True)
                received = whole.attentions[0][0].mean(dim=0)[-1][image]
                kept = sorted(received.argsort(descending=True)[: int(image.sum()) // 4].tolist())
                assert method.kept_[row].tolist() == kept
                stays = ~image
                stays[image.nonzero()[:, 0][kept]] = True
                for number, block in enumerate(decoder.layers):
                    if number == 1:
                        states, positions = states[:, stays], positions[:, stays]
                    turned = decoder.rotary_emb(states, positions)
                    mask = torch.full((states.shape[1],) * 2, -torch.inf).triu(1)[None, None]
                    found = block(states, position_embeddings=turned, attention_mask=mask, position_ids=positions)
                    states = found[0] if isinstance(found, tuple) else found
                wanted = llava.model.lm_head(decoder.norm(states))[0, -1]
        finally:
            decoder.config._attn_implementation = "sdpa"
        close(logits[row, -1], wanted, 1e-5)


def given(vlm: VLM, batch: Batch, states: list[Tensor]) -> tuple[Any, ImageTokens]:
    """The run over a batch whose image tokens are said to have these states."""
    return vlm._context(batch), ImageTokens(tuple(torch.arange(len(one)) for one in states), tuple(states))


def test_alike_tokens_are_merged_into_their_weighted_mean(llava: VLM, batch: Batch) -> None:
    """Planted: tokens point one of three ways, at several lengths, and no token is primary."""
    n = int(batch.image_mask[0].sum())
    ways = torch.eye(llava.anatomy.d_model)[:3]
    kind = torch.arange(n) % 3
    states = ways[kind] * (1 + torch.arange(n) / 7)[:, None]
    method = TokenMerging(3 / n, primary=0.0)
    run, tokens = given(llava, batch, [states] * batch.size)
    merged = method.change(run, tokens)
    importance = ClsPruning().scores(run)
    for row in range(batch.size):
        into = method.clusters_[row]
        assert all(len(into[kind == one].unique()) == 1 for one in range(3))
        assert len(merged.number[row]) == 3
        assert merged.number[row].tolist() == sorted(merged.number[row].tolist())
        for cluster in range(3):
            members = into == cluster
            weight = importance[row][members]
            wanted = (weight[:, None] * states[members]).sum(dim=0) / weight.sum()
            close(merged.states[row][cluster], wanted, 1e-5)
            assert int(merged.number[row][cluster]) == int(members.nonzero()[:, 0][weight.argmax()])


def test_primary_tokens_are_kept_as_they_are(llava: VLM, batch: Batch) -> None:
    run = llava._context(batch)
    n = int(batch.image_mask[0].sum())
    states = [torch.randn(n, llava.anatomy.d_model, generator=torch.Generator().manual_seed(row)) for row in range(3)]
    merged = TokenMerging(0.5, primary=0.5).change(run, given(llava, batch, states)[1])
    importance = ClsPruning().scores(run)
    for row in range(3):
        assert len(merged.number[row]) == n // 2
        for token in importance[row].argsort(descending=True)[: n // 4].tolist():
            place = merged.number[row].tolist().index(token)
            assert torch.equal(merged.states[row][place], states[row][token])


@pytest.mark.parametrize("value", ["mean", "zero", "given"])
def test_ablated_tokens_hold_what_was_asked_for(value: Any, llava: VLM, batch: Batch) -> None:
    vector = [float(one) for one in range(llava.anatomy.d_model)]
    method = ImageTokenAblation(0.5, value, vector=vector if value == "given" else None)
    before = embedded(llava, batch)
    with llava.apply(method), llava.trace(sites.resid_pre(layers=0, positions="image")) as trace:
        llava.forward(batch)
    for row in range(batch.size):
        own = before[row][batch.image_mask[row]]
        wanted = own.clone()
        put = {"mean": own.mean(dim=0), "zero": torch.zeros_like(own[0]), "given": torch.tensor(vector)}[value]
        wanted[method.ablated_[row]] = put
        assert len(method.ablated_[row]) == len(own) // 2
        close(trace["resid_pre"][0][row, : len(own)], wanted, 1e-6)


def test_edits_act_one_after_the_other(llava: VLM, batch: Batch) -> None:
    """Half of the half, by the same ranking, is a quarter; ablation ranks what pruning has left."""
    twice, once, ablation = ClsPruning(0.5), ClsPruning(0.25), ImageTokenAblation(0.5)
    with llava.apply(ClsPruning(0.5), twice):
        llava.forward(batch)
    with llava.apply(once, ablation):
        llava.forward(batch)
    for row in range(batch.size):
        assert twice.kept_[row].tolist() == once.kept_[row].tolist()
        assert set(ablation.ablated_[row].tolist()) <= set(once.kept_[row].tolist())
        assert len(ablation.ablated_[row]) == len(once.kept_[row]) // 2


def test_block_edits_act_on_what_is_left(llava: VLM, batch: Batch) -> None:
    """Factors of image tokens reach those that are left, whichever place they have now."""
    whole, pruned = InformedTokenBoost(5.0, 5.0, share=1.0), InformedTokenBoost(5.0, 5.0, share=1.0)
    pruning = ClsPruning(0.25)
    with llava.apply(pruning, pruned), llava.trace(sites.attention(queries="last", keys="all")) as trace:
        llava.forward(batch)
    with llava.apply(pruning), llava.trace(sites.attention(queries="last", keys="all")) as plain:
        llava.forward(batch)
    assert trace.batch is not None
    changed = (trace["attention"][2] - plain["attention"][2]).abs().amax(dim=(1, 2))
    assert float(changed.max()) > 1e-3
    with llava.apply(whole):
        llava.forward(batch)
    assert [one.tolist() for one in whole.summary_] == [one.tolist() for one in pruned.summary_]


def test_a_contrast_beside_pruning_is_with_the_unmodified_model(llava: VLM, batch: Batch) -> None:
    with llava.apply(ClsPruning(0.25)):
        clean = llava.forward(batch).logits[:, -1]
    with llava.apply(ClsPruning(0.25), ImageContrast(1.0, "deleted", beta=0.0)):
        fused = llava.forward(batch).logits[:, -1]
        generation = llava.generate(batch, max_new_tokens=4)
    free = llava.forward(batch.without_images()).logits[:, -1]
    close(fused, 2 * clean - free, 1e-4)
    assert [row[0] for row in generation.tokens] == fused.argmax(dim=-1).tolist()


def test_reinforced_heads_of_a_pruned_prompt(llava: VLM, batch: Batch) -> None:
    """Step by step and at once, with gaps between positions, and against an image-free run, which has none."""
    site = sites.resid_post(layers=[2], positions="before_generated")
    with llava.apply(ClsPruning(0.25, positions="original"), HeadReinforcement(3.0, layers=[0, 1, 2])):
        with llava.trace(site) as stepwise:
            generation = llava.generate(batch, max_new_tokens=4)
        with llava.trace(site) as at_once:
            llava.forward(generation.teacher_forced())
    close(stepwise["resid_post"][2], at_once["resid_post"][2], 1e-4)


def test_what_cannot_be_pruned_is_refused_by_name(llava_next: VLM, llava: VLM, batch: Batch, image: Any) -> None:
    tiles = llava_next.encode(images=[image(0)], prompts=["<image> is there a dog ?"])
    with llava_next.apply(ClsPruning()), pytest.raises(InputError, match="high-resolution tiles"):
        llava_next.forward(tiles)
    text = llava.encode(prompts=["is there a dog ?"])
    with llava.apply(ClsPruning()), pytest.raises(InputError, match="needs an image in every row"):
        llava.forward(text)
    with (
        pytest.raises(UnsupportedError, match="one way of counting"),
        llava.apply(ClsPruning(), TokenMerging(positions="original")),
    ):
        pass
    for name, match in (("mllama", "cross-attention"), ("qwen3_vl", "DeepStack")):
        with pytest.raises(UnsupportedError, match=match), BUILDERS[name]().apply(ClsPruning()):
            pass
    with (
        pytest.raises(UnsupportedError, match="by row and column"),
        BUILDERS["qwen2_vl"]().apply(FocalPruning(positions="original")),
    ):
        pass
    with pytest.raises(UnsupportedError, match="no CLS token"), BUILDERS["gemma3"]().apply(ClsPruning()):
        pass
    for bad in (
        ClsPruning(0.0),
        ClsPruning(1.5),
        FocalPruning(keep=-1),
        TokenMerging(primary=2),
        FastVPruning(layer=0),
    ):
        with pytest.raises(InputError), llava.apply(bad):
            pass


def test_attention_that_is_not_finite_gives_no_order(llava: VLM, batch: Batch) -> None:
    run = llava._context(batch)
    n_patches = [len(one) for one in batch.patches]
    values = torch.rand(batch.size, n_patches[0])
    assert all(one.isfinite().all() for one in of_tokens(run, values, n_patches, "me"))
    values[1, 3] = torch.nan
    with pytest.raises(InputError, match="me: the vision tower's attention holds NaN"):
        of_tokens(run, values, n_patches, "me")


def test_shares_and_choices() -> None:
    assert [count_kept(one, 576) for one in (256 / 576, 128 / 576, 64 / 576, 1.0, 1e-9)] == [256, 128, 64, 576, 1]
    values = torch.tensor([3.0, torch.nan, 1.0, 2.0])
    assert best(values, 1, "most", 0).tolist() == [True, True, False, False]
    assert best(values, 1, "least", 0).tolist() == [False, True, True, False]
    drawn = {tuple(best(values, 2, "random", seed).tolist()) for seed in range(20)}
    assert len(drawn) == 3  # of the three tokens with a value, every pair
