"""How many floating-point operations a decoder's blocks take, and how many of them a skip of computation saves."""

from __future__ import annotations

from dataclasses import dataclass, replace

from slitlamp.models import Anatomy


@dataclass(frozen=True)
class BlockSizes:
    """The sizes of a decoder's blocks that its operations depend on.

    Attributes:
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp: of the language model.
        gated: whether the MLP multiplies by a gate: three matrices in place of two.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    gated: bool

    @staticmethod
    def of(anatomy: Anatomy) -> BlockSizes:
        """The sizes of a model whose blocks are alike; experts are counted as one MLP."""
        gates = [one.path for one in anatomy.places.get("mlp_pre", {}).values()]
        return BlockSizes(
            anatomy.n_layers,
            anatomy.n_heads,
            anatomy.n_kv_heads,
            anatomy.d_model,
            anatomy.d_head,
            anatomy.d_mlp,
            gated=not gates or gates[0].endswith("gate_proj"),
        )

    @property
    def mlp(self) -> int:
        """Of the MLP of one block, per token. A multiplication and its addition are two operations."""
        return 2 * (3 if self.gated else 2) * self.d_model * self.d_mlp

    @property
    def query(self) -> int:
        """Of the projections of a token's query and of its heads' output, in one block."""
        return 2 * 2 * self.d_model * self.n_heads * self.d_head

    @property
    def key_value(self) -> int:
        """Of the projections of a token's key and value, in one block."""
        return 2 * 2 * self.d_model * self.n_kv_heads * self.d_head

    def attending(self, n_keys: int) -> int:
        """Of one query over some keys: scores and weighted sum, in one block."""
        return 2 * 2 * self.n_heads * self.d_head * n_keys


@dataclass(frozen=True)
class Tokens:
    """A run: text before the image, the image, text after it, and generated tokens (all but the last are fed back)."""

    before: int
    image: int
    after: int
    generated: int = 1

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.before + self.image + self.after

    @property
    def decoded(self) -> int:
        """Tokens that are fed back, each in a forward call of its own."""
        return max(self.generated - 1, 0)

    def keys(self, kind: str) -> int:
        """Sum over the tokens of a kind ("image", "text" of the prompt, "decoded") of the keys they attend to (causal)."""
        if kind == "image":
            return _between(self.before, self.before + self.image)
        if kind == "text":
            return _between(0, self.prompt) - self.keys("image")
        return _between(self.prompt, self.prompt + self.decoded)

    def count(self, kind: str) -> int:
        """Number of tokens of a kind."""
        return {"image": self.image, "text": self.before + self.after, "decoded": self.decoded}[kind]


def _between(first: int, last: int) -> int:
    """The sum of i + 1 over positions first <= i < last."""
    return (last * (last + 1) - first * (first + 1)) // 2


KINDS = ("image", "text", "decoded")


def decoder_flops(sizes: BlockSizes, tokens: Tokens) -> int:
    """Operations of all blocks in a run with a key-value cache; norms, embedding, output head and vision tower left out."""
    per_block = sum(
        tokens.count(kind) * (sizes.mlp + sizes.query + sizes.key_value) + sizes.attending(tokens.keys(kind))
        for kind in KINDS
    )
    return sizes.n_layers * per_block


def skipped_flops(sizes: BlockSizes, tokens: Tokens, kinds: tuple[str, ...], what: str, n_blocks: int) -> int:
    """Operations that need not be done when tokens of some kinds skip some blocks.

    Args:
        sizes: of the model.
        tokens: of the run.
        kinds: of the tokens that skip, among `KINDS`.
        what: "ffn"; "block": MLP and attention, but for keys and values, which other tokens still read; "parallel": none,
            since nothing is left out (attention and MLP may run at the same time).
        n_blocks: how many blocks.
    """
    if what == "parallel":
        return 0
    saved = 0
    for kind in kinds:
        saved += tokens.count(kind) * sizes.mlp
        if what == "block":
            saved += tokens.count(kind) * sizes.query + sizes.attending(tokens.keys(kind))
    return n_blocks * saved


def pruned_flops(sizes: BlockSizes, tokens: Tokens, kept: int, from_layer: int = 0) -> int:
    """Operations that need not be done when the decoder has fewer image tokens from a layer on.

    Args:
        sizes: of the model.
        tokens: of the run with all image tokens.
        kept: how many image tokens are left.
        from_layer: the first block that has them no more; 0 for pruning before the decoder.
    """
    saved = decoder_flops(sizes, tokens) - decoder_flops(sizes, replace(tokens, image=kept))
    return saved // sizes.n_layers * (sizes.n_layers - from_layer)
