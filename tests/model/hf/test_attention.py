"""Attention's options and parallel branches against Hugging Face's own layers with the same weights, in float32."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.context import Context, Documents
from model.hybrid import HybridLM
from model.layers.attention import AttentionConfig
from model.layers.base import Dims
from model.layers.mamba2 import Mamba2Config
from model.layers.mlp import MLPConfig
from model.ops.rope import LinearScaling, Llama3Scaling, NTKScaling, RopeScaling, YarnScaling, frequencies

transformers = pytest.importorskip("transformers", reason="the layers to compare with are transformers'")

D, H, K, P, T = 32, 4, 2, 8, 40
SHAPE = {"hidden_size": D, "num_attention_heads": H, "num_key_value_heads": K, "num_hidden_layers": 2}
COMMON = {**SHAPE, "max_position_embeddings": 4096, "attn_implementation": "eager"}
LENGTH = 64  # that the scaled models were trained on

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": LENGTH}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": LENGTH,
}


def llama(rope: dict[str, Any], **changes: Any) -> Any:
    return transformers.LlamaConfig(**(COMMON | {"rope_parameters": rope} | changes))


def make(name: str, prefix: str, config: Any) -> tuple[nn.Module, nn.Module]:
    """A family's attention of layer 0 and its rotary embedding."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    return getattr(module, f"{prefix}Attention")(config, 0), getattr(module, f"{prefix}RotaryEmbedding")(config)


def cases() -> dict[str, tuple[Any, AttentionConfig]]:
    """Name -> (maker of Hugging Face's attention and rotary embedding, our config)."""
    heads = AttentionConfig(n_heads=H, n_kv_heads=K)
    grouped = {"n_heads": H, "n_kv_heads": K}
    gemma = transformers.Gemma2Config(
        **COMMON, head_dim=P, query_pre_attn_scalar=16, attn_logit_softcapping=1.5, sliding_window=6
    )
    qwen = transformers.Qwen3Config(**COMMON, head_dim=12, rms_norm_eps=1e-5)
    half = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    stable = transformers.StableLmConfig(**COMMON, rope_parameters=half)
    return {
        "llama": (lambda: make("llama", "Llama", llama({"rope_type": "default", "rope_theta": 1e4})), heads),
        "llama, yarn": (
            lambda: make("llama", "Llama", llama(YARN)),
            AttentionConfig(**grouped, rope_scaling=YarnScaling(4.0, LENGTH)),
        ),
        "llama, llama3": (
            lambda: make("llama", "Llama", llama(LLAMA3)),
            AttentionConfig(**grouped, rope_theta=5e5, rope_scaling=Llama3Scaling(8.0, LENGTH)),
        ),
        "gemma 2, window and cap": (
            lambda: make("gemma2", "Gemma2", gemma),
            AttentionConfig(**grouped, window=6, logit_cap=1.5, scale=16**-0.5),
        ),
        "qwen 3, norm of q and k": (
            lambda: make("qwen3", "Qwen3", qwen),
            AttentionConfig(**grouped, head_dim=12, qk_norm=True),
        ),
        "stablelm, half of the dimensions": (
            lambda: make("stablelm", "StableLm", stable),
            AttentionConfig(**grouped, rope_fraction=0.5),
        ),
    }


CASES = cases()
RENAMED = {"o_proj.weight": "out.weight", "q_norm.weight": "q_norm_weight", "k_norm.weight": "k_norm_weight"}


def attention_weights(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and shapes for what Hugging Face's attention holds: weights, or their gradients."""
    qkv = torch.cat([theirs[f"{letter}_proj.weight"] for letter in "qkv"])
    return {"qkv.weight": qkv} | {ours: theirs[name] for name, ours in RENAMED.items() if name in theirs}


@torch.no_grad()
def liven(module: nn.Module) -> None:
    """Weights that make every term of a layer visible."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.4, generator=generator)
        elif "norm" in name:
            parameter.normal_(1, 0.2, generator=generator)
        else:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def assert_near(ours: Tensor, theirs: Tensor, what: str) -> None:
    error = (ours - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())
    assert error <= 1e-4, f"{what}: off by {error:.1e}"


@pytest.mark.parametrize("lengths", [[T], [25, 3, 12]], ids=["one document", "three"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str, lengths: list[int]):
    """Breaks when an option computes something else than the library that made it known."""
    maker, config = CASES[case]
    theirs, embedding = maker()
    liven(theirs)
    ours = config.build(Dims(D, 1))
    with torch.no_grad():
        for name, value in attention_weights(dict(theirs.named_parameters())).items():
            ours.get_parameter(name).copy_(value)
    starts = torch.zeros(1, T, dtype=torch.bool)
    starts[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    documents = Documents.from_starts(starts)
    steps = torch.arange(T)
    seen = (steps[:, None] >= steps) & (documents.index[0, :, None] == documents.index[0])
    if config.window is not None:
        seen &= steps[:, None] - steps < config.window
    mask = torch.zeros(1, 1, T, T).masked_fill(~seen, torch.finfo(torch.float32).min)
    x, upstream = torch.randn(1, T, D), torch.randn(1, T, D)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted = theirs(hidden_states=x_theirs, position_embeddings=embedding(x, documents.positions), attention_mask=mask)[
        0
    ]
    got = ours(x_ours, Context(documents)).y
    wanted.backward(upstream)
    got.backward(upstream)
    assert_near(got, wanted, "output")
    assert_near(x_ours.grad, x_theirs.grad, "gradient of x")
    for name, value in attention_weights({n: p.grad for n, p in theirs.named_parameters()}).items():
        assert_near(ours.get_parameter(name).grad, value, f"gradient of {name}")


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1e4, **options}


@pytest.mark.parametrize(
    ("parameters", "length", "scaling"),
    [
        (rope("linear", factor=4.0), None, LinearScaling(4.0)),
        # With factor 1, their dynamic form stretches by (length at hand) / (trained length).
        (rope("dynamic", factor=1.0), 4 * LENGTH, NTKScaling(4.0)),
        (YARN, None, YarnScaling(4.0, LENGTH)),
        (
            YARN | {"truncate": False, "beta_fast": 20, "beta_slow": 2},
            None,
            YarnScaling(4.0, LENGTH, 20, 2, None, False),
        ),
        (YARN | {"attention_factor": 1.3}, None, YarnScaling(4.0, LENGTH, attention_factor=1.3)),
        (LLAMA3 | {"rope_theta": 1e4}, None, Llama3Scaling(8.0, LENGTH)),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
@pytest.mark.parametrize("dims", [16, 64, 128])
def test_scaled_frequencies(parameters: dict[str, Any], length: int | None, scaling: RopeScaling, dims: int):
    """Breaks when a checkpoint of theirs would be read with other positions."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    trained = LENGTH if parameters["rope_type"] == "dynamic" else 16 * LENGTH
    config = llama(dict(parameters), head_dim=dims, max_position_embeddings=trained)
    wanted, amplitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len=length)
    got = frequencies(1e4, dims, scaling, torch.float64, torch.device("cpu"))
    assert torch.allclose(got.float(), wanted, rtol=2e-6, atol=0)
    assert scaling.amplitude == pytest.approx(amplitude, rel=1e-7)


def falcon(norm: bool) -> tuple[Any, ModelConfig]:
    """The two configs of a Falcon-H1 of two layers, all its multipliers 1."""
    theirs = transformers.FalconH1Config(
        **COMMON,
        vocab_size=64,
        head_dim=P,
        intermediate_size=48,
        mamba_d_ssm=48,
        mamba_n_heads=6,
        mamba_d_head=8,
        mamba_n_groups=2,
        mamba_d_state=16,
        mamba_chunk_size=16,
        mamba_rms_norm=norm,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    layers = {
        "M": Mamba2Config(expand=1.5, head_dim=8, d_state=16, n_groups=2, chunk=16, norm=norm, norm_before_gate=norm),
        "*": AttentionConfig(n_heads=H, n_kv_heads=K),
        "-": MLPConfig(d_hidden=48),
    }
    return theirs, ModelConfig(64, D, "([M*]-)x2", layers, tie_embeddings=False)


def falcon_weights(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and shapes for what Falcon-H1 holds: weights, or their gradients."""
    ours = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.final_layernorm.weight"],
        "head.weight": theirs["lm_head.weight"],
    }
    for index in range(2):
        layer = f"model.layers.{index}."
        block, after = f"blocks.{2 * index}.", f"blocks.{2 * index + 1}."
        ours[f"{block}norm.weight"] = theirs[f"{layer}input_layernorm.weight"]
        for name, value in theirs.items():
            if name.startswith(f"{layer}mamba."):
                part = name.removeprefix(f"{layer}mamba.").replace("conv1d.", "conv_").replace("norm.", "norm_")
                ours[f"{block}branches.0.mixer.{part}"] = value.squeeze(1) if part == "conv_weight" else value
        within = {name.removeprefix(f"{layer}self_attn."): value for name, value in theirs.items() if layer in name}
        ours |= {f"{block}branches.1.mixer.{name}": value for name, value in attention_weights(within).items()}
        ours[f"{after}norm.weight"] = theirs[f"{layer}pre_ff_layernorm.weight"]
        gate, up = (theirs[f"{layer}feed_forward.{name}_proj.weight"] for name in ("gate", "up"))
        ours[f"{after}mixer.up.weight"] = torch.cat([gate, up])
        ours[f"{after}mixer.down.weight"] = theirs[f"{layer}feed_forward.down_proj.weight"]
    return ours


@pytest.mark.parametrize("norm", [False, True], ids=["no norm", "norm before gate"])
def test_falcon_h1_is_a_braid_of_parallel_branches(norm: bool):
    """Breaks when parallel branches, or Mamba-2's other gates, differ from the model that has them: whole model,
    logits and gradients."""
    their_config, config = falcon(norm)
    theirs = transformers.FalconH1ForCausalLM(their_config)
    liven(theirs)
    ours = HybridLM(config)
    table, values = ours.table(), falcon_weights(dict(theirs.named_parameters()))
    assert values.keys() == table.keys()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.zero_()[: values[name].shape[0]] = values[name]
    tokens = torch.randint(1, 64, (2, T), generator=torch.Generator().manual_seed(0))  # 0 is their padding
    starts = torch.zeros(2, T, dtype=torch.bool)
    starts[:, 0] = True
    wanted, got = theirs(tokens).logits, ours(tokens, starts).logits
    assert_near(got, wanted, "logits")
    for logits in (wanted, got):
        logits.log_softmax(-1).square().mean().backward()
    for name, value in falcon_weights({n: p.grad for n, p in theirs.named_parameters()}).items():
        assert_near(ours.get_parameter(name).grad[: value.shape[0]], value, f"gradient of {name}")
