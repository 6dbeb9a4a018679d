"""The Triton kernels of norms, activations and the head's softmax against the plain equations in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import head_triton, norm_triton
from model.ops.head import IGNORE, linear_cross_entropy, linear_cross_entropy_reference
from model.ops.head_triton import TritonSoftmax
from model.ops.norm import rms_norm_reference
from model.ops.norm_triton import TritonNorm, TritonReLU2, TritonSwiGLU
from tests.model.ops.kernels import DEVICE
from tests.model.ops.support import leaf, outputs_and_gradients

EPS = 1e-5
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several programs even in a small input; none is filled."""
    monkeypatch.setattr(norm_triton, "ELEMENTS", 32)
    monkeypatch.setattr(norm_triton, "PROGRAMS", 3)
    monkeypatch.setattr(head_triton, "BLOCK", 16)


def compare(
    run: Callable[..., Tensor], plain: Callable[..., Tensor], given: Sequence[Tensor], within: float, out: torch.dtype
) -> None:
    """The output and every gradient, each error against the largest number of its kind."""
    given = [v.detach().to(DEVICE).requires_grad_() for v in given]
    exact = [v.detach().double().requires_grad_() for v in given]
    got = outputs_and_gradients(lambda: [run(*given)], given)
    want = outputs_and_gradients(lambda: [plain(*exact)], exact)
    assert [v.dtype for v in got] == [out, *(v.dtype for v in given)]
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b).abs().max() / max(1.0, float(b.abs().max()))
        assert error <= within, f"number {number} differs by {error:.1e}"


@pytest.mark.parametrize(("dtype", "within"), DTYPES)
@pytest.mark.parametrize("gate", [None, False, True])
@pytest.mark.parametrize(("width", "groups"), [(12, 1), (12, 3), (64, 1)])
def test_norm(width, groups, gate, dtype, within):
    """Plain, gated before and after; groups; a width that is no power of two; rows that do not fill a program, and
    several turns of a program; x and z are slices of wider rows."""
    wide, weight = leaf(3, 7, 2 * width + 1, dtype=dtype), leaf(width, dtype=torch.float32)

    def run(rows: Tensor, w: Tensor) -> Tensor:
        x, z = rows[..., :width], rows[..., width : 2 * width]
        return TritonNorm.apply(x, None if gate is None else z, w, EPS, groups, bool(gate), x.dtype)

    def plain(rows: Tensor, w: Tensor) -> Tensor:
        x, z = rows[..., :width], rows[..., width : 2 * width]
        if gate is None:
            return rms_norm_reference(x, w, EPS, groups)
        if gate:
            return rms_norm_reference(x, w, EPS, groups) * F.silu(z)
        return rms_norm_reference(x * F.silu(z), w, EPS, groups)

    compare(run, plain, [wide, weight], within, dtype)


def test_norm_of_the_residual():
    """float32 rows to bfloat16, as blocks ask for it: the upstream gradient is bfloat16, the gradient float32."""

    def run(x: Tensor, w: Tensor) -> Tensor:
        return TritonNorm.apply(x, None, w, EPS, 1, False, torch.bfloat16)

    given = [leaf(5, 24, dtype=torch.float32), leaf(24, dtype=torch.float32)]
    compare(run, lambda x, w: rms_norm_reference(x, w, EPS), given, 1e-2, torch.bfloat16)


@pytest.mark.parametrize(("dtype", "within"), DTYPES)
def test_activations(dtype, within):
    """SwiGLU of the halves of a projection, and squared ReLU of a slice of it; widths that do not fill a block."""
    rows = leaf(2, 3, 90, dtype=dtype)

    def swiglu(v: Tensor) -> Tensor:
        gate, up = v.chunk(2, -1)
        return TritonSwiGLU.apply(gate, up)

    compare(swiglu, lambda v: F.silu(v[..., :45]) * v[..., 45:], [rows], within, dtype)
    compare(lambda v: TritonReLU2.apply(v[..., :45]), lambda v: F.relu(v[..., :45]).square(), [rows], within, dtype)


@pytest.mark.parametrize(("dtype", "within"), DTYPES)
def test_softmax_of_the_head(dtype, within):
    """Blocks of logits that the vocabulary does not fill; padding, which is read nowhere and gets a slope of 0; tokens
    without a target; the slope stands where the logits stood."""
    n, V = 5, 37
    rows = torch.full((n, 64), float("nan"), dtype=dtype, device=DEVICE)
    rows[:, :V] = (3 * leaf(n, V)).detach().to(DEVICE, dtype)
    logits = rows[:, :V].clone()
    target = torch.tensor([0, 36, IGNORE, 17, 16], device=DEVICE)
    lse = torch.empty(n, device=DEVICE)
    TritonSoftmax().log_sum_exp(rows, V, lse)
    exact = logits.double().requires_grad_()
    assert (lse.double() - exact.logsumexp(-1)).abs().max() <= 1e-5
    own = torch.tensor([1.0, 0.5, 0.0, -2.0, 1.0], device=DEVICE)
    nll = linear_cross_entropy_reference(exact[None], torch.eye(V, device=DEVICE).double(), target[None], V)[0]
    (want,) = torch.autograd.grad((nll * own.double()).sum(), exact)
    TritonSoftmax().softmax_slope(rows, V, lse, own, own, target)
    assert (rows[:, :V].double() - want).abs().max() <= within
    assert torch.equal(rows[:, V:], torch.zeros_like(rows[:, V:]))


@pytest.mark.parametrize(("dtype", "within"), DTYPES)
def test_head(monkeypatch, dtype, within):
    """The whole op with this softmax: padded rows of the weight take part in its matmuls and get no gradient."""
    monkeypatch.setattr("model.ops.head._softmax", lambda name: TritonSoftmax())
    monkeypatch.setattr("model.ops.head.rows_at_once", lambda *sizes: 4)
    target = torch.randint(0, 37, (2, 19), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    target[:, ::5] = IGNORE
    given = [leaf(2, 19, 24, dtype=dtype), leaf(64, 24, dtype=torch.float32)]
    with torch.no_grad():
        given[1][37:] = 0
    compare(
        lambda h, w: linear_cross_entropy(h, w, target, vocab_size=37, z_loss=1e-3),
        lambda h, w: linear_cross_entropy_reference(h, w, target, 37, 1e-3),
        given,
        2 * within,
        torch.float32,
    )


def test_as_shipped(monkeypatch):
    """Whole tiles of the sizes that run."""
    monkeypatch.undo()
    rows, weight = leaf(9, 3072, dtype=torch.bfloat16), leaf(1536, dtype=torch.float32)

    def run(v: Tensor, w: Tensor) -> Tensor:
        return TritonNorm.apply(v[:, :1536], v[:, 1536:], w, EPS, 1, False, v.dtype)

    def plain(v: Tensor, w: Tensor) -> Tensor:
        return rms_norm_reference(v[:, :1536] * F.silu(v[:, 1536:]), w, EPS)

    compare(run, plain, [rows, weight], 1e-2, torch.bfloat16)
