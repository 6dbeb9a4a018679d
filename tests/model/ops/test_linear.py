"""Projections: the loops give what float64 gives, of any sizes and strides; who takes them, and when."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from model.ops import backend, head
from model.ops import linear as ops
from model.ops.backend import chosen, request
from model.ops.head import linear_cross_entropy, linear_cross_entropy_reference
from model.ops.linear import FEW, linear, native_matmul, native_weight_gradient, takes_native
from model.ops.native import native_ready
from tests.model.ops.support import leaf

needs_loops = pytest.mark.skipif(not native_ready(), reason="no C++ compiler, so no loops in C++")

BF16 = torch.bfloat16
ROUNDED = 2.0**-8
"""Of a result that is rounded to bfloat16 once, relative to the largest."""
SUMMED = 1e-5
SIZES = [(1, 2, 2), (3, 34, 70), (64, 64, 64), (67, 130, 66), (300, 62, 194), (515, 66, 1030), (1025, 1026, 64)]
"""Rows, inputs, outputs: full tiles, panels, spans of rows and groups of columns, and what is left over of each."""


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "_chosen", {})
    yield
    request({})


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(((got.double() - want).abs().max() / want.abs().max()).detach())


def a_case(n: int, inputs: int, outputs: int, weight: torch.dtype, apart: int = 0) -> tuple[torch.Tensor, ...]:
    """x, dy and W; the rows of the first two are `apart` elements further apart than they are long."""
    x, dy = leaf(n, inputs + apart, dtype=BF16)[:, apart:], leaf(n, outputs + apart, dtype=BF16, seed=1)[:, apart:]
    return x.detach(), dy.detach(), leaf(outputs, inputs, dtype=weight, seed=2).detach()


@needs_loops
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("weight", [torch.float32, BF16])
@pytest.mark.parametrize("apart", [0, 3, 4])
def test_the_loops_give_what_float64_gives(sizes: tuple[int, int, int], weight: torch.dtype, apart: int):
    x, dy, W = a_case(*sizes, weight, apart)
    exact = W.to(BF16).double()
    assert distance(native_matmul(x, W, transposed=True), x.double() @ exact.t()) < ROUNDED
    assert distance(native_matmul(dy, W, transposed=False), dy.double() @ exact) < ROUNDED
    want = dy.double().t() @ x.double()
    dw = torch.full(W.shape, float("nan"))
    native_weight_gradient(dy, x, dw, add=False)
    assert distance(dw, want) < SUMMED
    native_weight_gradient(dy, x, dw, add=True)
    assert distance(dw, 2 * want) < SUMMED


@needs_loops
@pytest.mark.parametrize("weight", [torch.float32, BF16])
def test_the_op_and_its_gradients(weight: torch.dtype):
    request({"linear": "native"})
    x, W = leaf(3, 50, 66, dtype=BF16), leaf(130, 66, dtype=weight, seed=2)
    slope = leaf(3, 50, 130, dtype=BF16, seed=1).detach()
    y = linear(x, W)
    dx, dw = torch.autograd.grad(y, (x, W), slope)
    assert chosen()["linear"] == "native"
    assert (y.dtype, dx.dtype, dw.dtype) == (BF16, BF16, weight)
    exact, wide = W.detach().to(BF16).double(), x.detach().double()
    assert distance(y, wide @ exact.t()) < ROUNDED
    assert distance(dx, slope.double() @ exact) < ROUNDED
    want = slope.double().flatten(0, 1).t() @ wide.flatten(0, 1)
    assert distance(dw, want) < (SUMMED if weight == torch.float32 else ROUNDED)


@needs_loops
@pytest.mark.parametrize("alike", [True, False], ids=["tokens weigh alike", "tokens weigh each its own"])
def test_the_heads_matmuls(alike: bool, monkeypatch: pytest.MonkeyPatch):
    """In several chunks, with padding rows of the vocabulary; against all logits at once in float64."""
    monkeypatch.setattr(head, "CHUNK", 40 * 70)
    h = (leaf(2, 50, 66, dtype=BF16).detach() / 8).requires_grad_()
    W = leaf(72, 66, dtype=torch.float32, seed=2)
    targets = torch.arange(100).view(2, 50) % 70
    weights = torch.ones(2, 50) if alike else torch.linspace(0.5, 2, 100).view(2, 50)
    wide = [v.detach().to(BF16).double().requires_grad_() for v in (h, W)]
    want = linear_cross_entropy_reference(*wide, targets, 70)
    slopes = torch.autograd.grad(want, wide, weights.double())
    for name in ("native", "torch"):
        request({"linear": name})
        got = linear_cross_entropy(h, W, targets, vocab_size=70)
        dh, dw = torch.autograd.grad(got, (h, W), weights)
        assert name in chosen()["linear"]
        assert (dh.dtype, dw.dtype) == (BF16, torch.float32)
        assert distance(got, want) < ROUNDED
        assert distance(dh, slopes[0]) < 2 * ROUNDED and distance(dw, slopes[1]) < 2 * ROUNDED


@needs_loops
def test_only_wanted_gradients_are_taken(monkeypatch: pytest.MonkeyPatch):
    request({"linear": "native"})
    x, W = leaf(40, 64, dtype=BF16), leaf(64, 64, dtype=torch.float32)
    y, other = linear(x.detach(), W).sum(), linear(x, W.detach()).sum()
    with monkeypatch.context() as patch:
        patch.delattr(ops, "native_matmul")
        assert torch.autograd.grad(y, W)[0].shape == W.shape
    monkeypatch.delattr(ops, "native_weight_gradient")
    assert torch.autograd.grad(other, x)[0].shape == x.shape


@needs_loops
def test_no_more_is_kept_than_the_wanted_gradients_need():
    request({"linear": "native"})
    x, W = leaf(40, 64, dtype=BF16), leaf(32, 64, dtype=torch.float32)
    for inputs, kept in (((x, W), [x, W]), ((x.detach(), W), [x]), ((x, W.detach()), [W])):
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v, saved=saved: saved.append(v) or v, lambda v: v):
            linear(*inputs)
        assert [v.data_ptr() for v in saved] == [v.data_ptr() for v in kept], "and nothing is copied"


@needs_loops
def test_gradients_of_any_strides():
    request({"linear": "native"})
    x, W = leaf(30, 66, dtype=BF16), leaf(34, 66, dtype=torch.float32)
    for slope in (
        torch.ones((), dtype=BF16).expand(30, 34),
        leaf(34, dtype=BF16).detach().expand(30, 34),
        leaf(30, 1, dtype=BF16).detach().expand(30, 34),
        leaf(34, 30, dtype=BF16).detach().t(),
    ):
        dx, dw = torch.autograd.grad(linear(x, W), (x, W), slope)
        same = torch.autograd.grad(linear(x, W), (x, W), slope.contiguous())
        assert torch.equal(dx, same[0]) and torch.equal(dw, same[1])


@needs_loops
@pytest.mark.parametrize("width", [32, 63, 128])
def test_a_wrong_width_is_refused(width: int):
    W = torch.zeros(64, 64)
    for rows in (3, FEW):
        with pytest.raises(RuntimeError, match="shape"):
            linear(torch.zeros(rows, width, dtype=BF16), W)
    with pytest.raises(AssertionError, match="weight"):
        native_matmul(torch.zeros(3, width, dtype=BF16), W, transposed=True)
    with pytest.raises(AssertionError, match="dw"):
        native_weight_gradient(torch.zeros(3, 64, dtype=BF16), torch.zeros(3, width, dtype=BF16), W, add=False)
    with pytest.raises(AssertionError, match="dw"):
        native_weight_gradient(torch.zeros(4, 64, dtype=BF16), torch.zeros(3, 64, dtype=BF16), W, add=False)


@needs_loops
def test_a_weight_of_another_dtype_is_rounded():
    request({"linear": "native"})
    x, W = leaf(30, 66, dtype=BF16), leaf(34, 66)
    dw = torch.autograd.grad(linear(x, W).sum(), W)[0]
    assert dw.dtype == torch.float64 and "native" in chosen()["linear"]


@needs_loops
def test_a_row_does_not_depend_on_the_others_nor_on_threads():
    x, dy, W = a_case(300, 258, 194, torch.float32)
    several = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            dw = torch.zeros(W.shape)
            native_weight_gradient(dy, x, dw, add=False)
            results.append([native_matmul(x, W, transposed=True), native_matmul(dy, W, transposed=False), dw])
    finally:
        torch.set_num_threads(several)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for first, last in ((0, 1), (7, 12), (150, 300)):
        assert torch.equal(native_matmul(x[first:last], W, transposed=True), results[0][0][first:last])
        assert torch.equal(native_matmul(dy[first:last], W, transposed=False), results[0][1][first:last])


@needs_loops
def test_what_is_no_number_stays_in_its_row():
    x, dy, W = a_case(70, 66, 66, torch.float32)
    want = native_matmul(x, W, transposed=True)
    x[69, 3] = float("nan")
    got = native_matmul(x, W, transposed=True)
    assert got[69].isnan().all() and torch.equal(got[:69], want[:69])
    dw = torch.zeros(W.shape)
    native_weight_gradient(dy, x, dw, add=False)
    assert dw[:, 3].isnan().all() and not dw[:, :3].isnan().any() and not dw[:, 4:].isnan().any()


@needs_loops
def test_no_rows():
    request({"linear": "native"})
    x, W = leaf(0, 64, dtype=BF16), leaf(32, 64, dtype=torch.float32)
    y = linear(x, W)
    dx, dw = torch.autograd.grad(y.sum(), (x, W))
    assert y.shape == (0, 32) and dx.shape == (0, 64) and torch.equal(dw, torch.zeros(32, 64))


@needs_loops
def test_who_takes_the_loops(monkeypatch: pytest.MonkeyPatch):
    W, odd = torch.zeros(64, 64), torch.zeros(64, 63)
    for faster in (True, False):
        monkeypatch.setattr(ops, "native_is_faster", lambda faster=faster: faster)
        assert takes_native(FEW, W, BF16) is faster
        assert not takes_native(FEW - 1, W, BF16), "few rows are torch's"
        assert not takes_native(FEW, odd, BF16) and not takes_native(FEW, odd.t(), BF16), "odd sizes are torch's"
        assert not takes_native(FEW, W, torch.float32)
    request({"linear": "native"})
    assert takes_native(1, W, BF16), "a user who names them gets them"
    with pytest.raises(ValueError, match="linear: backend 'native' cannot serve this call: inputs is 63"):
        takes_native(1, odd, BF16)
    request({"linear": "torch"})
    assert not takes_native(FEW, W, BF16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16])
def test_without_the_loops_it_is_torchs(dtype: torch.dtype):
    request({"linear": "torch"})
    x, W = leaf(2, 5, 7, dtype=dtype), leaf(3, 7, dtype=torch.float32)
    y = linear(x, W)
    assert y.dtype == dtype and torch.equal(y, F.linear(x, W.to(dtype)))
    assert chosen()["linear"] == "torch"
