"""Whole models of transformers at toy size, and the same model as ours: a `ModelConfig` and a map of the weights.

The map is made of torch operations from their parameters to ours, so that gradients flow back through it: what a
fixed multiplier of theirs does is a factor of a weight of ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.hybrid import VOCABULARY_MULTIPLE
from model.layers.attention import AttentionConfig
from model.layers.mamba2 import Mamba2Config
from model.layers.mlp import MLPConfig

V, D, HEADS, KV, HIDDEN = 50, 32, 4, 2, 48
EPS = 1e-5
Weights = Mapping[str, Tensor]
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Definer:
    """make: their model, from the module `transformers`. config: ours. weights: their parameters, by name, to ours."""

    make: Callable[[Any], nn.Module]
    config: ModelConfig
    weights: Callable[[Weights], Parts]


def mamba2(theirs: Weights, at: str) -> Parts:
    parts = _mamba(theirs, at)
    if f"{at}.norm.weight" in theirs:
        parts["norm_weight"] = theirs[f"{at}.norm.weight"]
    return parts | {"dt_bias": theirs[f"{at}.dt_bias"]}


def mamba(theirs: Weights, at: str) -> Parts:
    parts = _mamba(theirs, at) | {"x_proj.weight": theirs[f"{at}.x_proj.weight"]}
    parts |= {"dt_proj.weight": theirs[f"{at}.dt_proj.weight"], "dt_bias": theirs[f"{at}.dt_proj.bias"]}
    for ours, name in (("dt", "dt"), ("B", "b"), ("C", "c")):
        if f"{at}.{name}_layernorm.weight" in theirs:
            parts[f"{ours}_norm_weight"] = theirs[f"{at}.{name}_layernorm.weight"]
    return parts


def _mamba(theirs: Weights, at: str) -> Parts:
    same = ("in_proj.weight", "A_log", "D", "out_proj.weight")
    conv = {"conv_weight": theirs[f"{at}.conv1d.weight"][:, 0], "conv_bias": theirs[f"{at}.conv1d.bias"]}
    return {name: theirs[f"{at}.{name}"] for name in same} | conv


def attention(theirs: Weights, at: str) -> Parts:
    qkv = torch.cat([theirs[f"{at}.{letter}_proj.weight"] for letter in "qkv"])
    return {"qkv.weight": qkv, "out.weight": theirs[f"{at}.o_proj.weight"]}


def gated_mlp(theirs: Weights, at: str) -> Parts:
    up = torch.cat([theirs[f"{at}.gate_proj.weight"], theirs[f"{at}.up_proj.weight"]])
    return {"up.weight": up, "down.weight": theirs[f"{at}.down_proj.weight"]}


def plain_mlp(theirs: Weights, at: str) -> Parts:
    return {"up.weight": theirs[f"{at}.up_proj.weight"], "down.weight": theirs[f"{at}.down_proj.weight"]}


@dataclass
class Builder:
    """Collects our parameters block by block."""

    theirs: Weights
    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.final_layernorm.weight"
    parts: Parts = field(default_factory=dict)
    blocks: int = 0

    def block(self, norm: str, *branches: Parts) -> None:
        """One block of ours under their norm; several branches stand side by side."""
        at = f"blocks.{self.blocks}."
        self.parts[f"{at}norm.weight"] = self.theirs[f"{norm}.weight"]
        for index, branch in enumerate(branches):
            prefix = f"{at}branches.{index}.mixer." if len(branches) > 1 else f"{at}mixer."
            self.parts |= {prefix + name: value for name, value in branch.items()}
        self.blocks += 1

    def finish(self, tied: bool) -> Parts:
        self.parts["embedding.weight"] = self.theirs[self.embedding]
        self.parts["norm.weight"] = self.theirs[self.norm]
        if not tied:
            self.parts["head.weight"] = self.theirs["lm_head.weight"]
        return self.parts


def padded(parts: Parts, tied: bool) -> Parts:
    """With the padding rows of the vocabulary that ours stores, and the head of a tied model."""
    missing = -V % VOCABULARY_MULTIPLE
    parts = {
        n: F.pad(w, (0, 0, 0, missing)) if n in ("embedding.weight", "head.weight") else w for n, w in parts.items()
    }
    return parts | ({"head.weight": parts["embedding.weight"]} if tied else {})


MAMBA2 = Mamba2Config(head_dim=8, d_state=16, n_groups=2, chunk=16)
ATTENTION = AttentionConfig(n_heads=HEADS, n_kv_heads=KV)
NOPE = AttentionConfig(n_heads=HEADS, n_kv_heads=KV, rope_theta=None)
SWIGLU = MLPConfig(HIDDEN)

SHAPE = {"vocab_size": V, "hidden_size": D, "num_attention_heads": HEADS, "num_key_value_heads": KV}
THEIR_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 8}


def braid(pattern: str, layers: Mapping[str, Any], tied: bool = False, **more: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=V, d_model=D, pattern=pattern, layers=layers, tie_embeddings=tied, norm_eps=EPS, **more
    )
