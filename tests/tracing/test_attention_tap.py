"""Attention rows by hand, and the promise that the matrix of all rows by all columns is never built."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slitlamp.errors import UnsupportedError
from slitlamp.tracing import sites
from slitlamp.tracing.attention_tap import attention_rows, tapped


def rows_by_hand(mask=None, is_causal=False, rows=None):
    """Two queries and keys of width 1 with scores [0, ln 3] and [0, -ln 2]: weights 1:3 and 2:1 without a mask."""
    query = torch.tensor([math.log(3), -math.log(2)]).view(1, 1, 2, 1)
    key = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    return attention_rows(query, key, mask, scaling=1.0, is_causal=is_causal, rows=rows)[0, 0]


def test_two_by_two():
    wanted = torch.tensor([[1 / 4, 3 / 4], [2 / 3, 1 / 3]])
    torch.testing.assert_close(rows_by_hand(), wanted)
    torch.testing.assert_close(rows_by_hand(rows=torch.tensor([[1, 0, 1]])), wanted[[1, 0, 1]])


def test_causal():
    torch.testing.assert_close(rows_by_hand(is_causal=True), torch.tensor([[1.0, 0.0], [2 / 3, 1 / 3]]))
    torch.testing.assert_close(rows_by_hand(is_causal=True, rows=torch.tensor([[0]])), torch.tensor([[1.0, 0.0]]))


def test_boolean_mask():
    mask = torch.tensor([[True, True], [False, True]])[None, None]
    torch.testing.assert_close(rows_by_hand(mask), torch.tensor([[1 / 4, 3 / 4], [0.0, 1.0]]))
    torch.testing.assert_close(rows_by_hand(mask, rows=torch.tensor([[1]])), torch.tensor([[0.0, 1.0]]))


def test_additive_mask():
    """Adding ln 2 doubles a weight before normalisation: 1:3 becomes 2:3."""
    mask = torch.tensor([[math.log(2), 0.0], [0.0, -math.inf]])[None, None]
    torch.testing.assert_close(rows_by_hand(mask), torch.tensor([[2 / 5, 3 / 5], [1.0, 0.0]]))


def test_a_mask_longer_than_the_keys_and_one_row_for_all_queries():
    mask = torch.tensor([[False, True, True]])[None, None]
    torch.testing.assert_close(rows_by_hand(mask), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))


def test_key_heads_are_shared_by_groups_of_query_heads():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 6, 5, 4, generator=generator), torch.randn(2, 3, 7, 4, generator=generator)
    rows = torch.tensor([[4, 0], [1, 1]])
    found = attention_rows(query, key, None, scaling=None, is_causal=False, rows=rows)
    for row in range(2):
        for head in range(6):
            scores = query[row, head, rows[row]] @ key[row, head // 2].T / 2  # d_head 4: 1 / sqrt(4)
            torch.testing.assert_close(found[row, head], scores.softmax(dim=-1))


class Largest(TorchDispatchMode):
    """Shapes of all new tensors (not views of others) with two axes of `length` or more."""

    def __init__(self, length):
        super().__init__()
        self.length = length
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {
            one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)
        }
        for one in tree_leaves(result):
            new = isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in given
            if new and sum(size >= self.length for size in one.shape) >= 2:
                self.shapes.append((str(function), tuple(one.shape)))
        return result


@pytest.mark.parametrize("padded", [False, True])
def test_the_matrix_of_all_rows_by_all_columns_is_never_built(padded, llava, image):
    """Tensors with two axes as long as the prompt: none but those that the plain model makes (its mask, when padded).

    The prompt is longer than every width of the model, so that such a tensor is one over positions twice.
    """
    long = "<image> " + "is there a dog in the image ? " * 12
    batch = llava.encode([image(0), image(1)], [long, long + ("cat " if padded else "")])
    length = batch.length - 1
    assert length > 100

    def shapes(*asked):
        with Largest(length) as seen:
            if asked:
                with llava.trace(*asked):
                    llava.forward(batch)
            else:
                llava.forward(batch)
        return sorted(seen.shapes)

    plain = shapes()
    for asked in (
        [sites.attention(queries="last", keys="image")],
        [sites.attention(queries="last", keys="all", reduce_keys="sum")],
        [sites.vision_attention(), sites.resid_post(), sites.z(positions="image", reduce="mean")],
    ):
        assert shapes(*asked) == plain
    assert len(shapes(sites.attention(queries="all", keys="image", layers=[0]))) > len(plain)  # the test can see it


def test_an_implementation_that_cannot_be_tapped_is_refused(llava, image, monkeypatch):
    batch = llava.encode([image(0)], ["<image> what ?"])
    text = llava.model.config.text_config
    monkeypatch.setattr(text, "_attn_implementation_internal", "flash_attention_2")
    with (
        llava.trace(sites.attention()),
        pytest.raises(
            UnsupportedError, match=r"runs attention by flash_attention_2.*load it with attn_implementation='sdpa'"
        ),
    ):
        llava.forward(batch)
    assert text._attn_implementation == "flash_attention_2"


def test_what_the_tap_replaces_comes_back(llava):
    configs = [llava.model.config, llava.model.config.text_config, llava.model.config.vision_config]
    before = [config._attn_implementation for config in configs]
    with tapped(llava.model):
        assert {config._attn_implementation for config in configs} == {"slitlamp_sdpa"}
        with tapped(llava.model):
            pass
        assert {config._attn_implementation for config in configs} == {"slitlamp_sdpa"}
    assert [config._attn_implementation for config in configs] == before
