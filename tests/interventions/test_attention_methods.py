"""Interventions on attention to and among image tokens, against the same done by hand, pair by pair, in copies of models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contract import close, encode, pictures_of
from eager import Eager
from edits import Edits
from hand_attention import built, by_hand, logits_with_mask, outputs
from tiny_models import BUILDERS
from tiny_models.common import random_image

from interventions import FocusCut, ImageAttentionMask, InactiveHeads, LayerDrop, SinkRedistribution
from interventions.focus_cut import lowest
from interventions.image_attention_mask import noise_of
from interventions.sink_redistribution import moved
from slitlamp.decoding import Intervention
from slitlamp.errors import InputError, UnknownNameError, UnsupportedError
from slitlamp.experiments.registry import build, describe
from slitlamp.models import Batch
from slitlamp.tracing import Calls, Edit, sites
from slitlamp.vlm import VLM

CASES = [("llava", "sdpa"), ("llava", "eager"), ("llava_next", "sdpa"), ("qwen2_5_vl", "sdpa"), ("gemma3", "sdpa")]


def under(vlm: VLM, batch: Batch, *methods: Intervention) -> torch.Tensor:
    """Logits at real positions under interventions."""
    with vlm.apply(*methods):
        return vlm.forward(batch).logits[batch.real_mask]


def weights_under(vlm: VLM, batch: Batch, *methods: Intervention) -> dict[int, torch.Tensor]:
    """Attention [batch, head, query, key] of every layer under interventions, at the positions of the batch."""
    with vlm.apply(*methods), vlm.trace(sites.attention("all", "all")) as trace:
        vlm.forward(batch)
    found = {}
    for layer, taken in trace["attention"].items():
        found[layer] = torch.zeros(*taken.shape[:2], batch.length, batch.length)
        for row, n in enumerate(batch.lengths):
            found[layer][row, :, batch.length - n :, batch.length - n :] = taken[row, :, :n, :n]
    return found


# masks of image tokens


def image_pairs(batch: Batch, window: int | None, later: bool) -> torch.Tensor:
    """bool [batch, T, T], pairs of image tokens that may attend, looked up one by one; window None for the diagonal."""
    pairs = torch.zeros(batch.size, batch.length, batch.length, dtype=torch.bool)
    for row, patches in enumerate(batch.patches):
        positions = batch.image_mask[row].nonzero()[:, 0].tolist()
        places = list(
            zip(
                patches.image.tolist(),
                patches.view.tolist(),
                patches.row.tolist(),
                patches.column.tolist(),
                strict=True,
            )
        )
        for query, one in zip(positions, places, strict=True):
            for key, other in zip(positions, places, strict=True):
                if window is None:
                    pairs[row, query, key] = query == key
                elif min(one + other) < 0:
                    pairs[row, query, key] = key <= query  # no place: as ever
                else:
                    near = max(abs(one[2] - other[2]), abs(one[3] - other[3])) <= window // 2
                    pairs[row, query, key] = one[:2] == other[:2] and near and (later or key <= query)
    return pairs


def masks_of(batch: Batch, shown: torch.Tensor) -> torch.Tensor:
    """What is added to the model's own mask [batch, 1, T, T], so that image tokens attend among themselves as shown."""
    among = batch.image_mask[:, :, None] & batch.image_mask[:, None]
    causal = torch.ones(batch.length, batch.length, dtype=torch.bool).tril()
    bias = torch.zeros(shown.shape).masked_fill(among & ~shown & causal, -torch.inf)
    lifts = -torch.finfo(torch.float32).min  # eager masks hide by the least float
    return bias.masked_fill(shown & ~causal, lifts)[:, None]


@pytest.mark.parametrize(("family", "implementation"), [case for case in CASES if case[0] != "gemma3"])
@pytest.mark.parametrize(
    ("method", "window", "later"),
    [
        (ImageAttentionMask(window=3, layers=[0, 1]), 3, False),
        (ImageAttentionMask(window=3, direction="both", layers=[0, 1]), 3, True),
        (ImageAttentionMask("diagonal", layers=[0, 1]), None, False),
    ],
    ids=["causal", "both", "diagonal"],
)
def test_masked_image_tokens_equal_a_mask_written_pair_by_pair(
    family: str, implementation: str, method: ImageAttentionMask, window: int | None, later: bool
) -> None:
    """Several images in a prompt, views and ends of rows of LLaVA-NeXT, a packed tower."""
    vlm = built(family, implementation)
    batch = encode(vlm, pictures_of(vlm))
    bias = masks_of(batch, image_pairs(batch, window, later))
    wanted = logits_with_mask(vlm, batch, {0: bias, 1: bias})[batch.real_mask]
    found = under(vlm, batch, method)
    close(found, wanted)
    assert (found - vlm.forward(batch).logits[batch.real_mask]).abs().max() > 1e-3


def test_gemmas_image_tokens_see_no_later_neighbour_under_a_causal_mask() -> None:
    """Its own mask lets the tokens of an image see each other both ways."""
    vlm = BUILDERS["gemma3"]()
    batch = encode(vlm, pictures_of(vlm))
    image, kept = batch.image_mask, image_pairs(batch, 3, False)
    seen = weights_under(vlm, batch, ImageAttentionMask(window=3))[2]  # a layer without a sliding window
    plain = weights_under(vlm, batch)[2]
    among = image[:, :, None] & image[:, None]
    assert (plain > 0).any(dim=1)[among & ~kept].any()
    assert torch.equal((seen > 0).all(dim=1)[among], kept[among] & (plain > 0).all(dim=1)[among])
    assert torch.equal((seen > 0).any(dim=1)[among], kept[among] & (plain > 0).any(dim=1)[among])


def test_image_tokens_see_the_question_under_mutual_attention(llava: VLM) -> None:
    """And no token of the answer; text sees what it saw."""
    batch = encode(llava, pictures_of(llava)).with_continuation([[6, 7], [8], [9, 10]])
    plain, found = (weights_under(llava, batch, *methods)[1] > 0 for methods in ((), (ImageAttentionMask("mutual"),)))
    question = batch.text_after_image_mask & ~batch.generated_mask
    shown = (batch.image_mask[:, :, None] & question[:, None])[:, None]
    assert shown.any()
    assert not (plain & shown).any()
    assert torch.equal(found, plain | shown)


@pytest.mark.parametrize(
    "method",
    [
        ImageAttentionMask(window=3),
        ImageAttentionMask(window=3, direction="both"),
        ImageAttentionMask("diagonal"),
    ],
    ids=["causal", "both", "diagonal"],
)
def test_random_masks_have_as_many_pairs_in_every_row(method: ImageAttentionMask, llava: VLM) -> None:
    batch = encode(llava, pictures_of(llava))
    control = method.controls()["random"]
    mine, drawn = (weights_under(llava, batch, one)[0][:, 0] > 0 for one in (method, control))
    image = batch.image_mask
    among = image[:, :, None] & image[:, None]
    assert torch.equal((mine & among).sum(dim=2), (drawn & among).sum(dim=2))
    assert (mine != drawn)[among].any()
    assert torch.equal(mine & ~among, drawn & ~among)
    others = weights_under(llava, batch, ImageAttentionMask(method.pattern, 3, method.direction, None, "random", 1))
    assert (others[0][:, 0] > 0).ne(drawn)[among].any()


def test_random_mutual_attention_shows_later_image_tokens(llava: VLM) -> None:
    batch = llava.encode([random_image(0)], ["<image> what ?"])
    mine, drawn = (
        weights_under(llava, batch, one)[0][0, 0] > 0
        for one in (ImageAttentionMask("mutual"), ImageAttentionMask("mutual", select="random"))
    )
    image, later = batch.image_mask[0], torch.ones(batch.length, batch.length, dtype=torch.bool).triu(1)
    n_text = int(batch.text_after_image_mask.sum())
    to_come = torch.arange(int(image.sum()) - 1, -1, -1)  # image tokens after each
    assert (mine & later)[image].sum(dim=1).tolist() == [n_text] * int(image.sum())
    assert (drawn & later)[image][:, image].sum(dim=1).tolist() == to_come.clamp(max=n_text).tolist()
    assert not (drawn & later)[image][:, ~image].any()
    assert not (drawn & later)[~image].any()


def test_noise_is_spread_evenly_and_follows_from_the_pair_alone() -> None:
    rows, columns = torch.arange(200)[:, None], torch.arange(300)
    whole = noise_of(rows, columns, 3)
    assert torch.equal(noise_of(rows[40:41], columns[7:9], 3), whole[40:41, 7:9])
    assert not torch.equal(noise_of(rows, columns, 4), whole)
    assert whole.unique().numel() > 0.999 * whole.numel()
    shares = torch.histc(whole.double() / 2**32, bins=10, min=0, max=1) / whole.numel()
    assert (shares - 0.1).abs().max() < 0.01  # 60000 draws: 8 standard deviations of a share of a tenth
    pairs = torch.stack([whole[:, :-1].flatten(), whole[:, 1:].flatten()]).double()
    assert torch.corrcoef(pairs)[0, 1].abs() < 0.03


# layers and heads without the image


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_dropped_layers_equal_the_same_by_hand_before_and_after_the_softmax(family: str, implementation: str) -> None:
    vlm = built(family, implementation)
    batch = encode(vlm, pictures_of(vlm))
    apart = batch.image_mask[:, None, None, :] & ~torch.eye(batch.length, dtype=torch.bool)
    layers = range(vlm.anatomy.n_layers - 2, vlm.anatomy.n_layers)
    bias = torch.zeros(apart.shape).masked_fill(apart & batch.real_mask[:, None, :, None], -torch.inf)
    before = under(vlm, batch, LayerDrop(2))
    close(before, logits_with_mask(vlm, batch, dict.fromkeys(layers, bias))[batch.real_mask])
    rules: Any = [(layer, lambda weights, *_: weights.masked_fill(apart, 0), batch.real_mask) for layer in layers]
    after = under(vlm, batch, LayerDrop(2, "post_softmax"))
    close(after, outputs(by_hand(vlm, rules, {}), batch).logits[batch.real_mask])
    plain = vlm.forward(batch).logits[batch.real_mask]
    for one, other in ((before, plain), (after, plain), (before, after)):
        assert (one - other).abs().max() > 1e-3


def test_without_the_image_in_any_layer_text_knows_nothing_of_it(llava: VLM) -> None:
    """Zeroed after the softmax it still does: the image has drawn attention from the text, more or less of it."""
    one, other = (llava.encode([random_image(seed)], ["<image> is there a dog ?"]) for seed in (0, 1))
    n_layers = llava.anatomy.n_layers
    before, after = LayerDrop(n_layers), LayerDrop(n_layers, "post_softmax")
    close(under(llava, one, before)[-1], under(llava, other, before)[-1], 1e-6)
    for methods in ((), (after,)):
        assert (under(llava, one, *methods)[-1] - under(llava, other, *methods)[-1]).abs().max() > 1e-3


def test_which_layers_are_dropped(organism: VLM) -> None:
    assert LayerDrop().chosen(organism.anatomy) == (3, 4, 5)
    assert LayerDrop(0).chosen(organism.anatomy) == ()
    assert LayerDrop(2).chosen(organism.anatomy) == (4, 5)
    assert LayerDrop(2, select="first").chosen(organism.anatomy) == (0, 1)
    drawn = {LayerDrop(2, select="random", seed=seed).chosen(organism.anatomy) for seed in range(20)}
    assert all(len(set(one)) == 2 for one in drawn)
    assert len(drawn) > 5  # 15 pairs are possible
    for seed in range(20):
        five = LayerDrop(5, select="random", seed=seed).chosen(organism.anatomy)
        assert len(set(five)) == 5
        assert five != (1, 2, 3, 4, 5)
    assert LayerDrop(6, select="random").chosen(organism.anatomy) == (0, 1, 2, 3, 4, 5)


def silenced(batch: Batch, heads: torch.Tensor, cut: bool) -> tuple[Any, torch.Tensor]:
    """What inactive heads, bool [batch, head], are by hand: a rule for weights, and a bias of scores."""
    image = batch.image_mask
    from_text = (batch.text_mask[:, None, :, None] & image[:, None, None, :]) & heads[:, :, None, None]
    at_image = (image[:, None, :, None] & heads[:, :, None, None]).expand(-1, -1, -1, batch.length)
    hidden = at_image if cut else from_text | at_image
    return lambda weights, *_: weights.masked_fill(hidden, 0), torch.zeros(from_text.shape).masked_fill(
        from_text, -torch.inf
    )


@pytest.mark.parametrize(("family", "implementation"), CASES)
@pytest.mark.parametrize("stage", ["pre_softmax", "post_softmax"])
def test_fixed_inactive_heads_equal_the_same_by_hand(family: str, implementation: str, stage: Any) -> None:
    vlm = built(family, implementation)
    batch = encode(vlm, pictures_of(vlm))
    rules, biases = [], {}
    for layer, chosen in ((0, [1]), (2, [0, 3])):
        heads = torch.zeros(batch.size, vlm.anatomy.n_heads, dtype=torch.bool)
        heads[:, chosen] = True
        rule, bias = silenced(batch, heads, stage == "pre_softmax")
        rules.append((layer, rule, None))
        if stage == "pre_softmax":
            biases[layer] = bias
    found = under(vlm, batch, InactiveHeads(stage=stage, heads=[(0, 1), (2, 0), (2, 3)]))
    close(found, outputs(by_hand(vlm, rules, biases), batch).logits[batch.real_mask])  # type: ignore[arg-type]
    assert (found - vlm.forward(batch).logits[batch.real_mask]).abs().max() > 1e-3


def test_inactive_heads_are_those_of_hugging_faces_own_attention(llava: VLM) -> None:
    """The least of all heads is the one inactive just above its ratio; each item has its own; an answer changes none."""
    batch = encode(llava, pictures_of(llava)[:2])
    ratios = torch.zeros(2, 3, 4)
    attentions = Eager(llava, batch).attentions
    for row in range(2):
        after, image, text = (mask[row] for mask in (batch.text_after_image_mask, batch.image_mask, batch.text_mask))
        for layer in range(3):
            rows = attentions[layer][row][:, after]
            ratios[row, layer] = rows[:, :, image].sum(2).mean(1) / rows[:, :, text].sum(2).mean(1)
    least = ratios.flatten().sort().values
    one = InactiveHeads(float(least[0] + least[1]) / 2, kept_layers=0)
    under(llava, batch, one)
    assert one.inactive_ is not None
    assert torch.equal(one.inactive_, ratios <= one.theta)
    assert int(one.inactive_.sum()) == 1
    many = InactiveHeads(float(ratios[:, 2, 0].mean()))  # between the two items
    under(llava, batch, many)
    wanted = ratios <= many.theta
    wanted[:, :2] = False
    assert many.inactive_ is not None
    assert torch.equal(many.inactive_, wanted)
    assert not torch.equal(wanted[0], wanted[1])
    found = many.inactive_
    under(llava, batch.with_continuation([[6, 7], [8]]), many)
    assert torch.equal(many.inactive_, found)


def test_random_inactive_heads_are_as_many_and_others_where_there_are(llava: VLM) -> None:
    batch = encode(llava, pictures_of(llava)[:2])
    mine, drawn = (InactiveHeads(1.0, kept_layers=0, select=which) for which in ("inactive", "random"))  # type: ignore[arg-type]
    under(llava, batch, mine)
    under(llava, batch, drawn)
    assert mine.inactive_ is not None
    assert drawn.inactive_ is not None
    counts = mine.inactive_.sum(dim=2)
    assert torch.equal(counts, drawn.inactive_.sum(dim=2))
    assert torch.equal((mine.inactive_ & drawn.inactive_).sum(dim=2), (2 * counts - 4).clamp(min=0))
    assert {1, 2, 3} & set(counts.flatten().tolist())  # in some layer there is something to draw


def test_inactive_heads_need_text_after_the_image(llava: VLM) -> None:
    batch = llava.encode([random_image(0)] * 2, ["<image> what ?", "what <image>"], ids=["first", "second"], chat=False)
    with llava.apply(InactiveHeads()), pytest.raises(InputError, match="text after the image; item 'second' has none"):
        llava.forward(batch)
    with llava.apply(InactiveHeads(heads=[(0, 1)])):
        llava.forward(batch)


# sinks


def moved_by_hand(
    weights: torch.Tensor, sink: torch.Tensor, image: torch.Tensor, p: float, rho: float, least: float, which: str
) -> torch.Tensor:
    """One row of one head [key], number by number."""
    values, sinks, images = weights.tolist(), sink.tolist(), image.tolist()
    seen = sum(value for value, one in zip(values, images, strict=True) if one)
    useful = sum(value for value, one, bad in zip(values, images, sinks, strict=True) if one and not bad)
    if seen < least or useful < rho * seen or useful == 0:
        return weights
    sources = [bad and (one or which == "all") for one, bad in zip(images, sinks, strict=True)]
    budget = p * sum(value for value, taken in zip(values, sources, strict=True) if taken)
    new = []
    for value, one, bad, taken in zip(values, images, sinks, sources, strict=True):
        value = value * (1 - p) if taken else value
        new.append(value + budget * value / useful if one and not bad else value)
    return torch.tensor(new, dtype=weights.dtype)


@pytest.mark.parametrize("which", ["all", "image"])
def test_weights_move_as_by_hand(which: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 5, 6, 12, generator=generator, dtype=torch.float64).mul(2).softmax(dim=-1)
    image = torch.zeros(2, 12, dtype=torch.bool)
    image[0, 3:9] = image[1, 1:6] = True
    sink = torch.rand(2, 12, generator=generator) < 0.3
    sink[:, 0] = True
    sink[0, 4] = sink[1, 2] = True
    source = sink if which == "all" else sink & image
    found = moved(
        weights,
        source[:, None, None],
        (image & ~sink)[:, None, None],
        image[:, None, None],
        p=0.6,
        rho=0.6,
        image_mass=0.35,
    )
    changed = 0
    for row in range(2):
        for head in range(5):
            for query in range(6):
                one = weights[row, head, query]
                wanted = moved_by_hand(one, sink[row], image[row], 0.6, 0.6, 0.35, which)
                torch.testing.assert_close(found[row, head, query], wanted)
                changed += int(not torch.equal(wanted, one))
    assert 10 < changed < 50  # of 60 rows, some take part and some do not
    torch.testing.assert_close(found.sum(dim=-1), weights.sum(dim=-1))


def planted(batch: Batch, tokens: list[int], dim: int = 5) -> Edits:
    """A massive activation at some image tokens of every item, and at the first token of the prompt."""

    def plant(values: torch.Tensor, calls: Calls) -> torch.Tensor:
        if not calls.is_prefill:
            return values
        changed = values.clone()
        for row in range(batch.size):
            places = batch.image_mask[row].nonzero()[tokens, 0]
            changed[row, places, dim] = 60.0
            changed[row, int(batch.real_mask[row].nonzero()[0, 0]), dim] = -60.0
        return changed

    return Edits([Edit("resid_pre", 0, plant)])


@pytest.mark.parametrize("which", ["all", "image"])
def test_planted_sinks_are_found_and_their_attention_is_moved(which: Any, llava: VLM) -> None:
    """Against the weights without the method: the layer that it changes first has the same input with and without it."""
    batch = llava.encode(
        [random_image(0), random_image(1)], ["<image> what ?", "<image> is there a dog in the image ?"]
    )
    plant = planted(batch, [2, 7])
    method = SinkRedistribution(0.6, 5.0, 0.5, 0.1, layers=[1, 2], sinks=which, sink_dims=[5])
    plain, found = weights_under(llava, batch, plant), weights_under(llava, batch, plant, method)
    changed = 0
    for row in range(batch.size):
        expected = torch.zeros(batch.length, dtype=torch.bool)
        expected[batch.image_mask[row].nonzero()[[2, 7], 0]] = True
        expected[int(batch.real_mask[row].nonzero()[0, 0])] = True
        for layer in (1, 2):
            assert torch.equal(method.sinks_[layer][row] & batch.real_mask[row], expected)
        assert torch.equal(found[0], plain[0])
        for head in range(4):
            assert torch.equal(found[1][row, head, :-1], plain[1][row, head, :-1])
            wanted = moved_by_hand(plain[1][row, head, -1], expected, batch.image_mask[row], 0.6, 0.5, 0.1, which)
            close(found[1][row, head, -1], wanted)
            changed += int((wanted - plain[1][row, head, -1]).abs().max() > 1e-3)
    assert changed >= 2


def test_sink_dimensions_are_found_where_the_first_token_is_massive(build_llava: Any) -> None:
    vlm = build_llava()
    batch = encode(vlm, pictures_of(vlm))
    first = int(batch.input_ids[0][batch.real_mask[0]][0])
    with torch.no_grad():
        vlm.model.get_input_embeddings().weight[first, [9, 20]] = torch.tensor([80.0, -70.0])
    method = SinkRedistribution(0.5, tau=3.0, layers=[0, 1, 2])
    under(vlm, batch, method)
    assert method.dims_ is not None
    assert [sorted(one) for one in method.dims_.tolist()] == [[9, 20]] * batch.size
    for row, n in enumerate(batch.lengths):
        assert method.sinks_[0][row, batch.length - n]


@pytest.mark.parametrize("rows", ["predicting", "text_after_image"])
def test_which_rows_lose_their_sinks(rows: Any, llava: VLM) -> None:
    batch = encode(llava, pictures_of(llava)[:2]).with_continuation([[6, 7], [8]])
    plant = planted(batch, [2])
    method = SinkRedistribution(1.0, 5.0, 0.0, 0.0, layers=[0], sink_dims=[5], rows=rows)
    plain, found = weights_under(llava, batch, plant)[0], weights_under(llava, batch, plant, method)[0]
    differs = (found - plain).abs().amax(dim=(1, 3)) > 1e-6
    places = torch.arange(batch.length)
    predicting = batch.generated_mask | (places == batch.last_prompt_position[:, None])
    assert torch.equal(differs, predicting if rows == "predicting" else batch.text_after_image_mask)


def test_the_random_control_takes_as_much_from_as_many_that_are_no_sinks(llava: VLM) -> None:
    batch = llava.encode(
        [random_image(0), random_image(1)], ["<image> what ?", "<image> is there a dog in the image ?"]
    )
    method = SinkRedistribution(0.05, 5.0, 0.5, 0.1, layers=[0], sinks="image", sink_dims=[5])
    plant = planted(batch, [2, 7])
    plain = weights_under(llava, batch, plant)[0][:, :, -1]
    mine = weights_under(llava, batch, plant, method)[0][:, :, -1]
    drawn = weights_under(llava, batch, plant, method.controls()["random"])[0][:, :, -1]
    for row in range(batch.size):
        for head in range(4):
            lost = [(plain - one)[row, head].clamp(min=0) for one in (mine, drawn)]
            assert [int((one > 1e-7).sum()) for one in lost] in ([2, 2], [0, 0])
            close(lost[1].sum(), lost[0].sum(), 1e-6)
            assert not ((lost[0] > 1e-7) & (lost[1] > 1e-7)).any()
    assert (plain - drawn).abs().max() > 1e-3


def test_a_random_source_gives_what_it_has() -> None:
    """It holds 0.1 where 0.3 is asked for."""
    weights = torch.tensor([0.5, 0.3, 0.1, 0.1]).view(1, 1, 1, 4)
    sink, image, other = (torch.tensor(one).view(1, 1, 1, 4) for one in ([1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]))
    found = moved(weights, sink.bool(), image.bool(), image.bool(), 0.6, 0.8, 0.2, other.bool())
    torch.testing.assert_close(found.flatten(), torch.tensor([0.5, 0.375, 0.0, 0.125]))


# focus


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_what_is_out_of_focus_is_cut(family: str, implementation: str) -> None:
    """F by Hugging Face's own attention, term by term; answers take the choice of the prompt's last token."""
    vlm = built(family, implementation)
    prompt = encode(vlm, pictures_of(vlm))
    attentions = [one.mean(dim=1) for one in Eager(vlm, prompt).attentions]
    batch = prompt.with_continuation([[6, 7], [8], [9, 10]])
    biases = {}
    for layer in (0, 2):
        cut = torch.zeros(batch.size, 1, batch.length, batch.length)
        for row in range(batch.size):
            texts = prompt.text_after_image_mask[row].nonzero()[:, 0].tolist()
            images = prompt.image_mask[row].nonzero()[:, 0].tolist()
            shift = batch.length - batch.n_generated[row] - prompt.length
            for text in texts:
                one = attentions[layer][row]
                scores = [sum(float(one[text, via] * one[via, image]) for via in texts) for image in images]
                low = sorted(images, key=lambda image: scores[images.index(image)])[: math.floor(0.6 * len(images))]
                rows = [text + shift]
                if text == texts[-1]:
                    rows += range(batch.length - batch.n_generated[row], batch.length)
                for query in rows:
                    cut[row, 0, query, [image + shift for image in low]] = -torch.inf
        biases[layer] = cut
    found = under(vlm, batch, FocusCut(0.6, layers=[0, 2]))
    close(found, logits_with_mask(vlm, batch, biases)[batch.real_mask])
    assert (found - vlm.forward(batch).logits[batch.real_mask]).abs().max() > 1e-3


def test_random_cuts_are_as_many_in_every_row_and_all_is_all(llava: VLM) -> None:
    batch = encode(llava, pictures_of(llava))
    mine, drawn, whole = (
        weights_under(llava, batch, one)[1][:, 0] > 0
        for one in (FocusCut(0.5), FocusCut(0.5, select="random"), FocusCut(1.0))
    )
    image, after = batch.image_mask, batch.text_after_image_mask
    pairs = after[:, :, None] & image[:, None]
    assert torch.equal((mine & pairs).sum(dim=2), (drawn & pairs).sum(dim=2))
    assert (mine != drawn)[pairs].any()
    counts = image.sum(dim=1, keepdim=True)
    assert torch.equal((mine & pairs).sum(dim=2), torch.where(after, counts - counts // 2, 0))
    assert not whole[pairs].any()
    assert torch.equal(mine & ~pairs, drawn & ~pairs)


def test_the_lowest_are_a_share_rounded_down() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0, 4.0, 9.0, 5.0, 6.0, 8.0, 7.0]])
    assert lowest(scores, 0.7).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert lowest(scores, 0.19).nonzero()[:, 1].tolist() == [3]
    assert not lowest(scores, 0.09).any()
    assert lowest(scores, 1.0).all()
    assert lowest(torch.ones(1, 4), 0.5).nonzero()[:, 1].tolist() == [0, 1]  # of equal ones, the first


# in other families, step by step


@pytest.mark.parametrize(
    "method",
    [
        ImageAttentionMask(window=3, direction="both"),
        ImageAttentionMask("mutual"),
        LayerDrop(2),
        LayerDrop(2, "post_softmax"),
        InactiveHeads(1.0, kept_layers=1),
        InactiveHeads(1.0, "pre_softmax", kept_layers=1),
        SinkRedistribution(0.9, tau=1.5, rho=0.3, image_mass=0.0, layers=[0, 1, 2]),
        FocusCut(0.7),
    ],
    ids=lambda method: f"{method.name} {getattr(method, 'stage', getattr(method, 'pattern', ''))}",
)
@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "llava_next"])
def test_decoding_equals_recomputation_and_many_rows_equal_one(method: Any, family: str) -> None:
    """Behind Gemma 3's sliding window (8), the keys of a step are the last ones only. Items with several images, and with none
    unless the method needs one.
    """
    vlm = BUILDERS[family]()
    pictures = pictures_of(vlm)[: 2 if method.name == "InactiveHeads" else 3]
    batch = encode(vlm, pictures)
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": []}
    with vlm.apply(method):
        with vlm.trace(sites.logits(), sites.attention("generated", "all")) as steps:
            generation = vlm.generate(batch, **options)
        with vlm.trace(sites.logits("before_generated"), sites.attention("generated", "all")) as once:
            vlm.forward(generation.teacher_forced())
        close(steps["logits"][0], once["logits"][0])
        for layer in range(vlm.anatomy.n_layers):
            decoded = steps["attention"][layer]  # the last token is never fed back
            close(decoded, once["attention"][layer][..., : decoded.shape[-2], : decoded.shape[-1]])
        for row in range(batch.size):
            alone = vlm.generate(encode(vlm, pictures, [row]), **options)
            assert alone.tokens[0] == generation.tokens[row]


# items without an image, what does not fit, and YAML


@pytest.mark.parametrize(
    "method",
    [
        ImageAttentionMask(window=1),
        ImageAttentionMask("mutual"),
        LayerDrop(2, "post_softmax"),
        InactiveHeads(heads=[(0, 1)]),
        SinkRedistribution(0.9, tau=1.5, rho=0.3, image_mass=0.1, layers=[0, 1, 2]),
        FocusCut(),
    ],
    ids=lambda method: method.describe()[:40],
)
def test_items_without_an_image_are_left_as_they_are(method: Intervention, llava: VLM) -> None:
    batch = llava.encode([[]], ["is there a dog ?"], chat=False)
    close(under(llava, batch, method), llava.forward(batch).logits[batch.real_mask])
    mixed = encode(llava, pictures_of(llava))
    plain = llava.forward(mixed).logits
    with llava.apply(method):
        found = llava.forward(mixed).logits
    close(found[2][mixed.real_mask[2]], plain[2][mixed.real_mask[2]])
    assert (found[0] - plain[0])[mixed.real_mask[0]].abs().max() > 1e-4


def refusals() -> list[tuple[Intervention, type[Exception], str]]:
    wrong: Any = "either"
    half: Any = 1.5
    return [
        (ImageAttentionMask(wrong), UnknownNameError, "ImageAttentionMask pattern 'either'"),
        (ImageAttentionMask(direction=wrong), UnknownNameError, "direction 'either'"),
        (ImageAttentionMask(select=wrong), UnknownNameError, "select 'either'"),
        (ImageAttentionMask(window=4), InputError, "window must be an odd whole number from 1, found 4"),
        (ImageAttentionMask(window=-1), InputError, "found -1"),
        (ImageAttentionMask(layers=[3]), InputError, "layer 3 is not one of 0 to 2"),
        (ImageAttentionMask(layers=[1, 1]), InputError, "name one twice"),
        (LayerDrop(4), InputError, "last must be a number of layers from 0 to 3, found 4"),
        (LayerDrop(half), InputError, "found 1.5"),
        (LayerDrop(stage=wrong), UnknownNameError, "LayerDrop stage 'either'"),
        (LayerDrop(select=wrong), UnknownNameError, "LayerDrop select 'either'"),
        (InactiveHeads(-0.1), InputError, "theta must be a finite number from 0, found -0.1"),
        (InactiveHeads(math.inf), InputError, "found inf"),
        (InactiveHeads(stage=wrong), UnknownNameError, "InactiveHeads stage 'either'"),
        (InactiveHeads(select=wrong), UnknownNameError, "InactiveHeads select 'either'"),
        (InactiveHeads(kept_layers=-1), InputError, "kept_layers must be a number of layers from 0, found -1"),
        (InactiveHeads(heads=[(0, 4)]), InputError, "head 4 is not one of 0 to 3"),
        (InactiveHeads(heads=[(3, 0)]), InputError, "layer 3 is not one of 0 to 2"),
        (SinkRedistribution(1.1, 2.0), InputError, "p must be from 0 to 1, found 1.1"),
        (SinkRedistribution(tau=2.0, rho=-1), InputError, "rho must be from 0 to 1, found -1"),
        (SinkRedistribution(tau=2.0, image_mass=2), InputError, "image_mass must be from 0 to 1, found 2"),
        (SinkRedistribution(), InputError, r"less than sqrt\(d_model\) = 5.66, which phi cannot pass.*found 20"),
        (SinkRedistribution(tau=2.0), InputError, "a model of 3 layers has none between.*give layers"),
        (SinkRedistribution(tau=2.0, layers=[3]), InputError, "layer 3 is not one of 0 to 2"),
        (SinkRedistribution(tau=2.0, sinks=wrong), UnknownNameError, "sinks 'either'"),
        (SinkRedistribution(tau=2.0, rows=wrong), UnknownNameError, "rows 'either'"),
        (SinkRedistribution(tau=2.0, select=wrong), UnknownNameError, "select 'either'"),
        (SinkRedistribution(tau=2.0, sink_dims=[]), InputError, "sink_dims names no dimension"),
        (SinkRedistribution(tau=2.0, sink_dims=[32]), InputError, "sink dimension 32 is not one of 0 to 31"),
        (SinkRedistribution(tau=2.0, n_sink_dims=0), InputError, "n_sink_dims must be from 1 to 32, found 0"),
        (FocusCut(1.1), InputError, "quantile must be from 0 to 1, found 1.1"),
        (FocusCut(select=wrong), UnknownNameError, "FocusCut select 'either'"),
        (FocusCut(layers=[-1]), InputError, "layer -1 is not one of 0 to 2"),
    ]


def test_what_does_not_fit_the_model_is_refused_with_what_was_found(llava: VLM) -> None:
    for method, error, match in refusals():
        with pytest.raises(error, match=match):
            method.check(llava.anatomy)


def test_models_without_image_tokens_among_their_positions_are_refused() -> None:
    mllama = BUILDERS["mllama"]()
    for method in (
        ImageAttentionMask(layers=[0]),
        LayerDrop(1),
        InactiveHeads(heads=[(0, 0)]),
        SinkRedistribution(tau=1.0, layers=[0]),
        FocusCut(layers=[0]),
    ):
        with pytest.raises(UnsupportedError, match="reads the image by cross-attention"):
            method.check(mllama.anatomy)


@pytest.mark.parametrize(
    "method",
    [
        ImageAttentionMask("neighbour", 3, "both", [0, 1], "random", 2),
        LayerDrop(1, "post_softmax", "random", 3),
        InactiveHeads(1.0, "pre_softmax", 1, [(0, 1), (2, 3)], "random", 4),
        SinkRedistribution(0.5, 2.0, 0.5, 0.1, [1], "image", [3, 4], 1, "text_after_image", "random", 5),
        FocusCut(0.3, [0, 2], "random", 6),
    ],
    ids=lambda method: method.name,
)
def test_plain_values_as_in_a_yaml_file_make_the_same(method: Intervention, llava: VLM) -> None:
    ((name, values),) = describe(method).items()
    again = build("intervention", name, type(method), values)
    batch = encode(llava, [[random_image(0)], [random_image(1)]])
    assert torch.equal(under(llava, batch, again), under(llava, batch, method))
    assert describe(again) == {name: values}


def test_descriptions_tell_a_method_from_its_controls() -> None:
    for method in (
        ImageAttentionMask(),
        ImageAttentionMask("mutual"),
        LayerDrop(),
        InactiveHeads(),
        SinkRedistribution(),
        FocusCut(),
    ):
        words = [one.describe() for one in (method, *method.controls().values())]
        assert len(set(words)) == len(words)
    assert LayerDrop(1).describe() == "attention to image tokens cut before the softmax, in the last 1 layer"
    assert "zeroed after the softmax" in LayerDrop(stage="post_softmax").describe()
    assert "cut before the softmax" in InactiveHeads(stage="pre_softmax").describe()
    assert SinkRedistribution().describe() == (
        "60% of the attention on sinks (phi from 20) moved to other image tokens after the softmax, where a next token is "
        "predicted, in the third layer to the last but one"
    )
    assert FocusCut(0.25, [1]).describe() == (
        "attention of text after the image to the 25% of image tokens with the lowest focus score cut, in layers 1"
    )
