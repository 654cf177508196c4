"""What every intervention must hold. A new intervention joins by a line in CASES."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch

from interventions import (
    M3ID,
    ActivationAddition,
    CausalContrast,
    ClsPruning,
    CutAttention,
    FastVPruning,
    FocalPruning,
    FocusCut,
    HeadAblation,
    HeadReinforcement,
    ImageAttentionBoost,
    ImageAttentionMask,
    ImageContrast,
    ImageFreeGuidance,
    ImageTokenAblation,
    InactiveHeads,
    InformedTokenBoost,
    LayerDrop,
    MaskedImageFusion,
    OutlierContrast,
    PosthocDebias,
    ProjectionAblation,
    SinkRedistribution,
    SkipPerceptual,
    SubnetMask,
    TokenMerging,
    TruthfulPreIntervention,
)
from slitlamp.decoding import BacktrackingDecoding, ContrastDecoding, Intervention
from slitlamp.models import Batch
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

Make = Callable[[float], Intervention]

VECTOR = [(-1.0) ** (i // 3) * (1 + i % 5) for i in range(32)]
MEANS = [[[0.3 * layer - 0.2 * head + 0.1 * i for i in range(8)] for head in range(4)] for layer in range(3)]
SCORES = [10.0 * i for i in range(-3, 4)]
PROBE = {
    **dict.fromkeys(("direction", "shuffled_direction"), VECTOR),
    **dict.fromkeys(("intercept", "shuffled_intercept"), 1.0),
    **dict.fromkeys(("true_scores", "shuffled_true_scores"), SCORES),
    "layer": 1,
    "random_directions": [VECTOR[::-1], VECTOR[::-1]],
    "random_true_scores": [SCORES, SCORES],
}

# name -> (strength -> intervention), the neutral strength, a strength that changes the output of the tiny model
CASES: dict[str, tuple[Make, float, float]] = {
    "HeadReinforcement": (lambda a: HeadReinforcement(alpha=a, layers=[0, 1, 2]), 1.0, 3.0),
    "HeadReinforcement default layers": (lambda a: HeadReinforcement(alpha=a), 1.0, 6.0),
    "HeadReinforcement zero": (lambda a: HeadReinforcement(alpha=a, layers=[0, 2], contrast="zero"), 1.0, 3.0),
    "HeadReinforcement noise": (lambda a: HeadReinforcement(alpha=a, layers=[0, 2], contrast="noise"), 1.0, 3.0),
    "HeadReinforcement mean": (lambda a: HeadReinforcement(alpha=a, layers=[0, 2], contrast="mean"), 1.0, 3.0),
    "HeadReinforcement unk": (lambda a: HeadReinforcement(alpha=a, layers=[0, 2], contrast="unk"), 1.0, 3.0),
    "HeadReinforcement grey": (lambda a: HeadReinforcement(alpha=a, layers=[0, 2], contrast="grey"), 1.0, 3.0),
    "HeadReinforcement both": (
        lambda a: HeadReinforcement(alpha=a, layers=[0, 1, 2], reinforce_image_free=True),
        1.0,
        3.0,
    ),
    "HeadReinforcement last": (lambda a: HeadReinforcement(alpha=a, layers=[0, 1, 2], prefill="last"), 1.0, 4.0),
    "HeadReinforcement random": (lambda a: HeadReinforcement(alpha=a, layers=[0, 1, 2], select="random"), 1.0, 3.0),
    "HeadReinforcement least": (lambda a: HeadReinforcement(alpha=a, layers=[0, 1, 2], select="least"), 1.0, 3.0),
    "HeadReinforcement all": (lambda a: HeadReinforcement(alpha=a, layers=[0, 1, 2], select="all"), 1.0, 3.0),
    "HeadReinforcement fixed": (lambda a: HeadReinforcement(alpha=a, heads=[(0, 1), (2, 3), (2, 0)]), 1.0, 3.0),
    "SkipPerceptual": (lambda a: SkipPerceptual(interval=int(a)), 0.0, 1.0),
    "SkipPerceptual block": (lambda a: SkipPerceptual(skip="block", interval=int(a)), 0.0, 1.0),
    "SkipPerceptual parallel": (lambda a: SkipPerceptual(skip="parallel", interval=int(a)), 0.0, 1.0),
    "SkipPerceptual text": (lambda a: SkipPerceptual(interval=int(a), tokens="text"), 0.0, 1.0),
    "SkipPerceptual text block both": (
        lambda a: SkipPerceptual(skip="block", interval=int(a), tokens="text", when="both"),
        0.0,
        1.0,
    ),
    "SkipPerceptual all parallel both": (
        lambda a: SkipPerceptual(skip="parallel", interval=int(a), tokens="all", when="both"),
        0.0,
        1.0,
    ),
    "SubnetMask": (lambda a: SubnetMask(sparsity=a), 0.0, 0.5),
    "SubnetMask image": (lambda a: SubnetMask(sparsity=a, tokens="image", layers=[0, 2]), 0.0, 0.5),
    "SubnetMask text": (lambda a: SubnetMask(sparsity=a, tokens="text"), 0.0, 0.5),
    "HeadAblation": (lambda n: HeadAblation([(0, 1), (2, 3), (2, 0)][: int(n)]), 0, 3),
    "HeadAblation mean": (
        lambda n: HeadAblation([(0, 1), (2, 3), (2, 0)][: int(n)], value="mean", means=MEANS),
        0,
        3,
    ),
    "HeadAblation random": (lambda n: HeadAblation([(0, 1), (2, 3), (2, 0)][: int(n)], select="random"), 0, 3),
    "ActivationAddition": (lambda s: ActivationAddition(VECTOR, scale=s), 0.0, 0.5),
    "ActivationAddition random": (lambda s: ActivationAddition(VECTOR, scale=s, direction="random"), 0.0, 0.5),
    "ProjectionAblation": (lambda s: ProjectionAblation(VECTOR, strength=s), 0.0, 1.0),
    "ProjectionAblation half": (lambda s: ProjectionAblation(VECTOR, layers=[1], strength=s), 0.0, 0.5),
    "CutAttention": (lambda n: CutAttention(layers=[1][: int(n)]), 0, 1),
    "CutAttention text": (lambda n: CutAttention("text", "image", layers=[0][: int(n)]), 0, 1),
    "CutAttention generated": (lambda n: CutAttention("text_after_image", "all", layers=[0][: int(n)]), 0, 1),
    "ImageAttentionBoost": (lambda a: ImageAttentionBoost(a), 0.0, 2.0),
    "ImageAttentionBoost text": (lambda a: ImageAttentionBoost(a, layers=[0, 1, 2], columns="text"), 0.0, 2.0),
    "InformedTokenBoost": (lambda a: InformedTokenBoost(2 * a, a, layers=[0, 1, 2]), 0.0, 1.0),
    "InformedTokenBoost random": (lambda a: InformedTokenBoost(2 * a, a, select="random"), 0.0, 2.0),
    "ImageAttentionMask": (lambda n: ImageAttentionMask(window=3, layers=[0, 1][: int(n)]), 0, 2),
    "ImageAttentionMask window": (lambda w: ImageAttentionMask(window=int(w)), 99, 1),
    "ImageAttentionMask both": (
        lambda n: ImageAttentionMask(window=3, direction="both", layers=[0, 1, 2][: int(n)]),
        0,
        3,
    ),
    "ImageAttentionMask diagonal": (lambda n: ImageAttentionMask("diagonal", layers=[0, 1][: int(n)]), 0, 2),
    "ImageAttentionMask mutual": (lambda n: ImageAttentionMask("mutual", layers=[0, 1][: int(n)]), 0, 2),
    "ImageAttentionMask random": (
        lambda n: ImageAttentionMask(window=3, layers=[0, 1][: int(n)], select="random"),
        0,
        2,
    ),
    "ImageAttentionMask both random": (
        lambda n: ImageAttentionMask(window=3, direction="both", layers=[0, 1][: int(n)], select="random"),
        0,
        2,
    ),
    "ImageAttentionMask mutual random": (
        lambda n: ImageAttentionMask("mutual", layers=[0, 1][: int(n)], select="random"),
        0,
        2,
    ),
    "LayerDrop": (lambda n: LayerDrop(last=int(n)), 0, 2),
    "LayerDrop post_softmax": (lambda n: LayerDrop(last=int(n), stage="post_softmax"), 0, 2),
    "InactiveHeads": (lambda theta: InactiveHeads(theta, kept_layers=0), 0.0, 1.5),
    "InactiveHeads pre_softmax": (lambda theta: InactiveHeads(theta, "pre_softmax", kept_layers=1), 0.0, 1.5),
    "InactiveHeads random": (lambda theta: InactiveHeads(theta, kept_layers=0, select="random"), 0.0, 1.5),
    "InactiveHeads fixed": (lambda n: InactiveHeads(heads=[(0, 1), (2, 3), (2, 0)][: int(n)]), 0, 3),
    "SinkRedistribution": (
        lambda p: SinkRedistribution(p, tau=1.5, rho=0.3, image_mass=0.1, layers=[0, 1, 2]),
        0.0,
        0.9,
    ),
    "SinkRedistribution rows": (
        lambda p: SinkRedistribution(
            p, tau=1.5, rho=0.3, image_mass=0.1, layers=[1], sinks="image", sink_dims=[3, 8], rows="text_after_image"
        ),
        0.0,
        0.9,
    ),
    "SinkRedistribution random": (
        lambda p: SinkRedistribution(p, tau=1.5, rho=0.3, image_mass=0.1, layers=[0, 1, 2], select="random"),
        0.0,
        0.9,
    ),
    "FocusCut": (lambda q: FocusCut(q), 0.0, 0.5),
    "FocusCut layers": (lambda q: FocusCut(q, layers=[0, 2]), 0.0, 0.9),
    "FocusCut random": (lambda q: FocusCut(q, select="random"), 0.0, 0.5),
    "ImageContrast": (lambda a: ImageContrast(alpha=a), 0.0, 2.0),
    "ImageContrast deleted": (lambda a: ImageContrast(alpha=a, view="deleted"), 0.0, 2.0),
    "ImageContrast zero": (lambda a: ImageContrast(alpha=a, view="zero", beta=0.5), 0.0, 2.0),
    "ImageContrast unk": (lambda a: ImageContrast(alpha=a, view="unk"), 0.0, 2.0),
    "ImageContrast both": (lambda a: ImageContrast(alpha=a, view="both"), 0.0, 2.0),
    "ImageContrast white": (lambda a: ImageContrast(alpha=a, view="white"), 0.0, 2.0),
    "ImageContrast blocked": (lambda a: ImageContrast(alpha=a, view="blocked", rho=0.8), 0.0, 2.0),
    "M3ID": (lambda a: M3ID(decay=a, offset=5), 0.0, 0.2),
    "ImageFreeGuidance": (lambda a: ImageFreeGuidance(scale=a), 1.0, 3.0),
    "ImageFreeGuidance PAI": (
        lambda a: ImageFreeGuidance(scale=a, view="deleted", space="log-probs", beta=0.1),
        1.0,
        3.0,
    ),
    "ImageFreeGuidance soft": (lambda a: ImageFreeGuidance(scale=a, view="soft", prompt=[VECTOR] * 3), 1.0, 3.0),
    "OutlierContrast": (lambda a: OutlierContrast(alpha=a, top_k=3), 0.0, 2.0),
    "OutlierContrast as released": (lambda a: OutlierContrast(alpha=a, top_k=3, variant="as_released"), 0.0, 2.0),
    "ClsPruning": (lambda keep: ClsPruning(keep), 1.0, 0.25),
    "ClsPruning original": (lambda keep: ClsPruning(keep, positions="original"), 1.0, 0.25),
    "ClsPruning random": (lambda keep: ClsPruning(keep, select="random"), 1.0, 0.25),
    "FocalPruning": (lambda keep: FocalPruning(keep), 1.0, 0.25),
    "FocalPruning row": (lambda keep: FocalPruning(keep, unit="row", attention="received"), 1.0, 0.5),
    "TokenMerging": (lambda keep: TokenMerging(keep), 1.0, 0.25),
    "TokenMerging original": (lambda keep: TokenMerging(keep, positions="original", select="random"), 1.0, 0.25),
    "ImageTokenAblation": (lambda share: ImageTokenAblation(share), 0.0, 0.75),
    "ImageTokenAblation zero": (lambda share: ImageTokenAblation(share, value="zero", select="least"), 0.0, 0.75),
    "FastVPruning": (lambda keep: FastVPruning(keep, layer=1), 1.0, 0.25),
    "FastVPruning random": (lambda keep: FastVPruning(keep, layer=1, select="random"), 1.0, 0.1),
    "OutlierContrast random": (lambda a: OutlierContrast(alpha=a, top_k=3, select="random"), 0.0, 2.0),
    "CausalContrast": (lambda g: CausalContrast(g), 0.0, 1.0),
    "CausalContrast vision": (lambda g: CausalContrast(g, "vision", "random"), 0.0, 2.0),
    "CausalContrast language": (lambda g: CausalContrast(g, "language", "reversed", [0, 2]), 0.0, 2.0),
    "CausalContrast uniform": (lambda g: CausalContrast(g, counterfactual="uniform"), 0.0, 1.0),
    "PosthocDebias": (lambda s: PosthocDebias(s), 0.0, 1.0),
    "PosthocDebias shift": (lambda s: PosthocDebias(s, ["yes", "no", "red"], "shift", "both"), 0.0, 1.0),
    "PosthocDebias prior": (lambda s: PosthocDebias(s, ["dog", "cat"], prior=[0.9, 0.1]), 0.0, 1.0),
    "MaskedImageFusion": (lambda a: MaskedImageFusion(alpha=a, keep=0.4), 0.0, 2.0),
    "MaskedImageFusion random": (lambda a: MaskedImageFusion(alpha=a, keep=0.5, relevance="random"), 0.0, 2.0),
    "TruthfulPreIntervention": (lambda f: TruthfulPreIntervention(PROBE, fpr=f, steps="every"), 0.0, 0.5),
    "TruthfulPreIntervention objects": (
        lambda f: TruthfulPreIntervention(PROBE, fpr=f, words=["cat", "dog"]),
        0.0,
        1.0,
    ),
    "TruthfulPreIntervention places": (
        lambda f: TruthfulPreIntervention(PROBE, fpr=f, steps="every", select="random_places"),
        0.0,
        0.5,
    ),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Make, float, float]:
    return CASES[request.param]


@pytest.fixture(scope="module")
def batch(llava: VLM, image: Any) -> Batch:
    return llava.encode(
        images=[image(0), image(1), image(2)],
        prompts=[
            "<image> is there a dog ?",
            "<image> what is in the image and where is it ?",
            "describe this <image> .",
        ],
    )


def test_every_intervention_of_the_package_is_under_contract() -> None:
    found = entry_points(group="slitlamp.interventions")
    assert {one.name for one in found if one.value.startswith("interventions:")} == {name.split()[0] for name in CASES}


def test_neutral_strength_reproduces_the_baseline(case: tuple[Make, float, float], llava: VLM, batch: Batch) -> None:
    make, neutral, _ = case
    baseline = llava.generate(batch, max_new_tokens=8)
    with llava.apply(make(neutral)):
        assert llava.generate(batch, max_new_tokens=8).tokens == baseline.tokens


def test_it_does_something(case: tuple[Make, float, float], llava: VLM, batch: Batch) -> None:
    make, _, strong = case
    baseline = llava.forward(batch).logits[:, -1]
    said = llava.generate(batch, max_new_tokens=8).tokens
    with llava.apply(make(strong)):
        change = (llava.forward(batch).logits[:, -1] - baseline).abs()
        if isinstance(make(strong), BacktrackingDecoding):  # its forward pass is the plain one
            assert llava.generate(batch, max_new_tokens=8).tokens != said
            return
    assert change[change.isfinite()].max() > 1e-3  # a contrast gives -inf to tokens that it leaves out


WEIGHTED = [name for name, (make, _, strong) in CASES.items() if isinstance(make(strong), ContrastDecoding)]
WEIGHTED = [name for name in WEIGHTED if not name.startswith("PosthocDebias")]  # it divides by a prior


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_contrast_view_that_is_the_batch_leaves_the_logits(name: str, llava: VLM, batch: Batch) -> None:
    """The weights of a contrast sum to 1: with the same logits in every branch, nothing changes before APC."""
    make, _, strong = CASES[name]
    contrast = make(strong)
    assert isinstance(contrast, ContrastDecoding)
    clean = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).log_softmax(dim=-1)
    n_views = len(contrast.views(llava._context(batch)))
    combined = contrast.combine(clean, [clean] * n_views, torch.arange(4))
    total = 1 + strong if isinstance(contrast, MaskedImageFusion) else 1  # AGLA adds
    assert torch.allclose(combined, total * clean, atol=1e-5)


def test_batch_of_one_equals_batch_of_many(
    case: tuple[Make, float, float], llava: VLM, batch: Batch, image: Any
) -> None:
    make, _, strong = case
    prompts = ["<image> is there a dog ?", "<image> what is in the image and where is it ?", "describe this <image> ."]
    with llava.apply(make(strong)):
        together = llava.forward(batch).logits[:, -1]
        for row, prompt in enumerate(prompts):
            alone = llava.forward(llava.encode(images=[image(row)], prompts=[prompt])).logits[0, -1]
            assert torch.allclose(alone, together[row], atol=1e-4)  # float32, logits of order 1


def test_incremental_decoding_equals_full_recomputation(
    case: tuple[Make, float, float], llava: VLM, batch: Batch
) -> None:
    make, _, strong = case
    site = sites.resid_post(layers=[2], positions="before_generated")
    with llava.apply(make(strong)):
        with llava.trace(site) as stepwise:
            generation = llava.generate(batch, max_new_tokens=6)
        with llava.trace(site) as at_once:
            llava.forward(generation.teacher_forced())
    assert torch.equal(stepwise.mask("resid_post"), at_once.mask("resid_post"))
    assert torch.allclose(stepwise["resid_post"][2], at_once["resid_post"][2], atol=1e-4)


def test_the_model_is_bit_identical_after_exit(case: tuple[Make, float, float], llava: VLM, batch: Batch) -> None:
    make, _, strong = case
    llava.forward(batch)  # transformers puts its own output hooks on at the first call
    weights = copy.deepcopy(llava.model.state_dict())
    config = llava.model.config.to_dict()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in llava.model.modules()]
    before = llava.forward(batch).logits
    with contextlib.suppress(RuntimeError), llava.apply(make(strong)):
        llava.generate(batch, max_new_tokens=3)
        raise RuntimeError("an exception leaves as clean a model as an ordinary exit")
    assert torch.equal(llava.forward(batch).logits, before)
    assert llava.model.config.to_dict() == config
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in llava.model.modules()] == hooks
    for name, tensor in llava.model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_controls_are_interventions_that_run(case: tuple[Make, float, float], llava: VLM, batch: Batch) -> None:
    make, _, strong = case
    for control in make(strong).controls().values():
        with llava.apply(control):
            assert len(llava.generate(batch, max_new_tokens=2).texts) == 3


def test_bfloat16_runs(case: tuple[Make, float, float], llava: VLM, image: Any) -> None:
    make, _, strong = case
    half = VLM.wrap(copy.deepcopy(llava.model).to(torch.bfloat16), llava.processor)
    batch = half.encode(images=[image(0)], prompts=["<image> is there a dog ?"])
    with half.apply(make(strong)):
        logits = half.forward(batch).logits
        left_out = logits.isneginf() if make(strong).kind == "logits" else torch.zeros_like(logits, dtype=torch.bool)
        assert torch.isfinite(logits[~left_out]).all()
        assert not left_out.all(dim=-1).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_gives_what_it_gives_on_the_cpu(
    case: tuple[Make, float, float], llava: VLM, batch: Batch, image: Any
) -> None:
    make, neutral, strong = case
    there = VLM.wrap(copy.deepcopy(llava.model).to("cuda"), llava.processor)
    moved = batch.to("cuda")
    assert not torch.backends.cuda.matmul.allow_tf32
    with llava.apply(make(strong)):
        wanted = llava.forward(batch).logits[:, -1]
    with there.apply(make(strong)):
        found = there.forward(moved).logits[:, -1].cpu()
        assert len(there.generate(moved, max_new_tokens=4).texts) == 3
    assert torch.allclose(found, wanted, atol=1e-3)  # float32, logits of order 1
    baseline = there.generate(moved, max_new_tokens=6)
    with there.apply(make(neutral)):
        assert there.generate(moved, max_new_tokens=6).tokens == baseline.tokens
