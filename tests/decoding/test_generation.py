"""What `generate` gives back: the tokens of Hugging Face's own generate, their texts, and where each stands in the text."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slitlamp.decoding.generation import token_spans
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.experiments import load_dataset
from slitlamp.vlm import VLM


@pytest.fixture
def batch(any_vlm, image):
    return any_vlm.encode([[image(0), image(1, 9, 30)], None], ["is <image> in <image> ?", "what is a dog ?"])


def plain(vlm, batch, **options):
    """Generated ids of each row by the model alone, cut after its end token."""
    with torch.no_grad():
        ids = vlm.model.generate(**batch.inputs(), max_new_tokens=8, pad_token_id=0, **options)[:, batch.length :]
    rows = ids.tolist()
    return tuple(tuple(row[: row.index(2) + 1] if 2 in row else row) for row in rows)


def test_greedy_decoding_is_that_of_the_plain_model(any_vlm, batch):
    generation = any_vlm.generate(batch, max_new_tokens=8)
    assert generation.tokens == plain(any_vlm, batch, do_sample=False)
    assert generation.batch is batch
    assert generation.texts == tuple(any_vlm.tokenizer.batch_decode(list(generation.tokens), skip_special_tokens=True))
    assert generation.stopped == tuple(tokens[-1] == 2 for tokens in generation.tokens)


def test_sampling_is_that_of_the_plain_model_under_the_same_seed(any_vlm, batch):
    state = torch.get_rng_state()
    sampled = any_vlm.generate(batch, max_new_tokens=8, do_sample=True, temperature=1.5, seed=5)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the caller's stream
    again = any_vlm.generate(batch, max_new_tokens=8, do_sample=True, temperature=1.5, seed=5)
    other = any_vlm.generate(batch, max_new_tokens=8, do_sample=True, temperature=1.5, seed=6)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        wanted = plain(any_vlm, batch, do_sample=True, temperature=1.5)
    assert sampled.tokens == again.tokens == wanted
    assert other.tokens != sampled.tokens


def test_rows_end_at_their_end_token(llava, image):
    batch = llava.encode([image(0), None], ["<image> describe this .", "what is a dog ?"])
    free = llava.generate(batch, max_new_tokens=6)
    end = free.tokens[0][1]
    place = free.tokens[0].index(end)
    for given in (end, [end, 2]):
        cut = llava.generate(batch, max_new_tokens=6, eos_token_id=given)
        assert cut.tokens[0] == free.tokens[0][: place + 1]
        assert cut.stopped[0]
    assert free.stopped == tuple(row[-1] == 2 for row in free.tokens)


def test_the_models_own_end_tokens_are_taken_when_it_runs(llava, image):
    vlm = VLM.wrap(copy.deepcopy(llava.model), llava.processor)
    batch = vlm.encode([image(0)], ["<image> describe this ."])
    end = vlm.generate(batch, max_new_tokens=4).tokens[0][1]
    vlm.model.generation_config.eos_token_id = [end, 2]
    assert vlm.generate(batch, max_new_tokens=4).tokens[0][-1] == end
    vlm.model.generation_config.eos_token_id = None  # then the tokenizer's ends a row
    assert vlm.end_tokens == (2,)


def test_the_models_own_sampling_settings_do_not_make_greedy_decoding_sample(llava, image):
    vlm = VLM.wrap(copy.deepcopy(llava.model), llava.processor)
    vlm.model.generation_config.do_sample = True
    vlm.model.generation_config.temperature = 9.0
    batch = vlm.encode([image(0)], ["<image> describe this ."])
    assert vlm.generate(batch, max_new_tokens=5).tokens == llava.generate(batch, max_new_tokens=5).tokens


def test_teacher_forced_puts_the_tokens_after_the_prompts(any_vlm, batch):
    generation = any_vlm.generate(batch, max_new_tokens=4)
    forced = generation.teacher_forced()
    for row, tokens in enumerate(generation.tokens):
        assert forced.input_ids[row, forced.length - len(tokens) :].tolist() == list(tokens)
        assert forced.n_generated[row] == len(tokens)


def test_what_generate_refuses(llava, image, monkeypatch):
    batch = llava.encode([image(0)], ["<image> what ?"])
    monkeypatch.setattr(llava.model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    for error, match, options in [
        (InputError, "sampling needs a seed", {"do_sample": True}),
        (InputError, "greedy decoding takes no seed", {"seed": 0}),
        (InputError, "max_new_tokens must be 1 or more, found 0", {"max_new_tokens": 0}),
        (UnsupportedError, "num_beams with do_sample", {"num_beams": 2, "do_sample": True, "seed": 0}),
        (UnsupportedError, "num_return_sequences other than 1", {"num_return_sequences": 3}),
        (UnsupportedError, "stop_strings: rows must end at an end token", {"stop_strings": ["dog"]}),
    ]:
        with pytest.raises(error, match=match):
            llava.generate(batch, **options)
    with pytest.raises(InputError, match="this batch has a continuation"):
        llava.generate(batch.with_continuation([[5]]))


def test_one_beam_may_be_said(llava, image):
    batch = llava.encode([image(0)], ["<image> what ?"])
    said = llava.generate(batch, max_new_tokens=3, num_beams=1, num_return_sequences=1)
    assert said.tokens == llava.generate(batch, max_new_tokens=3).tokens


def test_spans_point_at_the_words(llava):
    tokens = llava.tokenizer.convert_tokens_to_ids(["is", "there", "</s>", "a", "dog"])
    text, spans = token_spans(llava.tokenizer, tokens)
    assert text == "is there a dog"
    assert [text[start:end] for start, end in spans] == ["is", "there", "", "a", "dog"]
    assert token_spans(llava.tokenizer, []) == ("", ())


def test_spans_of_a_generation_cover_its_texts(any_vlm, batch):
    generation = any_vlm.generate(batch, max_new_tokens=5)
    for row, tokens in enumerate(generation.tokens):
        text = generation.texts[row]
        words = [text[start:end] for start, end in generation.spans[row]]
        wanted = ["" if t == 2 else any_vlm.tokenizer.convert_ids_to_tokens(t) for t in tokens]
        assert words == [word if word != "<unk>" else "" for word in wanted]


def byte_level():
    """A byte-level tokenizer with a token per byte, a few words, and no merges of the bytes of a character."""
    bytes_of = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(bytes_of)}
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "cat")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_fallback():
    """As in Llama's: characters outside the vocabulary are made of tokens such as <0xC3>, and words begin with a ▁."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256, "▁": 257, "▁cat": 258, "cat": 259}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize("character", ["é", "字", "🐕"])
def test_all_tokens_of_a_character_get_that_character(character):
    tokenizer = byte_level()
    ids = tokenizer(f"cat {character}cat cat")["input_ids"]
    text, spans = token_spans(tokenizer, ids)
    n_bytes = len(character.encode())
    assert text == f"cat {character}cat cat"
    assert [text[a:b] for a, b in spans] == ["cat", "", *[character] * n_bytes, "cat", "cat"]

    fallback = byte_fallback()
    text, spans = token_spans(fallback, [258, 257, *character.encode(), 259, 258])
    assert text == f"cat {character}cat cat"
    assert [text[a:b] for a, b in spans] == ["cat", "", *[character] * n_bytes, "cat", "cat"]


def test_a_character_that_is_never_completed_stays_inside_the_text():
    tokenizer = byte_level()
    ids = tokenizer("cat 🐕")["input_ids"][:-1]
    text, spans = token_spans(tokenizer, ids)
    assert all(0 <= a <= b <= len(text) for a, b in spans)


def test_the_token_that_begins_a_word(organism: VLM) -> None:
    data = load_dataset("emoji_scenes/captions").take(2)
    generation = organism.generate(data.encode(organism), max_new_tokens=24)
    for row, text in enumerate(generation.texts):
        word = text.split()[3]
        start, end = generation.spans[row][generation.token_of(word, row)]
        assert text[start:end].strip() == word[: end - start]
        assert start == text.index(f" {word} ") + 1
    with pytest.raises(InputError, match="row 0 does not say 'imag'"):
        generation.token_of("imag")
