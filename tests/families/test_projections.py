"""What holds for every family's queries, keys, values and hidden layers: each is the one that its name says.

The other tests put a site and the module of its entry side by side; here a site is changed, and what the change reaches says
which one it is.
"""

from __future__ import annotations

import copy

import pytest
import torch
from contract import Setting
from edits import Edits
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from slitlamp.tracing import Edit, sites

SIDES = ("", "vision_")
CALLS: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}


def capture(module, query, key, value, attention_mask, **kwargs):
    """SDPA that keeps its queries, keys and values."""
    CALLS.setdefault(module, []).append((query, key, value))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("capture", capture)
AttentionMaskInterface.register("capture", sdpa_mask)


def last_layer(setting: Setting, side: str) -> int:
    """The last layer with attention over its own positions."""
    return setting.vlm.anatomy.layers(f"{side}attention")[-1]


def pushed(setting, side, name, layer, place):
    """Attention and values of a layer when one position's vectors at a site are changed: attention [head, query, key] and z
    [position, head, d_head] of the first row, less those without the change.
    """
    noise = torch.randn(setting.trace[side + name][layer].shape[2:], generator=torch.Generator().manual_seed(0))

    def push(values, calls):
        values = values.clone()
        values[0, place] += 3 * noise
        return values

    wanted = [getattr(sites, f"{side}z")(), getattr(sites, f"{side}attention")(queries="all", keys="all")]
    with setting.vlm.apply(Edits([Edit(side + name, layer, push)])), setting.vlm.trace(*wanted) as trace:
        setting.vlm.forward(setting.batch)
    return tuple((trace[side + one][layer] - setting.trace[side + one][layer])[0] for one in ("attention", "z"))


@pytest.mark.parametrize("side", SIDES)
def test_queries_ask_keys_answer_values_are_put_out(side, setting):
    """A query changes the attention of its own position; a key that of other positions, to itself most; a value changes
    no attention.
    """
    layer = last_layer(setting, side)
    if setting.vlm.anatomy.place(f"{side}q", layer).third is not None:
        return  # see below
    # of the first row: the position that its recordings have at 2
    skipped = 0 if side else setting.batch.length - setting.batch.lengths[0]
    place = 2
    attention, z = pushed(setting, side, "q", layer, place + skipped)
    moved = attention.abs().amax(dim=(0, 2)) > 1e-5
    assert moved.nonzero()[:, 0].tolist() == [place]
    assert (z.abs().amax(dim=(1, 2)) > 1e-5).nonzero()[:, 0].tolist() == [place]
    attention, z = pushed(setting, side, "k", layer, place + skipped)
    moved = attention.abs().amax(dim=(0, 2)) > 1e-5
    assert int(moved.sum()) > 2
    other = attention.abs().sum(dim=(0, 1))
    assert int(other.argmax()) == place
    attention, z = pushed(setting, side, "v", layer, place + skipped)
    assert attention.abs().max() < 1e-6
    assert int((z.abs().amax(dim=(1, 2)) > 1e-5).sum()) > 2


def test_thirds_of_a_fused_projection_are_queries_keys_and_values(setting):
    """What a tower hands to the attention interface: its values are the recorded ones; its queries and keys, which it may have
    rotated, are as long as the recorded ones.
    """
    vlm, trace = setting.vlm, setting.trace
    layers = [one for one in vlm.anatomy.layers("vision_q") if vlm.anatomy.place("vision_q", one).third is not None]
    if not layers:
        return  # a projection for each: see the test above
    model = copy.deepcopy(vlm.model)
    model.set_attn_implementation("capture")
    CALLS.clear()
    with torch.no_grad():
        model(**setting.batch.inputs())
    for layer in layers:
        calls = CALLS[model.get_submodule(vlm.anatomy.vision_attention_of(layer))]
        for number, name in enumerate("qkv"):
            handed = torch.cat([one[number].transpose(1, 2).flatten(0, 1) for one in calls])  # [position, head, d_head]
            recorded = trace[f"vision_{name}"][layer][trace.mask(f"vision_{name}")]
            lengths = [one.norm(dim=-1).sort(dim=0).values for one in (handed, recorded)]
            torch.testing.assert_close(*lengths, rtol=1e-4, atol=1e-4)
    CALLS.clear()


@pytest.mark.parametrize("side", SIDES)
def test_mlp_pre_goes_into_the_activation(side, setting):
    """Where it is far below zero, nothing comes out of the hidden layer: that of a gate's other factor would not do so."""
    anatomy = setting.vlm.anatomy
    layer = anatomy.layers(f"{side}mlp_pre")[-1]
    low = Edit(f"{side}mlp_pre", layer, lambda values, calls: torch.full_like(values, -1e4))
    with setting.vlm.apply(Edits([low])), setting.vlm.trace(getattr(sites, f"{side}mlp_post")(layers=[layer])) as trace:
        setting.vlm.forward(setting.batch)
    assert trace[f"{side}mlp_post"][layer].abs().max() < 1e-6
    assert setting.trace[f"{side}mlp_post"][layer].abs().max() > 1e-3
