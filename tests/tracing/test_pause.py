"""A paused run: the model runs over something else, and nothing of it reaches the run, nor anything of the run reaches it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from untouched import snapshot

from slitlamp.decoding.edits import knock_out, scale_heads
from slitlamp.models import Batch
from slitlamp.tracing import Trace, check_sites, session, sites
from slitlamp.tracing.pause import Pause
from slitlamp.vlm import VLM

SITES = (sites.resid_post(positions="all"), sites.attention(queries="all", keys="all"), sites.vision_resid_post())


@pytest.fixture(scope="module")
def batch(llava: VLM, image: Any) -> Batch:
    return llava.encode([image(0), image(1)], ["<image> is there a dog ?", "what is in the <image> ?"])


@pytest.fixture(scope="module")
def other(llava: VLM, image: Any) -> Batch:
    """Of another size and shape."""
    return llava.encode([image(2)], ["<image> describe this red cat ."])


def trace_of(vlm: VLM) -> Trace:
    return Trace(check_sites(SITES, vlm.anatomy))


def edits_of() -> list[Any]:
    return [*scale_heads([(1, 0)], 4.0), *knock_out([0, 2], "all", "image")]


def run(vlm: VLM, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = vlm._call(batch).logits
    return logits


def test_what_runs_in_a_pause_is_neither_recorded_nor_edited(llava: VLM, batch: Batch, other: Batch) -> None:
    plain = run(llava, other)
    whole, paused, pause = trace_of(llava), trace_of(llava), Pause()
    with session(llava.model, llava.anatomy, batch, traces=[whole], edits=edits_of(), decoding=True):
        wanted = run(llava, batch)
    with session(
        *(llava.model, llava.anatomy, batch), traces=[paused], edits=edits_of(), decoding=True, pause=pause
    ) as calls:
        with pause.set(True):
            assert torch.equal(run(llava, other), plain)
        assert calls.number == -1
        assert torch.equal(run(llava, batch), wanted)
        with pause.set(True):
            assert torch.equal(run(llava, other), plain)
        assert calls.number == 0
    for site in SITES:
        for layer in whole[site.label]:
            assert torch.equal(paused[site.label][layer], whole[site.label][layer])


def test_two_runs_take_turns(llava: VLM, batch: Batch, other: Batch) -> None:
    """Each with recordings and edits of its own on the same modules."""
    alone: dict[str, tuple[Trace, torch.Tensor]] = {}
    for name, one, edits in (("first", batch, edits_of()), ("second", other, [])):
        trace = trace_of(llava)
        with session(llava.model, llava.anatomy, one, traces=[trace], edits=edits, decoding=True):
            alone[name] = (trace, run(llava, one))
    traces, first, second = (trace_of(llava), trace_of(llava)), Pause(), Pause(on=True)
    model: Any = (llava.model, llava.anatomy)
    with (
        session(*model, batch, traces=[traces[0]], edits=edits_of(), decoding=True, pause=first),
        first.set(True),
        session(*model, other, traces=[traces[1]], decoding=True, pause=second),
    ):
        with second.set(False):
            assert torch.equal(run(llava, other), alone["second"][1])
        with first.set(False):
            assert torch.equal(run(llava, batch), alone["first"][1])
    for trace, (wanted, _) in zip(traces, alone.values(), strict=True):
        for site in SITES:
            for layer in wanted[site.label]:
                assert torch.equal(trace[site.label][layer], wanted[site.label][layer])


def test_an_error_in_a_pause_leaves_the_run_and_the_model_as_they_were(llava: VLM, batch: Batch, other: Batch) -> None:
    before = snapshot(llava)
    pause = Pause()

    def refuse(module: Any, args: Any) -> None:
        raise RuntimeError("on purpose")

    with session(
        *(llava.model, llava.anatomy, batch), traces=[trace_of(llava)], edits=edits_of(), decoding=True, pause=pause
    ):
        handle = llava.model.get_submodule(llava.anatomy.blocks[1]).register_forward_pre_hook(refuse)
        with pytest.raises(RuntimeError, match="on purpose"), pause.set(True):
            run(llava, other)
        handle.remove()
        assert not pause.on
        run(llava, batch)
    assert snapshot(llava) == before
