"""Recorded logits are the model's own, also where it computes those of few positions."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from slitlamp.errors import UnsupportedError
from slitlamp.tracing import Probe, ProbeResult, sites


@pytest.fixture
def batch(llava, image):
    return llava.encode([image(0), None], ["<image> what ?", "is there a dog in the image ?"])


def test_logits_of_chosen_positions(llava, batch):
    with llava.trace(
        sites.logits("all"), sites.logits(label="last"), sites.logits("text", reduce="mean", label="mean")
    ) as trace:
        wanted = llava.forward(batch).logits
    assert torch.equal(trace["logits"][0][trace.mask("logits")], wanted[batch.real_mask])
    assert torch.equal(trace["last"][0], wanted[:, -1:])
    for row in range(2):
        torch.testing.assert_close(trace["mean"][0][row], wanted[row][batch.text_mask[row]].mean(dim=0))


@pytest.mark.parametrize("kept", [1, 3])
def test_when_the_model_computes_the_last_logits_alone(kept, llava, batch):
    wanted = llava.forward(batch).logits
    last = torch.zeros_like(batch.image_mask)
    last[:, -kept:] = True
    with llava.trace(sites.logits(last)) as trace:
        llava.forward(batch, logits_to_keep=kept)
    torch.testing.assert_close(trace["logits"][0], wanted[:, -kept:])
    with (
        llava.trace(sites.logits("all")),
        pytest.raises(UnsupportedError, match=f"logits of the last {kept} positions alone"),
    ):
        llava.forward(batch, logits_to_keep=kept)


def test_logits_of_a_generation_choose_its_tokens(llava, batch):
    with llava.trace(sites.logits("before_generated")) as trace:
        generation = llava.generate(batch, max_new_tokens=4)
    scores = trace["logits"][0].clone()
    scores[..., [0, 1, 4]] = -torch.inf  # suppressed in generation
    for row, tokens in enumerate(generation.tokens):
        assert scores[row].argmax(dim=-1)[: len(tokens)].tolist() == list(tokens)


@dataclass
class Scores(Probe):
    name: ClassVar[str] = "scores"
    seen: list[Any] = field(default_factory=list)

    def sites(self, anatomy):
        return [sites.logits("all")]

    def update(self, batch, trace, labels=None):
        self.seen.append(trace["logits"][0])

    def state(self):
        return {}

    def load_state(self, state): ...

    def merge(self, other): ...

    def result(self):
        return ProbeResult(self.name, {}, "")


def test_a_probe_may_ask_for_all_logits(llava, batch):
    probe = Scores()
    llava.measure(probe, batch)
    assert probe.seen[0].shape == (2, max(batch.lengths), llava.anatomy.d_vocab)
