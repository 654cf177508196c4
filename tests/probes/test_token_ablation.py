"""Token ablation against Hugging Face's own forward passes, on a model that sees nothing, and on objects that are known."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from scipy.stats import binom
from tiny_models import BUILDERS

import slitlamp as sl
from probes import TokenAblation
from probes.ablation_tables import ABLATED, ROLES, Ablated, contrasts_table
from probes.image_means import Images
from probes.token_ablation import mean_image_token
from probes.token_sets import object_tokens, shifted_tokens
from slitlamp.errors import InputError, UnknownNameError, UnsupportedError
from slitlamp.experiments.labels import token_labels
from slitlamp.models import Batch
from slitlamp.reports.style import NARROW
from slitlamp.reports.token_ablation import FIGURES
from slitlamp.tracing import Trace, sites
from slitlamp.vlm import VLM

BOX = (0.0, 0.0, 0.5, 0.25)  # the first two of 4 x 4 cells


def table(label: str = "object", truth: str | None = None, boxes: Any = (BOX,)) -> pd.DataFrame:
    columns = {"token": [0, 1, 2], "word": list("abc"), "label": [label, "hallucinated", "other"]}
    if label in ("correct", "wrong"):
        columns["label"] = [label, "other", "other"]
    return pd.DataFrame({**columns, "truth": [truth, None, None], "boxes": [list(boxes), [], []]})


def caption(vlm: VLM, image: Any, n: int = 2) -> Batch:
    prompts = ["<image> is there a dog ?", "<image> what ?", "describe this <image> ."][:n]
    batch = vlm.encode([image(row) for row in range(n)], prompts, ids=[f"item{row}" for row in range(n)])
    return batch.with_continuation([[6, 7, 8 + row] for row in range(n)])


# -- which tokens -------------------------------------------------------------------------------------------------------


def test_tokens_of_an_object_by_hand(llava: VLM, image: Any) -> None:
    patches = caption(llava, image).patches[0]

    def cells(*arguments: Any) -> list[int]:
        return object_tokens(patches, *arguments).nonzero()[:, 0].tolist()

    assert cells([BOX], 0, 0.1) == [0, 1]
    assert cells([BOX], 1, 0.1) == [0, 1, 2, 4, 5, 6]
    assert cells([BOX], 2, 0.1) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert cells([(0.0, 0.0, 0.3, 0.25)], 0, 0.5) == [0]  # the second cell is covered to a fifth
    assert cells([(0.26, 0.26, 0.3, 0.3)], 0, 0.5) == [5]  # a speck: the cell that is covered most
    assert cells([], 0, 0.1) == []


def test_tiles_of_an_object_are_replaced_too(llava_next: VLM, image: Any) -> None:
    batch = llava_next.encode([[image(3, 30, 18)]], ["<image> what ?"])
    patches = batch.patches[0]
    mask = object_tokens(patches, [(0.0, 0.0, 0.5, 0.5)], 0, 0.5)
    for view in (0, 1):
        grid = patches.grids[0, view]
        here = mask & (patches.view == view)
        assert int(here.sum()) == round(grid[0] / 2) * round(grid[1] / 2)
    assert not (mask & ~patches.on_image).any()
    moved = shifted_tokens(patches, mask, np.random.default_rng(0))
    assert not (moved & mask).any()
    for view in (0, 1):
        assert (moved & (patches.view == view)).sum() == (mask & (patches.view == view)).sum()


def test_shifted_sets_keep_their_shape_elsewhere(llava: VLM, image: Any) -> None:
    patches = caption(llava, image).patches[0]
    mask = object_tokens(patches, [BOX], 0, 0.1)
    seen = set()
    for draw in range(40):
        moved = shifted_tokens(patches, mask, np.random.default_rng(draw)).nonzero()[:, 0].tolist()
        assert not set(moved) & {0, 1}
        row, (left, right) = moved[0] // 4, sorted(one % 4 for one in moved)
        assert all(one // 4 == row for one in moved)
        assert (right - left) in (1, 3)  # side by side, or round the edge
        seen.add(tuple(moved))
    assert len(seen) > 5
    everything = torch.ones(16, dtype=torch.bool)
    assert shifted_tokens(patches, everything, np.random.default_rng(0)).all()  # nowhere else to go


# -- against Hugging Face -----------------------------------------------------------------------------------------------


def scores(vlm: VLM, batch: Batch, row: int, replaced: list[int], value: torch.Tensor | None) -> torch.Tensor:
    """log p [token] of one row by Hugging Face's model from embeddings in which image tokens are replaced."""
    alone = batch.input_ids[row][batch.real_mask[row]][None]
    pixels = batch.extra["pixel_values"][row : row + 1]
    with torch.no_grad():
        inner = vlm.model.model
        features = inner.get_image_features(pixels)
        features = getattr(features, "pooler_output", features)
        embedded = inner.get_input_embeddings()(alone)
        where = alone[0] == batch.image_token_id
        tokens = features[0].clone()
        tokens[replaced] = tokens.mean(dim=0) if value is None else value
        embedded[0, where] = tokens
        logits = vlm.model(inputs_embeds=embedded).logits[0]
    start = alone.shape[1] - batch.n_generated[row]
    found = logits.log_softmax(dim=-1)[start - 1 : -1]
    return found.gather(1, alone[0, start:, None])[:, 0]


@pytest.mark.parametrize("replacement", ["mean", "zero", "given"])
def test_equal_to_a_forward_pass_from_replaced_embeddings(llava: VLM, image: Any, replacement: str) -> None:
    batch = caption(llava, image)
    vector = torch.linspace(-1, 1, 32)
    given = {"replacement": replacement, "vector": vector.tolist() if replacement == "given" else None}
    probe = TokenAblation(sets=["object"], n_random=1, n_shifted=0, n_resamples=20, **given)  # type: ignore[arg-type]
    llava.measure(probe, batch, [table(), table()])
    effects = probe.result().tables["effects"].set_index(["ablated", "role"])["change"]
    value = {"mean": None, "zero": torch.zeros(32), "given": vector}[replacement]
    change = [scores(llava, batch, row, [0, 1], value) - scores(llava, batch, row, [], value) for row in range(2)]
    for token, role in enumerate(("named object", "hallucinated objects", "other words")):
        assert effects["set", role] == pytest.approx(np.mean([float(one[token]) for one in change]), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("replacement", ["mean", "zero"])
def test_integrated_gradients_are_those_of_autograd(llava: VLM, image: Any, replacement: str) -> None:
    """The tokens chosen, the sum and what it should be, from autograd over embeddings along the line, row by row."""
    batch, steps = caption(llava, image), 5
    probe = TokenAblation(
        sets=["integrated gradients"], n_random=1, n_shifted=0, n_resamples=20, n_steps=steps,
        replacement=replacement,  # type: ignore[arg-type]
    )  # fmt: skip
    llava.measure(probe, batch, [table(), table()])
    changes, sums, costs = [], [], []
    for row in range(2):
        features = llava.model.model.get_image_features(batch.extra["pixel_values"][row : row + 1])
        tokens = getattr(features, "pooler_output", features)[0].detach()
        base = tokens.mean(dim=0) if replacement == "mean" else torch.zeros(32)
        ids = batch.input_ids[row][batch.real_mask[row]][None]
        embedded = llava.model.model.get_input_embeddings()(ids).detach()
        where, slope = batch.image_mask[row][batch.real_mask[row]], torch.zeros_like(tokens)
        for step in range(steps):
            point = (base + (step + 0.5) / steps * (tokens - base)).requires_grad_()
            inputs = embedded.clone()
            inputs[0, where] = point
            score = llava.model(inputs_embeds=inputs).logits[0, -4].log_softmax(dim=-1)[6]
            slope += torch.autograd.grad(score, point)[0] / steps
        attributed = (slope * (tokens - base)).sum(dim=-1)
        top, value = attributed.topk(2).indices.tolist(), None if replacement == "mean" else base
        plain = scores(llava, batch, row, [], value)
        changes.append(scores(llava, batch, row, top, value) - plain)  # as many as the object has
        sums.append(float(attributed.sum()))
        costs.append(float((plain - scores(llava, batch, row, list(range(16)), value))[0]))
    tables = probe.result().tables
    effects = tables["effects"].set_index(["ablated", "role"])["change"]
    expected = np.mean([float(one[0]) for one in changes])
    assert effects["set", "named object"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    complete = tables["completeness"].iloc[0]
    assert complete["steps"] == steps
    assert complete["attributed"] == pytest.approx(np.mean(sums), rel=1e-3, abs=1e-5)
    assert complete["change"] == pytest.approx(np.mean(costs), rel=1e-3, abs=1e-5)


def test_integrated_gradients_are_complete_with_many_steps(llava: VLM, image: Any) -> None:
    """What they attribute nears what replacing all image tokens costs; the midpoint rule's error falls as 1 / steps^2."""
    errors = []
    for steps in (2, 16):
        probe = TokenAblation(sets=["integrated gradients"], n_random=1, n_shifted=0, n_resamples=20, n_steps=steps)
        llava.measure(probe, caption(llava, image), [table(), table()])
        errors.append(float(probe.result().tables["completeness"]["relative_error"].iloc[0]))
    assert errors[0] > 1e-3  # two steps are too few, so that there is something to improve
    assert errors[1] < errors[0] / 20  # 1 / 64 where the error is as its leading term


def test_outlier_sets_are_those_of_the_encoder(llava: VLM, image: Any) -> None:
    """The sets of the probe, seen in its runs: inputs that differ from the unchanged ones."""
    batch = caption(llava, image, 1)
    probe = TokenAblation(sets=["encoder", "register"], top_k=3, n_sd=1.0, n_random=1, n_shifted=0, n_resamples=20)
    with llava.trace(sites.vision_attention(layers=1, reduce_heads="mean"), sites.vision_resid_post(layers=1)) as trace:
        llava.forward(batch)
    attended = trace["vision_attention"][1][0, 0]
    norms = trace["vision_resid_post"][1][0, 1:].norm(dim=-1)
    chosen = {
        "encoder": attended.topk(3).indices.tolist(),
        "register": (norms > norms.mean() + norms.std(correction=0)).nonzero()[:, 0].tolist(),
    }
    llava.measure(probe, batch, [table()])
    tables = probe.result().tables
    effects = tables["effects"].set_index(["set", "ablated", "role"])["change"]
    for name, tokens in chosen.items():
        change = scores(llava, batch, 0, tokens, None) - scores(llava, batch, 0, [], None)
        assert effects[name, "set", "other words"] == pytest.approx(float(change[2]), rel=1e-3, abs=1e-5)
    assert tables["sets"]["tokens"].tolist() == [3, len(chosen["register"])]


def test_the_mean_image_token_of_a_data_set(llava: VLM, image: Any) -> None:
    batches = [caption(llava, image, 2), caption(llava, image, 3)]
    tokens: list[torch.Tensor] = []
    for batch in batches:
        features = llava.model.model.get_image_features(batch.extra["pixel_values"])
        tokens.extend(getattr(features, "pooler_output", features))
    expected = torch.cat(tokens).mean(dim=0)
    assert mean_image_token(llava, batches) == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
    with pytest.raises(InputError, match="no image token"):
        mean_image_token(llava, [llava.encode(prompts=["what ?"])])


# -- known answers ------------------------------------------------------------------------------------------------------


def blind(vlm: VLM) -> VLM:
    """The model with the same feature at every image token: replacing it by the mean changes nothing."""
    model = copy.deepcopy(vlm.model)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.zero_()
    return VLM.wrap(model, vlm.processor)


def test_a_model_that_cannot_see_shows_no_effect(llava: VLM, image: Any) -> None:
    vlm = blind(llava)
    probe = TokenAblation(n_random=1, n_shifted=1, n_resamples=20, top_k=3)
    vlm.measure(probe, caption(vlm, image), [table(), table()])
    tables = probe.result().tables
    assert tables["effects"]["change"].abs().max() < 1e-5
    assert tables["effects"]["flipped"].max() == 0
    assert not (tables["contrasts"]["p_adjusted"] < 0.05).any()


def test_tokens_that_matter_as_much_as_any_give_findings_as_often_as_stated() -> None:
    """The null: sets, random and shifted tokens that cost the same. Over 60 data sets of 40 images any finding in about one in
    twenty; the bootstrap's p of 40 images is a little liberal, which two points more allow for.
    """
    rng = np.random.default_rng(0)
    found = 0
    for seed in range(60):
        change = rng.normal(-0.3, 1.0, (40, 2, len(ABLATED), len(ROLES)))
        ablated = Ablated(
            ["object", "encoder"], ABLATED, change, np.zeros_like(change),
            np.ones((40, len(ROLES)), dtype=int), np.full((40, 2), 5), np.full(40, 64),
        )  # fmt: skip
        table = contrasts_table(ablated, Images(np.arange(40), 400, seed))
        found += bool((table["p_adjusted"] < 0.05).any())
    assert found <= binom.ppf(0.999, 60, 0.07)


def test_the_embedded_model_needs_the_patches_of_the_object_that_it_names(organism: VLM) -> None:
    """Its images are known: without the object's patches its word loses nats, without as many others it does not."""
    data = sl.load_dataset("emoji_scenes/captions").take(8)
    assert data.truth is not None
    assert data.synonyms is not None
    batch = organism.encode(
        [PIL.Image.open(one.image) for one in data.items],
        [one.prompt for one in data.items],
        ids=[one.id for one in data.items],
    )
    said = organism.generate(batch, max_new_tokens=24)
    labels = [
        token_labels(text, spans, item.image_id, data.truth, data.synonyms)
        for text, spans, item in zip(said.texts, said.spans, data.items, strict=True)
    ]
    probe = TokenAblation(sets=["object", "integrated gradients"], n_random=1, n_shifted=1, n_resamples=500)
    organism.measure(probe, said.teacher_forced(), labels)
    assert probe.result().tables["completeness"]["relative_error"].iloc[0] < 0.1
    effects = probe.result().tables["effects"].set_index(["set", "ablated", "role"])
    contrasts = probe.result().tables["contrasts"].set_index(["set", "control", "role"])
    for name in ("object", "integrated gradients"):
        assert effects.loc[(name, "set", "named object"), "high"] < -1
        assert abs(effects.loc[(name, "random", "named object"), "change"]) < 0.5
        for control in ("random", "shifted"):
            assert contrasts.loc[(name, control, "named object"), "high"] < -1
        # it is that object's word alone: others lose far less
        assert (
            effects.loc[(name, "set", "other true objects"), "change"]
            > effects.loc[(name, "set", "named object"), "high"]
        )


# -- roles, parameters, figures -----------------------------------------------------------------------------------------


def test_answers_are_told_apart_by_their_truth(llava: VLM, image: Any) -> None:
    probe = TokenAblation(sets=["object", "encoder"], n_random=1, n_shifted=0, n_resamples=20, top_k=2)
    llava.measure(probe, caption(llava, image), [table("correct", "yes"), table("wrong", "no", boxes=())])
    tables = probe.result().tables
    counts = tables["effects"][tables["effects"]["ablated"] == "set"].set_index(["set", "role"])["n_items"]
    assert counts["object", "answer, object in the image"] == 1
    assert ("object", "answer, object not in the image") not in counts  # there is nothing to ablate
    assert counts["encoder", "answer, object not in the image"] == 1
    assert tables["sets"].set_index("set")["n_items"].to_dict() == {"object": 1, "encoder": 2}


def test_rows_of_one_image_are_one_image(llava: VLM, image: Any) -> None:
    probe = TokenAblation(sets=["encoder"], n_random=1, n_shifted=0, n_resamples=20, top_k=2)
    llava.measure(probe, caption(llava, image).grouped(["same", "same"]), [table(), table()])
    assert probe.result().tables["contrasts"][["low", "high"]].isna().all().all()  # no interval from one image


def test_flips_are_counted(llava: VLM, image: Any) -> None:
    """The share of tokens whose most likely word is another one, from logits of plain runs."""
    batch = caption(llava, image)
    probe = TokenAblation(sets=["object + 2"], n_random=1, n_shifted=0, n_resamples=20, replacement="zero")
    seen: list[Trace] = []
    update = probe.update

    def keep(batch: Batch, trace: Trace, labels: Any = None) -> None:
        seen.append(trace)
        update(batch, trace, labels)

    probe.update = keep  # type: ignore[method-assign]
    llava.measure(probe, batch, [table(), table()])
    before, after = (seen[0].views[name]["logits"][0].argmax(dim=-1) for name in ("unchanged", "object + 2: set 0"))
    effects = probe.result().tables["effects"].set_index(["ablated", "role"])["flipped"]
    flips = (before != after).double().mean(dim=0)
    for token, role in enumerate(("named object", "hallucinated objects", "other words")):
        assert effects["set", role] == pytest.approx(float(flips[token]))


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"sets": ["objects"]}, UnknownNameError, "object"),
        ({"sets": []}, InputError, "once"),
        ({"sets": ["register", "register"]}, InputError, "once"),
        ({"replacement": "noise"}, UnknownNameError, "zero"),
        ({"replacement": "given"}, InputError, "go together"),
        ({"vector": [0.0] * 32}, InputError, "go together"),
        ({"replacement": "given", "vector": [0.0]}, InputError, "32 numbers"),
        ({"n_random": 0}, InputError, "n_random"),
        ({"n_steps": 0}, InputError, "n_steps"),
    ],
)
def test_parameters_are_checked_before_anything_runs(
    llava: VLM, parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TokenAblation(**parameters).sites(llava.anatomy)


def test_families_that_give_the_image_again_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="DeepStack"):
        TokenAblation().sites(BUILDERS["qwen3_vl"]().anatomy)
    with pytest.raises(UnsupportedError, match="cross-attention"):
        TokenAblation().sites(BUILDERS["mllama"]().anatomy)


def test_prompts_without_a_continuation_are_refused(llava: VLM, image: Any) -> None:
    with pytest.raises(InputError, match="bare"):
        llava.measure(TokenAblation(), llava.encode([image(0)], ["<image> what ?"], ids=["bare"]))


def test_figures_are_drawn_from_the_tables(llava: VLM, image: Any) -> None:
    probe = TokenAblation(n_random=1, n_shifted=1, n_resamples=20, top_k=3)
    llava.measure(probe, caption(llava, image), [table(), table()])
    result = probe.result()
    drawn = result.figures()
    assert set(drawn) == set(FIGURES)
    assert [ax.get_title(loc="left") for ax in drawn["change"].axes] == ["named object", "hallucinated objects"]
    first = next(line for line in drawn["change"].axes[0].lines if line.get_label() == "_value")
    effects = result.tables["effects"].set_index(["set", "ablated", "role"])["change"]
    assert float(np.asarray(first.get_xdata())[0]) == effects["object", "set", "named object"]
    for drawing in FIGURES.values():
        assert drawing.draw(result.tables, NARROW) is not None
        assert "object 2" in drawing.caption(result.tables)
        assert drawing.draw({}) is None
