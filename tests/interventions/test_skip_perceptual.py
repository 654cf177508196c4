"""SkipPerceptual against copies of the model whose decoder layers were rewritten by hand."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from contract import encode
from tiny_models import BUILDERS
from tiny_models.common import random_image
from torch.utils.flop_counter import FlopCounterMode

from interventions import SkipPerceptual
from slitlamp.errors import InputError, UnknownNameError, UnsupportedError
from slitlamp.flops import BlockSizes, Tokens, decoder_flops, pruned_flops, skipped_flops
from slitlamp.models import Batch
from slitlamp.tracing import sites
from slitlamp.vlm import VLM


@pytest.fixture(scope="module")
def batch(llava: VLM, image: Any) -> Batch:
    prompts = llava.encode(
        images=[image(0), image(1)], prompts=["<image> is there a dog ?", "describe this <image> ."], ids=["a", "b"]
    )
    return prompts.with_continuation([[7, 8, 9], [10]])


def rewritten(vlm: VLM, layer: int, skip: str, chosen: torch.Tensor) -> VLM:
    """A copy whose decoder layer skips at chosen positions [batch, position]."""
    model = copy.deepcopy(vlm.model)
    block = model.model.language_model.layers[layer]
    here = chosen[..., None]

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        first = block.input_layernorm(hidden_states)
        mid = hidden_states + block.self_attn(hidden_states=first, **kwargs)[0]
        whole = mid + block.mlp(block.post_attention_layernorm(mid))
        other = {"ffn": mid, "block": hidden_states, "parallel": mid + block.mlp(first)}[skip]
        return torch.where(here, other, whole)

    block.forward = forward
    return VLM.wrap(model, vlm.processor)


def chosen_positions(batch: Batch, tokens: str, when: str) -> torch.Tensor:
    """By loops over ids and lengths, without the masks of `Batch` that the intervention uses."""
    chosen = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    for row, position in itertools.product(range(batch.size), range(batch.length)):
        if not batch.attention_mask[row, position]:
            continue
        generated = position >= batch.length - batch.n_generated[row]
        is_image = int(batch.input_ids[row, position]) == batch.image_token_id
        wanted = {"perceptual": is_image, "text": not is_image, "all": True}[tokens]
        chosen[row, position] = wanted and {"prefill": not generated, "decode": generated, "both": True}[when]
    return chosen


@pytest.mark.parametrize("skip", ["ffn", "block", "parallel"])
@pytest.mark.parametrize(
    ("tokens", "when"),
    [
        ("perceptual", "prefill"),
        ("perceptual", "both"),
        ("text", "prefill"),
        ("text", "decode"),
        ("all", "both"),
        ("all", "prefill"),
    ],
)
def test_a_layer_rewritten_by_hand(llava: VLM, batch: Batch, skip: Any, tokens: Any, when: Any) -> None:
    by_hand = rewritten(llava, 1, skip, chosen_positions(batch, tokens, when))
    method = SkipPerceptual(skip=skip, interval=1, tokens=tokens, when=when)
    with llava.apply(method):
        found = llava.forward(batch).logits
    assert method.blocks_ == (1,)
    real = batch.real_mask
    assert torch.allclose(found[real], by_hand.forward(batch).logits[real], atol=1e-4)
    assert (found - llava.forward(batch).logits)[real].abs().max() > 1e-3


def test_skipping_the_ffn_leaves_the_state_after_attention(llava: VLM, batch: Batch) -> None:
    """A clean skip is x + SA, to the bit: not x + LN2 of anything."""
    wanted = [sites.resid_mid(layers=[1], positions="image"), sites.resid_post(layers=[1], positions="image")]
    with llava.apply(SkipPerceptual(interval=1)), llava.trace(*wanted) as trace:
        llava.forward(batch)
    real = trace.mask("resid_mid")
    assert torch.equal(trace["resid_mid"][1][real], trace["resid_post"][1][real])


@pytest.mark.parametrize(
    ("start", "interval", "n_layers", "expected"),
    [
        (0, 2, 6, (2, 4)),
        (0, 1, 6, (1, 2, 3, 4)),
        (2, 2, 32, tuple(range(4, 31, 2))),
        (2, 4, 32, (4, 8, 12, 16, 20, 24, 28)),
        (30, 1, 32, ()),
        (0, 0, 6, ()),
    ],
)
def test_which_blocks(start: int, interval: int, n_layers: int, expected: tuple[int, ...]) -> None:
    """start < l < L - 1 and l mod interval = 0."""
    assert SkipPerceptual(start=start, interval=interval).blocks(n_layers) == expected


def test_random_blocks_are_as_many_and_seeded() -> None:
    rule = SkipPerceptual(interval=2)
    drawn = [SkipPerceptual(interval=2, select="random", seed=seed).blocks(32) for seed in range(20)]
    assert all(len(one) == len(set(one)) == len(rule.blocks(32)) for one in drawn)
    assert len(set(drawn)) > 15
    of_two = [SkipPerceptual(layers=[1], select="random", seed=seed).blocks(2) for seed in range(10)]
    assert set(of_two) == {(0,)}  # never the very blocks that they are the control of
    assert SkipPerceptual(layers=[0, 1], select="random").blocks(2) == (0, 1)
    assert drawn[3] == SkipPerceptual(interval=2, select="random", seed=3).blocks(32)


def test_controls_are_other_blocks_and_other_tokens() -> None:
    controls: dict[str, Any] = SkipPerceptual(when="both").controls()
    assert {name: (one.select, one.tokens) for name, one in controls.items()} == {
        "random": ("random", "perceptual"),
        "text": ("rule", "text"),
    }
    assert set(SkipPerceptual(tokens="all").controls()) == {"random"}


def test_bad_parameters_are_refused(llava: VLM) -> None:
    for bad, match in (
        (SkipPerceptual(interval=-1), "interval"),
        (SkipPerceptual(when="decode"), "no generated token"),
        (SkipPerceptual(layers=[3]), "layer 3"),
    ):
        with pytest.raises(InputError, match=match):
            bad.check(llava.anatomy)
    with pytest.raises(UnknownNameError, match="perceptual"):
        SkipPerceptual(tokens="perceptive").check(llava.anatomy)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="in parallel already"):
        SkipPerceptual(skip="parallel").check(BUILDERS["aya_vision"]().anatomy)
    with pytest.raises(UnsupportedError, match="cross-attention"):
        SkipPerceptual().check(BUILDERS["mllama"]().anatomy)


@pytest.mark.parametrize("family", ["gemma3", "aya_vision", "blip-2", "qwen3_vl", "llama4"])
def test_other_families_pass_their_residual_stream_on(family: str) -> None:
    vlm = BUILDERS[family]()
    batch = encode(vlm, [[random_image(0)]])
    with (
        vlm.apply(SkipPerceptual(layers=[1])),
        vlm.trace(
            sites.resid_pre(layers=[1], positions="image"),
            sites.attn_out(layers=[1], positions="image"),
            sites.resid_post(layers=[1], positions="image"),
        ) as trace,
    ):
        vlm.forward(batch)
    passed = trace["resid_pre"][1] + trace["attn_out"][1]
    assert torch.allclose(trace["resid_post"][1], passed, atol=1e-5)


# -- operations ---------------------------------------------------------------------------------------------------------


def test_flops_by_counting_products(llava: VLM, image: Any) -> None:
    """All linear maps and attention products of the blocks, counted by torch while the model runs over a prompt."""
    batch = llava.encode(images=[image(0)], prompts=["<image> is there a dog ?"])
    sizes = BlockSizes.of(llava.anatomy)
    n_image = int(batch.image_mask.sum())
    first = int(batch.image_mask[0].nonzero().min())
    tokens = Tokens(before=first, image=n_image, after=batch.length - n_image - first)
    counted = 0
    eager = VLM.wrap(copy.deepcopy(llava.model), llava.processor)
    eager.model.set_attn_implementation("eager")  # whose products torch can count
    with FlopCounterMode(display=False) as counter:
        eager.forward(batch)
    per_module = counter.get_flop_counts()
    prefix = type(llava.model).__name__
    for layer in range(3):
        path = f"{prefix}.model.language_model.layers.{layer}"
        counted += sum(per_module[path].values())
    # torch counts attention over all pairs, of which a causal decoder needs those on and below the diagonal
    length = batch.length
    all_pairs = 3 * (sizes.attending(length) * length - sizes.attending(length * (length + 1) // 2))
    assert decoder_flops(sizes, tokens) == counted - all_pairs


def test_saved_operations_by_hand() -> None:
    sizes = BlockSizes(n_layers=4, n_heads=2, n_kv_heads=1, d_model=8, d_head=4, d_mlp=16, gated=True)
    tokens = Tokens(before=1, image=2, after=1, generated=3)
    assert (sizes.mlp, sizes.query, sizes.key_value) == (768, 256, 128)
    assert [tokens.keys(kind) for kind in ("image", "text", "decoded")] == [2 + 3, 1 + 4, 5 + 6]
    assert decoder_flops(sizes, tokens) == 4 * (6 * (768 + 256 + 128) + 2 * 2 * 8 * (5 + 5 + 11))
    assert skipped_flops(sizes, tokens, ("image",), "ffn", 2) == 2 * 2 * 768
    assert skipped_flops(sizes, tokens, ("image",), "block", 1) == 2 * (768 + 256) + 2 * 2 * 8 * 5
    assert skipped_flops(sizes, tokens, ("image", "text"), "parallel", 3) == 0
    # one image token fewer: 1 + 2 + 3 + 4 + 5 keys in place of 1 + 2 + 3 + 4 + 5 + 6
    assert pruned_flops(sizes, tokens, kept=1) == 4 * ((768 + 256 + 128) + 2 * 2 * 8 * 6)
    assert pruned_flops(sizes, tokens, kept=1, from_layer=3) * 4 == pruned_flops(sizes, tokens, kept=1)
    assert pruned_flops(sizes, tokens, kept=2) == 0
    method = SkipPerceptual(interval=1)  # blocks 1 and 2
    assert method.saved(sizes, tokens) == 2 * 2 * 768 / decoder_flops(sizes, tokens)
    assert SkipPerceptual(interval=0).saved(sizes, tokens) == 0
    assert SkipPerceptual(interval=1, tokens="text", when="decode").saved(sizes, tokens) == 2 * 2 * 768 / decoder_flops(
        sizes, tokens
    )
    whole = SkipPerceptual(layers=range(4), tokens="all", when="both", skip="block").saved(sizes, tokens)
    assert 0.85 < whole < 1  # keys and values are still needed


def test_describe_says_what_is_done() -> None:
    assert SkipPerceptual().describe() == "image tokens skip the FFN in 1 block in 2 after 0"
    assert SkipPerceptual(skip="block", tokens="text", when="both", interval=1, start=2).describe() == (
        "text tokens, prompt and generated skip the block in every block after 2"
    )
    assert "random blocks" in SkipPerceptual(select="random").describe()
    assert "seed=4" in SkipPerceptual(select="random", seed=4).describe()
