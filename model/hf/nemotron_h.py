"""Braids as Hugging Face's native NemotronH: Mamba-2, full attention without positions, squared-ReLU MLPs.

What NemotronH's class (transformers, `models/nemotron_h`) cannot say: windows and rotary positions; gated MLPs and
other activations; limits of the step (its decoding does not apply them); two shapes of one layer kind; parallel
branches and shared weights. It bounds the
step from below by `time_step_min` when it reads a prompt: `NO_LIMIT` switches that off. A stack without attention
loads, and fails in `generate()`.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from model.config import ModelConfig
from model.layers.attention import AttentionConfig
from model.layers.mamba2 import Mamba2Config
from model.layers.mlp import MLPConfig
from model.registry import LayerConfig

LETTERS = {"mamba2": "M", "attention": "*", "mlp": "-"}
"""Layer kind -> its letter in NemotronH's pattern."""

NO_LIMIT = 1e-20


def obstacle(config: ModelConfig) -> str | None:
    """What NemotronH cannot express, naming the layer; None when it can express all of it."""
    if not any(isinstance(layer, AttentionConfig) for layer in config.stacked):
        return "the stack has no attention layer, without which NemotronH cannot decode"
    parallel = next((letters for letters in config.blocks if len(letters) > 1), None)
    if parallel is not None:
        return f"layers {', '.join(map(repr, parallel))} are parallel branches of one block; NemotronH has none"
    if config.places != sorted(set(config.places)):
        return f"the layers {config.shared!r} share their weights between places; NemotronH's do not"
    first: dict[str, tuple[str, LayerConfig]] = {}
    for letter in dict.fromkeys(config.blocks):
        layer = config.layers[letter]
        why = _obstacle(layer)
        if why is not None:
            return f"layer {letter!r} ({layer.kind}) {why}"
        other, known = first.setdefault(layer.kind, (letter, layer))
        if known != layer:
            return f"layers {other!r} and {letter!r} are both {layer.kind} and differ; NemotronH has one shape per kind"
    return None


def _obstacle(layer: LayerConfig) -> str | None:
    if isinstance(layer, Mamba2Config):
        if layer.d_ssm is not None:
            return f"has a state space of {layer.d_ssm} channels beside a gated MLP; NemotronH's has all"
        if not layer.norm or layer.norm_before_gate:
            return "gates otherwise; NemotronH's Mamba-2 norms what is gated"
        return None if layer.dt_limit is None else f"limits its step to {list(layer.dt_limit)}"
    if isinstance(layer, AttentionConfig):
        if layer.window is not None:
            return f"has a window of {layer.window} tokens; NemotronH's attention sees all"
        for key in ("qk_norm", "logit_cap", "scale", "qkv_conv"):
            if value := getattr(layer, key):
                return f"has {key} = {value}; NemotronH's attention has none"
        return None if layer.rope_theta is None else "has rotary positions; NemotronH's attention has none"
    if isinstance(layer, MLPConfig):
        if layer.gated:
            return "is gated; NemotronH's MLP is not"
        return None if layer.activation == "relu2" else f"uses {layer.activation}; only squared ReLU is known to agree"
    return "is unknown to NemotronH"


def configuration(config: ModelConfig) -> dict[str, Any]:
    """Arguments of `NemotronHConfig`, special tokens aside. The embedding is written twice when it is tied: the class
    cannot tie."""
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "hybrid_override_pattern": "".join(LETTERS[layer.kind] for layer in config.stacked),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": False,
        "rescale_prenorm_residual": config.rescale_outputs,
    }
    for layer in config.stacked:
        values |= _layer_values(layer, config.d_model)
    return values


def _layer_values(layer: LayerConfig, d_model: int) -> dict[str, Any]:
    if isinstance(layer, Mamba2Config):
        return {
            "mamba_num_heads": layer.n_heads(d_model),
            "mamba_head_dim": layer.head_dim,
            "ssm_state_size": layer.d_state,
            "n_groups": layer.n_groups,
            "conv_kernel": layer.d_conv,
            "use_conv_bias": layer.conv_bias,
            "chunk_size": layer.chunk,
            "expand": max(1, round(layer.expand)),
            "time_step_min": NO_LIMIT,
            "time_step_max": layer.dt_max,
            "time_step_floor": layer.dt_floor,
        }
    if isinstance(layer, AttentionConfig):
        return {
            "num_attention_heads": layer.n_heads,
            "num_key_value_heads": layer.kv_heads,
            "head_dim": layer.width(d_model),
        }
    assert isinstance(layer, MLPConfig)
    return {"intermediate_size": layer.d_hidden}


RENAMED = {
    "mixer.conv_weight": "mixer.conv1d.weight",
    "mixer.conv_bias": "mixer.conv1d.bias",
    "mixer.norm_weight": "mixer.norm.weight",
    "mixer.out.weight": "mixer.o_proj.weight",
    "mixer.up.weight": "mixer.up_proj.weight",
    "mixer.down.weight": "mixer.down_proj.weight",
}


def tensors(name: str, value: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of NemotronH that one logical tensor becomes, by their names on disk."""
    if name == "embedding.weight":
        yield "backbone.embeddings.weight", value
        if config.tie_embeddings:
            yield "lm_head.weight", value.clone()
    elif name == "head.weight":
        yield "lm_head.weight", value
    elif name == "norm.weight":
        yield "backbone.norm_f.weight", value
    else:
        _, index, part = name.split(".", 2)
        layer = f"backbone.layers.{index}"
        if part == "mixer.qkv.weight":
            attention = config.stacked[int(index)]
            assert isinstance(attention, AttentionConfig)
            width = attention.width(config.d_model)
            rows = [attention.n_heads * width, attention.kv_heads * width, attention.kv_heads * width]
            for letter, block in zip("qkv", value.split(rows), strict=True):
                yield f"{layer}.mixer.{letter}_proj.weight", block.clone()
        else:
            depthwise = part == "mixer.conv_weight"  # torch's convolution has an axis for the channels of a group
            yield f"{layer}.{RENAMED.get(part, part)}", value[:, None] if depthwise else value
