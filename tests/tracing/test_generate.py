"""What a trace of `generate` holds, step by step, compared with one full eager forward pass over what was generated.

Tolerance 1e-5 of the largest value, as for `forward`: the two differ in the order of float32 sums alone.
"""

import copy
from pathlib import Path

import pytest
import torch

from slitlamp.errors import InputError
from slitlamp.experiments import load_dataset
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

STEPS = 6


def close(found, wanted):
    scale = max([1.0, *wanted.abs().flatten().tolist()])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * scale)


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def run(request, image):
    """A traced generation in which one row stops early, and the eager pass over all of it."""
    vlm = request.getfixturevalue(request.param)
    batch = vlm.encode(
        [[image(0), image(1, 30, 9)], image(2), None],
        ["is <image> in the <image> ?", "<image> describe this .", "what is a dog ?"],
    )
    free = vlm.generate(batch, max_new_tokens=STEPS)
    end = next(token for token in free.tokens[1][1:4] if token not in free.tokens[1][:1])
    with vlm.trace(
        sites.resid_post(positions="all"),
        sites.resid_post(positions="last", label="last"),
        sites.resid_post(positions="before_generated", label="before"),
        sites.resid_post(positions="generated", label="generated"),
        sites.resid_post(positions="text_after_image", label="after"),
        sites.resid_post(positions="image", label="image"),
        sites.resid_post(positions="text", reduce="mean", label="mean"),
        sites.z(positions="last"),
        sites.attention(queries="last", keys="image"),
        sites.attention(queries="all", keys="all", label="all keys"),
        sites.attention(queries="last", keys="last", label="itself"),
        sites.attention(queries="last", keys="before_generated", label="to before"),
        sites.attention(queries="last", keys="image", reduce_queries="mean", reduce_keys="sum", label="mass"),
        sites.vision_resid_post(),
    ) as trace:
        generation = vlm.generate(batch, max_new_tokens=STEPS, eos_token_id=end)
    forced = generation.teacher_forced()
    eager = copy.deepcopy(vlm.model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = eager(**forced.inputs(), output_hidden_states=True, output_attentions=True)
    return vlm, generation, trace, forced, wanted


def fed_back(generation, row):
    """How many tokens of a row were given back to the model while it counted: not its end token, nor the last of all."""
    n = len(generation.tokens[row])
    return n - 1 if generation.stopped[row] else min(n, STEPS - 1)


def test_rows_stop_at_different_places(run):
    _, generation, trace, _, _ = run
    counts = [len(tokens) for tokens in generation.tokens]
    assert generation.stopped[1]
    assert counts[1] < max(counts)
    assert len(trace.steps) == max(counts)


def test_every_step_equals_the_full_pass(run):
    vlm, generation, trace, forced, wanted = run
    for step in range(1, len(trace.steps)):
        for row in range(3):
            alive = step <= fed_back(generation, row)
            values = trace.steps[step]
            assert values.masks["last"][row].tolist() == [alive]
            place = forced.length - len(generation.tokens[row]) + step - 1
            for layer in range(vlm.anatomy.n_layers - 1):
                found = values["last"][layer][row]
                if not alive:
                    assert not found.any()
                    continue
                close(found[0], wanted.hidden_states[layer + 1][row, place])
                projection = vlm.model.get_submodule(vlm.anatomy.out_proj(layer))
                mixed = projection(values["z"][layer][row].flatten(1)).detach()
                mlp = vlm.model.get_submodule(vlm.anatomy.mlp(layer))
                norm = vlm.model.get_submodule(vlm.anatomy.blocks[layer]).post_attention_layernorm
                middle = wanted.hidden_states[layer][row, place] + mixed[0]
                with torch.no_grad():
                    close(middle + mlp(norm(middle)), wanted.hidden_states[layer + 1][row, place])
                attention = wanted.attentions[layer][row, :, place]
                image = forced.image_mask[row]
                n = int(image.sum())
                close(values["attention"][layer][row, :, 0, :n], attention[:, image])
                close(values["mass"][layer][row], attention[:, image].sum(dim=-1)) if n else None
                first = forced.length - forced.lengths[row]
                close(values["all keys"][layer][row, :, 0, : place + 1 - first], attention[:, first : place + 1])
                close(values["itself"][layer][row, :, 0, 0], attention[:, place])
                start = place - step
                close(values["to before"][layer][row, :, 0, : step + 1], attention[:, start : place + 1])


def test_joined_steps_equal_the_full_pass(run):
    """`trace[...]` puts the prompt's positions and those of the tokens fed back in one tensor with one mask."""
    _, generation, trace, forced, wanted = run
    names = {
        "resid_post": lambda row: forced.real_mask[row],
        "after": lambda row: forced.text_after_image_mask[row],
        "image": lambda row: forced.image_mask[row],
        "generated": lambda row: forced.generated_mask[row],
        "before": lambda row: forced.before_generated_mask[row],
    }
    for label, mask in names.items():
        for row in range(3):
            found = trace[label][1][row][trace.mask(label)[row]]
            places = mask(row).nonzero().flatten().tolist()
            left_out = len(generation.tokens[row]) - fed_back(generation, row)  # generated but never fed back
            if label not in ("image", "before"):
                places = [place for place in places if place < forced.length - left_out]
            close(found, wanted.hidden_states[2][row, places])


def test_the_states_before_generated_tokens_predict_them(run):
    vlm, generation, trace, _, _ = run
    norm = vlm.model.get_submodule(vlm.anatomy.modules["final_norm"])
    last = vlm.anatomy.n_layers - 1
    suppressed = [0, 1, 4]
    for row, tokens in enumerate(generation.tokens):
        states = trace["before"][last][row][trace.mask("before")[row]]
        with torch.no_grad():
            logits = vlm.model.lm_head(norm(states))
        logits[:, suppressed] = -torch.inf
        assert logits.argmax(dim=-1).tolist() == list(tokens)


def test_reduced_recordings_are_stacked_by_step(run):
    _, _, trace, _, _ = run
    n_steps = len(trace.steps)
    assert trace["mean"].axes == ("batch", "step", "d_model")
    assert trace["mean"][0].shape == (3, n_steps, 32)
    assert trace["mean"].mask.shape == (3, n_steps)
    assert trace["mass"].axes == ("batch", "step", "head")
    assert trace["mass"][0].shape == (3, n_steps, 4)
    assert trace["mass"].mask.shape == (3, n_steps)
    assert trace["vision_resid_post"].axes == ("tile", "position", "d_vision")  # the tower runs once


def test_one_token_has_the_axes_of_many(llava, image):
    with llava.trace(sites.resid_post(reduce="mean")) as trace:
        llava.generate(llava.encode([image(0)], ["<image> what ?"]), max_new_tokens=1)
    assert trace["resid_post"].axes == ("batch", "step", "d_model")
    assert trace["resid_post"][0].shape == (1, 1, 32)


def test_a_batch_of_one_equals_a_batch_of_many(any_vlm, image):
    pictures = [[image(0), image(1, 30, 9)], [image(2)], []]
    prompts = ["is <image> in the <image> ?", "<image> describe this .", "what is a dog ?"]
    asked = [sites.resid_post(positions="before_generated"), sites.attention(queries="before_generated", keys="image")]
    with any_vlm.trace(*asked) as many:
        together = any_vlm.generate(any_vlm.encode(pictures, prompts), max_new_tokens=4)
    for row in range(3):
        with any_vlm.trace(*asked) as one:
            alone = any_vlm.generate(any_vlm.encode([pictures[row]], [prompts[row]]), max_new_tokens=4)
        assert alone.tokens[0] == together.tokens[row]
        assert alone.texts[0] == together.texts[row]
        n = len(alone.tokens[0])
        close(many["resid_post"][1][row, :n], one["resid_post"][1][0])
        if pictures[row]:
            keys = one["attention"][1].shape[-1]
            close(many["attention"][1][row, :, :n, :keys], one["attention"][1][0])


def test_two_traces_of_one_generation_hold_what_each_alone_holds(llava, image):
    """More steps than are remembered at once, sites of other layers and heads in each trace, rows with and without padding."""
    for prompts in (["<image> what ?"], ["<image> what ?", "<image> is there a dog in the image ?"]):
        batch = llava.encode([image(n) for n in range(len(prompts))], prompts)
        one = [sites.attention("all", "all", layers=[0, 2]), sites.z(layers=[1]), sites.attention(heads=[1], label="h")]
        two = [
            sites.attention("last", "text", reduce_keys="sum"),
            sites.z(),
            sites.attention(layers=[1], label="image"),
        ]
        with llava.trace(*one) as first, llava.trace(*two) as second:
            together = llava.generate(batch, max_new_tokens=40, min_new_tokens=40)
        for asked, both in ((one, first), (two, second)):
            with llava.trace(*asked) as alone:
                assert llava.generate(batch, max_new_tokens=40, min_new_tokens=40).tokens == together.tokens
            for site in asked:
                for layer, values in alone[site.label].items():
                    close(both[site.label][layer], values)
        with llava.trace(sites.attention("before_generated", "image")) as forced:
            llava.forward(together.teacher_forced())
        for layer, values in forced["attention"].items():
            close(second["image"][layer] if layer == 1 else values, values)
            close(first["h"][layer], values[:, [1]])


def test_a_map_of_attention_is_the_recording_on_the_grid(organism: VLM) -> None:
    batch = load_dataset("emoji_scenes/captions").take(3).encode(organism)
    with organism.trace(sites.attention(), sites.z(), sites.attention(reduce_heads="mean", label="mean")) as trace:
        generation = organism.generate(batch, max_new_tokens=30)
    weights = trace["attention"].stack()  # [layer, batch, head, query, key]
    longest = max(map(len, generation.tokens))
    for row, tokens in enumerate(generation.tokens):
        found = trace.attention_map(3, row, layers=[1, 4], heads=[0, 5])
        expected = weights[[1, 4], row][:, [0, 5], 3].mean(dim=(0, 1)).unflatten(-1, (8, 8))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(trace.attention_map(3, row), trace.attention_map(3, row, label="mean"))
        last = trace.attention_map(row=row)
        torch.testing.assert_close(last, weights[:, row, :, len(tokens) - 1].mean(dim=(0, 1)).unflatten(-1, (8, 8)))
        if len(tokens) < longest:
            with pytest.raises(InputError, match=f"query {len(tokens)} of row {row}: {len(tokens)} were recorded"):
                trace.attention_map(len(tokens), row)
    with pytest.raises(InputError, match="'mean' holds no single heads"):
        trace.attention_map(3, heads=[0], label="mean")
    with pytest.raises(InputError, match="a map needs attention from single queries"):
        trace.attention_map(label="z")
    with pytest.raises(InputError, match="has no grid"):
        trace.attention_map(image=1)


def test_a_trace_knows_what_was_generated_in_its_last_run(organism: VLM, tmp_path: Path) -> None:
    batch = load_dataset("emoji_scenes/captions").take(2).encode(organism)
    with organism.trace(sites.z(layers=0), store=tmp_path / "store") as trace:
        generation = organism.generate(batch, max_new_tokens=4)
        assert trace.generated == generation.tokens
        another = organism.generate(
            load_dataset("emoji_scenes/captions").take(1, skip=2).encode(organism), max_new_tokens=4
        )
        assert trace.generated == another.tokens
    with organism.trace(sites.z(layers=0)) as plain:
        organism.forward(batch)
    assert plain.generated is None
