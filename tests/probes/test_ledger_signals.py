"""The signals of the token ledger: by hand, and each again from separate unpadded runs of Hugging Face's eager model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from eager import Eager
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy

from probes import TokenLedger
from probes.ledger_readings import diffused
from probes.ledger_signals import SIGNALS, Signal, entropy, hellinger, register
from slitlamp.decoding.views import image_free
from slitlamp.errors import InputError, UnknownNameError
from slitlamp.models import Batch
from slitlamp.vlm import VLM

PROMPTS = {"a": "<image> is there a dog ?", "b": "<image> what is in the image and where is it ?"}
TOKENS = {"a": [6, 7, 8, 9, 12], "b": [10, 11]}
LABELS = {"a": ["other", "object", "other", "hallucinated", "object"], "b": ["hallucinated", "object"]}
SETTINGS: dict[str, Any] = {"top_k": 2, "n_outliers": 4, "lens_layers": [0, 1], "noise_step": 700, "n_resamples": 20}


def encoded(vlm: VLM, image: Any, names: str, lengths: dict[str, int] | None = None) -> Batch:
    """Some of the two items with their captions, or with the first tokens of them."""
    batch = vlm.encode(
        images=[image("ab".index(name)) for name in names], prompts=[PROMPTS[name] for name in names], ids=list(names)
    )
    return batch.with_continuation([TOKENS[name][: (lengths or {}).get(name)] for name in names])


def labelled(names: str) -> list[pd.DataFrame]:
    return [
        pd.DataFrame(
            {
                "token": range(len(TOKENS[name])),
                "word": [f"w{one}" for one in TOKENS[name]],
                "label": LABELS[name],
                "category": ["dog"] * len(TOKENS[name]),
                "frequency": [0.1 * one for one in range(len(TOKENS[name]))],
            }
        )
        for name in names
    ]


def heads_of(vlm: VLM, batch: Batch) -> torch.Tensor:
    """Head outputs at the last position [layer, head, d_head], from hooks on the output projections of an eager copy."""
    found: list[torch.Tensor] = []
    eager = Eager(vlm, batch)
    hooks = [
        eager.model.get_submodule(vlm.anatomy.out_proj(layer)).register_forward_pre_hook(
            lambda module, args: found.append(args[0][0, -1])
        )
        for layer in range(vlm.anatomy.n_layers)
    ]
    with torch.no_grad():
        eager.model(**batch.inputs(), use_cache=False)
    for one in hooks:
        one.remove()
    return torch.stack(found).unflatten(-1, (vlm.anatomy.n_heads, -1))


def brute_force(vlm: VLM, image: Any, name: str, step: int) -> dict[str, float]:
    """Every signal of one token from three runs of the prompt and the tokens before it, in float64 NumPy."""
    prefix = encoded(vlm, image, name, {name: step})
    token = TOKENS[name][step]
    runs = {
        "seen": Eager(vlm, prefix),
        "free": Eager(vlm, prefix.without_images()),
        "noised": Eager(vlm, diffused(prefix, SETTINGS["noise_step"], 0)),
    }
    logits = {key: run.logits[0, -1].double().numpy() for key, run in runs.items()}
    p = {key: np.exp(one - one.max()) / np.exp(one - one.max()).sum() for key, one in logits.items()}
    divergence = np.linalg.norm((heads_of(vlm, prefix) - heads_of(vlm, prefix.without_images())).numpy(), axis=-1)
    seen = runs["seen"]
    places = prefix.image_mask[0].numpy()
    weights = np.stack([one[0, :, -1].double().numpy().mean(axis=0)[places] for one in seen.attentions])
    cls = seen.vision_attentions[vlm.anatomy.n_vision_layers - 2][0].mean(dim=0)[0, 1:]
    outliers = cls.argsort(descending=True)[: SETTINGS["n_outliers"]].numpy()
    lens = 0.0
    for layer in SETTINGS["lens_layers"]:
        with torch.no_grad():
            states = seen.final_norm(seen.hidden[layer + 1][0, places])
            lens = max(lens, float(seen.model.lm_head(states).softmax(dim=-1)[:, token].max()))
    top = np.sort(p["seen"])[::-1]
    return {
        "t_vhd": np.sort(divergence, axis=1)[:, -SETTINGS["top_k"] :].sum(),
        "pdm_h": math.sqrt(((np.sqrt(p["seen"]) - np.sqrt(p["free"])) ** 2).sum() / 2),
        "visual_dependence": logits["seen"][token] - logits["noised"][token],
        "pmi": math.log(p["seen"][token] / p["free"][token]),
        "lens_agreement": lens,
        "attention_image": weights.sum(axis=1).mean(),
        "attention_outliers": weights.mean(axis=0)[outliers].sum() / weights.mean(axis=0).sum(),
        "attention_entropy": np.mean([scipy_entropy(one) / math.log(len(one)) for one in weights]),
        "surprisal": -math.log(p["seen"][token]),
        "entropy": scipy_entropy(p["seen"]),
        "margin": top[0] - top[1],
        "position": step,
        "frequency": 0.1 * step,
    }


@pytest.fixture(scope="module")
def ledger(llava: VLM, image: Any) -> pd.DataFrame:
    probe = TokenLedger(**SETTINGS)
    llava.measure(probe, encoded(llava, image, "ab"), labelled("ab"))
    return probe.result().tables["ledger"]


def test_every_signal_equals_separate_unpadded_eager_runs(llava: VLM, image: Any, ledger: pd.DataFrame) -> None:
    assert len(ledger) == 5
    for row in ledger.to_dict("records"):
        expected = brute_force(llava, image, row["item"], row["token"])
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=2e-4, abs=1e-6), (name, row["item"], row["token"])
    own = {"truthful_score", "random", "mention"}
    assert set(expected) == set(SIGNALS) - own  # no signal is left unchecked


def test_only_first_tokens_of_objects_have_rows(ledger: pd.DataFrame) -> None:
    assert ledger[["item", "token", "word", "label", "mention"]].values.tolist() == [
        ["a", 1, "w7", "object", 1],
        ["a", 3, "w9", "hallucinated", 2],
        ["a", 4, "w12", "object", 3],
        ["b", 0, "w10", "hallucinated", 1],
        ["b", 1, "w11", "object", 2],
    ]


def test_state_is_the_one_before_the_object(llava: VLM, image: Any) -> None:
    probe = TokenLedger(signals=["truthful_score"], truth_layer=0)
    llava.measure(probe, encoded(llava, image, "ab"), labelled("ab"))
    for row, (name, step) in enumerate([("a", 1), ("a", 3), ("a", 4), ("b", 0), ("b", 1)]):
        hidden = Eager(llava, encoded(llava, image, name, {name: step})).hidden[1][0, -1]
        np.testing.assert_allclose(probe.state()["rows.state"][row], hidden.numpy(), rtol=1e-4, atol=1e-5)


def test_a_tower_without_cls_uses_attention_received(llava_siglip: VLM, image: Any) -> None:
    probe = TokenLedger(signals=["attention_outliers"], n_outliers=3, vision_layer=1)
    llava_siglip.measure(probe, encoded(llava_siglip, image, "b"), labelled("b"))
    prefix = encoded(llava_siglip, image, "b", {"b": 1})
    eager = Eager(llava_siglip, prefix)
    received = eager.vision_attentions[1][0].mean(dim=(0, 1))
    chosen = received.argsort(descending=True)[:3]
    weights = torch.stack([one[0, :, -1].mean(dim=0)[prefix.image_mask[0]] for one in eager.attentions]).mean(dim=0)
    found = probe.ledger()["attention_outliers"].to_numpy()
    assert found[1] == pytest.approx(float(weights[chosen].sum() / weights.sum()), rel=1e-4)


def test_hellinger_and_entropy_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5, 1e-30]), torch.tensor([0.5, 1e-30, 0.5])
    # 1 - sum sqrt(pq) = 1 - .5
    assert float(hellinger(p.log(), q.log())) == pytest.approx(math.sqrt(0.5), rel=1e-5)
    assert float(hellinger(p.log(), p.log())) == 0
    assert float(entropy(torch.tensor([0.25] * 4))) == pytest.approx(math.log(4))
    assert float(entropy(torch.tensor([1.0, 0.0]))) == 0
    assert jensenshannon([1, 0], [0, 1], base=2) == float(hellinger(torch.eye(2).log()[0], torch.eye(2).log()[1])) == 1


def test_noise_of_the_first_step_is_next_to_nothing_and_of_the_last_is_everything(llava: VLM, image: Any) -> None:
    batch = encoded(llava, image, "ab")
    pixels = batch.extra["pixel_values"]
    noise = image_free(batch, "noise", 3)[0].extra["pixel_values"]
    first, last = (diffused(batch, step, 3).extra["pixel_values"] for step in (0, 999))
    # beta_0 = sigmoid(-6) * 0.00499 + 1e-5 = 2.2e-5: noise of sd 0.0047 on pixels of sd about 1
    assert float((first - pixels).abs().max()) < 0.03
    # the schedule keeps exp(-sum of betas) = exp(-2.5) of the variance at the end, as in VCD's release
    kept = math.exp(-sum(1 / (1 + math.exp(6 - 12 * i / 999)) * 0.00499 + 1e-5 for i in range(1000)))
    torch.testing.assert_close(last, math.sqrt(kept) * pixels + math.sqrt(1 - kept) * noise, rtol=0.02, atol=0.02)
    with pytest.raises(InputError, match="noise_step"):
        diffused(batch, 1000, 0)


def test_a_signal_of_ones_own_is_a_column(llava: VLM, image: Any) -> None:
    register(Signal("top_1", "largest p", "", "own", -1, lambda r: r.log_p.amax(dim=-1).exp(), needs=("logits",)))
    try:
        probe = TokenLedger(signals=["top_1", "surprisal"], n_resamples=20)
        llava.measure(probe, encoded(llava, image, "ab"), labelled("ab"))
        tables = probe.result().tables
        assert (tables["ledger"]["top_1"] >= np.exp(-tables["ledger"]["surprisal"]) - 1e-6).all()
        assert set(tables["ranking"]["signal"]) == {"top_1", "surprisal"}
        with pytest.raises(InputError, match="name of its own"):
            register(Signal("top_1", "", "", "", 1, None))
        register(Signal("two_each", "", "", "", 1, lambda r: r.logits, needs=("logits",)))
        with pytest.raises(InputError, match="two_each"):
            llava.measure(TokenLedger(signals=["two_each"]), encoded(llava, image, "ab"), labelled("ab"))
    finally:
        for name in ("top_1", "two_each"):
            SIGNALS.pop(name, None)


def test_what_cannot_be_a_signal_is_refused() -> None:
    with pytest.raises(InputError, match="sign"):
        register(Signal("odd", "", "", "", 2, None))
    with pytest.raises(UnknownNameError, match="logits"):
        register(Signal("odd", "", "", "", 1, None, needs=("logit",)))  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="family"):
        register(Signal("odd", "", "", "", 1, None, "state"))  # type: ignore[arg-type]
    assert "odd" not in SIGNALS
