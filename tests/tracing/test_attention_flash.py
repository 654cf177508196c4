"""Attention under flash attention: rows recomputed from queries and keys.

Without a GPU a stand-in takes the kernel's place, behind transformers' own code for flash attention: it has the signature
of flash_attn's functions and does what their documentation says, in plain loops, and keeps the weights it used.
"""

import importlib.util

import pytest
import torch
from contract import prompt
from tiny_models import BUILDERS
from transformers import modeling_flash_attention_utils as flash
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slitlamp.errors import UnsupportedError
from slitlamp.tracing import sites
from slitlamp.tracing.attention_tap import observed
from slitlamp.vlm import VLM

NAME = "flash_attention_2"


class Kernel:
    """flash_attn's two functions; `weights` holds [head, query, key] of every sequence of every call, in order."""

    def __init__(self):
        self.weights = []

    def _one(self, q, k, v, scale, causal, window, softcap):
        """[query, head, width], [key, kv head, width]: the causal mask is aligned at the bottom right."""
        n_queries, n_keys = len(q), len(k)
        groups = q.shape[1] // k.shape[1]
        weights = torch.zeros(q.shape[1], n_queries, n_keys)
        out = torch.zeros_like(q)
        for head in range(q.shape[1]):
            for row in range(n_queries):
                place = row + n_keys - n_queries
                first = max(0, place - window[0]) if window[0] >= 0 else 0
                last = place if causal else min(n_keys - 1, place + window[1]) if window[1] >= 0 else n_keys - 1
                if last < first:
                    continue
                scores = k[first : last + 1, head // groups] @ q[row, head] * scale
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                weights[head, row, first : last + 1] = scores.softmax(dim=0)
                out[row, head] = weights[head, row] @ v[:, head // groups]
        self.weights.append(weights)
        return out

    def flash_attn_func(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        deterministic=False,
    ):  # fmt: skip
        return torch.stack(
            [self._one(*one, softmax_scale, causal, window_size, softcap) for one in zip(q, k, v, strict=True)]
        )

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False,
    ):  # fmt: skip
        ends_q, ends_k = cu_seqlens_q[1:-1].tolist(), cu_seqlens_k[1:-1].tolist()
        parts = zip(q.tensor_split(ends_q), k.tensor_split(ends_k), v.tensor_split(ends_k), strict=True)
        return torch.cat([self._one(*one, softmax_scale, causal, window_size, softcap) for one in parts])


@pytest.fixture
def kernel(monkeypatch):
    """transformers believes that this is the flash attention it has loaded."""
    one = Kernel()
    monkeypatch.setattr(flash, "_loaded_implementation", NAME)
    monkeypatch.setattr(flash, "_flash_fn", one.flash_attn_func)
    monkeypatch.setattr(flash, "_flash_varlen_fn", one.flash_attn_varlen_func)
    monkeypatch.setattr(flash, "_flash_with_kvcache_fn", None)
    monkeypatch.setattr(flash, "_pad_fn", flash._pad_input)
    monkeypatch.setattr(flash, "_unpad_fn", flash._unpad_input)
    monkeypatch.setattr(
        flash, "_process_flash_kwargs_fn", flash._lazy_define_process_function(one.flash_attn_varlen_func)
    )
    return one


def under(builder, implementation):
    """A model whose every part runs under an implementation; set past transformers' check of what is installed."""
    vlm = BUILDERS[builder]()
    for module in vlm.model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation_internal = implementation
    return vlm


class Collect:
    def __init__(self):
        self.weights = []

    def see(self, call):
        self.weights.append(call.weights(slice(None), None))

    def end(self):
        pass


def prompts(vlm, image, *texts):
    return vlm.encode([image(row) for row in range(len(texts))], [prompt(vlm, 1, text) for text in texts], chat=False)


LONG = "is there a red cat in the image ? yes . is it blue ?"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("builder", ["llava", "gemma3", "paligemma gemma2", "mistral3", "qwen2_vl"])
def test_rows_are_the_weights_that_the_kernel_used(builder, padded, kernel, image):
    """Text layers: causal, with a sliding window (Gemma), soft-capped (Gemma 2), grouped key heads, left padding."""
    if builder not in BUILDERS:
        pytest.skip("this family has no entry")
    vlm = under(builder, NAME)
    batch = prompts(vlm, image, LONG, "what ?" if padded else LONG)
    assert padded == (not batch.attention_mask.all())
    modules = [vlm.model.get_submodule(vlm.anatomy.place("attention", layer).path) for layer in range(2)]
    collected = [Collect() for _ in modules]
    with torch.no_grad(), observed(dict(zip(modules, [[one] for one in collected], strict=True))):
        vlm._call(batch)
    n_layers = vlm.anatomy.n_layers
    used = kernel.weights[-n_layers * batch.size :]  # the language model's, layer by layer, row by row
    for layer, one in enumerate(collected):
        assert len(one.weights) == 1
        for row in range(batch.size):
            real = batch.attention_mask[row].bool()
            found = one.weights[0][row][:, real]
            torch.testing.assert_close(found[..., real], used[layer * batch.size + row], rtol=1e-4, atol=1e-6)
            assert (found[..., ~real] == 0).all()


@pytest.mark.parametrize("builder", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl"])
def test_a_trace_under_flash_attention_is_that_under_sdpa(builder, kernel, image):
    """Prompts of two lengths, decoded for three tokens; Qwen's vision tower packs its images into one row."""
    if builder not in BUILDERS:
        pytest.skip("this family has no entry")
    asked = (
        sites.attention("all", "all", label="all"),
        sites.attention("last", "image", heads=[1], label="one head"),
        sites.vision_attention("all", "all"),
        sites.resid_post(),
    )
    traces = []
    for implementation in ("sdpa", NAME):
        vlm = under(builder, implementation)
        batch = prompts(vlm, image, LONG, "what ?")
        with vlm.trace(*asked) as trace:
            vlm.generate(batch, max_new_tokens=4)
        traces.append(trace)
    assert kernel.weights
    for site in asked:
        torch.testing.assert_close(traces[0][site.label].stack(), traces[1][site.label].stack(), rtol=1e-3, atol=1e-5)


def test_the_output_is_that_of_the_untraced_run(kernel, image):
    vlm = under("llava", NAME)
    batch = prompts(vlm, image, LONG, "what ?")
    plain = vlm.forward(batch).logits
    with vlm.trace(sites.attention()):
        assert torch.equal(vlm.forward(batch).logits, plain)
    assert vlm.model.config.text_config._attn_implementation == NAME


def attention_of(vlm):
    return vlm.model.get_submodule(vlm.anatomy.place("attention", 0).path)


def call(vlm, **options):
    """Call the attention interface on behalf of a module that is watched."""
    module = attention_of(vlm)
    states = torch.randn(1, 4, 6, 8)
    with observed({module: [Collect()]}):
        function = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
        function(module, states, states, states, None, scaling=1.0, **options)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("n_queries", [1, 2])
def test_queries_are_the_last_of_the_keys(n_queries, window, kernel):
    """A cache longer than the window, as models have whose cache knows no window."""
    module = attention_of(under("llava", NAME))
    query, key = torch.randn(1, 4, n_queries, 8), torch.randn(1, 2, 6, 8)
    collected = Collect()
    with observed({module: [collected]}):
        function = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
        function(module, query, key, key, None, scaling=1.0, sliding_window=window)
    torch.testing.assert_close(collected.weights[0][0], kernel.weights[0])


def test_packing_that_cannot_be_followed_is_refused(kernel):
    vlm = under("llava", NAME)
    with pytest.raises(UnsupportedError, match="pack several sequences into one row"):
        call(vlm, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(UnsupportedError, match="queries and keys of different lengths"):
        call(
            vlm,
            cu_seq_lens_q=torch.tensor([0, 2, 6], dtype=torch.int32),
            cu_seq_lens_k=torch.tensor([0, 3, 6], dtype=torch.int32),
            max_length_q=4,
            max_length_k=3,
        )


def test_sinks_are_refused(kernel, monkeypatch):
    vlm = under("llava", NAME)
    monkeypatch.setattr(flash, "_process_flash_kwargs_fn", lambda **options: {"softmax_scale": 1.0, "causal": True})
    with pytest.raises(UnsupportedError, match=r"attention sinks \(s_aux\).*attn_implementation='eager'"):
        call(vlm, s_aux=torch.zeros(4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")
def test_the_real_kernel(image):
    """bf16, whose rounding of a score near 10 is 0.04: rows agree to 0.05 of their weight."""
    plain = BUILDERS["llava"]()
    vlm = VLM.wrap(plain.model.to("cuda", torch.bfloat16), plain.processor)
    traces = []
    for implementation in ("sdpa", NAME):
        vlm.model.set_attn_implementation(implementation)
        batch = prompts(vlm, image, LONG, "what ?")
        with vlm.trace(sites.attention("all", "all"), sites.vision_attention("all", "all")) as trace:
            vlm.generate(batch, max_new_tokens=4)
        traces.append(trace)
    for label in ("attention", "vision_attention"):
        torch.testing.assert_close(traces[0][label].stack(), traces[1][label].stack(), rtol=0.05, atol=0.02)
