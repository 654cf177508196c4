"""IMA as a probe: against Hugging Face's own hidden states, on states of known alignment, and what it keeps."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import entropy

from probes import ImplicitAlignment
from probes.alignment_causal import largest_rise, skip_for_image_tokens
from probes.alignment_states import token_masks
from slitlamp.errors import InputError, UnknownNameError
from slitlamp.models import Batch
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

CHEAP: dict[str, Any] = {"n_resamples": 30, "embedding": "none", "inside": False, "vocabulary": False}
PROMPTS = ["<image> is there a dog ?", "what is in the <image> ?", "describe this <image> and say where it is ."]
TOKENS = [[6, 7, 8], [9, 10], [11, 12, 13, 14]]


@pytest.fixture(scope="module")
def captions(llava: VLM, image: Any) -> Batch:
    batch = llava.encode(images=[image(n) for n in range(3)], prompts=PROMPTS, ids=["a", "b", "c"])
    return batch.with_continuation(TOKENS)


def rows(table: pd.DataFrame, column: str = "value", **where: object) -> Any:
    for name, value in where.items():
        table = table[table[name] == value]
    return table.sort_values("layer")[column].to_numpy()


def hidden(llava: VLM, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per row, run alone and unpadded: Hugging Face's hidden states [layer, position, d], masks of image and text, logits."""
    found = []
    for row in range(batch.size):
        ids = batch.input_ids[row][batch.attention_mask[row].bool()][None]
        with torch.no_grad():
            out = llava.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=batch.extra["pixel_values"][row : row + 1],
                output_hidden_states=True,
            )
        is_image = ids[0] == batch.image_token_id
        after = torch.arange(len(is_image)) > is_image.nonzero().max()
        found.append((torch.stack(out.hidden_states)[:, 0], is_image, after, out.logits[0]))
    return found


def test_equal_to_loops_over_hugging_face_hidden_states(llava: VLM, captions: Batch) -> None:
    """Curves, changes and norms of all layers but the last, whose entry in `hidden_states` is normed already."""
    probe = ImplicitAlignment(**{**CHEAP, "reductions": ["mean", "max_mean"]})
    llava.measure(probe, captions)
    tables = probe.result().tables
    states = hidden(llava, captions)
    last = llava.anatomy.n_layers
    cos = torch.nn.functional.cosine_similarity
    for layer in range(last):
        image = [one[0][layer][one[1]] for one in states]
        text = [one[0][layer][one[2]] for one in states]
        first = [one[0][0][one[1]] for one in states]
        avg = [[float(cos(p.mean(0), t.mean(0), dim=0)) for t in text] for p in image]
        score = [[float(cos(p.mean(0), t.mean(0), dim=0)) for t in text] for p in first]
        mean = [[float(cos(p[:, None], t[None], dim=2).mean()) for t in text] for p in image]
        largest = [[float(cos(p[:, None], t[None], dim=2).amax(1).mean()) for t in text] for p in image]
        norm = [float(np.median(one.norm(dim=1).numpy())) for one in text]
        expected = {
            "value": np.mean(avg),
            "sd": np.std(avg),
            "matched": np.mean(np.diag(avg)),
            "mismatched": np.mean(np.array(avg)[~np.eye(3, dtype=bool)]),
        }
        for column, value in expected.items():
            one = rows(tables["similarity"], column, pair="image-text", variant="raw")[layer]
            assert one == pytest.approx(value, abs=1e-5), (layer, column)
        whole = tables["whole_grid"].set_index(["reduction", "layer"])["value"]
        assert whole["avg", layer] == pytest.approx(np.mean(avg), abs=1e-5)
        assert whole["mean", layer] == pytest.approx(np.mean(mean), abs=1e-5)
        inputs = rows(tables["similarity"], pair="input image-text", variant="raw")
        assert inputs[layer] == pytest.approx(np.mean(score), abs=1e-5)
        for name, grid in (("mean", mean), ("max_mean", largest)):
            one = rows(tables["reductions"], pair="image-text", variant="raw", reduction=name)[layer]
            assert one == pytest.approx(np.mean(grid), abs=1e-5), name
        assert rows(tables["norms"], modality="text")[layer] == pytest.approx(np.mean(norm), rel=1e-5)
        if layer + 1 < last:
            later = [one[0][layer + 1][one[1]] for one in states]
            change = np.mean([float(cos(p, n, dim=1).mean()) for p, n in zip(image, later, strict=True)])
            assert rows(tables["change"], modality="image", interval=1)[layer] == pytest.approx(change, abs=1e-5)
            kept = rows(tables["token_change"], modality="image", interval=1, variant="raw")[layer]
            assert kept == pytest.approx(change, abs=1e-5)  # all tokens are kept here
    scores = tables["ima"].set_index(["kind", "variant"])["value"]
    curve = rows(tables["similarity"], pair="image-text", variant="raw")
    assert scores["same_layer", "raw"] == pytest.approx(curve.mean(), abs=1e-12)


def test_the_lens_of_the_last_layer_is_the_models_own_prediction(llava: VLM, captions: Batch) -> None:
    model = copy.deepcopy(llava.model)
    with torch.no_grad():  # a norm with weights of 1 may be applied twice and nobody sees it
        model.get_submodule(llava.anatomy.modules["final_norm"]).weight.uniform_(
            0.2, 3.0, generator=torch.Generator().manual_seed(0)
        )  # type: ignore[operator, union-attr]
    vlm = VLM.wrap(model, llava.processor)
    probe = ImplicitAlignment(**{**CHEAP, "vocabulary": True}, n_ids=50)
    vlm.measure(probe, captions)
    tables = probe.result().tables
    last = vlm.anatomy.n_layers
    divergence, token_entropy, share = [], [], []
    for _, is_image, after, logits in hidden(vlm, captions):
        p = logits.double().softmax(dim=1).numpy()
        divergence.append(entropy(p[is_image].mean(axis=0), p[after].mean(axis=0)))
        token_entropy.append(entropy(p[after], axis=1).mean())
        share.append(np.bincount(p[after].argmax(axis=1), minlength=p.shape[1]) / int(after.sum()))
    assert rows(tables["kl"], pair="image to text")[last] == pytest.approx(np.mean(divergence), rel=1e-4)
    found = tables["entropy"].query("kind == 'of a token'")
    assert rows(found, modality="text")[last] == pytest.approx(np.mean(token_entropy), rel=1e-4)
    histogram = tables["vocabulary_histogram"].query("layer == @last and modality == 'text' and top == 1")
    expected = np.mean(share, axis=0)
    for row in histogram.itertuples():
        assert row.value == pytest.approx(expected[row.id])  # type: ignore[index]
    assert histogram["value"].sum() == pytest.approx(1.0)  # fewer than 50 different words here
    for _, listed in tables["vocabulary_histogram"].groupby(["layer", "modality", "top"]):
        assert listed.sort_values("rank")["value"].is_monotonic_decreasing


def test_taps_are_those_of_the_blocks(llava: VLM, captions: Batch) -> None:
    probe = ImplicitAlignment(**{**CHEAP, "inside": True})
    llava.measure(probe, captions)
    tables = probe.result().tables
    assert tables["inside"]["tap"].nunique() == 7
    stream = rows(tables["norms"], modality="image")
    norm = tables["inside"].query("measure == 'norm' and modality == 'image'")
    np.testing.assert_allclose(rows(norm, tap="resid_post"), stream[1:])
    # RMS norms of the tiny model have weight 1: every token leaves them with the norm of d_model ones
    np.testing.assert_allclose(rows(norm, tap="ln1"), math.sqrt(llava.anatomy.d_model), rtol=0.05)
    cosines = tables["inside_similarity"].query("variant == 'raw'")
    curve = rows(tables["similarity"], pair="image-text", variant="raw")
    np.testing.assert_allclose(rows(cosines, tap="resid_post"), curve[1:], atol=1e-12)


ANGLES = [(1.5, 1.2), (1.2, 0.9), (0.4, 0.6), (0.3, 0.5)]
"""Per layer: how far image and text tokens lean away from what they share."""


def planted(probe: ImplicitAlignment, llava: VLM, batch: Batch, massive: float = 0.0) -> dict[str, pd.DataFrame]:
    """Measure states that are made, not computed: image tokens at cos a e0 + sin a e1, text tokens at cos b e0 + sin b e2."""
    with llava.trace(*probe.sites(llava.anatomy)) as trace:
        llava.forward(batch)
    masks = token_masks(batch, "all", "with", True)
    for layer, (a, b) in enumerate(ANGLES):
        site, place = ("resid_pre", 0) if layer == 0 else ("resid_post", layer - 1)
        values = torch.zeros_like(trace[site][place])
        for mask, angle, own in ((masks[0], a, 1), (masks[1], b, 2)):
            state = torch.zeros(values.shape[-1])
            state[[0, own]] = torch.tensor([math.cos(angle), math.sin(angle)])
            values[mask] = state * (3.0 if own == 1 else 1.0)
        values[..., 5] = massive
        trace.steps[0].values[site][place] = values
    probe.update(batch, trace)
    return probe.result().tables


def test_planted_alignment_is_found_by_every_reduction(llava: VLM, captions: Batch) -> None:
    probe = ImplicitAlignment(**CHEAP)
    tables = planted(probe, llava, captions)
    truth = [math.cos(a) * math.cos(b) for a, b in ANGLES]
    np.testing.assert_allclose(rows(tables["similarity"], pair="image-text", variant="raw"), truth, atol=1e-6)
    for name in probe.reductions:
        found = rows(tables["reductions"], pair="image-text", variant="raw", reduction=name)
        np.testing.assert_allclose(found, truth, atol=1e-6, err_msg=name)
    change = [math.cos(one - other) for (one, _), (other, _) in pairwise(ANGLES)]
    np.testing.assert_allclose(rows(tables["change"], modality="image", interval=1), change, atol=1e-6)
    np.testing.assert_allclose(rows(tables["norms"], modality="image / text"), 3.0, rtol=1e-6)
    inputs = [math.cos(ANGLES[0][0]) * math.cos(b) for _, b in ANGLES]
    np.testing.assert_allclose(rows(tables["similarity"], pair="input image-text", variant="raw"), inputs, atol=1e-6)
    scores = tables["ima"].set_index(["kind", "variant"])["value"]
    assert scores["input_layer", "raw"] == pytest.approx(np.mean(inputs), abs=1e-6)
    assert largest_rise(probe.sample()) == 2


def test_a_planted_massive_dimension_hides_the_truth_until_it_is_removed(llava: VLM, captions: Batch) -> None:
    truth = [math.cos(a) * math.cos(b) for a, b in ANGLES]
    for massive_k in (None, 1):
        tables = planted(ImplicitAlignment(**CHEAP, massive_k=massive_k), llava, captions, massive=2000.0)
        assert rows(tables["similarity"], pair="image-text", variant="raw").min() > 0.99999
        np.testing.assert_allclose(rows(tables["similarity"], pair="image-text", variant="removed"), truth, atol=1e-6)
        removed = rows(tables["reductions"], pair="image-text", variant="removed", reduction="median")
        np.testing.assert_allclose(removed, truth, atol=1e-6)
        assert tables["massive"]["dimensions"].tolist() == ["5"] * 4
        assert (tables["massive"]["largest_share"] > 0.999).all()


def test_text_is_what_was_asked_for(llava: VLM, captions: Batch) -> None:
    lengths = captions.lengths
    every = token_masks(captions, "all", "with", first_token=True)
    n_image = int(captions.image_mask[0].sum())
    assert every[1].sum(dim=1).tolist() == [length - n_image for length in lengths]
    assert (~every[0] | ~every[1]).all()
    without_first = token_masks(captions, "all", "with", first_token=False)
    assert (every[1].sum(dim=1) - without_first[1].sum(dim=1)).tolist() == [1, 1, 1]
    only = token_masks(captions, "after_image", "only", first_token=False)
    assert only[1].sum(dim=1).tolist() == [len(one) for one in TOKENS]
    for row, length in enumerate(lengths):
        assert only[1][row].nonzero()[:, 0].tolist() == list(range(length - len(TOKENS[row]), length))
    after = token_masks(captions, "after_image", "with", first_token=False)
    prompt = token_masks(captions, "after_image", "without", first_token=False)
    assert torch.equal(after[1], prompt[1] | only[1])


def test_which_items_are_kept_depends_on_their_names_alone(llava: VLM, image: Any) -> None:
    names = [f"item{n}" for n in range(6)]

    def measured(order: list[int]) -> ImplicitAlignment:
        probe = ImplicitAlignment(**CHEAP, max_items=3, token_items=2, max_tokens=3)
        for n in order:
            batch = llava.encode(images=[image(n)], prompts=[PROMPTS[n % 3]], ids=[names[n]])
            llava.measure(probe, batch.with_continuation([TOKENS[n % 3]]))
        return probe

    one, other = measured([0, 1, 2, 3, 4, 5]), measured([4, 2, 0, 5, 3, 1])
    for key in ("vector_stream", "token_states", "vector_item", "token_slots"):
        np.testing.assert_array_equal(one.state()[f"rows.{key}"], other.state()[f"rows.{key}"])
    assert len(one.state()["rows.vector_item"]) == 3
    assert one.state()["rows.token_states"].shape[:3] == (2, 2, 3)
    assert len(one.state()["rows.item"]) == 6
    assert one.result().tables["whole_grid"]["n_items"].eq(6).all()
    half, rest = measured([0, 1, 2]), measured([3, 4, 5])
    half.merge(rest)
    np.testing.assert_array_equal(half.state()["rows.vector_stream"], one.state()["rows.vector_stream"])


def test_parameters_that_cannot_be_used_are_refused_before_anything_runs(llava: VLM, captions: Batch) -> None:
    for parameters, match in (
        ({"intervals": [3]}, "below the number of layers"),
        ({"intervals": []}, "from 1"),
        ({"massive_k": llava.anatomy.d_model}, "would remove all"),
        ({"embedding_layers": [4]}, "embedding_layers"),
        ({"max_items": 0}, "max_items"),
        ({"reductions": []}, "reductions"),
    ):
        with pytest.raises(InputError, match=match):
            ImplicitAlignment(**parameters).sites(llava.anatomy)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="median"):
        ImplicitAlignment(reductions=["medain"]).sites(llava.anatomy)  # type: ignore[list-item]
    with pytest.raises(InputError, match="a, b, c: no text token"):
        llava.measure(ImplicitAlignment(**CHEAP, generated="only"), captions.prompt_only())


def test_intervals_too_long_for_the_model_are_dropped(llava: VLM, captions: Batch) -> None:
    probe = ImplicitAlignment(**CHEAP, intervals=[1, 8])
    llava.measure(probe, captions)
    assert set(probe.result().tables["change"]["interval"]) == {1}


def test_causal_targets_move_image_tokens_alone_and_equally_far(llava: VLM, captions: Batch) -> None:
    probe = ImplicitAlignment(**CHEAP)
    planted(probe, llava, captions)
    moved, passed = probe.causal_targets(llava.anatomy)
    values = torch.zeros(captions.size, captions.length, llava.anatomy.d_model)

    class Prefill:
        is_prefill = True

    def change(edits_of: Any) -> torch.Tensor:
        (edit,) = edits_of(captions)
        assert (edit.site, edit.layer) == ("resid_post", 1)  # layer 2 is after block 1
        result: torch.Tensor = edit.function(values, Prefill())
        return result

    steps = [change(one) for one in (moved.target, *moved.controls)]
    assert len(steps) == 20
    for step in steps:
        assert (step[~captions.image_mask] == 0).all()
        np.testing.assert_allclose(
            step[captions.image_mask].norm(dim=1), steps[0][captions.image_mask][0].norm(), rtol=1e-5
        )
    assert not torch.allclose(steps[0], steps[1])
    a, b = ANGLES[2]
    expected = torch.tensor([math.cos(b) - 3 * math.cos(a), -3 * math.sin(a), math.sin(b)])
    np.testing.assert_allclose(steps[0][captions.image_mask][0][:3], expected, atol=1e-6)
    assert (
        len(passed.controls) == 1
    )  # of three blocks, one is the target's, and nothing reads the last one's image tokens


def test_image_tokens_pass_a_block_and_text_goes_through(llava: VLM, captions: Batch) -> None:
    with llava.trace(sites.resid_pre(layers=1), sites.resid_post(layers=1)) as plain:
        llava.forward(captions)
    with llava.trace(sites.resid_post(layers=1)) as edited:
        llava.forward(captions, edits=skip_for_image_tokens(1)(captions))
    image, _ = token_masks(captions, "all", "with", True)
    real = plain.mask("resid_post")
    assert torch.equal(edited["resid_post"][1][image], plain["resid_pre"][1][image])
    assert torch.equal(edited["resid_post"][1][real & ~image], plain["resid_post"][1][real & ~image])


def test_figures_are_drawn_from_the_tables(llava: VLM, captions: Batch) -> None:
    probe = ImplicitAlignment(n_resamples=30, embedding_tokens=10)
    llava.measure(probe, captions)
    result = probe.result()
    figures = result.figures()
    assert set(figures) == {
        *("alignment_curves", "matched_pairs", "token_map", "reductions"),
        *("change_and_norms", "vocabulary_kl", "vocabulary_histogram", "inside_blocks"),
    }
    drawn = next(
        line for line in figures["alignment_curves"].axes[0].lines if line.get_label().startswith("image-text")
    )
    expected = rows(result.tables["similarity"], pair="image-text", variant="raw")
    np.testing.assert_allclose(np.asarray(drawn.get_ydata(), dtype=float), expected)
