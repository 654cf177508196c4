"""The published contrasts: their formulas by hand, and the outlier tokens of DAMRO by the tower's own weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import BUILDERS

import slitlamp
from interventions import M3ID, ImageContrast, ImageFreeGuidance, OutlierContrast
from slitlamp.decoding import ContrastDecoding, image_free
from slitlamp.decoding.two_branch import ContrastView
from slitlamp.decoding.views import IMAGE_FREE, blocked, diffused, only_tokens, soft_prompt
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import Batch
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

CLEAN = [2.0, 1.0, 0.5, -3.0]
OTHER = [2.5, -1.0, 0.0, 0.0]


def combined(method: ContrastDecoding, step: int = 0, clean: list[float] = CLEAN) -> list[float]:
    found = method.combine(torch.tensor([clean]), [torch.tensor([OTHER])], torch.tensor([step]))
    return [float(one) for one in found[0]]


def log_probs(logits: list[float]) -> list[float]:
    total = math.log(sum(math.exp(one) for one in logits))
    return [one - total for one in logits]


def normalised(logits: list[float]) -> Any:
    return pytest.approx(log_probs(logits), abs=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_vcd_vdd_and_damro_by_hand(alpha: float) -> None:
    wanted = [(1 + alpha) * one - alpha * other for one, other in zip(CLEAN, OTHER, strict=True)]
    assert combined(ImageContrast(alpha)) == pytest.approx(wanted, abs=1e-5)
    assert combined(OutlierContrast(alpha), step=7) == pytest.approx(wanted, abs=1e-5)


def test_image_free_guidance_by_hand() -> None:
    wanted = [1.7 * one - 0.7 * other for one, other in zip(CLEAN, OTHER, strict=True)]
    assert combined(ImageFreeGuidance(1.7)) == pytest.approx(wanted, abs=1e-5)
    on_log_probs = [1.7 * one - 0.7 * other for one, other in zip(log_probs(CLEAN), log_probs(OTHER), strict=True)]
    found = combined(ImageFreeGuidance(1.7, space="log-probs"))
    assert log_probs(found) == normalised(on_log_probs)
    assert combined(ImageFreeGuidance(1.0, space="log-probs")) == CLEAN  # on the scale of the logits


def test_m3id_by_hand() -> None:
    """The gate: the most probable token has probability 0.6, so that a gate of 0.5 leaves the step as it is."""
    pairs = list(zip(log_probs(CLEAN), log_probs(OTHER), strict=True))
    assert max(math.exp(one) for one, _ in pairs) == pytest.approx(0.6, abs=0.05)
    for step, offset in ((0, 0), (30, 0), (30, 12)):
        gamma = math.exp(-0.02 * (step + offset))
        wanted = [one + (1 - gamma) / gamma * (one - other) for one, other in pairs]
        assert log_probs(combined(M3ID(gate=0.9, offset=offset), step)) == normalised(wanted)
    assert combined(M3ID(gate=0.9), 0) == CLEAN
    assert combined(M3ID(gate=0.5), 30) == CLEAN
    capped = [one + 2.0 * (one - other) for one, other in pairs]
    assert log_probs(combined(M3ID(gate=0.9, max_weight=2.0), 1000)) == normalised(capped)


def test_the_defaults_are_the_papers() -> None:
    vcd = ImageContrast()
    assert (vcd.alpha, vcd.view, vcd.diffusion_step, vcd.beta) == (1.0, "diffusion", 500, 0.1)
    m3id = M3ID()
    assert (m3id.decay, m3id.gate, m3id.view, m3id.beta) == (0.02, 0.3, "deleted", 0.0)
    damro = OutlierContrast()
    assert (damro.alpha, damro.top_k, damro.beta, damro.variant) == (0.5, 10, 0.1, "paper")
    assert ImageFreeGuidance().beta == 0.0


@pytest.fixture(scope="module")
def batch(organism: VLM) -> Batch:
    scenes = slitlamp.load_dataset("emoji_scenes/captions").take(3).items
    return organism.encode([one.image for one in scenes], [scenes[0].prompt, "describe the image", "what is there ?"])


def test_each_view_is_the_one_named(organism: VLM, batch: Batch) -> None:
    context = organism._context(batch)
    for how in IMAGE_FREE:
        wanted, edits = image_free(batch, how, 3)
        reference = organism.forward(wanted, edits=edits).logits
        for method in (ImageContrast(view=how, seed=3), M3ID(view=how, seed=3), ImageFreeGuidance(view=how, seed=3)):
            ((view, its_edits),) = method.views(context)
            assert torch.equal(organism.forward(view, edits=its_edits).logits, reference)
    ((view, _),) = ImageContrast(diffusion_step=700, seed=3).views(context)
    assert torch.equal(view.extra["pixel_values"], diffused(batch, 700, 3).extra["pixel_values"])


def test_blocked_and_both_and_soft_are_the_views_of_their_names(organism: VLM, batch: Batch, tmp_path: Path) -> None:
    context = organism._context(batch)

    def logits(view: ContrastView) -> torch.Tensor:
        found: torch.Tensor = organism.forward(view[0], edits=view[1]).logits[:, -1]
        return found

    (view,) = ImageContrast(view="blocked", rho=0.7, seed=2).views(context)
    assert torch.equal(logits(view), logits(blocked(batch, organism.anatomy, 0.7, 2)))
    assert not torch.equal(logits(view), logits(blocked(batch, organism.anatomy, 0.9, 2)))
    both = ImageContrast(1.5, view="both", beta=0.0)
    assert [len(one) for one in both.views(context)] == [2, 2]
    clean, deleted, unk = logits((batch, ())), logits(image_free(batch)), logits(image_free(batch, "unk"))
    assert not torch.allclose(deleted, unk, atol=1e-3)
    with organism.apply(both):
        fused = organism.forward(batch).logits[:, -1]
    torch.testing.assert_close(fused, 2.5 * clean - 0.75 * deleted - 0.75 * unk, rtol=0, atol=2e-4)

    soft = torch.randn(7, organism.anatomy.d_model, generator=torch.Generator().manual_seed(1))
    save_file({"prompt": soft}, tmp_path / "soft.safetensors")
    wanted = logits((soft_prompt(batch, soft), ()))
    given: list[Path | list[list[float]]] = [tmp_path / "soft.safetensors", soft.tolist()]
    for prompt in given:
        method = ImageFreeGuidance(view="soft", prompt=prompt)
        method.check(organism.anatomy)
        (view,) = method.views(context)
        assert torch.equal(logits(view), wanted)
    assert ImageFreeGuidance(view="soft", prompt=given[0]).describe() == (
        "guidance by the image against a soft prompt (soft.safetensors), scale 1.5, on logits"
    )


def test_log_probs_and_logits_decode_alike(organism: VLM, batch: Batch) -> None:
    """With weights that sum to 1 they differ by a constant per step."""
    found = []
    for on in ("logits", "log-probs"):
        with organism.apply(ImageFreeGuidance(2.5, space=on)):
            found.append(organism.generate(batch, max_new_tokens=25, do_sample=True, seed=4).tokens)
    assert found[0] == found[1]
    assert found[0] != organism.generate(batch, max_new_tokens=25, do_sample=True, seed=4).tokens


def tower_inputs(vlm: VLM, batch: Batch, layer: int) -> torch.Tensor:
    """What the attention of a block of the tower reads, from the tower run by itself."""
    with torch.no_grad():
        tower: Any = vlm.model.get_submodule(vlm.anatomy.modules["vision_tower"])
        states = tower(batch.extra["pixel_values"], output_hidden_states=True).hidden_states[layer]
        return vlm.model.get_submodule(vlm.anatomy.vision_blocks[layer]).layer_norm1(states)  # type: ignore[operator,no-any-return]


def attention_by_hand(vlm: VLM, batch: Batch, layer: int, n_heads: int) -> torch.Tensor:
    """softmax(q_cls K^T / sqrt(d)), the mean over heads, without the CLS token itself: [tile, patch]."""
    inputs = tower_inputs(vlm, batch, layer)
    attention: Any = vlm.model.get_submodule(vlm.anatomy.vision_attention_of(layer))
    with torch.no_grad():
        query, key = (
            one(inputs).unflatten(-1, (n_heads, -1)).transpose(1, 2) for one in (attention.q_proj, attention.k_proj)
        )
        scores = query[:, :, :1] @ key.mT / query.shape[-1] ** 0.5
    weights: torch.Tensor = scores.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)
    return weights


def test_outliers_are_first_in_the_attention_of_the_layer_that_the_model_reads(organism: VLM, batch: Batch) -> None:
    """The embedded model reads the block before the last of its tower (vision_feature_layer = -2); one token per patch."""
    layer = organism.anatomy.n_vision_layers - 2
    assert organism.model.config.vision_feature_layer == -2
    features = organism._extra_pass(batch, [sites.resid_pre(layers=0, positions="image")], [])["resid_pre"][0]
    for variant, n_heads in (("paper", organism.anatomy.n_vision_heads), ("as_released", 1)):
        order = attention_by_hand(organism, batch, layer, n_heads).argsort(dim=-1, descending=True)[:, :10]
        expected = order if variant == "as_released" else order.sort(dim=-1).values
        method = OutlierContrast(alpha=1.0, variant=variant)
        with organism.apply(method):
            fused = organism.forward(batch).logits[:, -1]
        assert torch.equal(torch.stack(method.tokens_), expected)
        view = only_tokens(batch, list(expected), features)
        clean, without = organism.forward(batch).logits[:, -1], organism.forward(view).logits[:, -1]
        kept = fused.isfinite()
        torch.testing.assert_close(fused[kept], (2 * clean - without)[kept], rtol=0, atol=2e-4)


def test_the_variants_differ_in_the_tokens_and_in_their_order(organism: VLM, batch: Batch) -> None:
    found = {}
    for variant in ("paper", "as_released"):
        method = OutlierContrast(variant=variant)
        method.views(organism._context(batch))
        found[variant] = [row.tolist() for row in method.tokens_]
    assert all(row == sorted(row) for row in found["paper"])
    assert any(row != sorted(row) for row in found["as_released"])
    assert [sorted(row) for row in found["as_released"]] != found["paper"]


def test_the_controls_of_outliers_keep_as_many_tokens(organism: VLM, batch: Batch) -> None:
    method = OutlierContrast(top_k=6)
    controls = method.controls()
    chosen = {}
    for name, one in {"outliers": method, **controls}.items():
        assert isinstance(one, OutlierContrast)
        one.views(organism._context(batch))
        chosen[name] = [set(row.tolist()) for row in one.tokens_]
        assert all(len(row) == 6 for row in chosen[name])
    assert not any(one & other for one, other in zip(chosen["outliers"], chosen["least"], strict=True))
    assert chosen["random"] != chosen["outliers"]
    assert len({frozenset(row) for row in chosen["random"]}) == 1  # whatever else is in the batch
    assert controls["apc_only"].alpha == 0  # type: ignore[attr-defined]


def test_all_tokens_as_outliers_contrast_nothing(organism: VLM, batch: Batch) -> None:
    with organism.apply(OutlierContrast(alpha=3.0, top_k=1000, beta=0.0)):
        fused = organism.forward(batch).logits
    torch.testing.assert_close(fused, organism.forward(batch).logits, rtol=0, atol=2e-4)


def test_a_tower_without_cls_goes_by_received_attention_when_told(llava_siglip: VLM, image: Any) -> None:
    with pytest.raises(UnsupportedError, match="has no CLS token; encoder_attention='received'"):
        OutlierContrast().check(llava_siglip.anatomy)
    batch = llava_siglip.encode([image(0), image(1)], ["<image> is there a dog ?", "what is in <image> ?"])
    method = OutlierContrast(top_k=4, encoder_attention="received")
    with llava_siglip.apply(method):
        llava_siglip.forward(batch)
    site = sites.vision_attention(queries="patches", keys="patches", layers=1)
    with llava_siglip.trace(site) as trace:
        llava_siglip.forward(batch)
    received = trace["vision_attention"][1].mean(dim=(1, 2))
    assert torch.equal(torch.stack(method.tokens_), received.topk(4).indices.sort(dim=-1).values)


def test_tiles_and_ends_of_rows_are_left_out(llava_next: VLM, image: Any) -> None:
    batch = llava_next.encode([image(0, 40, 24)], ["<image> is there a dog ?"])
    method = OutlierContrast(top_k=5)
    ((view, _),) = method.views(llava_next._context(batch))
    assert view.image_mask.sum() == 5
    assert view.patches[0].view.tolist() == [0] * 5
    assert view.patches[0].on_image.all()
    assert len(batch.patches[0]) > 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blip-2", "queries of a Q-Former"),
        ("mllama", "cross-attention"),
        ("qwen3_vl", r"in several layers \(DeepStack\)"),
    ],
)
def test_families_without_image_tokens_of_the_tower_are_refused(name: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        OutlierContrast(encoder_attention="received").check(BUILDERS[name]().anatomy)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (ImageContrast(-1.0), "alpha must be 0 or more, found -1.0"),
        (ImageContrast(math.nan), "alpha"),
        (ImageContrast(diffusion_step=1000), "one of 0 to 999, found 1000"),
        (ImageContrast(beta=2.0), "beta must be between 0 and 1, found 2.0"),
        (ImageContrast(view="blocked", rho=1.1), "between 0 and 1, found 1.1"),
        (ImageFreeGuidance(view="soft"), "view='soft' needs a prompt"),
        (ImageFreeGuidance(prompt=[[0.0] * 32]), "goes with view='soft', found view='mean'"),
        (ImageFreeGuidance(view="soft", prompt=[[0.0] * 31]), r"\[1, 32\], found \[1, 31\]"),
        (ImageFreeGuidance(view="soft", prompt=[]), r"\[1, 32\], found \[0\]"),
        (ImageFreeGuidance(view="soft", prompt=[[0.0] * 32, [0.0]]), "one list per token"),
        (ImageFreeGuidance(view="soft", prompt="none.safetensors"), "cannot be read as a safetensors file"),
        (ImageFreeGuidance(view="sof"), "did you mean 'soft'"),  # type: ignore[arg-type]
        (ImageContrast(view="nose"), "did you mean 'noise'"),  # type: ignore[arg-type]
        (M3ID(decay=-0.1), "decay must be 0 or more"),
        (M3ID(max_weight=math.inf), "max_weight"),
        (M3ID(gate=0.0), "gate must be above 0"),
        (M3ID(view="delete"), "did you mean 'deleted'"),  # type: ignore[arg-type]
        (ImageFreeGuidance(-1.0), "scale must be 0 or more"),
        (ImageFreeGuidance(space="logit"), "did you mean 'logits'"),  # type: ignore[arg-type]
        (OutlierContrast(-1.0), "alpha must be 0 or more"),
        (OutlierContrast(top_k=0), "top_k must be at least 1, found 0"),
        (OutlierContrast(variant="released"), "did you mean 'as_released'"),  # type: ignore[arg-type]
        (OutlierContrast(encoder_attention="clss"), "did you mean 'cls'"),  # type: ignore[arg-type]
        (OutlierContrast(select="randm"), "did you mean 'random'"),  # type: ignore[arg-type]
        (OutlierContrast(variant="as_released", encoder_attention="received"), "goes by the CLS token"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(method: ContrastDecoding, message: str, llava: VLM) -> None:
    with pytest.raises(InputError, match=message), llava.apply(method):
        pass


def test_rows_without_an_image_are_refused(llava: VLM) -> None:
    text = llava.encode(prompts=["is there a dog ?"])
    for method in (ImageContrast(), ImageContrast(view="mean"), M3ID(), ImageFreeGuidance(), OutlierContrast()):
        with llava.apply(method), pytest.raises(InputError, match=r"rows without one: 0|needs an image in every row"):
            llava.generate(text, max_new_tokens=2)


def test_descriptions_say_what_is_done() -> None:
    assert ImageContrast().describe() == "contrast with a diffusion-noised image (step 500), alpha 1, beta 0.1"
    assert ImageContrast(view="blocked").describe() == (
        "contrast with an image that hardly any attention goes to (rho 0.99), alpha 1, beta 0.1"
    )
    assert ImageContrast(2.0, "deleted").describe() == "contrast with no image, alpha 2, beta 0.1"
    assert OutlierContrast(variant="as_released").describe() == (
        "contrast with the 10 image tokens first in the encoder's attention alone, as released, alpha 0.5, beta 0.1"
    )
    assert ImageFreeGuidance(1.1, "deleted", "log-probs", beta=0.1).describe() == (
        "guidance by the image against the image deleted, scale 1.1, on log-probs, beta 0.1"
    )
    assert M3ID().describe() == (
        "contrast with the image deleted, weight e^(0.02 t) - 1 up to 10, where no token has probability 0.3"
    )
