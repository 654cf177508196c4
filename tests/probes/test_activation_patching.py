"""Activation patching by hand, against hooks of our own, on a planted way, without one, and with first-order estimates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from planted_flow import BOX, NO, YES, asked, planted_llava

from probes import ActivationPatching
from probes.patching_places import contrast, random_places, roles
from probes.patching_tables import Gathered, tables_of
from slitlamp.decoding.views import image_free
from slitlamp.errors import InputError, UnknownNameError, UnsupportedError
from slitlamp.models import Batch
from slitlamp.reports.activation_patching import FIGURES
from slitlamp.reports.style import NARROW
from slitlamp.tracing import Edit, sites
from slitlamp.vlm import VLM

QUESTION = "<image> is there a dog in the image ?"


def table(label: str, category: str | None, truth: str | None, boxes: list[Any]) -> pd.DataFrame:
    return pd.DataFrame(
        {"token": [0], "word": [""], "label": [label], "category": [category], "truth": [truth], "boxes": [boxes]}
    )


def test_positions_of_the_roles(llava: VLM, image: Any) -> None:
    """<s> <image> x 16 is there a dog in the image ?: the box covers rows and columns 1 and 2 of 4."""
    batch = llava.encode([image(0)] * 2, [QUESTION, "<image> what ?"])
    found = roles(batch, [table("correct", "dog", "yes", [BOX]), None], [0, 0], llava.tokenizer)
    places = {name: (mask[0].nonzero()[:, 0]).tolist() for name, mask in found.items()}
    assert places["object"] == [1 + cell for cell in (5, 6, 9, 10)]
    assert places["other_image"] == [1 + cell for cell in range(16) if cell not in (5, 6, 9, 10)]
    assert places["question_object"] == [20]
    assert places["last"] == [24]
    assert places["other_text"] == [0, 17, 18, 19, 21, 22, 23]
    assert not found["object"][1].any()
    assert not found["question_object"][1].any()
    together = torch.stack(list(found.values())).sum(dim=0)
    assert torch.equal(together, batch.real_mask.long())


def test_random_positions_are_as_many_and_others(llava: VLM, image: Any) -> None:
    batch = llava.encode([image(0)] * 2, [QUESTION, "<image> what ?"], ids=["a", "b"])
    found = roles(batch, [table("correct", "dog", "yes", [BOX]), None], [0, 0], llava.tokenizer)
    drawn = random_places(batch, found["object"], "object", 0)
    assert drawn.sum(dim=1).tolist() == [4, 0]
    assert not (drawn & found["object"]).any()
    alone = llava.encode([image(0)], ["<image> what ?"], ids=["b"])
    here = random_places(alone, torch.ones_like(alone.image_mask).cumsum(dim=1) > 17, "x", 0)
    wide = random_places(batch, batch.real_mask & ~batch.image_mask & (batch.input_ids != 1), "x", 0)
    assert torch.equal(here[0], wide[1, -alone.length :])


def test_which_logits_are_compared(llava: VLM, image: Any) -> None:
    """For questions the right and the wrong answer; for captions the named object and its likeliest rival."""
    batch = llava.encode([image(0)] * 4, [QUESTION] * 4).with_continuation([[YES], [NO], [7, 8], [9]])
    labels = [
        table("correct", "dog", "yes", []),
        table("correct", "dog", "no", []),
        pd.DataFrame({"token": [0, 1], "label": ["other", "object"], "category": [None, "dog"]}),
        None,
    ]
    logits = torch.zeros(4, llava.anatomy.d_vocab)
    logits[2, 8], logits[2, 12], logits[3, 9], logits[3, 6] = 5, 4, 1, 3
    correct, foil = contrast(batch, labels, [0, 0, 1, 0], logits, llava.tokenizer)
    assert correct.tolist() == [YES, NO, 8, 9]
    assert foil.tolist() == [NO, YES, 12, 6]


class Words:
    """A tokenizer that writes words with capitals, and others with a space, in tokens of their own."""

    unk_token_id = 0
    ids: ClassVar[dict[str, int]] = {"yes": 5, "no": 6, "Yes": 7, "No": 8, " yes": 9, " no": 10}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self.ids.get(text, 0)]}


def test_the_answer_is_written_as_the_model_writes_it(llava: VLM, image: Any) -> None:
    batch = llava.encode([image(0)] * 2, [QUESTION] * 2).with_continuation([[8], [13]])
    labels = [table("correct", "dog", "no", []), table("correct", "dog", "yes", [])]
    logits = torch.zeros(2, 20)
    logits[1, 9] = 3.0  # the second row's answer is neither: what it finds likeliest decides
    correct, foil = contrast(batch, labels, [0, 0], logits, Words())
    assert correct.tolist() == [8, 9]
    assert foil.tolist() == [7, 10]


def test_equal_to_hooks_of_our_own(llava: VLM, image: Any) -> None:
    """Every effect again: plain PyTorch hooks on unpadded runs of the Hugging Face model, one row at a time."""
    prompts = [QUESTION, "<image> is there a dog ?"]
    batch = llava.encode([image(0), image(1)], prompts, ids=["a", "b"]).with_continuation([[YES, 7], [NO]])
    labels = [table("correct", "dog", "yes", [BOX]), table("correct", "dog", "no", [BOX])]
    probe = ActivationPatching(min_difference=0.0, n_resamples=20, layers=[0, 2])
    llava.measure(probe, batch, labels)
    tables = probe.result().tables
    model: Any = llava.model
    blocks = model.model.language_model.layers
    effects: dict[Any, list[float]] = {}
    for row in range(2):
        short = llava.encode([batch.images[row][0]], [prompts[row]])
        runs = {"clean": short.inputs(), "corrupt": image_free(short, "noise", 0)[0].inputs()}
        right, wrong = ((YES, NO), (NO, YES))[row]
        stored: dict[Any, torch.Tensor] = {}

        def run(which: str, hooks: list[Any]) -> float:
            handles = [make() for make in hooks]
            with torch.no_grad():
                logits = model(**runs[which]).logits[0, -1].double()  # noqa: B023  used within the turn of the loop
            for handle in handles:
                handle.remove()
            return float(logits[right] - logits[wrong])  # noqa: B023

        def keeping(which: str, layer: int) -> list[Any]:
            def block(module: Any, args: Any, output: Any) -> None:
                stored[which, "block", layer] = output.clone()  # noqa: B023

            def heads(module: Any, args: Any) -> None:
                stored[which, "heads", layer] = args[0].clone()  # noqa: B023

            return [
                lambda: blocks[layer].register_forward_hook(block),
                lambda: blocks[layer].self_attn.o_proj.register_forward_pre_hook(heads),
            ]

        ends = {which: run(which, [hook for layer in (0, 2) for hook in keeping(which, layer)]) for which in runs}
        total = ends["clean"] - ends["corrupt"]
        found = roles(short, [labels[row]], [0], llava.tokenizer)
        for layer in (0, 2):
            for direction, into, of in (("denoising", "corrupt", "clean"), ("noising", "clean", "corrupt")):
                sign = 1 if direction == "denoising" else -1
                for role, mask in found.items():

                    def put(module: Any, args: Any, output: Any) -> Any:
                        return torch.where(mask[..., None], stored[of, "block", layer], output)  # noqa: B023

                    patched = run(into, [lambda: blocks[layer].register_forward_hook(put)])  # noqa: B023
                    effects.setdefault((direction, role, layer), []).append(sign * (patched - ends[into]) / total)
                for head in range(4):

                    def swap(module: Any, args: Any) -> Any:
                        changed = args[0].clone()
                        some = slice(8 * head, 8 * head + 8)  # noqa: B023
                        changed[..., some] = stored[of, "heads", layer][..., some]  # noqa: B023
                        return (changed,)

                    patched = run(into, [lambda: blocks[layer].self_attn.o_proj.register_forward_pre_hook(swap)])  # noqa: B023
                    effects.setdefault((direction, head, layer), []).append(sign * (patched - ends[into]) / total)
    for one in tables["positions"].itertuples():
        assert one.effect == pytest.approx(np.mean(effects[one.direction, one.role, one.layer]), abs=2e-4)
    for one in tables["heads"].itertuples():
        assert one.effect == pytest.approx(np.mean(effects[one.direction, one.head, one.layer]), abs=2e-4)
    assert len(tables["positions"]) == 20


class Driven(torch.nn.Module):
    """What TransformerLens's patching functions ask of a model, on a batch with an image."""

    def __init__(self, vlm: VLM, batch: Batch, cfg: Any) -> None:
        super().__init__()
        self.vlm, self.batch, self.cfg = vlm, batch, cfg

    def run_with_hooks(self, tokens: torch.Tensor, fwd_hooks: list[Any]) -> torch.Tensor:
        edits = [
            Edit(
                name.rsplit("hook_")[-1],
                int(name.split(".")[1]),
                lambda values, calls, hook=hook: hook(values, hook=None),
            )  # type: ignore[misc]
            for name, hook in fwd_hooks
        ]
        return self.vlm.forward(self.batch, edits=edits).logits


def test_equal_to_transformer_lens_patching(llava: VLM, image: Any) -> None:
    """Heads, and the last position, by TransformerLens's own functions with our traces as caches."""
    from transformer_lens.patching import generic_activation_patch, get_act_patch_attn_head_out_all_pos
    from transformer_lens.patching import layer_pos_patch_setter as put

    batch = llava.encode([image(0), image(1)], [QUESTION, "<image> is there a dog ?"], ids=["a", "b"])
    batch = batch.with_continuation([[YES], [NO]])
    labels = [table("correct", "dog", "yes", []), table("correct", "dog", "no", [])]
    probe = ActivationPatching(min_difference=0.0, n_resamples=20, method="exact")
    llava.measure(probe, batch, labels)
    tables = probe.result().tables
    clean = batch.prompt_only()
    corrupt = image_free(clean, "noise", 0)[0]
    right, wrong = torch.tensor([YES, NO]), torch.tensor([NO, YES])

    def difference(logits: torch.Tensor) -> torch.Tensor:
        last, row = logits[:, -1], torch.arange(2)
        return last[row, right] - last[row, wrong]

    ends = {name: difference(llava.forward(one).logits) for name, one in (("clean", clean), ("corrupt", corrupt))}
    total = ends["clean"] - ends["corrupt"]
    for direction, into, of, sign in (("denoising", "corrupt", clean, 1), ("noising", "clean", corrupt, -1)):
        with llava.trace(sites.resid_post(), sites.z()) as trace:
            llava.forward(of)
        cache = trace.to_activation_cache()
        driven = Driven(llava, corrupt if into == "corrupt" else clean, cache.model.cfg).eval()
        tokens = driven.batch.input_ids
        options: Any = {"patching_metric": difference, "reduce": "none"}
        by_head = get_act_patch_attn_head_out_all_pos(driven, tokens, cache, **options).values
        by_place = generic_activation_patch(
            driven,
            tokens,
            cache,
            patch_setter=put,
            activation_name="resid_post",
            index_axis_names=("layer", "pos"),
            **options,
        ).values
        for name, found in (("heads", by_head.flatten(0, 1)), ("positions", by_place[:, -1])):
            wanted = (sign * (found - ends[into]) / total).mean(dim=-1).numpy()
            ours = tables[name][tables[name]["direction"] == direction]
            ours = ours.query("role == 'last'") if name == "positions" else ours
            np.testing.assert_allclose(ours["effect"].to_numpy(), wanted, atol=2e-4)


def test_estimates_are_the_slope_of_patching(llava: VLM, image: Any) -> None:
    """gradient * (clean - corrupt), against the finite difference of LD along that line.

    In float64 but for the norms, which round to float32: steps of 1 % keep that below the error of the difference.
    """
    import copy

    vlm = VLM.wrap(copy.deepcopy(llava.model).double(), llava.processor)
    batch = vlm.encode([image(0)], [QUESTION], ids=["a"]).with_continuation([[YES]])
    labels = [table("correct", "dog", "yes", [BOX])]
    probe = ActivationPatching(min_difference=0.0, n_resamples=20, layers=[1], method="attribution")
    vlm.measure(probe, batch, labels)
    found = probe.result().tables["attribution"].set_index(["direction", "place"])["effect"]
    short = batch.prompt_only()
    noise = image_free(short, "noise", 0)[0]
    stored = {}
    for name, one in (("clean", short), ("corrupt", noise)):
        with vlm.trace(sites.resid_post([1]), sites.logits()) as trace:
            vlm.forward(one)
        stored[name] = (trace["resid_post"][1], float(trace["logits"][0][0, 0, YES] - trace["logits"][0][0, 0, NO]))
    mask = roles(short, labels, [0], vlm.tokenizer)["object"][..., None]
    step = 1e-2 * (stored["clean"][0] - stored["corrupt"][0]) * mask
    for direction, one, start in (("denoising", noise, "corrupt"), ("noising", short, "clean")):
        ends = []
        for sign in (-1, 1):
            edit = Edit("resid_post", 1, lambda values, calls, sign=sign: values + sign * step)  # type: ignore[misc]
            logits = vlm.forward(one, edits=[edit]).logits[0, -1]
            ends.append(float(logits[YES] - logits[NO]))
        slope = (ends[1] - ends[0]) / 2e-2 / (stored["clean"][1] - stored["corrupt"][1])
        assert found[direction, "object"] == pytest.approx(slope, rel=1e-2), start


@pytest.fixture(scope="module")
def planted() -> tuple[VLM, ActivationPatching]:
    vlm = planted_llava(layer=1, head=2)
    probe = ActivationPatching()
    for start in (0, 4):
        vlm.measure(probe, *asked(vlm, [(start + i) % 4 != 0 for i in range(4)]))
    return vlm, probe


def test_the_layer_position_and_head_that_carry_the_answer_are_found(planted: tuple[VLM, ActivationPatching]) -> None:
    """Before layer 1 the bright patches carry it, from layer 1 on the last position alone, and one head moves it."""
    tables = planted[1].result().tables
    for direction in ("denoising", "noising"):
        places, heads = (
            tables[name][tables[name]["direction"] == direction].set_index(index)
            for name, index in (("positions", ["role", "layer"]), ("heads", ["layer", "head"]))
        )
        assert places.loc[("object", 0), "effect"] > 0.75  # noise is not quite dark
        assert places.loc[("other_image", 0), "effect"] < 0.25
        for layer in (1, 2):
            assert places.loc[("last", layer), "effect"] == pytest.approx(1, abs=1e-4)
            assert places.loc[("last", layer), "p_adjusted"] < 0.05
            assert (
                places.loc[(["object", "other_image", "question_object", "other_text"], layer), "effect"].abs().max()
                < 1e-5
            )
        assert places.loc[("last", 0), "effect"] == pytest.approx(0, abs=1e-5)
        assert heads.loc[(1, 2), "effect"] == pytest.approx(1, abs=1e-4)
        assert heads.loc[(1, 2), "p_adjusted"] < 0.05
        assert heads.drop((1, 2))["effect"].abs().max() < 1e-5
        assert (heads.drop((1, 2))["p_adjusted"] > 0.05).all()
    agreement = tables["agreement"].set_index(["direction", "component", "method"])["correlation"]
    assert agreement[("denoising", "heads", "pearson")] > 0.999
    assert tables["items"]["item"].nunique() == len(tables["items"]) / 2  # two batches of the same names
    assert "The head that restores most is 1.2" in planted[1].result().summary


def test_the_finding_is_given_as_edits_with_controls(planted: tuple[VLM, ActivationPatching]) -> None:
    vlm, probe = planted
    (target,) = probe.causal_targets(vlm.anatomy)
    batch, _ = asked(vlm, [True, True])
    plain = vlm.forward(batch.prompt_only()).logits[:, -1]
    changes = [
        float((vlm.forward(batch.prompt_only(), edits=edits(batch)).logits[:, -1] - plain).abs().max())
        for edits in (target.target, *target.controls)
    ]
    assert changes[0] > 1
    assert max(changes[1:]) < 1e-5
    with pytest.raises(InputError, match="heads, which are not among"):
        replace(probe, components=("positions",)).causal_targets(vlm.anatomy)


def test_no_image_no_item() -> None:
    """The null: where the image does not move the answer there is nothing to patch, and that is said."""
    vlm = planted_llava(reads_image=False)
    probe = ActivationPatching(n_resamples=20)
    vlm.measure(probe, *asked(vlm, [True, False, False]))
    with pytest.raises(InputError, match=r"no item left: 1 without a right answer.*2 whose clean and corrupt runs"):
        probe.result()


def test_noise_gives_as_many_findings_as_stated() -> None:
    """Effects of heads that differ by chance alone: over 60 data sets the share with any finding is about .05."""
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(60):
        gathered = Gathered(
            layers=[0, 1, 2],
            items=np.array([f"i{i}" for i in range(40)]),
            groups=np.array([f"i{i}" for i in range(40)]),
            differences=np.ones((40, 2)),
            present=np.ones((40, 5), dtype=bool),
            effects={"heads_denoising": rng.normal(0.1, 1, (40, 3, 4))},
            unanswered=0,
            too_close=0,
            n_resamples=400,
            seed=0,
        )
        found += (tables_of(gathered)["heads"]["p_adjusted"] < 0.05).any()
    assert (
        found <= 10
    )  # a binomial of 60 and .05 exceeds 8 with p = .004; the bootstrap of 40 items is a little liberal


def test_painting_the_object_over_leaves_the_rest(planted: tuple[VLM, ActivationPatching]) -> None:
    from probes.patching_edits import corrupted

    vlm, _ = planted
    batch, labels = asked(vlm, [True, False])
    short = batch.prompt_only()
    painted, edits = corrupted(short, "object", labels, [0, 0], 0)
    one, other = short.extra["pixel_values"], painted.extra["pixel_values"]
    changed = (one != other).any(dim=1)
    assert changed[0, 4:12, 4:12].all()
    assert changed[0].sum() == 64
    assert not changed[1].any()
    assert not edits
    probe = ActivationPatching(n_resamples=20, corrupt="object", method="exact", directions=["denoising"])
    vlm.measure(probe, batch, labels)
    places = probe.result().tables["positions"].set_index(["role", "layer"])["effect"]
    assert places["object", 0] == pytest.approx(1, abs=1e-4)
    assert places["other_image", 0] == pytest.approx(0, abs=1e-5)


def test_several_images_cannot_be_painted_over(llava: VLM, image: Any) -> None:
    batch = llava.encode([[image(0), image(1)]], ["<image> <image> what ?"]).with_continuation([[6]])
    with pytest.raises(UnsupportedError, match="use 'noise' or 'mean'"):
        llava.measure(ActivationPatching(corrupt="object"), batch)


def test_parameters_are_checked(llava: VLM) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"corrupt": "nois"}, UnknownNameError, "noise"),
        ({"method": "exct"}, UnknownNameError, "exact"),
        ({"directions": []}, InputError, "denoising, noising"),
        ({"components": ["head"]}, InputError, "positions, heads"),
        ({"min_difference": -1}, InputError, "min_difference"),
        ({"layers": [9]}, InputError, "some of 0 to 2"),
    ]
    for parameters, error, match in cases:
        with pytest.raises(error, match=match):
            ActivationPatching(**parameters).sites(llava.anatomy)


def test_figures_are_drawn_from_the_tables(planted: tuple[VLM, ActivationPatching]) -> None:
    result = planted[1].result()
    figures = result.figures()
    assert set(figures) == {"positions", "heads", "attribution"}
    drawn = next(line for line in figures["positions"].axes[0].lines if line.get_label() == "_last").get_ydata()
    table = result.tables["positions"].query("direction == 'denoising' and role == 'last'")
    np.testing.assert_allclose(np.asarray(drawn, dtype=float), table["effect"])
    heads = result.tables["heads"].query("direction == 'denoising'")
    mesh = np.asarray(figures["heads"].axes[0].collections[0].get_array()).ravel()
    np.testing.assert_allclose(mesh, heads["effect"])
    for drawing in FIGURES.values():
        assert drawing.caption(result.tables)
        assert drawing.draw(result.tables, NARROW) is not None
        assert drawing.draw({}) is None
