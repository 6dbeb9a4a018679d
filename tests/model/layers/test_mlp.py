"""The feed-forward layer: every activation, gated or not, written out."""

import pytest
import torch
import torch.nn.functional as F

from model.context import Context, Documents
from model.layers.base import Dims
from model.layers.mlp import MLPConfig, activate
from tests.contracts.examples import tokens_and_starts

EQUATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", EQUATIONS)
def test_the_equation(name: str, gated: bool):
    layer = MLPConfig(12, name, gated).build(Dims(8, 1)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    x = torch.randn(1, 5, 8, generator=generator, dtype=torch.float64)
    h = F.linear(x, layer.up.weight)
    act = EQUATIONS[name]
    h = act(h[..., :12]) * h[..., 12:] if gated else act(h)
    ctx = Context(Documents.from_starts(tokens_and_starts([5], rows=1)[1]), dtype=torch.float64)
    assert torch.allclose(layer(x, ctx).y, F.linear(h, layer.down.weight), atol=1e-12)
    assert torch.allclose(activate(name, x), act(x), atol=1e-12)


def test_an_unknown_activation_is_refused_with_the_key():
    with pytest.raises(ValueError, match="activation: got 'swish', wants one of silu, gelu, gelu_tanh, relu, relu2"):
        MLPConfig(12, "swish").check(8)
