"""The attention tap: rows by hand, rows equal to what the model's own eager attention returns, and outputs unchanged."""

import copy
import math
import re

import pytest
import torch
from contract import prompt
from tiny_models import BUILDERS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slitlamp.errors import UnsupportedError
from slitlamp.tracing import attention_rows as rows_module
from slitlamp.tracing import sites
from slitlamp.tracing.attention_rows import attention_rows
from slitlamp.tracing.attention_tap import _held, _observers, _own_eager, observed
from slitlamp.vlm import VLM

ALL = slice(None)


def rows_by_hand(mask=None, **options):
    """Two queries and keys of width 1 with scores [0, ln 3] and [0, -ln 2]: weights 1:3 and 2:1 without a mask."""
    query = torch.tensor([math.log(3), -math.log(2)]).view(1, 1, 2, 1)
    key = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    return attention_rows(query, key, mask, scaling=1.0, **options)[0, 0]


def test_two_by_two():
    wanted = torch.tensor([[1 / 4, 3 / 4], [2 / 3, 1 / 3]])
    torch.testing.assert_close(rows_by_hand(), wanted)
    torch.testing.assert_close(rows_by_hand(rows=torch.tensor([[1, 0, 1]])), wanted[[1, 0, 1]])
    torch.testing.assert_close(rows_by_hand(rows=slice(1, 2)), wanted[1:])


def test_causal():
    torch.testing.assert_close(rows_by_hand(is_causal=True), torch.tensor([[1.0, 0.0], [2 / 3, 1 / 3]]))
    torch.testing.assert_close(rows_by_hand(is_causal=True, rows=torch.tensor([[0]])), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(rows_by_hand(is_causal=True, offset=1)[0], torch.tensor([1 / 4, 3 / 4]))


def test_window():
    torch.testing.assert_close(rows_by_hand(window=1), torch.eye(2))
    torch.testing.assert_close(rows_by_hand(is_causal=True, window=1, rows=slice(1, 2)), torch.tensor([[0.0, 1.0]]))


def test_padding():
    torch.testing.assert_close(rows_by_hand(padding=torch.tensor([[False, True]])), torch.tensor([[0.0, 1.0]] * 2))


def test_a_row_that_sees_nothing_has_no_weight():
    nothing = torch.tensor([[False, False], [True, True]])[None, None]
    wanted = torch.tensor([[0.0, 0.0], [2 / 3, 1 / 3]])
    torch.testing.assert_close(rows_by_hand(nothing), wanted)
    torch.testing.assert_close(rows_by_hand(torch.where(nothing, 0.0, -torch.inf)), wanted)


def test_boolean_mask():
    mask = torch.tensor([[True, True], [False, True]])[None, None]
    torch.testing.assert_close(rows_by_hand(mask), torch.tensor([[1 / 4, 3 / 4], [0.0, 1.0]]))
    torch.testing.assert_close(rows_by_hand(mask, rows=torch.tensor([[1]])), torch.tensor([[0.0, 1.0]]))


def test_additive_mask():
    """Adding ln 2 doubles a weight before normalisation: 1:3 becomes 2:3."""
    mask = torch.tensor([[math.log(2), 0.0], [0.0, -math.inf]])[None, None]
    torch.testing.assert_close(rows_by_hand(mask), torch.tensor([[2 / 5, 3 / 5], [1.0, 0.0]]))


def test_soft_cap():
    """Score ln 3 under a cap c becomes c tanh(ln 3 / c); a cap far above the scores changes nothing."""
    capped = 2 * math.tanh(math.log(3) / 2)
    torch.testing.assert_close(rows_by_hand(softcap=2.0)[0, 1].item(), 1 / (1 + math.exp(-capped)))
    torch.testing.assert_close(rows_by_hand(softcap=1e4), rows_by_hand(), rtol=0, atol=1e-4)


def test_a_mask_longer_than_the_keys_and_one_row_for_all_queries():
    mask = torch.tensor([[False, True, True]])[None, None]
    torch.testing.assert_close(rows_by_hand(mask), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))


def test_a_mask_without_four_axes_is_refused():
    with pytest.raises(UnsupportedError, match=r"mask of shape \[2, 2\]"):
        rows_by_hand(torch.ones(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("heads", [None, [5, 0, 3]])
def test_key_heads_are_shared_by_groups_of_query_heads(heads):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 6, 5, 4, generator=generator), torch.randn(2, 3, 7, 4, generator=generator)
    rows = torch.tensor([[4, 0], [1, 1]])
    mask = torch.randn(2, 6, 5, 7, generator=generator) > 0
    found = attention_rows(query, key, mask, rows=rows, heads=heads)
    for row in range(2):
        for place, head in enumerate(heads or range(6)):
            scores = query[row, head, rows[row]] @ key[row, head // 2].T / 2  # d_head 4: 1 / sqrt(4)
            scores = scores.masked_fill(~mask[row, head, rows[row]], -torch.inf)
            torch.testing.assert_close(found[row, place], scores.softmax(dim=-1))


# -- against the model's own eager attention ---------------------------------------------------------------------------


class Collect:
    """An observer that keeps all weights of every call, by call of the module."""

    def __init__(self, *, block=None):
        self.forwards = [[]]
        self.numbers = []
        self.block = block

    def see(self, call):
        self.numbers.append(call.number)
        step = self.block or call.query.shape[2]
        parts = [call.weights(slice(at, at + step), None) for at in range(0, call.query.shape[2], step)]
        self.forwards[-1].append(torch.cat(parts, dim=2))

    def end(self):
        self.forwards.append([])


def attention_modules(model):
    """Every module of the language model, or of the vision tower, that takes its attention from the interface."""
    found = {}
    for name, module in model.named_modules():
        try:
            _own_eager(type(module))
        except UnsupportedError:
            continue
        found[name] = module
    return found


def two_prompts(vlm, image):
    """Rows of different lengths, so that one is padded."""
    texts = [prompt(vlm, 1, text) for text in ("is there a dog ?", "is there a red cat in the image ? yes .")]
    return vlm.encode([image(0), image(1)], texts, chat=False)


def run(vlm, batch):
    with torch.no_grad():
        return vlm._call(batch).logits


def again(vlm, implementation="as built"):
    """A copy of a VLM, under an attention implementation."""
    model = copy.deepcopy(vlm.model)
    if implementation != "as built":
        model.set_attn_implementation(implementation)
    return VLM.wrap(model, vlm.processor, vlm.name)


def own_weights(vlm, batch):
    """What the eager function of every attention module returns, call by call: the ground truth.

    The function that a module hands to the interface is wrapped where the module's file keeps it.
    """
    vlm = again(vlm, "eager")
    seen = {}
    names = {module: name for name, module in attention_modules(vlm.model).items()}
    with pytest.MonkeyPatch.context() as patch:
        for module_type in {type(module) for module in names}:
            own = _own_eager(module_type)
            space = __import__(own.__module__, fromlist=["_"])

            def keep(module, *args, own=own, **kwargs):
                output = own(module, *args, **kwargs)
                seen.setdefault(names[module], []).append(output[1])
                return output

            patch.setattr(space, own.__name__, keep)
        run(vlm, batch)
    return seen


@pytest.fixture(params=sorted(BUILDERS), scope="module")
def tiny(request):
    return BUILDERS[request.param]()


@pytest.mark.parametrize("block", [None, 3])
@pytest.mark.parametrize("implementation", ["as built", "eager"])
def test_rows_are_those_of_the_models_own_eager_attention(tiny, implementation, block, image, monkeypatch):
    """Every attention module of every family, text and vision, with padding; and the logits are the untraced ones."""
    if block is not None:
        monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", 1)  # eager: one query row at a time
    batch = two_prompts(tiny, image)
    wanted = own_weights(tiny, batch)
    vlm = again(tiny, implementation)
    plain = run(vlm, batch)
    modules = attention_modules(vlm.model)
    observers = {name: Collect(block=block) for name in modules}
    with observed({module: [observers[name]] for name, module in modules.items()}):
        traced = run(vlm, batch)
    if block is None:
        assert torch.equal(traced, plain)
    else:
        torch.testing.assert_close(traced, plain)
    assert wanted
    compared = 0
    for name, calls in wanted.items():
        found = observers[name].forwards
        assert len(found) == 2  # one forward, and it ended
        assert found[1] == []
        assert observers[name].numbers == list(range(len(calls)))
        for mine, own in zip(found[0], calls, strict=True):
            real = own if own.shape[0] != batch.size else own * sees_something(own, batch)
            torch.testing.assert_close(mine * sees_something(mine, batch), real, rtol=1e-4, atol=1e-6, msg=name)
            compared += 1
    assert compared >= 4


def sees_something(weights, batch):
    """1 for the rows of the language model that are not padding: eager gives a padded row uniform weights, SDPA none."""
    if weights.shape[0] != batch.size or weights.shape[2] != batch.length:
        return torch.ones(())
    return batch.attention_mask[:, None, :, None].float()


@pytest.mark.parametrize("implementation", ["as built", "eager"])
@pytest.mark.parametrize("builder", ["gemma3", "paligemma gemma2", "mllama", "llava"])
def test_decode_steps_are_the_rows_of_one_pass_over_everything(builder, implementation, image):
    """Sliding layers keep the last keys alone while they decode: columns are still those of the whole prompt.

    The model is random: its small rounding differences between the two ways to run it do not grow.
    """
    vlm = again(BUILDERS[builder](), implementation)
    batch = two_prompts(vlm, image)
    places = vlm.anatomy.places
    asked = {"all": sites.attention("all", "all", sorted(places["attention"]), label="all")}
    if "cross_attention" in places:
        asked["cross"] = sites.cross_attention("all", layers=sorted(places["cross_attention"]), label="cross")
    with vlm.trace(*asked.values()) as trace:
        generation = vlm.generate(batch, max_new_tokens=6)
    with vlm.trace(*asked.values()) as whole:
        vlm.forward(generation.teacher_forced())
    compared = 0
    for row, length in enumerate(batch.attention_mask.sum(dim=1).tolist()):
        for number in range(1, len(generation.tokens[row])):
            seen = length + number
            for label, site in asked.items():
                for layer in site.layers:
                    mine = trace.steps[number][label][layer][row, :, 0]
                    reference = whole[label][layer][row, :, seen - 1]
                    width = min(seen, mine.shape[1]) if label == "all" else mine.shape[1]
                    assert mine.shape[1] >= (seen if label == "all" else 1)
                    torch.testing.assert_close(mine[:, :width], reference[:, :width], rtol=1e-3, atol=1e-5)
                    compared += 1
    assert compared >= 10


# -- other facts ------------------------------------------------------------------------------------------------------


def test_in_bf16_rows_are_those_of_eager_to_a_rounding(image):
    """Both round q k^T to bf16; eager also rounds after scaling, so that a score of 8 may differ by 0.03."""
    vlm = again(BUILDERS["llava"]())
    vlm.model.to(torch.bfloat16)
    batch = two_prompts(vlm, image)
    wanted = own_weights(vlm, batch)
    modules = attention_modules(vlm.model)
    observers = {name: Collect() for name in modules}
    with observed({module: [observers[name]] for name, module in modules.items()}):
        run(vlm, batch)
    for name, calls in wanted.items():
        mine = observers[name].forwards[0][0]
        assert mine.dtype == torch.bfloat16
        seen = sees_something(mine, batch)
        torch.testing.assert_close(mine.float() * seen, calls[0].float() * seen, rtol=0.1, atol=0.02)


def test_qwens_tower_makes_one_call_per_image(image):
    vlm = BUILDERS["qwen2_vl"]()
    batch = two_prompts(vlm, image)
    module = vlm.model.get_submodule(vlm.anatomy.place("vision_attention", 0).path)
    collected = Collect()
    with observed({module: [collected]}):
        run(vlm, batch)
        run(vlm, batch)
    assert collected.numbers == [0, 1, 0, 1]
    assert [len(calls) for calls in collected.forwards] == [2, 2, 0]


def under_observation(vlm):
    return observed({vlm.model.get_submodule(vlm.anatomy.place("attention", 0).path): [Collect()]})


@pytest.mark.parametrize("name", ["flex_attention", "paged|eager", "my_attention"])
def test_an_implementation_that_cannot_be_tapped_is_refused(name, llava, image, monkeypatch):
    text = llava.model.config.text_config
    monkeypatch.setattr(text, "_attn_implementation_internal", name)
    with (
        pytest.raises(UnsupportedError, match=f"runs attention by {re.escape(name)}, .*attn_implementation='sdpa'"),
        under_observation(llava),
    ):
        pass
    assert text._attn_implementation == name
    assert not _held
    assert not _observers


def test_the_vision_tower_may_run_what_cannot_be_tapped_when_only_text_is_recorded(llava, image, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "my_attention", ALL_ATTENTION_FUNCTIONS["sdpa"])
    monkeypatch.setattr(llava.model.config.vision_config, "_attn_implementation_internal", "my_attention")
    batch = two_prompts(llava, image)
    with llava.trace(sites.attention()) as trace:
        llava.forward(batch)
    assert trace["attention"][0].shape[0] == 2


@pytest.mark.parametrize("option", ["s_aux", "position_bias"])
def test_what_sdpa_rows_do_not_take_into_account_is_refused(option, llava):
    module = llava.model.get_submodule(llava.anatomy.place("attention", 0).path)
    states = torch.randn(1, 4, 6, 8)
    with under_observation(llava), pytest.raises(UnsupportedError, match=rf"\({option}\).*'eager'"):
        ALL_ATTENTION_FUNCTIONS["slitlamp_sdpa"](
            module, states, states, states, None, **{option: torch.zeros(1, 4, 6, 6)}
        )


def test_a_module_that_bypasses_the_interface_is_found_when_it_runs(llava, image, monkeypatch):
    vlm = again(llava)
    module = vlm.model.get_submodule(vlm.anatomy.place("attention", 1).path)
    monkeypatch.setattr(module, "forward", lambda hidden_states, **kwargs: (hidden_states, None))
    batch = two_prompts(vlm, image)
    with vlm.trace(sites.attention()), pytest.raises(UnsupportedError, match="LlamaAttention did not call"):
        vlm.forward(batch)


def test_an_eager_function_whose_rows_are_not_its_own_is_refused():
    def eager_attention_forward(module, query, key, value, attention_mask, positions, **kwargs): ...

    space = {"eager_attention_forward": eager_attention_forward}
    exec("def forward(self):\n    return eager_attention_forward", space)
    odd = type("Odd", (torch.nn.Module,), {"forward": space["forward"]})
    with pytest.raises(UnsupportedError, match="eager attention of Odd takes positions"):
        _own_eager(odd)
    with pytest.raises(UnsupportedError, match="Linear does not say which eager attention"):
        _own_eager(torch.nn.Linear)


def test_what_the_tap_replaces_comes_back_after_nesting_and_exceptions(llava):
    text, vision = llava.model.config.text_config, llava.model.config.vision_config
    module = llava.model.get_submodule(llava.anatomy.place("attention", 0).path)
    before = text._attn_implementation, vision._attn_implementation

    def nested():
        assert (text._attn_implementation, vision._attn_implementation) == ("slitlamp_sdpa", before[1])
        with under_observation(llava):
            assert len(_observers[id(module)].observers) == 2
        assert len(_observers[id(module)].observers) == 1
        assert text._attn_implementation == "slitlamp_sdpa"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), under_observation(llava):
        nested()
    assert (text._attn_implementation, vision._attn_implementation) == before
    assert not _held
    assert not _observers
    assert not module._forward_hooks


def test_two_models_may_share_a_configuration(llava):
    other = VLM.wrap(type(llava.model)(llava.model.config).eval(), llava.processor)
    text = llava.model.config.text_config
    assert other.model.config.text_config is text
    outer, inner = under_observation(llava), under_observation(other)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)  # not in the order of a stack, as threads do
    assert text._attn_implementation == "slitlamp_sdpa"
    inner.__exit__(None, None, None)
    assert text._attn_implementation == "sdpa"
