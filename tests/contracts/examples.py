"""Small examples of every registered layer kind: what the contract tests run on. A new kind adds a line here."""

import torch

from model.config import ModelConfig
from model.hybrid import HybridLM, Precision, initialise_model
from model.layers.attention import AttentionConfig
from model.layers.mamba import MambaConfig
from model.layers.mamba2 import Mamba2Config
from model.layers.mlp import MLPConfig
from model.layers.moe import MoEConfig
from model.ops.rope import Llama3Scaling, NTKScaling, YarnScaling
from model.registry import KINDS, LayerConfig

D_MODEL = 32

EXAMPLES: dict[str, LayerConfig] = {
    "mamba2": Mamba2Config(head_dim=8, d_state=16, chunk=8),
    "mamba2 in groups": Mamba2Config(head_dim=8, d_state=8, n_groups=4, chunk=16, conv_bias=False, d_conv=3),
    "mamba2 with limits": Mamba2Config(head_dim=16, d_state=8, chunk=5, dt_limit=(0.01, 0.05)),
    "attention": AttentionConfig(n_heads=4),
    "attention without positions": AttentionConfig(n_heads=4, n_kv_heads=2, rope_theta=None),
    "sliding window": AttentionConfig(n_heads=4, n_kv_heads=1, window=6),
    "window of one": AttentionConfig(n_heads=2, window=1),
    "swiglu": MLPConfig(d_hidden=48),
    "squared relu": MLPConfig(d_hidden=48, activation="relu2", gated=False),
    "gelu": MLPConfig(d_hidden=48, activation="gelu", gated=False),
    "mamba2 beside an mlp": Mamba2Config(head_dim=8, d_state=8, n_groups=2, d_ssm=32, chunk=8),
    "mamba2 without norm": Mamba2Config(head_dim=8, d_state=8, chunk=8, norm=False),
    "mamba2, norm before gate": Mamba2Config(head_dim=8, d_state=8, n_groups=2, chunk=8, norm_before_gate=True),
    "partial rope, scaled": AttentionConfig(
        n_heads=3, n_kv_heads=1, head_dim=16, rope_fraction=0.5, rope_scaling=YarnScaling(factor=4.0, original_length=8)
    ),
    "qk norm": AttentionConfig(n_heads=4, n_kv_heads=2, qk_norm=True, scale=0.5),
    "capped": AttentionConfig(n_heads=4, n_kv_heads=2, logit_cap=1.5),
    "capped window": AttentionConfig(n_heads=4, window=6, logit_cap=1.5, rope_scaling=NTKScaling(2.0)),
    "short convolution": AttentionConfig(n_heads=4, n_kv_heads=2, window=6, qkv_conv=4),
    "short convolution, all": AttentionConfig(
        n_heads=2, qkv_conv=3, rope_scaling=Llama3Scaling(4.0, original_length=16)
    ),
    "relu": MLPConfig(d_hidden=48, activation="relu", gated=False),
    "gated gelu": MLPConfig(d_hidden=48, activation="gelu_tanh"),
    "mamba": MambaConfig(d_state=4),
    "mamba with inner norms": MambaConfig(
        expand=1.5, d_state=3, dt_rank=5, d_conv=3, conv_bias=False, inner_norms=True
    ),
    "mamba in small blocks": MambaConfig(d_state=8, dt_rank=1, d_conv=2, chunk=5),
    "switch": MoEConfig(n_experts=4, d_hidden=24, activation="relu", gated=False, capacity_factor=1.0),
    "dropless top 2": MoEConfig(
        n_experts=5, d_hidden=16, top_k=2, shared_hidden=12, renormalise=True, balance_weight=0.1, z_weight=0.01
    ),
    "balanced by bias": MoEConfig(
        n_experts=6, d_hidden=16, top_k=3, score="sigmoid", bias_rate=0.01, route_scale=1.5, activation="gelu"
    ),
}

assert {example.kind for example in EXAMPLES.values()} == set(KINDS), "every registered kind needs an example"


def braid(layer: LayerConfig, depth: int = 2, vocab_size: int = 61, seed: int = 1, **kwargs: object) -> HybridLM:
    """An initialised model of `depth` such layers, its vectors shaken so that no term of the layer is idle."""
    config = ModelConfig(vocab_size=vocab_size, d_model=D_MODEL, pattern=f"(L)x{depth}", layers={"L": layer}, **kwargs)
    model = HybridLM(config, Precision())
    initialise_model(model, seed)
    shake(model, seed)
    return model


def shake(model: torch.nn.Module, seed: int) -> None:
    """Larger matrices and unequal norm weights: outputs depend visibly on every input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name or parameter.dim() == 2:
                parameter.mul_(5.0)
            elif "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def tokens_and_starts(
    lengths: list[int], rows: int = 2, vocab_size: int = 61, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens (rows, sum(lengths)) and the starts of documents of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    starts = torch.zeros(rows, total, dtype=torch.bool)
    at = 0
    for length in lengths:
        starts[:, at] = True
        at += length
    return torch.randint(0, vocab_size, (rows, total), generator=generator), starts
