"""What a trace of `forward` holds, compared with a copy of the model run by Hugging Face's eager attention.

Tolerance: 1e-5 times the largest absolute value of the reference tensor (at least 1). Float32 rounds at 6e-8 relative; three
blocks of sums over at most 48 terms keep the difference of two orders of summation well below that.
"""

import copy
import itertools

import pytest
import torch

from slitlamp.tracing import sites
from slitlamp.vlm import VLM

LABELS = ("all", "image", "text", "text_after_image", "last", "generated", "before_generated")


def close(found, wanted, tolerance=1e-5):
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * scale)


class Eager:
    """What Hugging Face's eager model computes for a batch; attentions and hidden states by its own flags."""

    def __init__(self, vlm, batch):
        model = copy.deepcopy(vlm.model)
        model.set_attn_implementation("eager")
        anatomy = vlm.anatomy
        self.attention_out, self.mlp_out, self.projector = {}, {}, []
        for layer in range(anatomy.n_layers):
            model.get_submodule(anatomy.attention(layer)).register_forward_hook(
                lambda m, a, out, layer=layer: self.attention_out.__setitem__(layer, out[0])
            )
            model.get_submodule(anatomy.mlp(layer)).register_forward_hook(
                lambda m, a, out, layer=layer: self.mlp_out.__setitem__(layer, out)
            )
        model.get_submodule(anatomy.modules["projector"]).register_forward_hook(
            lambda m, a, out: self.projector.append(out)
        )
        with torch.no_grad():
            out = model(**batch.inputs(), output_hidden_states=True, output_attentions=True)
            self.logits, self.hidden, self.attentions = out.logits, out.hidden_states, out.attentions
            self.vision = None
            if "pixel_values" in batch.extra:
                pixels = batch.extra["pixel_values"]
                if pixels.ndim == 5:  # LLaVA-NeXT: images x tiles, of which the model takes the real ones
                    counts = [patches_of_image(vlm, size) for size in batch.extra["image_sizes"]]
                    pixels = torch.cat([one[:n] for one, n in zip(pixels, counts, strict=True)])
                self.vision = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
            self.norm = model.get_submodule(anatomy.modules["final_norm"])


def patches_of_image(vlm, size):
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = vlm.model.config
    return image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)


@pytest.fixture(scope="module")
def make_batch(image):
    def make(vlm):
        """Three images in a row of two lengths, a text-only row, and continuations of three lengths."""
        batch = vlm.encode(
            [[image(0), image(1, 30, 9)], image(2), None],
            ["is <image> in the <image> ?", "<image> describe this .", "what is a dog ?"],
        )
        return batch.with_continuation([[5, 6, 7], [8], []])

    return make


@pytest.fixture(scope="module", params=["llava", "llava_siglip", "llava_next"])
def setting(request, make_batch):
    """Each family's model, a batch, and what eager computes for it."""
    vlm = request.getfixturevalue(request.param)
    batch = make_batch(vlm)
    return vlm, batch, Eager(vlm, batch)


def masks(batch):
    """Positions by name, from ids and lengths alone."""
    wanted = {name: torch.zeros_like(batch.image_mask) for name in LABELS}
    for row in range(batch.size):
        ids = batch.input_ids[row].tolist()
        first, end, n_generated = batch.length - batch.lengths[row], batch.length, batch.n_generated[row]
        images = [place for place, token in enumerate(ids) if token == 4]
        for place in range(first, end):
            wanted["all"][row, place] = True
            wanted["image" if place in images else "text"][row, place] = True
            wanted["text_after_image"][row, place] = bool(images) and place > images[-1]
            wanted["generated"][row, place] = place >= end - n_generated
            wanted["before_generated"][row, place] = end - n_generated - 1 <= place < max(end - 1, end - n_generated)
        wanted["last"][row, end - 1] = True
    return wanted


def test_states_are_those_of_eager(setting):
    vlm, batch, eager = setting
    with vlm.trace(*(make() for make in (sites.resid_pre, sites.resid_post, sites.z, sites.mlp_out))) as trace:
        out = vlm.forward(batch)
    real, kept = batch.real_mask, trace.mask("resid_post")
    close(out.logits[real], eager.logits[real])
    for layer in range(vlm.anatomy.n_layers):
        close(trace["resid_pre"][layer][kept], eager.hidden[layer][real])
        close(trace["mlp_out"][layer][kept], eager.mlp_out[layer][real])
        z = trace["z"][layer]
        assert z.shape[2:] == (vlm.anatomy.n_heads, vlm.anatomy.d_head)
        projection = vlm.model.get_submodule(vlm.anatomy.out_proj(layer))
        close(projection(z.flatten(2))[kept].detach(), eager.attention_out[layer][real])
        # a block adds its attention and its MLP to the residual stream
        parts = eager.hidden[layer][real] + eager.attention_out[layer][real] + eager.mlp_out[layer][real]
        close(trace["resid_post"][layer][kept], parts)
        if layer + 1 < vlm.anatomy.n_layers:
            close(trace["resid_post"][layer][kept], eager.hidden[layer + 1][real])


def test_the_last_residual_is_not_the_normed_one(setting):
    """Hugging Face's last hidden state has passed the final norm; ours has not."""
    vlm, batch, eager = setting
    with vlm.trace(sites.resid_post()) as trace:
        vlm.forward(batch)
    last = trace["resid_post"][vlm.anatomy.n_layers - 1][trace.mask("resid_post")]
    normed = eager.hidden[-1][batch.real_mask]
    close(eager.norm(last).detach(), normed)
    assert (last - normed).abs().max() > 0.1


def test_positions_by_name(setting):
    vlm, batch, eager = setting
    wanted = masks(batch)
    asked = [sites.resid_post(layers=[0, 1], positions=name, label=name) for name in LABELS]
    with vlm.trace(*asked, *(sites.z(positions=name, label=f"z {name}") for name in LABELS)) as trace:
        vlm.forward(batch)
    for name in LABELS:
        check_packed(trace[name][1], trace.mask(name), eager.hidden[2], wanted[name])
        assert trace[name].layers == (0, 1)
        assert torch.equal(trace.mask(f"z {name}"), trace.mask(name))


def check_packed(values, valid, wanted, mask):
    """Values of each row's positions in order, packed to the left, 0 where a row has fewer."""
    counts = mask.sum(dim=1)
    assert values.shape[1] == int(counts.max())
    for row, count in enumerate(counts.tolist()):
        assert valid[row].tolist() == [True] * count + [False] * (values.shape[1] - count)
        close(values[row, :count], wanted[row][mask[row]])
        assert not values[row, count:].any()


def test_positions_by_mask(setting):
    vlm, batch, eager = setting
    mask = torch.rand(batch.size, batch.length, generator=torch.Generator().manual_seed(0)) < 0.3
    with vlm.trace(sites.resid_post(layers=0, positions=mask), sites.attention(queries=mask, keys="all")) as trace:
        vlm.forward(batch)
    check_packed(trace["resid_post"][0], trace.mask("resid_post"), eager.hidden[1], mask & batch.real_mask)
    check_packed(
        trace["attention"][0].transpose(1, 2).flatten(2)[..., :0],  # which rows: their values are compared below
        trace["attention"].mask,
        torch.zeros(batch.size, batch.length, 0),
        mask & batch.real_mask,
    )


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_reductions_equal_those_of_the_whole_recording(how, setting):
    vlm, batch, eager = setting
    with vlm.trace(sites.resid_post(positions="image", reduce=how), sites.z(positions="text", reduce=how)) as trace:
        vlm.forward(batch)
    assert trace["resid_post"].axes == ("batch", "d_model")
    assert trace["z"].axes == ("batch", "head", "d_head")
    for row in range(batch.size):
        chosen = eager.hidden[1][row][batch.image_mask[row]]
        found = trace["resid_post"][0][row]
        if len(chosen):
            close(found, chosen.mean(dim=0) if how == "mean" else chosen.sum(dim=0))
        else:
            assert found.isnan().all()  # a row without image tokens has no mean over them, nor a sum that is one of 0
    assert trace.mask("resid_post").tolist() == [[True], [True], [False]]
    assert trace.mask("z").tolist() == [[True], [True], [True]]
    assert trace["z"][0].shape == (batch.size, vlm.anatomy.n_heads, vlm.anatomy.d_head)


def test_heads_are_chosen_by_number(setting):
    vlm, batch, _ = setting
    with vlm.trace(
        sites.z(label="all z"),
        sites.z(heads=[3, 0]),
        sites.attention(label="all rows"),
        sites.attention(heads=[3, 0]),
    ) as trace:
        vlm.forward(batch)
    assert torch.equal(trace["z"][1], trace["all z"][1][:, :, [3, 0]])
    # only the chosen heads are computed: the same numbers by another matrix product
    torch.testing.assert_close(trace["attention"][1], trace["all rows"][1][:, [3, 0]])


def test_attention_is_that_of_eager(setting):
    vlm, batch, eager = setting
    by_name = masks(batch)
    pairs = list(itertools.product(LABELS, ("all", "image", "text", "last")))
    asked = [sites.attention(queries, keys, layers=[0, 2], label=f"{queries} {keys}") for queries, keys in pairs]
    with vlm.trace(*asked) as trace:
        vlm.forward(batch)
    for queries, keys in pairs:
        rows, columns = by_name[queries], by_name[keys]
        record = trace[f"{queries} {keys}"]
        assert record.axes == ("batch", "head", "query", "key")
        assert record.layers == (0, 2)
        for layer, found in record.items():
            assert found.shape[2:] == (int(rows.sum(dim=1).max()), int(columns.sum(dim=1).max()))
            for row in range(batch.size):
                n_rows, n_columns = int(rows[row].sum()), int(columns[row].sum())
                wanted = eager.attentions[layer][row][:, rows[row]][:, :, columns[row]]
                torch.testing.assert_close(found[row, :, :n_rows, :n_columns], wanted, rtol=0, atol=1e-5)
                assert not found[row, :, n_rows:].any()
                assert not found[row, :, :, n_columns:].any()
        assert torch.equal(record.mask.sum(dim=1), rows.sum(dim=1))
        assert torch.equal(record.key_mask.sum(dim=1), columns.sum(dim=1))


def test_attention_over_all_keys_sums_to_one(setting):
    vlm, batch, _ = setting
    with vlm.trace(sites.attention(queries="all", keys="all")) as trace:
        vlm.forward(batch)
    sums = trace["attention"][2].sum(dim=-1).transpose(1, 2)[trace["attention"].mask]
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


def test_attention_reductions(setting):
    vlm, batch, _ = setting
    with vlm.trace(
        sites.attention(queries="text", keys="image", label="whole"),
        sites.attention(queries="text", keys="image", reduce_keys="sum", label="keys"),
        sites.attention(queries="text", keys="image", reduce_queries="mean", label="queries"),
        sites.attention(queries="text", keys="image", reduce_heads="mean", label="heads"),
        sites.attention(
            queries="text", keys="image", reduce_keys="sum", reduce_queries="mean", reduce_heads="mean", label="one"
        ),
    ) as trace:
        vlm.forward(batch)
    whole = trace["whole"][1]
    assert trace["keys"].axes == ("batch", "head", "query")
    assert trace["queries"].axes == ("batch", "head", "key")
    assert trace["heads"].axes == ("batch", "query", "key")
    assert trace["one"].axes == ("batch",)
    assert trace["queries"].mask.tolist() == [[True], [True], [True]]
    for row in range(2):
        n_rows, n_columns = int(trace["whole"].mask[row].sum()), int(trace["whole"].key_mask[row].sum())
        block = whole[row, :, :n_rows, :n_columns]
        close(trace["keys"][1][row, :, :n_rows], block.sum(dim=2))
        close(trace["queries"][1][row, :, :n_columns], block.mean(dim=1))
        close(trace["heads"][1][row, :n_rows, :n_columns], block.mean(dim=0))
        close(trace["one"][1][row], block.sum(dim=2).mean())
    assert trace["keys"][1][2].isnan().all()  # no image in this row: no keys to sum over


def test_vision_tower_and_projector(setting):
    vlm, batch, eager = setting
    has_cls = vlm.anatomy.has_cls
    with vlm.trace(
        sites.vision_resid_post(),
        sites.vision_resid_post(positions="patches", label="patches"),
        sites.vision_resid_post(positions="patches", reduce="mean", label="mean"),
        sites.vision_attention(queries="all", keys="all"),
        sites.projector_out(),
    ) as trace:
        vlm.forward(batch)
    first = 1 if has_cls else 0
    for layer in range(vlm.anatomy.n_vision_layers):
        hidden = eager.vision.hidden_states[layer + 1]
        close(trace["vision_resid_post"][layer], hidden)
        close(trace["patches"][layer], hidden[:, first:])
        close(trace["mean"][layer], hidden[:, first:].mean(dim=1))
        torch.testing.assert_close(trace["vision_attention"][layer], eager.vision.attentions[layer], rtol=0, atol=1e-5)
    close(trace["projector_out"][0], torch.cat(eager.projector[:1]))
    assert trace["projector_out"][0].shape[1:] == (16, vlm.anatomy.d_model)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_attention_of_the_cls_token(name, make_batch, request):
    vlm = request.getfixturevalue(name)
    batch = make_batch(vlm)
    eager = Eager(vlm, batch)
    with vlm.trace(sites.vision_attention(heads=[1]), sites.vision_resid_post(positions="cls")) as trace:
        vlm.forward(batch)
    for layer in range(vlm.anatomy.n_vision_layers):
        found = trace["vision_attention"][layer]
        torch.testing.assert_close(found, eager.vision.attentions[layer][:, 1:2, :1, 1:], rtol=0, atol=1e-5)
        close(trace["vision_resid_post"][layer], eager.vision.hidden_states[layer + 1][:, :1])


def test_transformer_lens_names(llava, make_batch):
    with llava.trace(sites.resid_post(), sites.z(), sites.attention(queries="all", keys="all")) as trace:
        llava.forward(make_batch(llava))
    assert torch.equal(trace["blocks.1.hook_resid_post"], trace["resid_post"][1])
    assert torch.equal(trace["blocks.2.attn.hook_z"], trace["z"][2])
    assert torch.equal(trace["blocks.0.attn.hook_pattern"], trace["attention"][0])
    assert sites.canonical_name("mlp_out", 7) == "blocks.7.hook_mlp_out"
    assert sites.canonical_name("resid_pre", 0) == "blocks.0.hook_resid_pre"


def test_a_batch_of_one_equals_a_batch_of_many_and_padding_changes_nothing(any_vlm, make_batch, image):
    prompts = ["is <image> in the <image> ?", "<image> describe this .", "what is a dog ?"]
    pictures = [[image(0), image(1, 30, 9)], [image(2)], []]
    wanted = [sites.resid_post(), sites.attention(queries="all", keys="all")]
    with any_vlm.trace(*wanted) as many:
        any_vlm.forward(any_vlm.encode(pictures, prompts))
    for row, (prompt, own) in enumerate(zip(prompts, pictures, strict=True)):
        with any_vlm.trace(*wanted) as one:
            any_vlm.forward(any_vlm.encode([own], [prompt]))
        length = one.batch.length
        for layer in range(any_vlm.anatomy.n_layers):
            close(many["resid_post"][layer][row, :length], one["resid_post"][layer][0])
            close(many["attention"][layer][row, :, :length, :length], one["attention"][layer][0])


def test_bfloat16_equals_eager_in_bfloat16(llava, make_batch):
    """bfloat16 keeps 8 bits: each of some ten roundings on the way (relative 2**-9) may fall the other way."""
    vlm = VLM.wrap(copy.deepcopy(llava.model).to(torch.bfloat16), llava.processor)
    batch = make_batch(llava)
    batch = batch.with_pixels(batch.extra["pixel_values"].to(torch.bfloat16))
    eager = Eager(vlm, batch)
    with vlm.trace(
        sites.resid_post(), sites.resid_post(reduce="mean", label="mean"), sites.attention(queries="all", keys="all")
    ) as trace:
        vlm.forward(batch)
    assert trace["resid_post"][0].dtype == torch.bfloat16
    assert trace["mean"][0].dtype == torch.float32
    tolerance = 10 * 2**-9
    for layer in range(2):
        found = trace["resid_post"][layer][trace.mask("resid_post")]
        close(found.float(), eager.hidden[layer + 1][batch.real_mask].float(), tolerance)
        for row, length in enumerate(batch.lengths):
            attention = eager.attentions[layer][row, :, -length:, -length:].float()
            close(trace["attention"][layer][row, :, :length, :length].float(), attention, 2 * tolerance)


def test_a_recording_is_a_copy(llava, make_batch):
    """Writing into a recording must not reach another one (`everything` is chosen here, so nothing is gathered)."""
    batch = llava.encode(None, ["what is a dog ?"])
    with llava.trace(
        sites.resid_post(layers=0), sites.resid_pre(layers=1), sites.resid_post(layers=0, label="b")
    ) as trace:
        llava.forward(batch)
    before = trace["resid_pre"][1].clone()
    trace["resid_post"][0].zero_()
    assert torch.equal(trace["resid_pre"][1], before)
    assert torch.equal(trace["b"][0], before)


def test_size_and_stack(llava, make_batch):
    batch = make_batch(llava)
    with llava.trace(sites.resid_post(layers=[0, 2], positions="last")) as trace:
        llava.forward(batch)
    assert trace["resid_post"].stack().shape == (2, 3, 1, 32)
    assert trace.nbytes() == 2 * 3 * 32 * 4
    assert "resid_post: layers [0, 2], axes ('batch', 'position', 'd_model')" in repr(trace)
    assert list(trace["resid_post"]) == [0, 2]
    assert len(trace["resid_post"]) == 2
    assert "resid_post" in trace
    assert "z" not in trace
