"""Mamba against Hugging Face's slow paths, written by others: weights copied, logits and every gradient compared."""

import pytest
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.context import Context, Documents
from model.hybrid import HybridLM, Precision, initialise_model
from model.layers.base import Dims
from model.layers.mamba import Mamba, MambaConfig
from model.params import initialise

RENAMED = {
    "in_proj.weight": "in_proj.weight",
    "conv_weight": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "x_proj.weight": "x_proj.weight",
    "dt_norm_weight": "dt_layernorm.weight",
    "B_norm_weight": "b_layernorm.weight",
    "C_norm_weight": "c_layernorm.weight",
    "dt_proj.weight": "dt_proj.weight",
    "dt_bias": "dt_proj.bias",
    "A_log": "A_log",
    "D": "D",
    "out_proj.weight": "out_proj.weight",
}
"""Our names in a layer -> theirs."""


def theirs(name: str) -> str:
    """A parameter's name in MambaForCausalLM."""
    outer = {"embedding.weight": "backbone.embeddings.weight", "norm.weight": "backbone.norm_f.weight"}
    if name in outer:
        return outer[name]
    _, index, part = name.split(".", 2)
    inner = part if part.startswith("norm.") else f"mixer.{RENAMED[part.removeprefix('mixer.')]}"
    return f"backbone.layers.{index}.{inner}"


def copy_weights(ours: dict[str, nn.Parameter], other: nn.Module, names: dict[str, str]) -> None:
    state = other.state_dict()
    for name, parameter in ours.items():
        value = state[names[name]]
        value.copy_(parameter.detach()[: value.shape[0]].view(value.shape))
    assert not {n for n, _ in other.named_parameters()} - set(names.values()), "a weight of theirs was not set"


def shake(parameters: dict[str, nn.Parameter]) -> None:
    """Every weight off its symmetric start, so that no term is idle."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def assert_close(got: Tensor, want: Tensor, name: str) -> None:
    want = want.view_as(got)
    assert (got - want).abs().max() <= 1e-4 * max(1.0, want.abs().max().item()), name


@pytest.mark.parametrize(
    "layer", [MambaConfig(), MambaConfig(d_state=5, dt_rank=3, d_conv=3, conv_bias=False)], ids=["default", "odd"]
)
def test_logits_and_gradients_of_mamba(layer: MambaConfig):
    """MambaForCausalLM is the same function of the same weights."""
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(61, 32, "MM", {"M": layer})
    model = HybridLM(config, Precision())
    initialise_model(model, seed=1)
    ours = dict(model.named_parameters())
    shake(ours)
    with torch.no_grad():
        ours["embedding.weight"][61:] = 0
    other = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=layer.d_state,
            conv_kernel=layer.d_conv,
            use_conv_bias=layer.conv_bias,
            time_step_rank=layer.rank(32),
            layer_norm_epsilon=config.norm_eps,
            use_cache=False,
        )
    )
    names = {name: theirs(name) for name in ours}
    copy_weights(ours, other, names)
    tokens = torch.randint(0, 61, (2, 48), generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(2, 48, dtype=torch.bool)
    starts[:, 0] = True
    logits, want = model(tokens, starts).logits, other(tokens).logits
    assert_close(logits, want, "logits")
    for values in (logits, want):
        nn.functional.cross_entropy(values[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    for name, parameter in ours.items():
        reference = gradients[names[name]]
        assert reference.abs().max() > 1e-3, f"{name} is idle"
        assert_close(parameter.grad[: reference.shape[0]], reference, name)


def test_outputs_and_gradients_of_jambas_mixer():
    """JambaMambaMixer, with norms on the step, B and C."""
    jamba = pytest.importorskip("transformers.models.jamba.modeling_jamba")
    layer, dims = MambaConfig(d_state=6, dt_rank=4, inner_norms=True), Dims(32, 1)
    layer.check(32)
    model = Mamba(layer, dims)
    ours = dict(model.named_parameters())
    for name, spec in layer.table(dims).items():
        initialise(ours[name], name, spec, seed=1)
    shake(ours)
    config = jamba.JambaConfig(
        hidden_size=32, mamba_d_state=6, mamba_dt_rank=4, rms_norm_eps=dims.norm_eps, use_cache=False
    )
    other = jamba.JambaMambaMixer(config, layer_idx=0)
    copy_weights(ours, other, {name: RENAMED[name] for name in ours})
    u = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1))
    documents = Documents.from_starts(torch.zeros(2, 40, dtype=torch.bool))
    results = []
    for run in (lambda v: model(v, Context(documents)).y, other):
        v = u.clone().requires_grad_()
        y = run(v)
        (y * weight).sum().backward()
        results.append((y, v.grad))
    for name, got, want in zip(("y", "u"), *results, strict=True):
        assert_close(got, want, name)
    gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    for name, parameter in ours.items():
        assert_close(parameter.grad, gradients[RENAMED[name]], name)
