"""The promise that the matrix of all rows by all columns is never held: by shape, and by the peak memory of a process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slitlamp.tracing import sites
from slitlamp.tracing.attention_rows import BLOCK_ELEMENTS


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
        [sites.attention(queries="image", keys="image", reduce_keys="sum", reduce_heads="mean")],
        [sites.vision_attention(), sites.resid_post(), sites.z(positions="image", reduce="mean")],
    ):
        assert shapes(*asked) == plain
    assert len(shapes(sites.attention(queries="all", keys="image", layers=[0]))) > len(plain)  # the test can see it


linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads a process's peak memory as Linux gives it"
)

LENGTH = 3072
MATRIX = 4 * LENGTH**2 * 4
"""Bytes of one layer's weights of all heads, rows and columns in float32: 151 MB."""

SETTING = """
import json, torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from slitlamp.models import Batch, read_anatomy
from slitlamp.tracing import Trace, check_sites, session
from slitlamp.tracing.sites import attention

torch.set_num_threads(1)
torch.manual_seed(0)
length, n_images, per_image = LENGTH, 32, 64
text = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
                   num_key_value_heads=2, max_position_embeddings=length)
vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                          patch_size=4)
config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4)
model = LlavaForConditionalGeneration(config).eval()
ids = torch.full((1, length), 5)
ids[0, 1 : 1 + n_images * per_image] = 4
batch = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), image_mask=ids == 4, patches=(), images=((),), ids=("0",),
              n_generated=(0,), pad_token_id=0, image_token_id=4,
              extra={"pixel_values": torch.randn(n_images, 3, 32, 32)})
anatomy = read_anatomy(model)


def peak():
    "High-water mark of this process's resident memory in bytes; getrusage would start from that of the process before it."
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


@torch.no_grad()
def grown(*sites):
    "Growth of the high-water mark of resident memory in a run that records these sites, and the bytes recorded."
    before = peak()
    traces = [Trace(check_sites(sites, anatomy))] if sites else []
    with session(model, anatomy, batch, traces=traces):
        model(**batch.inputs(), use_cache=False, logits_to_keep=1)
    return peak() - before, sum(trace.nbytes() for trace in traces)


""".replace("LENGTH", str(LENGTH))

SDPA = """
grown()
found = {
    "last x image": grown(attention("last", "image")),
    "last x all": grown(attention("last", "all")),
    "image x image, over keys": grown(attention("image", "image", reduce_keys="sum")),
    "all x image, over queries": grown(attention("all", "image", heads=[1, 3], reduce_queries="mean")),
    "all x all, over everything": grown(attention("all", "all", reduce_queries="sum", reduce_keys="sum", reduce_heads="mean")),
    "all x all": grown(attention("all", "all")),
}
print(json.dumps(found))
"""

EAGER = """
grown()  # by SDPA: what libraries take once is taken
model.set_attn_implementation("eager")
found = {"traced": grown(attention("image", "image", reduce_keys="sum")), "plain": grown()}
print(json.dumps(found))
"""


def measured(script):
    """What a script prints that runs in a process of its own."""
    done = subprocess.run([sys.executable, "-c", SETTING + script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@linux
def test_peak_memory_is_that_of_a_block_and_of_what_is_recorded():
    """Over a plain SDPA pass: a few blocks of weights (scores, softmax, mask, chosen columns) of 4 MB each, in all under
    32 MB. The last run asks for all rows unreduced, which the measurement must see.
    """
    found = measured(SDPA)
    whole = found.pop("all x all")
    for what, (grown, recorded) in found.items():
        assert recorded < 1e6, what
        assert grown < 32e6, (what, grown)
    assert 4 * BLOCK_ELEMENTS * 8 <= 32 * 2**20
    assert whole[1] == MATRIX
    assert MATRIX / 2 < whole[0] < MATRIX + 32e6


@linux
def test_a_traced_eager_model_needs_less_than_the_plain_one():
    """The plain one holds scores, softmax and weights of all rows at once; both hold the mask that the model makes."""
    found = measured(EAGER)
    mask = LENGTH**2 * (4 + 1)
    assert found["traced"][0] < mask + 64e6
    assert found["traced"][0] + found["plain"][0] > MATRIX + mask
