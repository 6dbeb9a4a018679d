"""The Mamba-2 layer's published options: a gated MLP beside the state space, other gates, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from model.config import ModelConfig
from model.context import Context, Documents
from model.layers.base import Dims
from model.layers.mamba2 import Mamba2, Mamba2Config
from model.ops.norm import rms_norm_reference
from model.params import Place, count_parameters, local_layout
from tests.contracts.examples import tokens_and_starts

DIMS = Dims(16, 1)


def made(**options: object) -> Mamba2:
    layer = Mamba2Config(**({"head_dim": 4, "d_state": 6, "n_groups": 2, "chunk": 4} | options)).build(DIMS).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return layer


@pytest.mark.parametrize("norm", ["after the gate", "before the gate", "none"])
@pytest.mark.parametrize("d_ssm", [None, 16])
def test_the_equation(norm: str, d_ssm: int | None):
    """mamba_ssm's Mamba2 written out: [z0, x0, z, x, B, C, dt], the MLP beside the state space, the three gates."""
    before, normed = norm == "before the gate", norm != "none"
    layer = made(d_ssm=d_ssm, norm=normed, norm_before_gate=before)
    T, inner = 9, d_ssm or 32
    u = torch.randn(1, T, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sizes = [32 - inner, 32 - inner, inner, inner + 24, inner // 4]
    z0, x0, z, xBC, dt = (u @ layer.in_proj.weight.T).split(sizes, -1)
    padded = F.pad(xBC.transpose(1, 2), (3, 0))
    xBC = F.silu(F.conv1d(padded, layer.conv_weight[:, None], layer.conv_bias, groups=inner + 24)).transpose(1, 2)
    x, B, C = xBC.split([inner, 12, 12], -1)
    dt, A = F.softplus(dt + layer.dt_bias), -torch.exp(layer.A_log)
    state, rows = torch.zeros(inner // 4, 4, 6, dtype=torch.float64), []
    for t in range(T):
        heads = inner // 4 // 2
        Bt, Ct = (v[0, t].view(2, 6).repeat_interleave(heads, 0) for v in (B, C))
        xt = x[0, t].view(-1, 4)
        state = torch.exp(dt[0, t] * A)[:, None, None] * state + dt[0, t][:, None, None] * xt[..., None] * Bt[:, None]
        rows.append(((state * Ct[:, None]).sum(-1) + layer.D[:, None] * xt).flatten())
    y = torch.stack(rows)[None]
    if normed:
        y = y if before else y * F.silu(z)
        y = rms_norm_reference(y, layer.norm_weight, 1e-5, groups=2)
        y = y * F.silu(z) if before else y
    else:
        y = y * F.silu(z)
    wanted = y @ layer.out_proj.weight.T
    if d_ssm is not None:
        wanted = wanted + (F.silu(z0) * x0) @ layer.mlp_out.weight.T
    ctx = Context(Documents.from_starts(tokens_and_starts([T], rows=1)[1]), dtype=torch.float64)
    assert torch.allclose(layer(u, ctx).y, wanted, atol=1e-10)


def test_blocks_beside_an_mlp():
    """The fused projection names its runs, and tensor ranks divide state space and MLP each by its own units."""
    config = Mamba2Config(head_dim=4, d_state=6, n_groups=2, d_ssm=16)
    table = config.table(DIMS)
    spec = table["in_proj.weight"]
    assert [(b.name, b.rows) for b in spec.blocks] == [
        ("z0", 16),
        ("x0", 16),
        ("z", 16),
        ("x", 16),
        ("B", 12),
        ("C", 12),
        ("dt", 4),
    ]
    local = [(p.block, p.box[0][1] - p.box[0][0]) for p in local_layout(spec, Place(1, 2)).pieces]
    assert local == [("z0", 8), ("x0", 8), ("z", 8), ("x", 8), ("B", 6), ("C", 6), ("dt", 2)]
    assert (
        local_layout(table["out_proj.weight"], Place(1, 2)).shape
        == local_layout(table["mlp_out.weight"], Place(1, 2)).shape
        == (16, 8)
    )
    whole = count_parameters(Mamba2Config(head_dim=4, d_state=6, n_groups=2).table(DIMS))
    per_head = 16 + 5 * 4 + 3 + 4  # dt row, convolution and its bias, dt_bias, A_log and D, norm
    assert whole - count_parameters(table) == 4 * per_head


def test_older_checkpoints_keep_their_names():
    assert list(Mamba2Config(head_dim=4).table(DIMS)) == [
        "in_proj.weight",
        "conv_weight",
        "conv_bias",
        "dt_bias",
        "A_log",
        "D",
        "norm_weight",
        "out_proj.weight",
    ]
    assert "norm_weight" not in Mamba2Config(head_dim=4, norm=False).table(DIMS)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"d_ssm": 0}, "d_ssm: got 0, wants a number from 1 to the inner width 32"),
        ({"d_ssm": 40}, "d_ssm: got 40"),
        ({"d_ssm": 18}, "head_dim: got 4, wants a divisor of d_ssm 18"),
        ({"d_ssm": 12, "n_groups": 2}, "n_groups: got 2, wants a divisor of the 3 heads"),
        ({"norm": False, "norm_before_gate": True}, "norm_before_gate: got True, wants false where norm is false"),
    ],
)
def test_wrong_options_are_refused_with_the_key(options: dict, line: str):
    with pytest.raises(ValueError) as error:
        ModelConfig(61, 16, "M", {"M": Mamba2Config(**({"head_dim": 4} | options))})
    assert str(error.value).startswith(f"layers.M.{line}")
