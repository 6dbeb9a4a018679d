"""The quickstart recipe's training step beside Hugging Face's Granite hybrid, which has the same layers.

Granite's decoder layer is a mixer (Mamba-2 or attention with rotary positions) and a SwiGLU MLP, each with its norm and
residual: the pattern (M-W-)x4, weight for weight.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from launch.bench.row import Reading, Row, Side

if TYPE_CHECKING:
    from torch import nn

    from model.config import ModelConfig
    from train.config import Recipe

STEPS, QUICK_STEPS = 2, 1
PEER_CHUNK = 64
"""Tokens per chunk of the peer's scan: on the CPU its fastest of 32, 64, 128 and 256 (its default)."""


def ours(quick: bool) -> Iterator[Reading]:
    from launch.bench.training import braid

    return braid(quickstart(), QUICK_STEPS if quick else STEPS)


def peer(quick: bool) -> Iterator[Reading]:
    from launch.bench.training import hugging_face, without_windows

    recipe = quickstart()
    twin = without_windows(recipe.model)
    length = recipe.training.sequence_length
    return hugging_face(recipe, QUICK_STEPS if quick else STEPS, lambda: granite(recipe.model, length), twin)


def quickstart(*overrides: str) -> "Recipe":
    """The shipped recipe without its warm-up, so that the loss falls within a few steps."""
    from launch.recipes import FOLDER
    from train.config import load_recipe

    return load_recipe(FOLDER / "quickstart.toml", ["schedule.warmup_fraction=0.0", *overrides])


def granite(config: "ModelConfig", length: int) -> "nn.Module":
    """The Granite hybrid with the shape of `config`, whose pattern is mixers and SwiGLU MLPs in turn. length: tokens
    per row."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    from model.layers.attention import AttentionConfig
    from model.layers.mamba2 import Mamba2Config
    from model.layers.mlp import MLPConfig

    mixers, mlps = config.stacked[::2], config.stacked[1::2]
    mamba = next(layer for layer in mixers if isinstance(layer, Mamba2Config))
    attention = next(layer for layer in mixers if isinstance(layer, AttentionConfig))
    mlp = mlps[0]
    assert isinstance(mlp, MLPConfig) and all(layer == mlp for layer in mlps), "wants one kind of MLP"
    return GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=len(mixers),
            layer_types=["linear_attention" if layer == mamba else "full_attention" for layer in mixers],
            num_attention_heads=attention.n_heads,
            num_key_value_heads=attention.kv_heads,
            attention_multiplier=attention.width(config.d_model) ** -0.5,
            position_embedding_type="rope",
            rope_parameters={"rope_type": "default", "rope_theta": attention.rope_theta},
            max_position_embeddings=length,
            shared_intermediate_size=mlp.d_hidden,
            num_local_experts=0,
            num_experts_per_tok=0,
            mamba_n_heads=mamba.n_heads(config.d_model),
            mamba_d_head=mamba.head_dim,
            mamba_n_groups=mamba.n_groups,
            mamba_d_state=mamba.d_state,
            mamba_d_conv=mamba.d_conv,
            mamba_conv_bias=mamba.conv_bias,
            mamba_expand=round(mamba.expand),
            mamba_chunk_size=PEER_CHUNK,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="sdpa",
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def derive(ours: Side, peer: Side | None) -> dict[str, Any]:
    from launch.bench.training import utilisation

    return utilisation(ours, peer)


ROWS = (
    Row(
        name="train_quickstart",
        measures="Training step of the quickstart recipe on random packed rows, optimizer and clipping included.",
        ours=ours,
        peer=peer,
        peer_name="transformers GraniteMoeHybrid",
        needs=("transformers",),
        note=(
            "same layers, widths, vocabulary, batch and AdamW (fused). The peer attends to the whole row, ours to a "
            "window of 256; its torch path cannot keep documents apart. It runs in the faster of bf16 autocast and "
            "bf16 weights, with SDPA and scan chunks of 64 (its fastest). Its MFU counts its own attention"
        ),
        derive=derive,
    ),
)
