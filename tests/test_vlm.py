"""Making a VLM: loading, wrapping, the embedded model; and families and models that cannot be taken."""

import copy

import pytest
import torch
from transformers import BlipConfig, GPT2Config, GPT2LMHeadModel, LlavaModel

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.tracing import sites
from slitlamp.vlm import ORGANISM_WEIGHTS, VLM


@pytest.fixture(scope="module")
def saved(llava_chat, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    llava_chat.model.save_pretrained(folder, safe_serialization=True)
    llava_chat.processor.save_pretrained(folder)
    return folder


def test_from_pretrained_gives_the_same_answers(saved, llava_chat, image):
    vlm = VLM.from_pretrained(saved, device="cpu")
    assert vlm.name == str(saved)
    assert vlm.dtype == torch.float32
    assert vlm.device == torch.device("cpu")
    assert not vlm.model.training
    assert vlm.weights_hash == llava_chat.weights_hash
    batches = [one.encode([image(0), None], ["is there a dog ?", "what ?"]) for one in (vlm, llava_chat)]
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    answers = [one.forward(batch).logits for one, batch in zip((vlm, llava_chat), batches, strict=True)]
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-5 * float(answers[1].abs().max()))
    assert vlm.generate(batches[0], max_new_tokens=3).texts == llava_chat.generate(batches[1], max_new_tokens=3).texts


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_from_pretrained_in_another_dtype(dtype, saved, image):
    vlm = VLM.from_pretrained(saved, dtype=dtype)
    assert vlm.dtype == torch.bfloat16
    batch = vlm.encode([image(0)], ["what ?"])
    with vlm.trace(sites.resid_post(layers=[1])) as trace:
        vlm.generate(batch, max_new_tokens=2)
    assert trace["resid_post"][1].dtype == torch.bfloat16


def test_the_weights_hash_sees_one_changed_number(llava):
    other = VLM.wrap(copy.deepcopy(llava.model), llava.processor)
    assert other.weights_hash == llava.weights_hash
    changed = VLM.wrap(copy.deepcopy(llava.model), llava.processor)
    changed.model.lm_head.weight.data[0, 0] += 1e-3
    assert changed.weights_hash != llava.weights_hash


def test_pickled_weights_are_not_loaded(saved, tmp_path):
    import shutil

    shutil.copytree(saved, tmp_path / "pickled")
    folder = tmp_path / "pickled"
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        VLM.from_pretrained(folder)


def test_an_unknown_family_is_refused_before_its_weights_are_read(tmp_path):
    """There are no weights here to be read."""
    BlipConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"family 'blip'\. Nearest known: .*must give the paths"):
        VLM.from_pretrained(tmp_path)


def test_a_model_without_vision_is_refused(llava):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10))
    with pytest.raises(UnsupportedError, match=r"family 'gpt2'\. Nearest known: "):
        VLM.wrap(model, llava.processor)


def test_a_near_name_is_named_first():
    from slitlamp.models import family_of

    class Near:
        model_type = "llava_nxt"

    with pytest.raises(UnsupportedError, match="Nearest known: llava_next"):
        family_of(Near())


def test_a_model_that_its_entry_does_not_fit_is_refused(llava):
    with pytest.raises(
        UnsupportedError, match=r"text decoder at one of model\.language_model, but this LlavaModel has none"
    ):
        VLM.wrap(LlavaModel(llava.model.config), llava.processor)
    model = copy.deepcopy(llava.model)
    model.config.text_config.num_hidden_layers = 5
    with pytest.raises(UnsupportedError, match=r"says 5 decoder blocks, but 'model\.language_model\.layers' holds 3"):
        VLM.wrap(model, llava.processor)
    model = copy.deepcopy(llava.model)
    model.config.text_config.head_dim = 5
    with pytest.raises(UnsupportedError, match="o_proj takes 32 features, but its heads make 20"):
        VLM.wrap(model, llava.processor)


def test_an_unknown_vision_tower_is_refused(llava):
    model = copy.deepcopy(llava.model)
    model.config.vision_config.model_type = "resnet"
    with pytest.raises(UnsupportedError, match=r"vision tower 'resnet'\. Nearest known: .*clip_vision_model"):
        VLM.wrap(model, llava.processor)


def test_a_tokenizer_in_place_of_the_processor(llava):
    with pytest.raises(InputError, match=r"needs the processor of its images and texts; found .*Tokenizer"):
        VLM.wrap(llava.model, llava.tokenizer)


def test_wrap_changes_nothing(llava):
    model = copy.deepcopy(llava.model).train()
    before = (repr(model.config), {name: len(m._forward_hooks) for name, m in model.named_modules()})
    vlm = VLM.wrap(model, llava.processor)
    assert vlm.model is model
    assert model.training
    assert before == (repr(model.config), {name: len(m._forward_hooks) for name, m in model.named_modules()})


def test_device_and_device_map_together(saved):
    with pytest.raises(InputError, match="device or device_map, not both"):
        VLM.from_pretrained(saved, device="cpu", device_map="auto")


def test_anatomy(llava, llava_siglip, llava_next):
    one = llava.anatomy
    assert (one.family.name, one.n_layers, one.n_heads, one.n_kv_heads) == ("LLaVA-1.5", 3, 4, 2)
    assert (one.d_model, one.d_head, one.d_mlp, one.d_vocab) == (32, 8, 48, llava.model.config.text_config.vocab_size)
    assert (one.n_vision_layers, one.n_vision_heads, one.d_vision, one.has_cls) == (3, 2, 16, True)
    assert one.image_token_id == 4
    assert llava_next.anatomy.family.name == "LLaVA-NeXT"
    assert not llava_siglip.anatomy.has_cls
    assert "3 layers x 4 heads (2 key/value)" in repr(llava)
    assert "no CLS" in repr(llava_siglip)


def test_forward_may_keep_the_last_logits_only(llava, image):
    batch = llava.encode([image(0)], ["<image> what ?"])
    assert llava.forward(batch).logits.shape == (1, batch.length, llava.anatomy.d_vocab)
    whole, last = llava.forward(batch).logits, llava.forward(batch, logits_to_keep=1).logits
    torch.testing.assert_close(last, whole[:, -1:], rtol=0, atol=1e-5 * float(whole.abs().max()))
    assert not llava.forward(batch).logits.requires_grad


def test_only_interventions_can_be_applied(llava):
    with pytest.raises(InputError, match="apply takes interventions, found 'vhr'"), llava.apply("vhr"):
        pass


def test_an_embedded_model_that_is_not_shipped():
    with pytest.raises(InputError, match="no embedded model of seed 77; shipped:"):
        VLM.organism(seed=77)


@pytest.mark.skipif(not (ORGANISM_WEIGHTS / "seed0").is_dir(), reason="the embedded model's weights are not here")
def test_the_embedded_model(organism, image):
    assert organism.name == "organism:0"
    assert organism.dtype == torch.float32
    assert organism.anatomy.has_cls
    batch = organism.encode([image(0, 64, 64), None], ["is there a dog in the image?", "is there a dog?"])
    with organism.trace(sites.resid_post(), sites.attention(queries="last", keys="image")) as trace:
        generation = organism.generate(batch, max_new_tokens=4)
    assert len(generation.texts) == 2
    assert trace["attention"].layers == tuple(range(organism.anatomy.n_layers))
