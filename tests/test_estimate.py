"""What an estimate says against what is really there: weights, caches and recordings of the tiny models of every family."""

from __future__ import annotations

import io
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from rich.console import Console
from tiny_models import BUILDERS
from transformers import AutoModelForImageTextToText

import slitlamp as sl
from slitlamp.cli import main
from slitlamp.errors import InputError, UnknownNameError
from slitlamp.estimates import _spread, estimate, parse_site
from slitlamp.inspection import estimate_model, estimate_sections, in_bytes, inspect_model
from slitlamp.models import Batch
from slitlamp.tracing.sites import Site
from slitlamp.tracing.sizes import ItemSize, trace_bytes
from slitlamp.vlm import VLM

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "docs" / "qwen2_5_vl_72b.json"


OF_THE_IMAGE = (
    *("llava_next", "llava_onevision", "internvl", "aya_vision", "idefics3", "smolvlm", "mistral3", "llava pixtral"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llama4"),
)
"""Families in which the number of image tokens depends on the size of the image."""


@pytest.fixture(scope="module", params=list(BUILDERS))
def built(request: pytest.FixtureRequest) -> VLM:
    """Every family in turn."""
    return BUILDERS[request.param]()


SIZES = ((40, 24), (12, 12))


def encoded(vlm: VLM, image: Callable[..., Any], size: tuple[int, int] = SIZES[0]) -> Batch:
    """One item about an image of so many pixels, with a continuation of two tokens."""
    placeholder = vlm.anatomy.family.placeholder
    before = "" if placeholder is None else f"{getattr(vlm.processor, placeholder)} "
    batch = vlm.encode(images=[image(0, *size)], prompts=[f"{before}is there a dog"])
    return batch.with_continuation([[7, 8]])


def all_sites(vlm: VLM) -> list[Site]:
    """Every site of a model with every position, and most with fewer."""
    found = []
    for name in vlm.anatomy.places:
        keys: Any = "image" if name == "cross_attention" else "all"
        found.append(Site(name, positions="all", queries="all", keys=keys, label=name))
        if name.endswith("attention"):
            rows: Any = "patches" if name == "vision_attention" else "before_generated"
            found.append(Site(name, queries=rows, keys=keys, reduce_keys="sum", heads=(1,), label=f"{name} summed"))
            found.append(Site(name, queries=rows, keys=keys, reduce_queries="mean", label=f"{name} queries"))
            found.append(Site(name, queries=rows, keys=keys, reduce_heads="mean", label=f"{name} heads"))
        elif name != "projector_out":
            places: Any = (
                ("patches",)
                if name.startswith("vision_")
                else ("image", "text", "text_after_image", "last", "generated")
            )
            found += [Site(name, positions=one, label=f"{name} {one}") for one in places]
            found.append(Site(name, positions=places[0], reduce="mean", label=f"{name} mean"))
    found += [
        Site(name, heads=(1,), label=f"{name} of a head") for name in ("q", "k", "v", "z") if name in vlm.anatomy.places
    ]
    return found


def meta(vlm: VLM) -> Any:
    """The model without its numbers."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(vlm.model.config)


@pytest.mark.parametrize("size", SIZES)
def test_recordings(built: VLM, size: tuple[int, int], image: Callable[..., Any]) -> None:
    """Every recording of one item takes the bytes that its meta model says, for every family and site."""
    batch = encoded(built, image, size)
    sites = all_sites(built)
    item = ItemSize.of(batch, built.anatomy, built.model.config)
    expected = trace_bytes(meta(built), built.anatomy, sites, item, built.dtype)
    with built.trace(*sites) as trace:
        built.forward(batch)
    found = dict.fromkeys(expected, 0)
    for step in trace.steps:
        for label, layers in step.values.items():
            found[label] += sum(one.nbytes for one in layers.values())
    assert found == expected
    assert trace.nbytes() == sum(expected.values())


@pytest.mark.parametrize("name", list(BUILDERS))
def test_the_item_of_a_configuration(name: str, image: Callable[..., Any], tmp_path: Path) -> None:
    """What a configuration alone tells is what the processor makes of an image, for families that treat all images alike."""
    vlm = BUILDERS[name]()
    vlm.model.config.save_pretrained(tmp_path)
    batch = encoded(vlm, image, (64, 64))  # the most tiles
    made = ItemSize.of(batch, vlm.anatomy, vlm.model.config)
    told = inspect_model(str(tmp_path / "config.json")).n_image_tokens
    assert told in (None, made.image_tokens)
    assert (told is None) == (name in OF_THE_IMAGE)
    sizes = {"image_tokens": made.image_tokens, "text_tokens": made.text_tokens, "new_tokens": 2}
    known = estimate_model(str(tmp_path / "config.json"), ["resid_post:last"], **sizes).item
    assert known.tile_positions in (None, made.tile_positions)
    if made.tiles == known.tiles:
        assert known.projected in (None, made.projected)
        assert known.cross_keys == made.cross_keys


def test_half_precision(llava: VLM, image: Callable[..., Any]) -> None:
    """What is reduced is stored in float32, the rest in the dtype of the model."""
    vlm = VLM.wrap(type(llava.model)(llava.model.config).to(torch.bfloat16).eval(), llava.processor)
    batch = encoded(vlm, image)
    sites = all_sites(vlm)
    item = ItemSize.of(batch, vlm.anatomy, vlm.model.config)
    with vlm.trace(*sites) as trace:
        vlm.forward(batch)
    assert trace.nbytes() == sum(trace_bytes(vlm.model, vlm.anatomy, sites, item, torch.bfloat16).values())


@pytest.mark.parametrize("size", SIZES)
def test_weights_and_cache(built: VLM, size: tuple[int, int], image: Callable[..., Any]) -> None:
    batch = encoded(built, image, size)
    item = ItemSize.of(batch, built.anatomy, built.model.config)
    one = estimate(meta(built), built.anatomy, item, ["resid_post:last"], dtype=torch.float32)
    state = {(value.data_ptr(), value.shape): value for value in built.model.state_dict().values() if value.numel()}
    assert one.weights[torch.float32] == sum(value.nbytes for value in state.values())
    with torch.no_grad():
        positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        places = {} if built.anatomy.family.first_position is None else {"position_ids": positions}
        output = built.model(**batch.inputs(), **places, use_cache=True)
        cache = getattr(
            output, "language_model_outputs", output
        ).past_key_values  # BLIP-2 passes on what its decoder gives
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert one.cache_per_item == sum(tensor.nbytes for tensor in held)
    assert one.cache_per_token <= one.cache_per_item


def test_the_item_of_a_processor(llava: VLM, tmp_path: Path, image: Callable[..., Any]) -> None:
    """The number of tokens comes from the processor, if there is one, and else from the configuration or the user."""
    llava.model.config.save_pretrained(tmp_path)
    llava.processor.save_pretrained(tmp_path)
    found = estimate_model(str(tmp_path), dtype="float32", image_size=(64, 32), new_tokens=2)
    batch = llava.encode(images=[image(0, 64, 32)], prompts=["<image> Describe this image in detail."])
    assert found.item == ItemSize.of(batch.with_continuation([[7, 8]]), llava.anatomy, llava.model.config)
    assert estimate_model(str(tmp_path), text_tokens=30).item.text_tokens == 30

    shutil.copy(tmp_path / "config.json", tmp_path / "alone.json")
    assert estimate_model(str(tmp_path / "alone.json")).item.image_tokens == 16, "of its tower, not of the usual one"
    with pytest.raises(
        InputError, match="depends on its processor, and a configuration file has none; give the number"
    ):
        estimate_model(str(CONFIG))
    known = estimate_model(str(tmp_path / "alone.json"), ["vision_resid_post:patches"], image_tokens=16, text_tokens=5)
    assert known.item == replace(known.item, image_tokens=16, text_tokens=5, tile_positions=17, projected=16)
    assert known.trace == llava.anatomy.n_vision_layers * 16 * llava.anatomy.d_vision * 2


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_the_pieces_of_a_model(n: int) -> None:
    """Nothing is lost when a model is cut, and the fullest device holds no more than any other cut would give it."""
    sizes = torch.randint(1, 50, (12,), generator=torch.Generator().manual_seed(n)).tolist()
    pieces = [(str(i), size) for i, size in enumerate(sizes)]
    cut = _spread(pieces, n)
    assert [piece for part in cut for piece in part] == pieces
    assert len(cut) <= n

    def best(first: int, parts: int) -> int:
        if parts == 1 or first == len(sizes):
            return sum(sizes[first:])
        return min(max(sum(sizes[first:end]), best(end, parts - 1)) for end in range(first, len(sizes) + 1))

    assert max(sum(size for _, size in part) for part in cut) == best(0, n)


def test_gpus(llava: VLM, image: Callable[..., Any]) -> None:
    item = ItemSize.of(encoded(llava, image), llava.anatomy, llava.model.config)
    sites = ["resid_post:image", "vision_resid_post:all", "logits:last"]
    one = estimate(llava.model, llava.anatomy, item, sites, dtype=torch.float32, batch=3)
    (whole,) = one.gpus
    assert whole.blocks == (0, 1, 2)
    assert (whole.recordings, whole.cache) == (3 * one.trace, 3 * one.cache_per_item)
    several = estimate(llava.model, llava.anatomy, item, sites, dtype=torch.float32, batch=3, gpus=3).gpus
    for part in ("weights", "cache", "recordings"):
        assert sum(getattr(share, part) for share in several) == getattr(whole, part), part
    assert [block for share in several for block in share.blocks] == [0, 1, 2]
    assert max(share.weights for share in several) < whole.weights
    buffers = sum(value.nbytes for value in llava.model.buffers())
    assert whole.weights - one.weights[torch.float32] <= buffers, "buffers that are not saved take memory too"


def test_a_large_model_needs_no_memory() -> None:
    """The 72-billion-parameter model of the documentation, on the meta device: its published number of parameters."""
    found = inspect_model(str(CONFIG))
    assert found.n_parameters == 73_410_777_344
    one = estimate_model(str(CONFIG), image_tokens=391, gpus=8, items=10)
    assert one.weights[torch.bfloat16] == 2 * found.n_parameters
    assert one.cache_per_token == 80 * 2 * 8 * 128 * 2
    assert len(one.gpus) == 8
    assert one.store == 10 * one.trace
    assert one.trace == 80 * (8192 * 4 + 8192 * 2 + 64 * 128 * 2 + 64 * 391 * 2)


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("resid_post", sl.sites.resid_post()),
        ("resid_post:image:mean", sl.sites.resid_post(positions="image", reduce="mean")),
        ("z:last:layers=0,4-6:heads=1", sl.sites.z(positions="last", layers=[0, 4, 5, 6], heads=[1])),
        ("attention", sl.sites.attention()),
        ("attention:text:image", sl.sites.attention(queries="text", keys="image")),
        ("attention:last:image:reduce_keys=sum", sl.sites.attention(reduce_keys="sum")),
        ("cross_attention:text:layers=3", sl.sites.cross_attention(queries="text", layers=[3])),
        ("vision_attention:cls:patches", sl.sites.vision_attention()),
        ("logits:last", sl.sites.logits()),
        ("projector_out:mean", sl.sites.projector_out(reduce="mean")),
    ],
)
def test_sites_as_texts(text: str, site: Site) -> None:
    assert parse_site(text) == replace(site, label=text)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("resid_pots:image", UnknownNameError, "unknown site 'resid_pots'; did you mean 'resid_post'"),
        ("resid_post:image:mean:sum", InputError, "takes resid_post:positions:reduce"),
        ("resid_post:reduce_keys=sum", UnknownNameError, "unknown key in site"),
        ("z:heads=a", InputError, "expected numbers such as 0,4-8; found 'a'"),
        ("resid_post:heads=1", InputError, "heads"),
    ],
)
def test_texts_that_are_no_sites(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_site(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be a floating-point dtype"),
        ({"dtype": "bfloat61"}, "dtype must be a floating-point dtype"),
        ({"gpus": 0}, "gpus must be 1 or more, found 0"),
        ({"image_tokens": -1}, "image_tokens must be 0 or more"),
        ({"sites": ["resid_post:imgae"]}, "did you mean 'image'"),
        ({"sites": ["vision_attention:all:all"], "image_tokens": 4, "name": "next"}, "give the size of an image"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    name = options.pop("name", "organism")
    if name == "next":  # a tower whose patches the configuration does not count
        vlm = BUILDERS["llava pixtral"]()
        vlm.model.config.save_pretrained(tmp_path)
        name = str(tmp_path / "config.json")
    with pytest.raises(InputError, match=message):
        estimate_model(name, **options)


def test_texts() -> None:
    assert [in_bytes(n) for n in (0, 999, 1000, 999_499, 1_449_000_000, 9.25e12, 2e15)] == [
        *("0 B", "999 B", "1 kB", "999 kB", "1.45 GB", "9.25 TB", "2,000 TB")
    ]
    rows = estimate_sections(estimate_model("organism", gpus=2, items=1000, batch=4))
    assert rows["store of 1,000 items"][-1] == ("together", "15.4 MB")
    assert rows["store of 1,000 items"][0] == ("resid_post:image:mean", "4.61 MB")
    assert any("4 items per batch" in title for title in rows)


# -- the documentation -------------------------------------------------------------------------------------------------

SCALE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_documentation_shows_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("slitlamp.cli._silence_libraries", lambda: None)
    blocks = re.findall(r"```console\n\$ slitlamp (.*?)\n(.*?)\n```", SCALE, flags=re.DOTALL)
    assert len(blocks) == 3
    for arguments, shown in blocks:
        printed = io.StringIO()
        monkeypatch.setattr("slitlamp.cli.out", Console(width=110, file=printed))
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(arguments))
        assert not ended.value.code
        assert "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines()) == shown


def test_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load, script = re.findall(r"```python\n(.*?)```", SCALE, flags=re.DOTALL)
    compile(load, "scale.md", "exec")  # a model of the hub
    try:
        exec(compile(script, "scale.md", "exec"), {"__name__": "scale"})
    finally:
        PartialState._reset_state()  # tests that start processes do not want to find one
    store = sl.open_store(tmp_path / "activations")
    assert set(store.ids) == {item.id for item in sl.load_dataset("emoji_scenes/captions").take(6).items}
    sites = ["resid_post:image:mean", "attention:last:image"]
    expected = estimate_model("organism", sites, dtype="float32", items=6).store
    headers = 10_000 * len(store.shards())
    assert expected < store.nbytes < expected + headers, "the store takes what the estimate says, and its headers"
    for target in re.findall(r"\]\(([^)#:]+)\)", SCALE):
        assert (ROOT / "docs" / target).exists()
