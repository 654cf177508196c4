"""The logit lens by hand, against TransformerLens's own, on planted states, and without a signal."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from contract import encode, pictures_of
from planted_flow import YES, asked, planted_llava
from tiny_models import BUILDERS
from tiny_models.common import token_id

from probes import LogitLens
from probes.lens_readout import at_object, name_tokens, read_image, read_text
from slitlamp.errors import InputError
from slitlamp.models.patches import Patches
from slitlamp.reports.logit_lens import FIGURES
from slitlamp.reports.style import NARROW
from slitlamp.tracing import sites
from slitlamp.tracing.trace import Source
from slitlamp.vlm import VLM

DOG = token_id("dog")


def source_of(vlm: VLM) -> Source:
    return Source(vlm.model, vlm.anatomy, vlm.tokenizer)


def plain_source(d_vocab: int) -> Any:
    """A model whose norm and head do nothing: its lens is the softmax of the state."""
    modules = {"final_norm": torch.nn.Identity(), "head": torch.nn.Identity()}
    model = SimpleNamespace(get_submodule=lambda path: modules[path])
    anatomy = SimpleNamespace(modules={"final_norm": "final_norm", "head": "head"}, logit_softcap=None, d_vocab=d_vocab)
    return SimpleNamespace(model=model, anatomy=anatomy)


def test_text_by_hand() -> None:
    """p = (1/2, 1/4, 1/4) after layer 0 and (1/8, 3/8, 1/2) in the end; the last token is emitted."""
    early, final = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.125, 0.375, 0.5]]).log()
    found = read_text(plain_source(3), [early, final], torch.tensor([2]))
    kl = 0.125 * np.log(0.25) + 0.375 * np.log(1.5) + 0.5 * np.log(2)  # sum of final * log(final / early)
    np.testing.assert_allclose(found[0, 0], [0.25, 2, 0, 1.5 * np.log(2), kl], atol=1e-6)
    entropy = np.log(8) / 8 + 0.375 * np.log(8 / 3) + np.log(2) / 2
    np.testing.assert_allclose(found[1, 0], [0.5, 1, 1, entropy, 0], atol=1e-6)


def test_image_by_hand() -> None:
    """Two tokens, vocabulary of 4; the object's name begins with id 1 or id 3."""
    states = [torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.2, 0.2, 0.1]]).log()]
    found = read_image(plain_source(4), states, [[1, 3], [0]])
    np.testing.assert_allclose(found[0, 0], [[0.6, 1], [0.3, 2]], atol=1e-6)
    np.testing.assert_allclose(found[1, 0], [[0.1, 4], [0.5, 1]], atol=1e-6)


def grid() -> Patches:
    row, column = (one.flatten() for one in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    zero = torch.zeros(16, dtype=torch.int64)
    return Patches(zero, row, column, zero, {(0, 0): (4, 4)}, n_tiles=1)


def test_an_object_by_hand() -> None:
    """The upper left quarter, 4 of 16 tokens: probability .8 there, .1 elsewhere, but for one token of .9 outside."""
    inside = [0, 1, 4, 5]
    probability = np.full(16, 0.1)
    probability[inside], probability[15] = 0.8, 0.9
    values = np.stack([probability, 20 * (1 - probability)], axis=-1)[None]
    found = at_object(values, grid(), [(0, 0, 0.5, 0.5)], "a", "dog", n_shifted=3, seed=0)
    assert found is not None
    np.testing.assert_allclose(found[0, 0], [0.8, 4, 44 / 48])  # each of 4 beats 11 of 12
    np.testing.assert_allclose(found[0, 1], [(11 * 0.1 + 0.9) / 12, 20 * (1 - 2 / 12), 4 / 48])
    assert found[0, 2, 0] < 0.4
    assert at_object(values, grid(), [(0, 0, 1, 1)], "a", "dog", n_shifted=3, seed=0) is None
    assert at_object(values, grid(), [], "a", "dog", n_shifted=3, seed=0) is None


def test_names(llava: VLM) -> None:
    assert name_tokens("dog", llava.tokenizer) == [DOG]
    assert name_tokens("zebra", llava.tokenizer) == []


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "paligemma gemma2", "gemma3", "aya_vision", "smolvlm"])
def test_equal_to_transformer_lens_in_every_layer(family: str) -> None:
    """TransformerLens's own logit lens on the same recordings; the last layer's is the model's own logits."""
    vlm = BUILDERS[family]()
    weight = vlm.model.get_submodule(vlm.anatomy.modules["final_norm"]).weight
    with torch.no_grad():  # as it is made, norming twice is norming once
        weight.copy_(2 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)))
    batch = encode(vlm, pictures_of(vlm)).with_continuation([[6, 7], [8], [9, 10]])
    with vlm.trace(sites.resid_pre(), sites.resid_post(), sites.logits("all", label="own")) as trace:
        vlm.forward(batch)
    lens = trace.to_activation_cache(["resid_pre", "resid_post"]).logit_lens(positions=None)
    assert lens.labels[-1] == "final_post"
    probe = LogitLens(n_resamples=20, image=False)
    vlm.measure(probe, batch)
    text = probe.result().tables["text"].set_index(["kind", "layer", "metric"])["value"]
    for layer in range(vlm.anatomy.n_layers):
        p, entropies = [], []
        for row, tokens in enumerate([[6, 7], [8], [9, 10]]):
            before = batch.before_generated_mask[row].nonzero()[:, 0]
            log_p = lens.values[layer + 1][row, before].double().log_softmax(dim=-1)
            p += log_p[range(len(tokens)), tokens].exp().tolist()
            entropies += (-(log_p.exp() * log_p).sum(dim=-1)).tolist()
        assert text["all", layer, "probability"] == pytest.approx(np.mean(p), abs=1e-4)
        assert text["all", layer, "entropy"] == pytest.approx(np.mean(entropies), abs=1e-4)
    own = trace["own"][0][trace.mask("own")].double().log_softmax(dim=-1)
    ours = lens.values[-1][batch.real_mask].double().log_softmax(dim=-1)
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-3)
    assert text["all", vlm.anatomy.n_layers - 1, "kl"] == pytest.approx(0, abs=1e-9)


def test_the_layer_in_which_the_answer_appears_is_found() -> None:
    """The planted head writes it in layer 1: before that the lens says the default, from there on the answer."""
    vlm = planted_llava(layer=1)
    probe = LogitLens(n_resamples=200, image=False)
    vlm.measure(probe, *asked(vlm, [True, True, True]))
    text = probe.result().tables["text"].set_index(["kind", "layer", "metric"])["value"]
    assert [text["correct", layer, "top1"] for layer in range(3)] == [0, 1, 1]
    assert text["correct", 0, "probability"] < 0.1
    assert text["correct", 1, "probability"] > 0.9
    (target,) = probe.causal_targets(vlm.anatomy)
    assert target.name.startswith("layer 1,")
    batch, _ = asked(vlm, [True])
    logits = [
        vlm.forward(batch.prompt_only(), edits=edits(batch)).logits[0, -1]
        for edits in (target.target, *target.controls)
    ]
    assert logits[0].argmax() != YES
    assert all(one.argmax() == YES for one in logits[1:])


def test_the_layer_that_is_skipped_is_the_one_that_gains_most_on_named_objects(llava: VLM) -> None:
    """Over all tokens layer 2 gains most, at the object alone layer 1: causal checks look at objects."""
    sums = np.zeros((1, 6, 3, 5))
    sums[0, 0, :, 0] = [1.0, 2.0, 7.0]  # of ten tokens
    sums[0, 1, :, 0] = [0.1, 0.7, 0.8]  # of the one that names an object
    probe = LogitLens(n_resamples=20)
    state = {"rows.text_group": np.array(["a"]), "rows.text_sums": sums, "constants.layer": np.arange(3)}
    state |= {"constants.d_vocab": np.array(10)}
    probe.load_state({**state, "rows.text_count": np.array([[10.0, 1, 0, 9, 0, 0]])})
    assert probe.causal_targets(llava.anatomy)[0].name.startswith("layer 1, ")
    probe = LogitLens(n_resamples=20)
    probe.load_state({**state, "rows.text_count": np.array([[10.0, 0, 0, 0, 0, 0]])})
    assert probe.causal_targets(llava.anatomy)[0].name.startswith("layer 2, ")


@pytest.fixture(scope="module")
def naming() -> VLM:
    """A planted model in which bright patches are called "dog", in every layer."""
    vlm = planted_llava()
    with torch.no_grad():
        vlm.model.lm_head.weight[DOG, 0] = 1.0
    return vlm


def test_an_object_named_at_its_patches_is_found(naming: VLM) -> None:
    probe = LogitLens(n_resamples=200)
    naming.measure(probe, *asked(naming, [True, False, True, True]))
    tables = probe.result().tables
    image = tables["image"].set_index(["layer", "place", "metric"])["value"]
    for layer in range(3):
        assert image[layer, "inside", "auroc"] == 1
        assert image[layer, "inside", "rank"] == 1
        assert image[layer, "inside", "probability"] > 0.5
        assert image[layer, "shifted", "auroc"] < 0.5
        assert image[layer, "outside", "probability"] < 0.1
    contrast = tables["image_contrast"].query("metric == 'auroc'")
    assert (contrast["low"] > 0.4).all()
    wanted = [image[layer, "inside", "auroc"] - image[layer, "shifted", "auroc"] for layer in contrast["layer"]]
    np.testing.assert_allclose(contrast["difference"], wanted)
    assert (contrast["n_objects"] == 3).all()  # the question about an absent object has no place


def test_boxes_that_say_nothing_give_no_finding(llava: VLM, image: Any) -> None:
    """The null: random images of a random model with random boxes; of 15 data sets about .75 have any finding."""
    rng = np.random.default_rng(0)
    vlm = VLM.wrap(copy.deepcopy(llava.model), llava.processor)
    found = 0
    for number in range(15):
        batch = vlm.encode(
            [image(100 * number + i) for i in range(12)],
            ["<image> what ?"] * 12,
            ids=[f"{number} {i}" for i in range(12)],
        ).with_continuation([[6]] * 12)
        labels = []
        for _ in range(12):
            left, top = rng.uniform(0, 0.5, 2)
            box = [(left, top, left + 0.4, top + 0.4)]
            labels.append(pd.DataFrame({"token": [0], "label": ["object"], "category": ["dog"], "boxes": [box]}))
        probe = LogitLens(n_resamples=400)
        vlm.measure(probe, batch, labels)
        found += (probe.result().tables["image_contrast"]["p_adjusted"] < 0.05).any()
    assert found <= 4  # a binomial of 15 and .05 exceeds 3 with p = .005; the bootstrap of 12 items is a little liberal


def test_the_last_layer_is_always_there_and_parameters_are_checked(naming: VLM) -> None:
    probe = LogitLens(layers=[0], n_resamples=20)
    naming.measure(probe, *asked(naming, [True]))
    assert probe.result().tables["text"]["layer"].unique().tolist() == [0, 2]
    with pytest.raises(InputError, match="n_shifted"):
        LogitLens(n_shifted=0).sites(naming.anatomy)


def test_text_alone_can_be_read(llava: VLM) -> None:
    batch = llava.encode(prompts=["is there a dog ?"], ids=["textual"]).with_continuation([[6, 7]])
    probe = LogitLens(n_resamples=20)
    llava.measure(probe, batch)
    assert set(probe.result().tables) == {"text"}


def test_figures_are_drawn_from_the_tables(naming: VLM) -> None:
    probe = LogitLens(n_resamples=50)
    naming.measure(probe, *asked(naming, [True, False, True]))
    result = probe.result()
    figures = result.figures()
    assert set(figures) == {"text", "image"}
    drawn = next(line for line in figures["image"].axes[0].lines if line.get_label() == "_inside").get_ydata()
    np.testing.assert_allclose(np.asarray(drawn, dtype=float), 1)
    for drawing in FIGURES.values():
        assert drawing.caption(result.tables)
        assert drawing.draw(result.tables, NARROW) is not None
        assert drawing.draw({}) is None
