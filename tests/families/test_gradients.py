"""What holds for every family's gradients: they are those of the model's own chain of blocks, row by row."""

from __future__ import annotations

import torch
from contract import close

from slitlamp.tracing import sites


def test_gradients_follow_the_blocks_and_stay_in_their_row(setting):
    """Of a logit of the first row's last token. With respect to the last block's output, the final norm and the head alone
    say it; with respect to its input, a sum of parts, it is that and what comes through attention and MLP.
    """
    vlm, batch = setting.vlm, setting.batch
    last = vlm.anatomy.n_layers - 1
    wanted = (sites.resid_post(layers=[last]), sites.resid_pre(), sites.vision_resid_post(), sites.projector_out())
    with vlm.trace(*wanted, gradient_of=lambda out: out.logits[0, -1, 7]) as trace:
        out = vlm.forward(batch)
    close(out.logits[batch.real_mask], setting.logits[batch.real_mask])
    state = trace["resid_post"][last][0, batch.lengths[0] - 1].clone().requires_grad_()
    norm = vlm.model.get_submodule(vlm.anatomy.modules["final_norm"])
    head = vlm.model.get_submodule(vlm.anatomy.modules["head"])
    logit = head(norm(state))[7]
    cap = vlm.anatomy.logit_softcap
    logit = logit if cap is None else cap * torch.tanh(logit / cap)
    (by_hand,) = torch.autograd.grad(logit, state)
    found = trace.gradients["resid_post"][last]
    close(found[0, batch.lengths[0] - 1], by_hand, 1e-4)
    assert not found[0, : batch.lengths[0] - 1].any()
    assert not found[1:].any()
    for layer in range(vlm.anatomy.n_layers):
        of_layer = trace.gradients["resid_pre"][layer]
        assert of_layer[0, : batch.lengths[0]].abs().max() > 1e-6
        assert not of_layer[1:].any()
    # of the image's tokens, and through them of the tiles of the first row and of no others
    own = batch.tiles[0]
    seen = trace.gradients["projector_out"][0]
    assert seen[:own].abs().amax(dim=(1, 2)).min() > 0
    assert not seen[own:].any()
    assert not trace.gradients["vision_resid_post"][0][own:].any()
    assert trace.gradients["vision_resid_post"][0][:own].abs().max() > 0
