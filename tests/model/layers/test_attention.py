"""The attention layer: the order of its steps written out, odd heads, and wrong options refused with their key."""

import pytest
import torch
import torch.nn.functional as F

from model.config import ModelConfig
from model.context import Context, Documents
from model.layers.attention import AttentionConfig
from model.layers.base import Dims
from model.ops.norm import rms_norm_reference
from model.ops.rope import LinearScaling, NTKScaling
from tests.contracts.examples import braid, shake, tokens_and_starts


def test_the_equation():
    """Convolution with SiLU on q, k and v, norm of q and k, rotation of the first half, cap, scale: in that order."""
    config = AttentionConfig(
        n_heads=3, n_kv_heads=1, head_dim=8, rope_fraction=0.5, qk_norm=True, logit_cap=0.8, scale=0.7, qkv_conv=3
    )
    layer = config.build(Dims(16, 1)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    T = 9
    x = torch.randn(1, T, 16, generator=generator, dtype=torch.float64)
    ctx = Context(Documents.from_starts(tokens_and_starts([T], rows=1)[1]), dtype=torch.float64)
    qkv = (x[0] @ layer.qkv.weight.T).T[None]
    qkv = F.silu(F.conv1d(F.pad(qkv, (2, 0)), layer.conv_weight[:, None], groups=40))[0].T
    q, k, v = qkv.view(T, 5, 8).split([3, 1, 1], 1)
    q, k = rms_norm_reference(q, layer.q_norm_weight, 1e-5), rms_norm_reference(k, layer.k_norm_weight, 1e-5)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.01], dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    q, k = (
        torch.cat([(z := torch.complex(h[..., :2], h[..., 2:4]) * turn).real, z.imag, h[..., 4:]], -1) for h in (q, k)
    )
    scores = torch.einsum("ihp,jkp->hij", q, k) * 0.7
    scores = (0.8 * torch.tanh(scores / 0.8)).masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
    y = torch.einsum("hij,jkp->ihp", scores.softmax(-1), v).flatten(1) @ layer.out.weight.T
    assert torch.allclose(layer(x, ctx).y[0], y, atol=1e-12)


def test_heads_need_not_divide_the_width():
    """Samba 3.8B: 11 query heads on one key/value head of 256 dimensions each; decoding works there too."""
    config = AttentionConfig(n_heads=11, n_kv_heads=1, head_dim=6, window=5)
    model = braid(config)
    assert model.blocks[0].mixer.qkv.weight.shape == (13 * 6, 32)
    tokens, starts = tokens_and_starts([12])
    first = model(tokens[:, :7], starts[:, :7], carry=True)
    rest = model(tokens[:, 7:], starts[:, 7:], state=first.state).logits
    assert torch.allclose(rest, model(tokens, starts).logits[:, 7:], atol=1e-4)


def test_older_states_still_fit():
    """A layer without convolution carries none, and keeps the parameters that older checkpoints have."""
    model = braid(AttentionConfig(n_heads=4), depth=1)
    shake(model, 0)
    tokens, starts = tokens_and_starts([5])
    assert model(tokens, starts, carry=True).state.layers[0].conv is None
    assert [name for name in model.table() if "mixer" in name] == [
        "blocks.0.mixer.qkv.weight",
        "blocks.0.mixer.out.weight",
    ]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"window": 0}, "window: got 0"),
        ({"n_kv_heads": 3}, "n_kv_heads: got 3, wants a divisor of n_heads=4"),
        ({"head_dim": 7}, "head_dim: got 7, wants an even size under rope"),
        ({"rope_fraction": 0.0}, "rope_fraction: got 0.0"),
        ({"rope_fraction": 1.5}, "rope_fraction: got 1.5"),
        ({"rope_fraction": 0.05}, "rope_fraction: got 0.05, wants an even number of the 8 dimensions"),
        (
            {"rope_fraction": 0.375},
            "rope_fraction: got 0.375, wants an even number of the 8 dimensions of a head, not 3",
        ),
        ({"rope_fraction": 0.3}, "rope_fraction: got 0.3"),
        ({"rope_theta": None, "rope_fraction": 0.5}, "rope_fraction: got 0.5, wants 1 without rope"),
        ({"rope_theta": None, "rope_scaling": LinearScaling(2.0)}, "rope_scaling: got LinearScaling"),
        ({"rope_theta": 1.0, "rope_scaling": LinearScaling(2.0)}, "rope_theta: got 1.0"),
        ({"rope_fraction": 0.25, "rope_scaling": NTKScaling(2.0)}, "rope_scaling.kind: got ntk"),
        ({"logit_cap": 0.0}, "logit_cap: got 0.0"),
        ({"logit_cap": -1.0}, "logit_cap: got -1.0"),
        ({"scale": 0.0}, "scale: got 0.0"),
        ({"qkv_conv": 0}, "qkv_conv: got 0"),
    ],
)
def test_wrong_options_are_refused_with_the_key(options: dict, line: str):
    with pytest.raises(ValueError) as error:
        ModelConfig(61, 32, "*", {"*": AttentionConfig(**({"n_heads": 4} | options))})
    assert str(error.value).startswith(f"layers.*.{line}")
