"""What holds for every family: each site is what its definition says, and what Hugging Face's eager model computes."""

from __future__ import annotations

import itertools

import pytest
import torch
from contract import close
from torch import nn

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.tracing import sites
from slitlamp.tracing.sites import SITES

SIDES = ("", "vision_")


def module(setting, site, layer):
    return setting.vlm.model.get_submodule(setting.vlm.anatomy.place(site, layer).path)


def gated(setting, site, layer, values):
    """Values times the gate that the block has at a site."""
    place = setting.vlm.anatomy.place(site, layer)
    if place.gate is None:
        return values
    gate = setting.vlm.model.get_parameter(place.gate)
    return values * (gate.tanh() if place.tanh else gate)


def layers_having(setting, side, *names):
    anatomy = setting.vlm.anatomy
    n_layers = anatomy.n_vision_layers if side else anatomy.n_layers
    return [one for one in range(n_layers) if all(one in anatomy.layers(side + name) for name in names)]


def sizes_of(setting, name):
    """The size of each axis of a site, None where it differs from family to family (positions of a tower)."""
    batch, anatomy = setting.batch, setting.vlm.anatomy
    layer = anatomy.layers(name)[0]
    if name.startswith("vision_"):
        d_head = anatomy.d_vision // anatomy.n_vision_heads
        sizes = {"head": anatomy.n_vision_heads, "d_head": d_head, "d_vision": anatomy.d_vision}
    elif name == "projector_out":
        sizes = {"d_model": anatomy.d_model}
    else:
        n_heads = anatomy.n_kv_heads if name in ("k", "v") else anatomy.n_heads
        n_keys = max(len(one) for one in batch.patches) if name == "cross_attention" else batch.length
        sizes = {"position": batch.length, "query": batch.length, "key": n_keys, "head": n_heads}
        sizes |= {"d_head": anatomy.d_head, "d_model": anatomy.d_model, "d_vocab": anatomy.d_vocab}
    if name.endswith("mlp_pre"):
        sizes["d_mlp"] = module(setting, name, layer).out_features
    if name.endswith("mlp_post"):
        sizes["d_mlp"] = module(setting, name, layer).in_features
    if name in ("mlp_pre", "mlp_post"):
        assert sizes["d_mlp"] == anatomy.d_mlp
    return {"batch": batch.size, "tile": sum(batch.tiles), **sizes}


def test_every_site_has_its_documented_shape(setting):
    places = setting.vlm.anatomy.places
    assert set(places) <= set(SITES)
    for name in places:
        record, sizes = setting.trace[name], sizes_of(setting, name)
        assert record.layers == setting.vlm.anatomy.layers(name)
        rows = record.axes.index("position" if "position" in record.axes else "query")
        for layer in record.layers:
            found = record[layer]
            assert found.ndim == len(record.axes), name
            for axis, size in zip(record.axes, found.shape, strict=True):
                assert sizes.get(axis) in (None, size), (name, layer, axis)
            assert record.mask.shape == (found.shape[0], found.shape[rows])
            assert found.isfinite().all(), name
            assert found.abs().max() > 0, name


@pytest.mark.parametrize("side", SIDES)
def test_blocks_add_their_parts_to_the_residual_stream(side, setting):
    rows, anatomy = setting.rows, setting.vlm.anatomy
    n_layers = anatomy.n_vision_layers if side else anatomy.n_layers
    for layer in layers_having(setting, side, "resid_mid"):
        close(rows(f"{side}resid_mid", layer), rows(f"{side}resid_pre", layer) + rows(f"{side}attn_out", layer))
    for layer in layers_having(setting, side, "resid_mid", "mlp_out"):
        close(rows(f"{side}resid_post", layer), rows(f"{side}resid_mid", layer) + rows(f"{side}mlp_out", layer))
    side_by_side = [one for one in range(n_layers) if one not in anatomy.layers(f"{side}resid_mid")]
    for layer in side_by_side:
        parts = rows(f"{side}resid_pre", layer) + rows(f"{side}attn_out", layer) + rows(f"{side}mlp_out", layer)
        close(rows(f"{side}resid_post", layer), parts)
    blocks = anatomy.vision_blocks if side else anatomy.blocks
    for layer in range(n_layers - 1):
        same_stack = blocks[layer].rpartition(".")[0] == blocks[layer + 1].rpartition(".")[0]
        equal = torch.equal(rows(f"{side}resid_pre", layer + 1), rows(f"{side}resid_post", layer))
        assert equal == (same_stack and (side != "" or layer not in anatomy.deepstack_layers))


@pytest.mark.parametrize("side", SIDES)
@torch.no_grad()
def test_parts_of_a_block_follow_from_each_other(side, setting):
    rows = setting.rows
    for norm, stream in (("ln1", "resid_pre"), ("ln2", "resid_mid")):
        for layer in layers_having(setting, side, norm, stream):
            close(rows(side + norm, layer), module(setting, side + norm, layer)(rows(side + stream, layer)))
    for name in "qkv":
        for layer in layers_having(setting, side, name):
            place = setting.vlm.anatomy.place(side + name, layer)
            projected = module(setting, side + name, layer)(rows(f"{side}ln1", layer))
            if place.third is not None:
                projected = projected.chunk(3, dim=-1)[place.third]
            close(rows(side + name, layer).flatten(1), projected)
    for layer in layers_having(setting, side, "z"):
        made = module(setting, f"{side}z", layer)(rows(f"{side}z", layer).flatten(1))
        close(
            rows(f"{side}attn_out", layer),
            gated(setting, f"{side}attn_out", layer, after(setting, side, "attn_out", layer, made)),
        )
    for layer in layers_having(setting, side, "mlp_post", "mlp_out"):
        made = module(setting, f"{side}mlp_post", layer)(rows(f"{side}mlp_post", layer))
        close(
            rows(f"{side}mlp_out", layer),
            gated(setting, f"{side}mlp_out", layer, after(setting, side, "mlp_out", layer, made)),
        )
    for layer in layers_having(setting, side, "mlp_pre"):
        normed = rows(side + ("ln2" if layer in setting.vlm.anatomy.layers(f"{side}ln2") else "ln1"), layer)
        close(rows(f"{side}mlp_pre", layer), module(setting, f"{side}mlp_pre", layer)(normed))


def after(setting, side, site, layer, made):
    """What a part's output becomes on its way to the residual stream: itself, or that of the norm after it."""
    last = module(setting, side + site, layer)
    is_norm = not any(isinstance(one, nn.Linear) for one in last.modules())
    return last(made) if is_norm else made


@pytest.mark.parametrize("side", SIDES)
def test_heads_put_out_values_weighted_by_attention(side, setting):
    """z = attention x v, with Hugging Face's weights where it gives them."""
    trace, anatomy = setting.trace, setting.vlm.anatomy
    if side and anatomy.family.cross is not None:
        assert (
            trace["vision_attention"][0].sum(dim=-1).max() < 1
        )  # its tiles read each other, which the site does not show
        return
    for layer in layers_having(setting, side, "attention", "v"):
        weights, values = trace[f"{side}attention"][layer], trace[f"{side}v"][layer]
        values = values.repeat_interleave(weights.shape[1] // values.shape[2], dim=2)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, values)
        mask = trace.mask(f"{side}z")
        close(trace[f"{side}z"][layer][mask], mixed[mask])
        sums = weights.sum(dim=-1).transpose(1, 2)[mask]
        close(sums, torch.ones_like(sums))


def test_states_and_logits_are_those_of_eager(setting):
    vlm, batch, eager = setting.vlm, setting.batch, setting.eager
    real = batch.real_mask
    close(setting.logits[real], eager.logits[real])
    close(setting.rows("logits", 0), eager.logits[real])
    assert len(eager.hidden) == vlm.anatomy.n_layers + 1
    for layer in range(vlm.anatomy.n_layers):
        if layer - 1 not in vlm.anatomy.deepstack_layers:  # Hugging Face's are those after a block
            close(setting.rows("resid_pre", layer), eager.hidden[layer][real])
        if layer + 1 < vlm.anatomy.n_layers:
            close(setting.rows("resid_post", layer), eager.hidden[layer + 1][real])
    last = setting.rows("resid_post", vlm.anatomy.n_layers - 1)
    with torch.no_grad():
        close(eager.final_norm(last), eager.hidden[-1][real])  # Hugging Face's last hidden state has passed the norm
    assert (last - eager.hidden[-1][real]).abs().max() > 0.1


def test_the_vision_tower_is_that_of_eager(setting):
    vlm, batch, eager, trace = setting.vlm, setting.batch, setting.eager, setting.trace
    anatomy = vlm.anatomy
    assert len(eager.vision_hidden) == anatomy.n_vision_layers
    unpack = anatomy.tower.unpack
    index = None if unpack is None else unpack(vlm.model.config, batch.extra, False)
    for layer, whole in eager.vision_hidden.items():
        found = trace["vision_resid_post"][layer]
        if index is None:
            close(found, whole)
            close(trace["vision_attention"][layer], eager.vision_attentions[layer])
            continue
        assert len(index) == len(found) == sum(batch.tiles)
        for tile, places in enumerate(index):
            close(found[tile, : len(places)], whole.flatten(0, -2)[places])
            assert not found[tile, len(places) :].any()


def mask_of(batch, name):
    """Positions by name, from ids and lengths alone."""
    image = batch.input_ids == batch.image_token_id
    real = torch.arange(batch.length)[None, :] >= batch.length - torch.tensor(batch.lengths)[:, None]
    last = torch.zeros_like(real)
    last[:, -1] = True
    return {"all": real, "image": image & real, "text": ~image & real, "last": last}[name]


PAIRS = [("all", "all"), ("last", "image"), ("text", "image"), ("image", "all"), ("last", "text")]


def test_attention_rows_are_those_of_eager(setting):
    vlm, batch, eager = setting.vlm, setting.batch, setting.eager
    if vlm.anatomy.family.cross is not None:
        pairs = [("all", "all"), ("last", "text"), ("text", "all")]
    else:
        pairs = PAIRS
    with vlm.trace(
        *(sites.attention(queries, keys, label=f"{queries} {keys}") for queries, keys in pairs),
        sites.attention("last", "all", heads=[2, 0], label="heads"),
    ) as trace:
        vlm.forward(batch)
    for (queries, keys), layer in itertools.product(pairs, vlm.anatomy.layers("attention")):
        record = trace[f"{queries} {keys}"]
        rows, columns = mask_of(batch, queries), mask_of(batch, keys)
        for row in range(batch.size):
            n_rows, n_columns = int(rows[row].sum()), int(columns[row].sum())
            wanted = eager.attentions[layer][row][:, rows[row]][:, :, columns[row]]
            close(record[layer][row, :, :n_rows, :n_columns], wanted)
            assert not record[layer][row, :, n_rows:].any()
            assert not record[layer][row, :, :, n_columns:].any()
        assert torch.equal(record.mask.sum(dim=1), rows.sum(dim=1))
        assert torch.equal(record.key_mask.sum(dim=1), columns.sum(dim=1))
    for layer in vlm.anatomy.layers("attention"):
        whole = setting.trace["attention"][layer]
        last = torch.stack([whole[row, :, n - 1 : n] for row, n in enumerate(batch.lengths)])
        close(trace["heads"][layer], last[:, [2, 0]])


def test_attention_of_the_cls_token(setting):
    """By default, `vision_attention` is that of the CLS token over the patches; a tower without one refuses it by name."""
    vlm, whole = setting.vlm, setting.trace["vision_attention"]
    if not vlm.anatomy.has_cls:
        with pytest.raises(InputError, match="no CLS token"), vlm.trace(sites.vision_attention()):
            pass
        return
    with vlm.trace(sites.vision_attention(), sites.vision_resid_post(positions="patches")) as trace:
        vlm.forward(setting.batch)
    for layer in vlm.anatomy.layers("vision_attention"):
        close(trace["vision_attention"][layer], whole[layer][:, :, :1, 1:])
        close(trace["vision_resid_post"][layer], setting.trace["vision_resid_post"][layer][:, 1:])


def test_a_site_that_a_model_lacks_is_refused_by_name(setting):
    vlm = setting.vlm
    lacking = [name for name in SITES if name not in vlm.anatomy.places]
    for name in lacking:
        with pytest.raises(UnsupportedError, match=f"has no '{name}'"), vlm.trace(getattr(sites, name)()):
            pass
