"""What cannot be recorded is refused before the model runs, with what was found and the nearest name."""

import numpy as np
import pytest
import torch

from slitlamp.errors import InputError, UnknownNameError
from slitlamp.tracing import Site, check_sites, sites


@pytest.mark.parametrize(
    ("site", "match"),
    [
        (Site("resid_pst", label="x"), "unknown site 'resid_pst'; did you mean 'resid_post'"),
        (sites.resid_post(layers=[3]), "layer of resid_post: 3 is not one of 0 to 2"),
        (sites.resid_post(layers=[-1]), "layer of resid_post: -1 is not one of 0 to 2"),
        (sites.resid_post(layers=[True]), "layer of resid_post: True is not one of 0 to 2"),
        (sites.resid_post(layers=[]), "no layer of resid_post is asked for"),
        (sites.resid_post(layers=[1, 1]), "names one twice"),
        (sites.vision_resid_post(layers=[9]), "layer of vision_resid_post: 9 is not one of 0 to 2"),
        (sites.z(heads=[4]), "head of z: 4 is not one of 0 to 3"),
        (sites.attention(heads=[7]), "head of attention: 7 is not one of 0 to 3"),
        (sites.vision_attention(heads=[2]), "head of vision_attention: 2 is not one of 0 to 1"),
        (sites.resid_post(positions="images"), "unknown position for resid_post 'images'; did you mean 'image'"),
        (sites.attention(queries="lst"), "unknown position for attention 'lst'; did you mean 'last'"),
        (sites.attention(keys="patches"), "unknown position for attention 'patches'"),
        (sites.vision_attention(queries="last"), "unknown position for vision_attention 'last'"),
        (sites.resid_post(reduce="meen"), "unknown reduction 'meen'; did you mean 'mean'"),
        (sites.attention(reduce_keys="max"), "unknown reduction 'max'"),
        (
            sites.resid_post(positions=torch.ones(2, 3)),
            r"mask must be bool \[batch, position\], found torch.float32 \[2, 3\]",
        ),
        (sites.resid_post(positions=torch.ones(3).bool()), r"found torch.bool \[3\]"),
        (sites.resid_post(positions=[1, 2]), "or a bool tensor.*found list"),
        (sites.vision_resid_post(positions=torch.ones(1, 17).bool()), "one of 'all', 'cls', 'patches'; found Tensor"),
        ("resid_post", "a trace takes sites such as"),
    ],
)
def test_sites_that_do_not_fit(site, match, llava):
    with pytest.raises(InputError, match=match), llava.trace(site):
        pytest.fail("the trace was opened")


def test_no_site_and_one_label_twice(llava):
    with pytest.raises(InputError, match="a trace of no site"), llava.trace():
        pass
    with pytest.raises(InputError, match="two recordings are called 'z'"), llava.trace(sites.z(), sites.z(layers=[1])):
        pass


def test_cls_of_a_tower_without_one(llava_siglip):
    with pytest.raises(InputError, match="has no CLS token"), llava_siglip.trace(sites.vision_attention()):
        pass


def test_numbers_may_come_from_numpy(llava):
    (site,) = check_sites([sites.z(layers=np.arange(2), heads=[np.int64(3)])], llava.anatomy)
    assert site.layers == (0, 1)
    assert site.heads == (3,)
    assert check_sites([sites.resid_post(layers=np.int32(1))], llava.anatomy)[0].layers == (1,)


def test_a_mask_of_another_shape_is_refused_before_the_model_runs(llava, image, monkeypatch):
    batch = llava.encode([image(0)], ["<image> what ?"])
    monkeypatch.setattr(llava.model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    mask = torch.ones(1, 5, dtype=torch.bool)
    for site in (sites.resid_post(positions=mask), sites.attention(queries=mask), sites.attention(keys=mask)):
        with llava.trace(site) as trace:
            with pytest.raises(InputError, match=r"mask of shape \[1, 5\] for a batch of shape \[1, 19\]"):
                llava.forward(batch)
            assert trace.batch is None


def test_a_model_in_training_mode_is_refused_before_it_runs(llava, image, monkeypatch):
    batch = llava.encode([image(0)], ["<image> what ?"])
    monkeypatch.setattr(llava.model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    llava.model.train()
    try:
        with pytest.raises(InputError, match=r"training mode.*call model\.eval\(\)"):
            llava.forward(batch)
        with pytest.raises(InputError, match="training mode"):
            llava.generate(batch)
    finally:
        llava.model.eval()


def test_asking_a_trace_for_what_it_does_not_hold(llava, image):
    with llava.trace(sites.resid_post(layers=[1]), sites.z(positions="generated")) as trace:
        assert "nothing has run yet" in repr(trace)
        with pytest.raises(InputError, match=r"recorded nothing: call vlm\.forward or vlm\.generate inside"):
            trace["resid_post"]
        llava.forward(llava.encode([image(0)], ["<image> what ?"]))
    with pytest.raises(UnknownNameError, match="unknown recording 'resid_pots'; did you mean 'resid_post'"):
        trace["resid_pots"]
    with pytest.raises(UnknownNameError, match="unknown recording in this step 'attention'"):
        trace.steps[0]["attention"]
    with pytest.raises(InputError, match=r"layer 0 of 'resid_post' was not recorded; recorded: \[1\]"):
        trace["resid_post"][0]
    with pytest.raises(InputError, match=r"layer 2 of 'resid_post' was not recorded"):
        trace["blocks.2.hook_resid_post"]
    with pytest.raises(InputError, match="'z' recorded nothing: no position of this run is among 'generated'"):
        trace["z"][0]


def test_names_that_transformer_lens_does_not_have():
    with pytest.raises(UnknownNameError, match="unknown site with a TransformerLens name 'projector_out'"):
        sites.canonical_name("projector_out", 0)
