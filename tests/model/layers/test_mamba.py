"""Mamba's own equation, sizes, initial values and refusals; what every kind must satisfy is in tests/contracts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.context import Context, Documents
from model.hybrid import HybridLM, parameter_count
from model.layers.base import Dims
from model.layers.mamba import Mamba, MambaConfig
from model.params import Place, initialise, local_layout
from tests.model.ops.support import largest

# (layers, d_model, millions): state-spaces/mamba README sizes, counts by the paper's tensors, vocabulary 50,280, tied.
SIZES = [(24, 768, 129.1), (48, 1024, 371.5), (48, 1536, 793.2), (48, 2048, 1372.2), (64, 2560, 2768.3)]


def layer(config: MambaConfig, d_model: int = 16, dtype: torch.dtype = torch.float32) -> Mamba:
    config.check(d_model)
    dims = Dims(d_model, n_residuals=2)
    module = Mamba(config, dims)
    for name, spec in config.table(dims).items():
        initialise(module.get_parameter(name), name, spec, seed=0)
    return module.to(dtype)


def equation(m: Mamba, u: Tensor) -> Tensor:
    """The equations of the module's docstring, one row and one token at a time."""
    weight = dict(m.named_parameters())
    inner, N = weight["A_log"].shape
    rows = []
    for row in u:
        xz = row @ weight["in_proj.weight"].t()
        taps, h, ys = torch.zeros(weight["conv_weight"].shape[1], inner, dtype=u.dtype), torch.zeros(inner, N), []
        for token in xz:
            taps = torch.cat([taps[1:], token[None, :inner]])
            x = F.silu((taps * weight["conv_weight"].t()).sum(0) + weight["conv_bias"])
            r, B, C = (weight["x_proj.weight"] @ x).split([m.sizes[0], N, N])
            if m.config.inner_norms:
                r, B, C = (
                    weight[f"{name}_norm_weight"] * v / torch.sqrt(v.square().mean() + m.eps)
                    for name, v in zip(("dt", "B", "C"), (r, B, C), strict=True)
                )
            dt = F.softplus(weight["dt_proj.weight"] @ r + weight["dt_bias"])
            h = torch.exp(-dt[:, None] * weight["A_log"].exp()) * h + torch.outer(dt * x, B)
            y = h @ C + weight["D"] * x
            ys.append(weight["out_proj.weight"] @ (y * F.silu(token[inner:])))
        rows.append(torch.stack(ys))
    return torch.stack(rows)


@pytest.mark.parametrize("inner_norms", [False, True])
def test_the_layer_is_its_equation(inner_norms: bool):
    """In float64, forward and gradients of input and weights."""
    m = layer(MambaConfig(d_state=5, inner_norms=inner_norms), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(2, 13, 16, generator=generator, dtype=torch.float64).requires_grad_()
    leaves = [u, *m.parameters()]
    documents = Documents.from_starts(torch.zeros(2, 13, dtype=torch.bool))
    got, want = m(u, Context(documents)).y, equation(m, u)
    assert torch.allclose(got, want, rtol=0, atol=1e-10)
    upstream = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    pairs = zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in pairs)


@pytest.mark.parametrize(("n_layers", "d_model", "millions"), SIZES)
def test_published_counts(n_layers: int, d_model: int, millions: float):
    """Mamba 130M to 2.8B: a tensor that is missing, biased or too wide shows here."""
    config = ModelConfig(50_280, d_model, f"(M)x{n_layers}", {"M": MambaConfig()})
    assert round(parameter_count(config) / 1e6, 1) == millions
    model = HybridLM(config, device="meta")
    padding = -50_280 % 128 * d_model
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config) + padding


def test_initial_values():
    """The step starts log-uniform in its range, A at -1 .. -N, D at 1, the step's weights within R^-1/2."""
    m = layer(MambaConfig(dt_min=2e-3, dt_max=5e-2), d_model=128)
    step = F.softplus(m.dt_bias)
    assert 2e-3 * 0.999 <= step.min() < 2.3e-3 and 4.5e-2 < step.max() <= 5e-2 * 1.001
    assert abs(step.log().mean() - torch.tensor([2e-3, 5e-2]).log().mean()) < 0.2
    assert torch.allclose(torch.exp(m.A_log), torch.arange(1.0, 17).expand(256, 16), rtol=1e-6)
    assert (m.D == 1).all()
    bound = 8**-0.5
    assert 0.95 * bound < m.dt_proj.weight.abs().max() <= bound


def test_the_floor_of_the_step():
    assert torch.allclose(
        F.softplus(layer(MambaConfig(dt_min=1e-6, dt_max=1e-6, dt_floor=1e-3)).dt_bias), torch.tensor(1e-3)
    )


@pytest.mark.parametrize("size", [2, 3, 4])
def test_channels_split_over_tensor_ranks(size: int):
    """Ranks hold a part of the channels each, in every weight the same; what x_proj and out_proj give sums to the
    whole."""
    config = MambaConfig(d_state=3, inner_norms=True)
    whole, parts = layer(config), []
    for rank in range(size):
        part = {}
        for name, spec in config.table(Dims(16, 2)).items():
            layout, value = local_layout(spec, Place(rank, size)), whole.get_parameter(name)
            boxes = [value[tuple(slice(*span) for span in piece.box)].flatten() for piece in layout.pieces]
            part[name] = torch.cat(boxes).view(layout.shape)
        parts.append(part)
    widths = [len(part["D"]) for part in parts]
    assert sum(widths) == 32 and max(widths) - min(widths) <= 1
    for name in ("conv_weight", "conv_bias", "dt_proj.weight", "dt_bias", "A_log", "D"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole.get_parameter(name))
    for name in ("dt_norm_weight", "B_norm_weight", "C_norm_weight"):
        assert all(torch.equal(part[name], whole.get_parameter(name)) for part in parts)
    u = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    x, z = (u @ whole.in_proj.weight.t()).chunk(2, -1)
    halves = [(u @ part["in_proj.weight"].t()).chunk(2, -1) for part in parts]
    for got, want in zip(zip(*halves, strict=True), (x, z), strict=True):
        assert torch.allclose(torch.cat(got, -1), want, atol=1e-6)
    for name in ("x_proj.weight", "out_proj.weight"):
        sums = sum(half[0] @ part[name].t() for half, part in zip(halves, parts, strict=True))
        assert torch.allclose(sums, x @ whole.get_parameter(name).t(), atol=1e-6)


def test_no_tensor_has_a_state_per_token():
    """Memory of a long row: the largest tensor of forward and backward holds the states of a block of tokens."""
    m, T, tokens = layer(MambaConfig()), 512, 128
    u = torch.randn(1, T, 16, requires_grad=True)
    documents = Documents.from_starts(torch.zeros(1, T, dtype=torch.bool))
    assert largest(lambda: m(u, Context(documents)).y, [u]) <= (tokens + 1) * 32 * 16


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"expand": 1.3}, "expand: got 1.3, wants a multiple that makes d_model=16 whole"),
        ({"expand": 0}, "expand: got 0, wants a positive number"),
        ({"d_state": 0}, "d_state: got 0, wants a positive number"),
        ({"d_conv": 0}, "d_conv: got 0, wants a positive number"),
        ({"dt_rank": 0}, "dt_rank: got 0, wants 1 to the inner width 32, or none"),
        ({"dt_rank": 33}, "dt_rank: got 33, wants 1 to the inner width 32, or none"),
        ({"dt_min": 0.2}, "dt_max: got 0.1, wants at least dt_min=0.2"),
        ({"dt_min": 0}, "dt_min: got 0, wants a positive number"),
        ({"dt_floor": 0}, "dt_floor: got 0, wants a positive number"),
        ({"chunk": 0}, "chunk: got 0, wants a positive number of tokens, or none"),
    ],
)
def test_wrong_options_are_named(wrong: dict, line: str):
    with pytest.raises(ValueError, match=line):
        MambaConfig(**wrong).check(16)
