"""Models that accelerate has spread over devices: the same recordings, edits, answers and hash as in one piece."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretend_devices import PretendDevices, dispatch
from tiny_models import BUILDERS
from torch import Tensor, nn

import slitlamp as sl
from interventions import HeadReinforcement
from probes import HeadDivergence
from slitlamp.errors import UnsupportedError
from slitlamp.models import Batch
from slitlamp.tracing import Edit, Site
from slitlamp.tracing.session import session
from slitlamp.vlm import VLM

SITES = (
    sl.sites.resid_post(positions="image"),
    sl.sites.resid_pre(positions="text", reduce="mean"),
    sl.sites.z(positions="last"),
    sl.sites.attention(queries="last", keys="image"),
    sl.sites.attention(queries="text", keys="all", reduce_keys="sum", label="to_all"),
    sl.sites.vision_resid_post(positions="patches"),
    sl.sites.vision_attention(queries="all", keys="all"),
    sl.sites.projector_out(),
)
LAYERS = "model.language_model.layers"
PIECES: dict[str, dict[str, str]] = {
    "last blocks on disk": {
        **dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "lm_head"), "cpu"),
        **{f"model.language_model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")},
        **{f"{LAYERS}.0": "cpu", f"{LAYERS}.1": "disk", f"{LAYERS}.2": "disk"},
    },
    "all on disk": {
        **dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "model.language_model"), "disk"),
        "lm_head": "cpu",
    },
}


@pytest.fixture(scope="module")
def folder(llava: VLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    llava.model.save_pretrained(folder)
    llava.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> VLM:
    return VLM.from_pretrained(folder)


@pytest.fixture(scope="module", params=[*PIECES, "auto"])
def spread(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    device_map = PIECES.get(request.param, "auto")
    return VLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path_factory.mktemp("offload"))


def encoded(vlm: VLM, image: Callable[..., Any]) -> Batch:
    prompts = ["<image> is there a dog in the <image> ?", "<image> what is this"]
    return vlm.encode(images=[[image(0), image(1)], image(2)], prompts=prompts)


def runs(vlm: VLM, batch: Batch) -> dict[str, Any]:
    """Recordings of a forward pass and of a generation, answers and logits."""
    with vlm.trace(*SITES) as forward:
        logits = vlm.forward(batch).logits
    with vlm.trace(*SITES) as decoding:
        generation = vlm.generate(batch, max_new_tokens=4)
    with vlm.apply(HeadReinforcement(alpha=3.0)):
        reinforced = vlm.generate(batch, max_new_tokens=4)
    found: dict[str, Any] = {"tokens": generation.tokens, "reinforced": reinforced.tokens, "logits": logits}
    for name, trace in (("forward", forward), ("generate", decoding)):
        found |= {f"{name} {label} {n}": one for label in trace.sites for n, one in trace.record(label).items()}
        found |= {f"{name} mask {label}": trace.mask(label) for label in trace.sites}
    return found


def hooks(vlm: VLM) -> dict[str, tuple[int, int, Any]]:
    """The hooks of every module: torch's, and the forward that accelerate has put in place of the module's own."""
    return {
        name: (len(one._forward_hooks), len(one._forward_pre_hooks), one.__dict__.get("forward"))
        for name, one in vlm.model.named_modules()
    }


def test_recordings_and_answers(whole: VLM, spread: VLM, image: Callable[..., Any]) -> None:
    spread.forward(encoded(spread, image))  # transformers attaches hooks of its own in a model's first call
    before = hooks(spread)
    expected = runs(whole, encoded(whole, image))
    found = runs(spread, encoded(spread, image))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value, name
    assert hooks(spread) == before


def test_edits(whole: VLM, spread: VLM, image: Callable[..., Any]) -> None:
    """An edit at every kind of place reaches the model, also where the weights come and go with each call."""
    places = [
        ("resid_pre", 1),
        ("resid_post", 1),
        ("z", 2),
        ("mlp_out", 2),
        ("projector_out", 0),
        ("vision_resid_post", 0),
    ]
    for site, layer in places:
        logits = []
        for vlm in (whole, spread):
            batch = encoded(vlm, image)
            edit = Edit(site, layer, lambda values, calls: values * 0.5)
            with torch.no_grad(), session(vlm.model, vlm.anatomy, batch, edits=[edit]):
                logits.append(vlm.model(**batch.inputs()).logits)
            unchanged = vlm.model(**batch.inputs()).logits
            assert not torch.equal(logits[-1], unchanged), site
        assert torch.equal(*logits), site


def test_hash_and_device(whole: VLM, spread: VLM, folder: Path) -> None:
    assert spread.device == torch.device("cpu")
    assert spread.weights_hash == whole.weights_hash
    changed = VLM.from_pretrained(folder)
    with torch.no_grad():
        changed.model.lm_head.weight[0, 0] += 1
    assert changed.weights_hash != whole.weights_hash


def test_weights_are_really_offloaded(folder: Path, tmp_path: Path) -> None:
    """Or the tests above would say nothing."""
    vlm = VLM.from_pretrained(folder, device_map=PIECES["all on disk"], offload_folder=tmp_path)
    assert next(vlm.model.get_input_embeddings().parameters()).device.type == "meta"
    assert {one.device.type for one in vlm.model.model.language_model.parameters()} == {"meta"}


def test_a_model_without_numbers_has_no_hash(whole: VLM) -> None:
    with torch.device("meta"):
        model = type(whole.model)(whole.model.config)
    with pytest.raises(UnsupportedError, match="is on the meta device, so this model has no numbers"):
        _ = VLM.wrap(model, whole.processor).weights_hash


def pieces(module: nn.Module, disk: set[str], path: str = "") -> Iterator[tuple[str, str]]:
    """A device map in which these modules are on disk and everything else is not."""
    below = [one for one in disk if one == path or one.startswith(f"{path}." if path else "")]
    if path in disk or not below:
        yield path, "disk" if path in disk else "cpu"
        return
    for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield f"{path}.{name}".lstrip("."), "cpu"
    for name, child in module.named_children():
        yield from pieces(child, disk, f"{path}.{name}".lstrip("."))


@pytest.mark.parametrize("name", list(BUILDERS))
def test_every_family(name: str, image: Callable[..., Any], tmp_path: Path) -> None:
    """Every site of every family, with all blocks but the first on disk, those of the vision tower too."""
    vlm = BUILDERS[name]()
    vlm.model.save_pretrained(tmp_path / "model")
    kept = type(vlm.model).from_pretrained(tmp_path / "model")
    device_map = dict(pieces(vlm.model, {*vlm.anatomy.vision_blocks[1:], *vlm.anatomy.blocks[1:]}))
    spread = type(vlm.model).from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "off")
    for one in (kept, spread):
        one.generation_config = vlm.model.generation_config
    placeholder = vlm.anatomy.family.placeholder
    before = "" if placeholder is None else f"{getattr(vlm.processor, placeholder)} "
    recorded = []
    for model in (kept, spread):
        part = VLM.wrap(model.eval(), vlm.processor)
        batch = part.encode(
            images=[image(0, 40, 24), image(1, 20, 20)], prompts=[f"{before}is there", f"{before}a dog in"]
        )
        sites = [
            Site(site, queries="all", keys="image" if site == "cross_attention" else "all", label=site)
            for site in part.anatomy.places
        ]
        with part.trace(*sites) as trace:
            part.forward(batch)
        values = {(site, layer): one for site in trace.sites for layer, one in trace.record(site).items()}
        recorded.append((values, part.generate(batch, max_new_tokens=3).tokens, part.weights_hash, part.device))
    (expected, *facts), (found, *others) = recorded
    assert others == facts
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


# -- two devices ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(build_llava: Any) -> VLM:
    """The first block on the first device, the others, the norm and the head on a second one that is pretended."""
    vlm: VLM = build_llava()
    model = copy.deepcopy(vlm.model)
    second = (f"{LAYERS}.1", f"{LAYERS}.2", "model.language_model.norm", "lm_head")
    dispatch(model, dict.fromkeys(second, "cuda:1") | {"model.multi_modal_projector": "cuda:2"})
    return VLM.wrap(model, vlm.processor)


def test_the_pretended_devices_are_kept_apart() -> None:
    with PretendDevices():
        here, there = torch.ones(3), torch.ones(3).to("cuda:1")
        assert (here + 1).device == torch.device("cpu")
        assert (there * 2).device == torch.device("cuda:1")
        assert torch.equal((there * 2).cpu(), here + 1)
        assert there[torch.tensor([0, 1])].device == torch.device("cuda:1")
        assert here.to(there.device).device == there.device
        with pytest.raises(RuntimeError, match="same device"):
            here + there
        with pytest.raises(RuntimeError, match="same device"):
            torch.stack([here, there])
        with pytest.raises(RuntimeError, match="same device"):
            there.masked_fill(here.bool(), 0)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(there)


def test_masks_follow_the_values(pair: VLM, llava: VLM, image: Callable[..., Any]) -> None:
    """Recordings, edits and interventions on layers of two devices: nothing meets what is elsewhere."""
    expected = runs(llava, encoded(llava, image))
    with PretendDevices():
        batch = encoded(pair, image)
        found = runs(pair, batch)
        devices = {name: value.device.index for name, value in found.items() if isinstance(value, Tensor)}
        assert devices["forward resid_post 0"] is None
        assert devices["forward resid_post 1"] == 1, "a recording stays where it was made"
        assert devices["forward projector_out 0"] == 2
        found = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in found.items()}
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value, name


TOWER_IN_ONE_PIECE = ("vipllava", "mllama")
"""Models that put the states of several layers of the tower together, without moving them."""


@pytest.mark.parametrize("name", list(BUILDERS))
def test_every_family_on_three_devices(name: str, image: Callable[..., Any]) -> None:
    """Every site of every family, forward and decoding, with the tower's later blocks and the decoder's on other devices."""
    vlm = BUILDERS[name]()
    one = vlm.anatomy
    placeholder = one.family.placeholder
    before = "" if placeholder is None else f"{getattr(vlm.processor, placeholder)} "
    sites = [
        Site(site, queries="all", keys="image" if site == "cross_attention" else "all", label=site)
        for site in one.places
    ]
    sites += [
        Site(site, positions="image", reduce="mean", label=f"{site} mean") for site in ("resid_post", "z", "mlp_pre")
    ]

    def recorded(vlm: VLM) -> dict[Any, Any]:
        batch = vlm.encode(
            images=[image(0, 40, 24), image(1, 20, 20)], prompts=[f"{before}is there", f"{before}a dog in"]
        )
        with vlm.trace(*sites) as forward:
            vlm.forward(batch)
        with vlm.trace(*(site for site in sites if site.name != "logits")) as decoding:
            generation = vlm.generate(batch, max_new_tokens=3)
        found: dict[Any, Any] = {"tokens": generation.tokens}
        for trace in (forward, decoding):
            found |= {
                (trace.decoding, label, n): one for label in trace.sites for n, one in trace.record(label).items()
            }
        for label in forward.sites:
            if forward.record(label).layers:
                assert forward.record(label).stack().device == forward.mask(label).device
        return found

    expected = recorded(vlm)
    model = copy.deepcopy(vlm.model)
    later = [*one.blocks[1:], one.modules["final_norm"]]
    if model.get_submodule(one.modules["head"]).weight is not model.get_input_embeddings().weight:
        later.append(one.modules["head"])
    tower = [one.modules["vision_tower"]] if name in TOWER_IN_ONE_PIECE else list(one.vision_blocks[1:])
    dispatch(model, dict.fromkeys(later, "cuda:1") | dict.fromkeys(tower, "cuda:2"))
    with PretendDevices():
        found = recorded(VLM.wrap(model, vlm.processor))
        assert {value.device.index for value in found.values() if isinstance(value, Tensor)} == {None, 1, 2}
        found = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in found.items()}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value, key


def test_stacked_layers_of_two_devices(pair: VLM, image: Callable[..., Any]) -> None:
    with PretendDevices():
        with pair.trace(sl.sites.resid_post(positions="image")) as trace:
            pair.forward(encoded(pair, image))
        stacked = trace.record("resid_post").stack()
        mask = trace.mask("resid_post")
        assert (stacked.norm(dim=-1) * mask).shape == stacked.shape[:-1]


def test_a_probe_on_two_devices(pair: VLM, llava: VLM, image: Callable[..., Any]) -> None:
    expected, found = HeadDivergence(n_resamples=100), HeadDivergence(n_resamples=100)
    llava.measure(expected, llava.generate(encoded(llava, image), max_new_tokens=3).teacher_forced())
    with PretendDevices():
        pair.measure(found, pair.generate(encoded(pair, image), max_new_tokens=3).teacher_forced())
    for name, table in expected.result().tables.items():
        assert table.equals(found.result().tables[name])


@pytest.mark.parametrize("how", ["zero", "mean", "deleted", "noise"])
def test_without_the_image_on_two_devices(how: Any, pair: VLM, llava: VLM, image: Callable[..., Any]) -> None:
    from slitlamp.decoding import image_free

    logits = []
    for vlm, mode in ((llava, None), (pair, PretendDevices())):
        with torch.no_grad():
            if mode is None:
                batch, edits = image_free(encoded(vlm, image), how)
                with session(vlm.model, vlm.anatomy, batch, edits=edits):
                    logits.append(vlm.model(**batch.inputs()).logits)
            else:
                with mode:
                    batch, edits = image_free(encoded(vlm, image), how)
                    with session(vlm.model, vlm.anatomy, batch, edits=edits):
                        logits.append(vlm.model(**batch.inputs()).logits.cpu())
    assert torch.equal(*logits)


def test_sites_are_those_of_the_model(whole: VLM) -> None:
    assert all(isinstance(site, Site) for site in SITES)
    assert {site.name for site in SITES} <= set(whole.anatomy.places)
