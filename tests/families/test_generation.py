"""What holds for every family when it generates: each step is that of one forward pass over all that was generated."""

from __future__ import annotations

import pytest
import torch
from contract import close, encode
from edits import Edits

from slitlamp.tracing import Edit, sites

STEPS = 5


@pytest.fixture(scope="session")
def run(setting):
    """A generation in which one row stops early, traced, and the forward pass over all of it."""
    vlm = setting.vlm
    batch = encode(vlm, setting.pictures)
    free = vlm.generate(batch, max_new_tokens=STEPS)
    first, second = free.tokens[:2]
    ends = [token for token in second[1:4] if token not in second[:1] and token not in first[:3]]
    wanted = (
        sites.resid_post(),
        sites.z(),
        sites.attention(queries="all", keys="all"),
        sites.logits(positions="last"),
        sites.vision_resid_post(),
        sites.projector_out(),
    )
    with vlm.trace(*wanted) as trace:
        generation = vlm.generate(batch, max_new_tokens=STEPS, eos_token_id=ends[:1] or list(vlm.end_tokens))
    forced = generation.teacher_forced()
    with vlm.trace(*wanted[:3], *wanted[4:]) as whole:
        logits = vlm.forward(forced).logits
    return free, generation, trace, forced, whole, logits


def fed_back(generation, row):
    """How many tokens of a row were given back to the model while it counted: not its end token, nor the last of all."""
    n = len(generation.tokens[row])
    return n - 1 if generation.stopped[row] else min(n, STEPS - 1)


def test_states_step_by_step_are_those_of_one_forward_pass(setting, run):
    vlm = setting.vlm
    _, generation, trace, _, whole, _ = run
    prompts = generation.batch.lengths
    for layer in range(vlm.anatomy.n_layers):
        for row, prompt in enumerate(prompts):
            n_fed = fed_back(generation, row)
            for label in ("resid_post", "z"):
                record = trace[label]
                kept = record[layer][row][record.mask[row]]
                assert len(kept) == prompt + n_fed
                close(kept, whole[label][layer][row, : prompt + n_fed])
    for layer in vlm.anatomy.layers("attention"):
        for step in range(1, len(trace.steps)):
            for row, prompt in enumerate(prompts):
                if step > fed_back(generation, row):
                    continue
                found = trace.steps[step]["attention"][layer][row, :, 0, : prompt + step]
                close(found, whole["attention"][layer][row, :, prompt + step - 1, : prompt + step])
    # the image is looked at once, before the first token
    for layer in range(vlm.anatomy.n_vision_layers):
        close(trace["vision_resid_post"][layer], whole["vision_resid_post"][layer])
    close(trace["projector_out"][0], whole["projector_out"][0])
    assert all("vision_resid_post" not in step for step in trace.steps[1:])


def test_tokens_are_the_largest_logits_of_one_forward_pass(setting, run):
    vlm = setting.vlm
    _, generation, trace, forced, _, logits = run
    suppressed = generation_config(vlm).suppress_tokens
    for row, tokens in enumerate(generation.tokens):
        first = forced.length - len(tokens) - 1
        own = logits[row, first : first + len(tokens)].clone()
        for step, one in enumerate(own):
            close(trace.steps[step]["logits"][0][row, 0], one)
        own[:, suppressed] = -torch.inf
        assert own.argmax(dim=-1).tolist() == list(tokens)


def generation_config(vlm):
    """That of the module whose `generate` makes the tokens."""
    return vlm.model.get_submodule(getattr(vlm.anatomy.family, "generator", "")).generation_config


def test_some_generation_is_longer_than_one_token(run):
    assert max(len(tokens) for tokens in run[1].tokens) > 2
    assert min(len(tokens) for tokens in run[1].tokens) >= 1


def test_a_batch_of_one_equals_a_batch_of_many(setting, run):
    vlm = setting.vlm
    free = run[0]
    for row, own in enumerate(setting.pictures):
        one = vlm.generate(encode(vlm, setting.pictures, rows=[row]), max_new_tokens=STEPS)
        assert one.tokens == (free.tokens[row],)
        assert len(one.batch.images[0]) == len(own)


def test_a_row_alone_has_the_states_that_it_has_in_a_batch(setting):
    """Longer rows, rows with more images and rows without one beside it change nothing."""
    vlm = setting.vlm
    many = setting.trace
    prompts = setting.batch.prompt_lengths
    wanted = (sites.resid_post(), sites.q(), sites.mlp_post(), sites.attention(queries="all", keys="all"))
    for row in range(setting.batch.size):
        batch = encode(vlm, setting.pictures, rows=[row])
        assert batch.length == prompts[row]
        with vlm.trace(*wanted) as one:
            vlm.forward(batch)
        for label in ("resid_post", "q", "mlp_post"):
            for layer in vlm.anatomy.layers(label):
                close(many[label][layer][row, : batch.length], one[label][layer][0])
        for layer in vlm.anatomy.layers("attention"):
            close(many["attention"][layer][row, :, : batch.length, : batch.length], one["attention"][layer][0], 4e-5)


def test_an_edit_that_changes_nothing_changes_no_token(setting, run):
    vlm = setting.vlm
    names = ("resid_pre", "resid_post", "z", "mlp_out", "projector_out", "vision_resid_post")
    same = [
        Edit(name, vlm.anatomy.layers(name)[-1], lambda values, calls: values * 1.0)
        for name in names
        if vlm.anatomy.place(name, vlm.anatomy.layers(name)[-1]).gate is None
    ]
    assert len(same) >= 5
    with vlm.apply(Edits(same)):
        generation = vlm.generate(run[0].batch, max_new_tokens=STEPS)
    assert generation.tokens == run[0].tokens


@pytest.mark.parametrize("site", ["resid_post", "z", "mlp_out", "attn_out", "q", "mlp_post"])
def test_an_edit_reaches_what_follows_and_nothing_before(site, setting):
    vlm, plain = setting.vlm, setting.trace
    ungated = (one for one in vlm.anatomy.layers(site) if vlm.anatomy.place(site, one).gate is None)
    layer = next(one for one in ungated if one > 0)
    generator = torch.Generator().manual_seed(0)

    def shift(values, calls):
        return values + torch.randn(values.shape[-1], generator=generator.manual_seed(0))

    with (
        vlm.apply(Edits([Edit(site, layer, shift)])),
        vlm.trace(sites.resid_pre(), sites.resid_post(), getattr(sites, site)(label="edited")) as trace,
    ):
        logits = vlm.forward(setting.batch).logits
    mask = trace.mask("resid_pre")
    assert torch.equal(trace["resid_pre"][layer][mask], plain["resid_pre"][layer][mask])
    moved = trace["edited"][layer][mask] - plain[site][layer][mask]
    close(moved, shift(torch.zeros_like(moved), None).expand_as(moved), 1e-4)
    for later in range(layer, vlm.anatomy.n_layers):
        assert (trace["resid_post"][later][mask] - plain["resid_post"][later][mask]).abs().max() > 1e-3
    real = setting.batch.real_mask
    assert (logits - setting.logits)[real].abs().max() > 1e-3
    if site == "resid_post" and layer + 1 < vlm.anatomy.n_layers and layer not in vlm.anatomy.deepstack_layers:
        assert torch.equal(trace["resid_pre"][layer + 1][mask], trace["edited"][layer][mask])
