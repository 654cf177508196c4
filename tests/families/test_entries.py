"""What holds for every entry: a wrong path is an error when the model is loaded, and a run leaves the model as it was."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from contract import all_sites, encode
from edits import Edits
from tiny_models import BUILDERS
from untouched import snapshot

from slitlamp.errors import UnsupportedError
from slitlamp.models import FAMILIES
from slitlamp.models.decoders import DECODERS, Decoder, decoder_of
from slitlamp.models.families import families_table
from slitlamp.models.towers import VISION_TOWERS, vision_tower_of
from slitlamp.tracing import Edit
from slitlamp.vlm import VLM

WRONG = "no_such.module"


def test_every_entry_has_a_tiny_model():
    assert {name.partition(" ")[0] for name in BUILDERS} == set(FAMILIES)


def test_the_name_of_a_tiny_model_is_its_family(setting):
    assert setting.vlm.anatomy.family is FAMILIES[setting.name.partition(" ")[0]]
    assert type(setting.vlm.model).__module__.startswith("transformers.models.")


@pytest.mark.parametrize("field", ["decoder", "head", "vision_tower", "projector", "generator", "kept"])
def test_a_wrong_path_of_a_family_is_an_error_at_load_that_names_it(field, setting, monkeypatch):
    vlm = setting.vlm
    right = vlm.anatomy.family
    several = isinstance(getattr(right, field), tuple)
    wrong = dataclasses.replace(right, **{field: (WRONG,) if several else WRONG})
    monkeypatch.setitem(FAMILIES, right.model_type, wrong)
    with pytest.raises(UnsupportedError, match=r"no_such") as caught:
        VLM.wrap(vlm.model, vlm.processor)
    assert right.name in str(caught.value)


def paths_of(block):
    """The fields of a block that name a module or a parameter."""
    return [one.name for one in dataclasses.fields(block) if isinstance(getattr(block, one.name), str)]


def test_a_wrong_path_in_a_block_is_an_error_at_load_that_names_it(setting, monkeypatch):
    vlm = setting.vlm
    text = vlm.model.config.get_text_config(decoder=True)
    decoder = decoder_of(text)
    kinds = [decoder.block_of(text, layer) for layer in range(vlm.anatomy.n_layers)]
    for layer, kind in enumerate(kinds):
        for name in paths_of(kind):
            wrong = dataclasses.replace(kind, **{name: WRONG})
            blocks = [wrong if one == layer else kinds[one] for one in range(len(kinds))]
            broken = dataclasses.replace(decoder, block=lambda config, number, blocks=blocks: blocks[number])
            monkeypatch.setitem(DECODERS, text.model_type, broken)
            with pytest.raises(UnsupportedError, match="no_such"):
                VLM.wrap(vlm.model, vlm.processor)
    for name in ("blocks", "final_norm"):
        monkeypatch.setitem(DECODERS, text.model_type, dataclasses.replace(decoder, **{name: WRONG}))
        with pytest.raises(UnsupportedError, match="no_such"):
            VLM.wrap(vlm.model, vlm.processor)
    monkeypatch.setitem(DECODERS, text.model_type, decoder)
    VLM.wrap(vlm.model, vlm.processor)


def test_a_wrong_path_in_a_tower_is_an_error_at_load_that_names_it(setting, monkeypatch):
    vlm = setting.vlm
    vision = vlm.model.config.vision_config
    tower = vision_tower_of(vision)
    wrong = [
        dataclasses.replace(tower, block=dataclasses.replace(tower.block, **{name: WRONG}))
        for name in paths_of(tower.block)
    ]
    wrong.append(dataclasses.replace(tower, blocks=(WRONG,)))
    wrong.append(dataclasses.replace(tower, more_blocks=WRONG))
    for one in wrong:
        monkeypatch.setitem(VISION_TOWERS, vision.model_type, one)
        with pytest.raises(UnsupportedError, match="no_such"):
            VLM.wrap(vlm.model, vlm.processor)


def test_a_run_leaves_the_model_its_configuration_and_its_processor_as_they_were(setting):
    vlm, batch = setting.vlm, setting.batch
    weights = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    before = snapshot(vlm)
    edits = [
        Edit(site, vlm.anatomy.layers(site)[0], lambda values, calls: values * 1.5)
        for site in ("resid_post", "z", "projector_out", "vision_z")
    ]
    with vlm.apply(Edits(edits)), vlm.trace(*all_sites(vlm)):
        vlm.forward(batch)
    prompts = encode(vlm, setting.pictures)
    with vlm.trace(*(site for site in all_sites(vlm) if site.name != "logits")):
        vlm.generate(prompts, max_new_tokens=2)
    with pytest.raises(ZeroDivisionError), vlm.apply(Edits([Edit("mlp_post", 0, lambda values, calls: 1 / 0)])):
        vlm.generate(prompts, max_new_tokens=2)
    with pytest.raises(ZeroDivisionError), vlm.apply(Edits([Edit("vision_z", 0, lambda values, calls: 1 / 0)])):
        vlm.forward(batch)
    after = snapshot(vlm)
    for name in before:
        assert after[name] == before[name], name
    assert all(torch.equal(tensor, weights[name]) for name, tensor in vlm.model.state_dict().items())


def test_recording_changes_the_answer_by_rounding_alone(setting):
    vlm = setting.vlm
    plain = vlm.forward(setting.batch).logits
    real = setting.batch.real_mask
    scale = max(1.0, float(plain[real].abs().max()))
    assert (plain - setting.logits)[real].abs().max() < 2e-5 * scale


def test_the_table_names_every_family():
    table = families_table()
    for family in FAMILIES.values():
        assert f"| {family.name} | `{family.model_type}` |" in table
    assert len({family.name for family in FAMILIES.values()}) == len(FAMILIES)


def test_an_encoder_decoder_is_refused_by_name():
    from transformers import T5Config

    with pytest.raises(UnsupportedError, match="'t5' is an encoder-decoder"):
        decoder_of(T5Config())


def test_a_decoder_whose_norms_come_last_is_refused():
    from transformers import OPTConfig

    config = OPTConfig(do_layer_norm_before=False)
    decoder = decoder_of(config)
    assert isinstance(decoder, Decoder)
    with pytest.raises(UnsupportedError, match="do_layer_norm_before=False"):
        decoder.block_of(config, 0)
