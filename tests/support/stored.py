"""What tests of activation stores share: every kind of site, a batch, and a comparison with a plain trace."""

import torch

from slitlamp.tracing import sites

PROMPTS = ["is <image> in the <image> ?", "<image> describe this .", "what is a dog ?", "<image> what ?"]


def asked():
    """Every kind of recording: kept whole, reduced, with heads, with queries and keys, of the vision tower."""
    return [
        sites.resid_post(layers=[0, 2], positions="all", label="all"),
        sites.resid_post(positions="image"),
        sites.resid_post(positions="last", label="last"),
        sites.resid_post(positions="image", reduce="mean", label="mean"),
        sites.z(positions="text_after_image", heads=[3, 0]),
        sites.k(layers=1, positions="last"),
        sites.mlp_post(layers=1, positions="text"),
        sites.logits(),
        sites.attention(queries="text", keys="image"),
        sites.attention(queries="last", keys="all", layers=1, heads=[2], label="one head"),
        sites.attention(queries="text", keys="image", reduce_keys="sum", label="over keys"),
        sites.attention(queries="text", keys="all", reduce_queries="mean", label="over queries"),
        sites.attention(queries="last", keys="image", reduce_heads="mean", label="over heads"),
        sites.attention(reduce_queries="mean", reduce_keys="sum", label="mass"),
        sites.vision_resid_post(layers=[0, 1]),
        sites.vision_attention(queries="all", keys="all", layers=1),
        sites.projector_out(),
    ]


def encode(vlm, pictures, rows=range(4), suffix=""):
    ids = [f"item {row}{suffix}" for row in rows]
    return vlm.encode([pictures[row] for row in rows], [PROMPTS[row] for row in rows], ids=ids, chat=False)


def real(trace, label, layer, row):
    """The recording of a row (of a vision site, of a tile) without padding, by the masks of each forward call."""
    site = trace.sites[label]
    parts, widths = [], []
    for step in (step for step in trace.steps if label in step):
        values, valid = step[label][layer][row], step.masks[label][row]
        keys = step.key_masks[label][row] if site.is_attention else None
        if keys is not None and not keys.any():
            continue
        axes = list(site.axes[1:])
        for name in ("position", "query"):
            if name in axes:
                values = values.index_select(axes.index(name), valid.nonzero()[:, 0])
        if "key" in axes:
            values = values.index_select(axes.index("key"), keys.nonzero()[:, 0])
            widths.append(values.shape[-1])
        if valid.any():
            parts.append(values)
    return parts, widths


def check(layer, trace, label, row, unit):
    """A stored recording is that of the trace, bit for bit."""
    found = layer[unit]
    parts, widths = real(trace, label, layer.layer, row)
    site = trace.sites[label]
    ragged = [axis for axis in ("position", "query", "step", "key") if axis in layer.axes]
    if not parts:  # nothing was there to be recorded
        assert found.isnan().all() if not ragged else found.numel() == 0
        return 0
    if "key" in layer.axes:
        parts = [torch.nn.functional.pad(part, (0, max(widths) - part.shape[-1])) for part in parts]
    joined = next((site.axes[1:].index(name) for name in ("position", "query") if name in site.axes), None)
    if "step" in layer.axes:
        wanted = torch.stack(parts)
    else:
        wanted = parts[0] if len(parts) == 1 else torch.cat(parts, dim=joined)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)
    return wanted.numel()


def check_store(store, trace, batch):
    compared = 0
    for label, site in trace.sites.items():
        assert store[label].layers == site.layers
        for layer in store[label].values():
            if not site.is_vision:
                compared += sum(check(layer, trace, label, row, one) for row, one in enumerate(batch.ids))
                continue
            owners = [one for one, count in zip(batch.ids, batch.tiles, strict=True) for _ in range(count)]
            assert layer.ids == tuple(owners)
            compared += sum(check(layer, trace, label, row, row) for row in range(len(owners)))
            for one in batch.ids:
                tiles = [layer[row] for row, owner in enumerate(owners) if owner == one]
                if len({tile.shape for tile in tiles}) == 1:
                    assert torch.equal(layer[one], torch.stack(tiles))
    assert compared > 0
