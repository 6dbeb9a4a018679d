"""The families with experts: Jamba, Granite 4.0 and Nemotron 3."""

from typing import Any

from torch import nn

from model.layers.attention import AttentionConfig
from model.layers.mamba import MambaConfig
from model.layers.moe import MoEConfig
from tests.model.hf.definers import (
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
    Weights,
    attention,
    braid,
    gated_mlp,
    mamba,
    mamba2,
    plain_mlp,
)
from tests.model.hf.families import GRANITE, granite_factors

E, K, F, SHARED = 4, 2, 24, 40


def routed(theirs: Weights, router: str, at: str, up: str) -> Parts:
    """Router and experts; theirs are stacked along an axis of their own, ours along the rows."""
    return {
        "router.weight": theirs[f"{router}.weight"],
        "up.weight": theirs[f"{at}.{up}"].flatten(0, 1),
        "down.weight": theirs[f"{at}.down_proj"].flatten(0, 1),
    }


def jamba_experts() -> Definer:
    """The weights of the chosen experts do not add up to 1."""

    def make(transformers: Any) -> nn.Module:
        config = transformers.JambaConfig(
            **SHAPE,
            num_hidden_layers=4,
            intermediate_size=HIDDEN,
            attn_layer_period=4,
            attn_layer_offset=2,
            num_experts=E,
            num_experts_per_tok=K,
            mamba_d_state=8,
            rms_norm_eps=EPS,
        )
        return transformers.JambaForCausalLM(config)

    def weights(theirs: Weights) -> Parts:
        builder = Builder(theirs)
        for index, (letter, behind) in enumerate(zip("MM*M", "-E-E", strict=True)):
            at = f"model.layers.{index}"
            mixer = mamba(theirs, f"{at}.mamba") if letter == "M" else attention(theirs, f"{at}.self_attn")
            builder.block(f"{at}.input_layernorm", mixer)
            ff = f"{at}.feed_forward"
            dense = behind == "-"
            mlp = gated_mlp(theirs, ff) if dense else routed(theirs, f"{ff}.router", f"{ff}.experts", "gate_up_proj")
            builder.block(f"{at}.pre_ff_layernorm", mlp)
        return builder.finish(tied=False)

    layers = {
        "M": MambaConfig(d_state=8, inner_norms=True),
        "*": NOPE,
        "-": SWIGLU,
        "E": MoEConfig(E, HIDDEN, top_k=K),
    }
    return Definer(make, braid("M-ME*-ME", layers), weights)


def granite_experts() -> Definer:
    """The weights of the chosen experts add up to 1; a shared expert beside them."""

    def make(transformers: Any) -> nn.Module:
        config = transformers.GraniteMoeHybridConfig(
            **SHAPE,
            **THEIR_MAMBA2,
            **GRANITE,
            num_hidden_layers=3,
            intermediate_size=F,
            shared_intermediate_size=SHARED,
            num_local_experts=E,
            num_experts_per_tok=K,
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
            moe = f"{at}.block_sparse_moe"
            parts = routed(theirs, f"{moe}.router", f"{moe}.experts", "gate_up_proj")
            parts["shared.up.weight"] = theirs[f"{at}.shared_mlp.input_linear.weight"]
            parts["shared.down.weight"] = theirs[f"{at}.shared_mlp.output_linear.weight"]
            builder.block(f"{at}.post_attention_layernorm", parts)
        return granite_factors(builder.finish(tied=True))

    layers = {
        "M": MAMBA2,
        "*": AttentionConfig(HEADS, KV, rope_theta=None, scale=0.2),
        "E": MoEConfig(E, F, top_k=K, shared_hidden=SHARED, renormalise=True),
    }
    return Definer(make, braid("ME*EME", layers, tied=True), weights)


def nemotron_h_experts() -> Definer:
    """A sigmoid router with a bias for the choice alone, a factor of the weights, plain squared-ReLU experts."""
    pattern = "ME*E"

    def make(transformers: Any) -> nn.Module:
        config = transformers.NemotronHConfig(
            **SHAPE,
            hybrid_override_pattern=pattern,
            head_dim=D // HEADS,
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=16,
            n_groups=2,
            chunk_size=8,
            layer_norm_epsilon=EPS,
            time_step_min=1e-20,
            n_routed_experts=E,
            num_experts_per_tok=K,
            moe_intermediate_size=F,
            moe_shared_expert_intermediate_size=SHARED,
            routed_scaling_factor=1.5,
        )
        return transformers.NemotronHForCausalLM(config)

    def experts(theirs: Weights, at: str) -> Parts:
        parts = routed(theirs, f"{at}.gate", f"{at}.experts", "up_proj")
        parts["bias"] = theirs[f"{at}.gate.e_score_correction_bias"]
        return parts | {f"shared.{name}": weight for name, weight in plain_mlp(theirs, f"{at}.shared_experts").items()}

    def weights(theirs: Weights) -> Parts:
        builder = Builder(theirs, "model.embeddings.weight", "model.norm_f.weight")
        mixers = {"M": mamba2, "*": attention, "E": experts}
        for index, letter in enumerate(pattern):
            at = f"model.layers.{index}"
            builder.block(f"{at}.norm", mixers[letter](theirs, f"{at}.mixer"))
        return builder.finish(tied=False)

    routing = {"score": "sigmoid", "renormalise": True, "route_scale": 1.5, "bias_rate": 1e-3}
    plain = {"activation": "relu2", "gated": False, "shared_hidden": SHARED}
    layers = {"M": MAMBA2, "*": NOPE, "E": MoEConfig(E, F, top_k=K, **routing, **plain)}
    return Definer(make, braid(pattern, layers), weights)


WITH_EXPERTS = {
    "Jamba": jamba_experts,
    "GraniteMoeHybrid": granite_experts,
    "NemotronH, with experts": nemotron_h_experts,
}
