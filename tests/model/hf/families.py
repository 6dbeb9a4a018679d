"""Every family that is compared with transformers: its model at toy size, ours, and the map of the weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from model.layers.attention import AttentionConfig
from model.layers.mamba import MambaConfig
from model.layers.mamba2 import Mamba2Config
from model.layers.mlp import MLPConfig
from tests.model.hf.definers import (
    ATTENTION,
    EPS,
    HEADS,
    HIDDEN,
    KV,
    MAMBA2,
    NOPE,
    SHAPE,
    SWIGLU,
    THEIR_MAMBA2,
    Builder,
    D,
    Definer,
    Parts,
    V,
    Weights,
    attention,
    braid,
    gated_mlp,
    mamba,
    mamba2,
    plain_mlp,
)


def mamba2_lm() -> Definer:
    def make(transformers: Any) -> nn.Module:
        config = transformers.Mamba2Config(
            vocab_size=V,
            hidden_size=D,
            num_hidden_layers=3,
            num_heads=8,
            head_dim=8,
            state_size=16,
            n_groups=2,
            chunk_size=8,
            layer_norm_epsilon=EPS,
            tie_word_embeddings=True,
        )
        return transformers.Mamba2ForCausalLM(config)

    def weights(theirs: Weights) -> Parts:
        return _backbone(theirs, 3, mamba2)

    return Definer(make, braid("MMM", {"M": MAMBA2}, tied=True), weights)


def mamba_lm() -> Definer:
    def make(transformers: Any) -> nn.Module:
        shape = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "state_size": 8}
        config = transformers.MambaConfig(**shape, layer_norm_epsilon=EPS, tie_word_embeddings=True)
        return transformers.MambaForCausalLM(config)

    def weights(theirs: Weights) -> Parts:
        return _backbone(theirs, 3, mamba)

    return Definer(make, braid("MMM", {"M": MambaConfig(d_state=8)}, tied=True), weights)


def _backbone(theirs: Weights, layers: int, mixer: Callable[[Weights, str], Parts]) -> Parts:
    builder = Builder(theirs, "backbone.embeddings.weight", "backbone.norm_f.weight")
    for index in range(layers):
        at = f"backbone.layers.{index}"
        builder.block(f"{at}.norm", mixer(theirs, f"{at}.mixer"))
    return builder.finish(tied=True)


def nemotron_h() -> Definer:
    pattern = "M-M*-M-"

    def make(transformers: Any) -> nn.Module:
        config = transformers.NemotronHConfig(
            **SHAPE,
            hybrid_override_pattern=pattern,
            head_dim=D // HEADS,
            intermediate_size=HIDDEN,
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=16,
            n_groups=2,
            chunk_size=8,
            layer_norm_epsilon=EPS,
            time_step_min=1e-20,
        )
        return transformers.NemotronHForCausalLM(config)

    def weights(theirs: Weights) -> Parts:
        builder = Builder(theirs, "model.embeddings.weight", "model.norm_f.weight")
        mixers = {"M": mamba2, "*": attention, "-": plain_mlp}
        for index, letter in enumerate(pattern):
            at = f"model.layers.{index}"
            builder.block(f"{at}.norm", mixers[letter](theirs, f"{at}.mixer"))
        return builder.finish(tied=False)

    layers = {"M": MAMBA2, "*": NOPE, "-": MLPConfig(HIDDEN, "relu2", gated=False)}
    return Definer(make, braid(pattern, layers), weights)


def bamba() -> Definer:
    kinds = "M*M"

    def make(transformers: Any) -> nn.Module:
        config = transformers.BambaConfig(
            **SHAPE,
            **THEIR_MAMBA2,
            num_hidden_layers=3,
            intermediate_size=HIDDEN,
            attn_layer_indices=[1],
            rms_norm_eps=EPS,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        )
        return transformers.BambaForCausalLM(config)

    def weights(theirs: Weights) -> Parts:
        builder = Builder(theirs)
        for index, letter in enumerate(kinds):
            at = f"model.layers.{index}"
            mixer = mamba2(theirs, f"{at}.mamba") if letter == "M" else attention(theirs, f"{at}.self_attn")
            builder.block(f"{at}.input_layernorm", mixer)
            builder.block(f"{at}.pre_ff_layernorm", gated_mlp(theirs, f"{at}.feed_forward"))
        return builder.finish(tied=False)

    half = AttentionConfig(n_heads=HEADS, n_kv_heads=KV, rope_fraction=0.5)
    return Definer(make, braid("M-*-M-", {"M": MAMBA2, "*": half, "-": SWIGLU}), weights)


def llama() -> Definer:
    def make(transformers: Any) -> nn.Module:
        rope = {"rope_type": "default", "rope_theta": 1e4}
        config = transformers.LlamaConfig(
            **SHAPE, num_hidden_layers=3, intermediate_size=HIDDEN, rms_norm_eps=EPS, rope_parameters=rope
        )
        return transformers.LlamaForCausalLM(config)

    def weights(theirs: Weights) -> Parts:
        builder = Builder(theirs, norm="model.norm.weight")
        for index in range(3):
            at = f"model.layers.{index}"
            builder.block(f"{at}.input_layernorm", attention(theirs, f"{at}.self_attn"))
            builder.block(f"{at}.post_attention_layernorm", gated_mlp(theirs, f"{at}.mlp"))
        return builder.finish(tied=False)

    return Definer(make, braid("(*-)x3", {"*": ATTENTION, "-": SWIGLU}), weights)


def jamba() -> Definer:
    """Without experts."""

    def make(transformers: Any) -> nn.Module:
        config = transformers.JambaConfig(
            **SHAPE,
            num_hidden_layers=3,
            intermediate_size=HIDDEN,
            attn_layer_period=3,
            attn_layer_offset=1,
            num_experts=1,
            mamba_d_state=8,
            rms_norm_eps=EPS,
        )
        return transformers.JambaForCausalLM(config)

    def weights(theirs: Weights) -> Parts:
        builder = Builder(theirs)
        for index, letter in enumerate("M*M"):
            at = f"model.layers.{index}"
            mixer = mamba(theirs, f"{at}.mamba") if letter == "M" else attention(theirs, f"{at}.self_attn")
            builder.block(f"{at}.input_layernorm", mixer)
            builder.block(f"{at}.pre_ff_layernorm", gated_mlp(theirs, f"{at}.feed_forward"))
        return builder.finish(tied=False)

    layers = {"M": MambaConfig(d_state=8, inner_norms=True), "*": NOPE, "-": SWIGLU}
    return Definer(make, braid("M-*-M-", layers), weights)


def zamba2() -> Definer:
    """Its Mamba-2 layers; the shared blocks are not ours (see launch/recipes/zamba2-2.7b.toml)."""

    def make(transformers: Any) -> nn.Module:
        config = transformers.Zamba2Config(
            vocab_size=V,
            hidden_size=D,
            num_attention_heads=HEADS,
            num_hidden_layers=3,
            n_mamba_heads=8,
            mamba_d_state=16,
            mamba_ngroups=2,
            chunk_size=8,
            layers_block_type=["linear_attention"] * 3,
            time_step_min=1e-20,
            rms_norm_eps=EPS,
        )
        return transformers.Zamba2ForCausalLM(config)

    def weights(theirs: Weights) -> Parts:
        builder = Builder(theirs)
        for index in range(3):
            at = f"model.layers.{index}"
            builder.block(f"{at}.input_layernorm", mamba2(theirs, f"{at}.mamba"))
        return builder.finish(tied=True)

    return Definer(make, braid("MMM", {"M": MAMBA2}, tied=True), weights)


FALCON = {
    "embedding_multiplier": 1.7,
    "lm_head_multiplier": 0.6,
    "mlp_multipliers": [0.8, 0.7],
    "key_multiplier": 0.5,
    "attention_in_multiplier": 0.9,
    "attention_out_multiplier": 1.1,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.9,
    "ssm_multipliers": [0.4, 1.3, 0.7, 0.6, 0.8],
}


def falcon_h1() -> Definer:
    """All of its fixed multipliers are factors of weights of ours."""
    inner, state = 48, 16

    def make(transformers: Any) -> nn.Module:
        config = transformers.FalconH1Config(
            **SHAPE,
            **FALCON,
            num_hidden_layers=3,
            intermediate_size=HIDDEN,
            mamba_d_ssm=inner,
            mamba_n_heads=6,
            mamba_d_state=state,
            mamba_chunk_size=8,
            rms_norm_eps=EPS,
            rope_parameters={"rope_type": "default", "rope_theta": 1e11},
        )
        return transformers.FalconH1ForCausalLM(config)

    def scaled_mamba2(theirs: Weights, at: str) -> Parts:
        parts = mamba2(theirs, at)
        sizes = torch.tensor([inner, inner, state, state, 6])
        rows = torch.tensor(FALCON["ssm_multipliers"]).repeat_interleave(sizes) * FALCON["ssm_in_multiplier"]
        parts["in_proj.weight"] = parts["in_proj.weight"] * rows[:, None]
        parts["out_proj.weight"] = parts["out_proj.weight"] * FALCON["ssm_out_multiplier"]
        return parts

    def scaled_attention(theirs: Weights, at: str) -> Parts:
        parts = attention(theirs, at)
        width = D // HEADS
        factors = torch.tensor([1.0, FALCON["key_multiplier"], 1.0]) * FALCON["attention_in_multiplier"]
        rows = factors.repeat_interleave(torch.tensor([HEADS * width, KV * width, KV * width]))
        parts["qkv.weight"] = parts["qkv.weight"] * rows[:, None]
        parts["out.weight"] = parts["out.weight"] * FALCON["attention_out_multiplier"]
        return parts

    def scaled_mlp(theirs: Weights, at: str) -> Parts:
        gate, down = FALCON["mlp_multipliers"]
        up = torch.cat([gate * theirs[f"{at}.gate_proj.weight"], theirs[f"{at}.up_proj.weight"]])
        return {"up.weight": up, "down.weight": down * theirs[f"{at}.down_proj.weight"]}

    def weights(theirs: Weights) -> Parts:
        builder = Builder(theirs)
        for index in range(3):
            at = f"model.layers.{index}"
            branches = scaled_mamba2(theirs, f"{at}.mamba"), scaled_attention(theirs, f"{at}.self_attn")
            builder.block(f"{at}.input_layernorm", *branches)
            builder.block(f"{at}.pre_ff_layernorm", scaled_mlp(theirs, f"{at}.feed_forward"))
        parts = builder.finish(tied=False)
        parts["embedding.weight"] = parts["embedding.weight"] * FALCON["embedding_multiplier"]
        parts["head.weight"] = parts["head.weight"] * FALCON["lm_head_multiplier"]
        return parts

    layers = {
        "M": Mamba2Config(expand=1.5, head_dim=8, d_state=state, chunk=16, norm=False),
        "*": AttentionConfig(n_heads=HEADS, n_kv_heads=KV, rope_theta=1e11),
        "-": SWIGLU,
    }
    return Definer(make, braid("([M*]-)x3", layers), weights)


GRANITE = {"embedding_multiplier": 1.7, "residual_multiplier": 0.4, "logits_scaling": 3.0}


def granite() -> Definer:
    """Dense and tied. Its multipliers: of the embedding, in ours the embedding's; of the logits, in ours the last
    norm's, where the embedding's factor is taken back; of the residuals, in ours the output projections'."""

    def make(transformers: Any) -> nn.Module:
        config = transformers.GraniteMoeHybridConfig(
            **SHAPE,
            **THEIR_MAMBA2,
            **GRANITE,
            num_hidden_layers=3,
            shared_intermediate_size=HIDDEN,
            num_local_experts=0,
            layer_types=["mamba", "attention", "mamba"],
            attention_multiplier=0.2,
            rms_norm_eps=EPS,
            tie_word_embeddings=True,
        )
        return transformers.GraniteMoeHybridForCausalLM(config)

    def weights(theirs: Weights) -> Parts:
        builder = Builder(theirs, norm="model.norm.weight")
        for index, letter in enumerate("M*M"):
            at = f"model.layers.{index}"
            mixer = mamba2(theirs, f"{at}.mamba") if letter == "M" else attention(theirs, f"{at}.self_attn")
            builder.block(f"{at}.input_layernorm", mixer)
            shared = f"{at}.shared_mlp"
            mlp = {
                "up.weight": theirs[f"{shared}.input_linear.weight"],
                "down.weight": theirs[f"{shared}.output_linear.weight"],
            }
            builder.block(f"{at}.post_attention_layernorm", mlp)
        return granite_factors(builder.finish(tied=True))

    layers = {"M": MAMBA2, "*": AttentionConfig(HEADS, KV, rope_theta=None, scale=0.2), "-": SWIGLU}
    return Definer(make, braid("M-*-M-", layers, tied=True), weights)


def granite_factors(parts: Parts) -> Parts:
    outputs = ("out_proj.weight", "out.weight", "down.weight")
    for name in parts:
        if name.endswith(outputs):
            parts[name] = parts[name] * GRANITE["residual_multiplier"]
    parts["embedding.weight"] = parts["embedding.weight"] * GRANITE["embedding_multiplier"]
    taken_back = GRANITE["embedding_multiplier"] * GRANITE["logits_scaling"]
    parts["norm.weight"] = parts["norm.weight"] / taken_back
    return parts


FAMILIES: dict[str, Callable[[], Definer]] = {
    "Mamba": mamba_lm,
    "Mamba2": mamba2_lm,
    "NemotronH": nemotron_h,
    "Bamba": bamba,
    "GraniteMoeHybrid, dense": granite,
    "Jamba, dense": jamba,
    "FalconH1": falcon_h1,
    "Zamba2, its Mamba-2 layers": zamba2,
    "Llama": llama,
}
