"""What a transformer block is made of: which module of it, and which side of that module, is which site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where the values of a site pass.

    Attributes:
        path: of a module, from the model.
        at_input: whether they are what goes into the module rather than what comes out of it.
        heads: into how many heads the last axis is to be split; None for one vector.
        third: for a fused projection of queries, keys and values, which of the three (0, 1, 2).
        gate: path of a parameter by which the block multiplies what comes out before adding it to the residual stream:
            recorded values are multiplied by it too.
        tanh: whether it multiplies by the gate's tanh.
        read_only: whether the block goes on with these values by another way too, which a change here would not reach.
    """

    path: str
    at_input: bool = False
    heads: int | None = None
    third: int | None = None
    gate: str | None = None
    tanh: bool = False
    read_only: bool = False


@dataclass(frozen=True)
class Block:
    """Where the parts of one kind of transformer block are: module paths, from the block.

    Attributes:
        attention: the module that calls transformers' attention interface.
        out_proj: the projection that puts the heads together.
        q, k, v: the projections of queries, keys and values; None where a block has none over its own positions.
        qkv: one projection for all three, in that order, in place of `q`, `k`, `v`.
        ln1: the norm before attention.
        ln2: the norm before the MLP, which reads the residual stream between the two; None where there is no such
            place (attention and MLP side by side).
        mlp_in: the projection into the hidden layer (of the gate, for gated MLPs): it gives `mlp_pre`. None where there is
            no one hidden layer (experts).
        mlp_down: the projection out of the hidden layer: it takes `mlp_post`. None as `mlp_in`.
        attn_out, mlp_out: the modules whose outputs are added to the residual stream: the parts themselves, or the
            norms after them.
        attn_gate, mlp_gate: parameters of the block that multiply those outputs first (`tanh:NAME`: by its tanh).
        cross: whether its attention reads the image and not the text before it.
    """

    attention: str
    out_proj: str
    attn_out: str
    mlp_out: str | None
    mlp_in: str | None
    mlp_down: str | None
    ln1: str
    ln2: str | None
    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    attn_gate: str | None = None
    mlp_gate: str | None = None
    cross: bool = False

    def places(self, block: str, n_heads: int, n_kv_heads: int) -> dict[str, Place]:
        """The place of every site of a block, by the site's name.

        Args:
            block: path of the block.
            n_heads, n_kv_heads: query heads and key/value heads.
        """
        of = f"{block}.".__add__
        found = {
            "resid_pre": Place(block, at_input=True),
            "resid_post": Place(block),
            "ln1": Place(of(self.ln1)),
            "z": Place(of(self.out_proj), at_input=True, heads=n_heads),
            "attn_out": Place(of(self.attn_out), **_gate(block, self.attn_gate)),
            "cross_attention" if self.cross else "attention": Place(of(self.attention)),
        }
        if self.ln2 is not None:
            found["resid_mid"] = Place(of(self.ln2), at_input=True, read_only=True)
            found["ln2"] = Place(of(self.ln2))
        if self.mlp_in is not None:
            found["mlp_pre"] = Place(of(self.mlp_in))
        if self.mlp_down is not None:
            found["mlp_post"] = Place(of(self.mlp_down), at_input=True)
        if self.mlp_out is not None:
            found["mlp_out"] = Place(of(self.mlp_out), **_gate(block, self.mlp_gate))
        for third, (name, path) in enumerate((("q", self.q), ("k", self.k), ("v", self.v))):
            heads = n_heads if name == "q" else n_kv_heads
            if self.qkv is not None:
                found[name] = Place(of(self.qkv), heads=heads, third=third)
            elif path is not None:
                found[name] = Place(of(path), heads=heads)
        return found


def _gate(block: str, named: str | None) -> dict[str, Any]:
    if named is None:
        return {}
    return {"gate": f"{block}.{named.removeprefix('tanh:')}", "tanh": named.startswith("tanh:")}
