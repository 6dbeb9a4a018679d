"""The selective scan's Triton kernels against the recurrence in float64, token by token."""

import pytest
import torch
from torch import Tensor

from model.ops import selective_scan_triton as kernels
from model.ops.selective_scan_triton import selective_scan_triton
from tests.model.ops.kernels import DEVICE
from tests.model.ops.support import leaf, outputs_and_gradients, packed

C, N = 11, 5
NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several chunks and blocks of channels even in a small input; none is filled."""
    monkeypatch.setattr(kernels, "CHANNELS", 8)
    monkeypatch.setattr(kernels, "SHORTEST", 8)
    monkeypatch.setattr(kernels, "LONGEST", 8)


def recurrence(x, dt, A, B, C, D, documents, state) -> tuple[Tensor, Tensor]:
    """The equation."""
    h = x.new_zeros(x.shape[0], *A.shape) if state is None else state
    ys = []
    for t in range(x.shape[1]):
        kept = torch.exp(dt[:, t, :, None] * A) * h
        if documents is not None:
            continues = documents[:, t] == (documents[:, t - 1] if t else 0)
            kept = torch.where(continues[:, None, None], kept, 0)
        h = kept + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1) + (0 if D is None else D * x[:, t]))
    return torch.stack(ys, 1), h


def inputs(
    rows: int, T: int, dtype: torch.dtype = torch.float32, channels: int = C, states: int = N
) -> dict[str, Tensor]:
    """Leaves by name: x, B and C in `dtype`, the others float32. Steps from short to so long that a state is lost."""
    dt = torch.exp(2 * leaf(rows, T, channels, seed=1) - 2)
    A = -torch.exp(leaf(channels, states, seed=2))
    x, B, C = leaf(rows, T, channels), leaf(rows, T, states, seed=3), leaf(rows, T, states, seed=4)
    D, state = leaf(channels), leaf(rows, channels, states)
    wide = (x, dt, A, B, C, D, state)
    types = (dtype, torch.float32, torch.float32, dtype, dtype, torch.float32, torch.float32)
    return {name: v.detach().to(to).to(DEVICE).requires_grad_() for name, v, to in zip(NAMES, wide, types, strict=True)}


def compare(given: dict[str, Tensor], documents: Tensor | None = None, within: float = 1e-5) -> None:
    """Outputs and gradients of what is given, each error against the largest number of its kind."""
    documents = None if documents is None else documents.to(DEVICE)

    def run(values: dict[str, Tensor], call) -> list[Tensor]:
        D, state = values.get("D"), values.get("initial_state")
        args = [values[name] for name in NAMES[:5]]
        return outputs_and_gradients(lambda: call(*args, D, documents, state), list(values.values()))

    exact = {name: v.detach().double().requires_grad_() for name, v in given.items()}
    pairs = zip(["y", "state", *given], run(given, selective_scan_triton), run(exact, recurrence), strict=True)
    for name, got, want in pairs:
        assert got.dtype == (given["x" if name == "y" else "dt" if name == "state" else name].dtype), name
        assert got.shape == want.shape, name
        error = (got.double() - want).abs().max() / max(1.0, float(want.abs().max()))
        assert error <= within, f"{name} differs by {error:.1e}"


def test_row_with_state():
    """Chunks pass states to the right and their gradients to the left, more of them than are read at once."""
    compare(inputs(1, 37))


@pytest.mark.parametrize("without", [{"initial_state"}, {"initial_state", "D"}])
def test_without(without):
    """Zeros where there is no state; no skip."""
    compare({name: v for name, v in inputs(1, 11).items() if name not in without})


def test_documents():
    """Boundaries at a chunk's edge, one token before and after it, several in a chunk, a chunk within a document."""
    compare(inputs(2, 21), packed([8, 1, 6, 2, 4], [1, 16, 4]))


def test_documents_that_continue_no_state():
    """A row whose first document is not that of the state neither sees it nor gives it a gradient."""
    given = inputs(2, 9)
    documents = torch.tensor([[1] * 9, [0] + [3] * 8], dtype=torch.int32)
    compare(given, documents)
    y, _ = selective_scan_triton(*(given[name] for name in NAMES[:6]), documents.to(DEVICE), given["initial_state"])
    (gradient,) = torch.autograd.grad(y.sum(), given["initial_state"])
    assert gradient[0].abs().max() == 0 < gradient[1].abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("T", [2, 8, 9, 17])
def test_lengths(T):
    """Less than a chunk, a whole one, one token more; a boundary at every place."""
    compare(inputs(1, T))
    for first in range(1, T):
        compare(inputs(1, T), packed([first, T - first]))


def test_a_token():
    compare(inputs(2, 1), packed([1], [1]))


def test_as_shipped(monkeypatch):
    """The sizes that models have: whole blocks of channels, chunks of 16, in bfloat16, rounded once at the end."""
    monkeypatch.undo()
    compare(inputs(1, 19, torch.bfloat16, channels=40, states=16), packed([9, 10]), within=2e-2)


def test_a_slice_of_a_projection():
    """x, B and C as parts of one tensor, and an upstream gradient with strides of its own."""
    given = {name: v.detach() for name, v in inputs(2, 3).items()}
    whole = torch.cat([given["x"], given["B"], given["C"]], 2)
    x, B, C_ = whole.split([C, N, N], 2)
    assert not x.is_contiguous()
    parts = {**given, "x": x, "B": B, "C": C_}
    want = selective_scan_triton(**{**given, "documents": None})
    got = selective_scan_triton(**{**parts, "documents": None})
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    gradients = []
    for v in (x.clone().requires_grad_(), x.requires_grad_()):
        y, _ = selective_scan_triton(**{**parts, "x": v, "documents": None})
        upstream = torch.ones(2, 3, device=DEVICE)[..., None].expand(y.shape)
        gradients += torch.autograd.grad(y, v, upstream)
    assert torch.equal(*gradients)


def test_gradients_of_one_output():
    """The loss may see only the state, as in carried training, or only y."""
    given = inputs(1, 9)
    args = [given[name] for name in NAMES]
    exact = [v.detach().double().requires_grad_() for v in args]
    for which in (0, 1):
        got = torch.autograd.grad(
            selective_scan_triton(*args[:6], None, args[6])[which].sum(), args, materialize_grads=True
        )
        want = torch.autograd.grad(recurrence(*exact[:6], None, exact[6])[which].sum(), exact, materialize_grads=True)
        for name, a, b in zip(NAMES, got, want, strict=True):
            assert (a.double() - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max())), name


def test_pieces_equal_the_row():
    """The state hands a row over to the next piece, in the middle of a document."""
    given = {name: v.detach() for name, v in inputs(2, 15).items()}
    documents = packed([4, 11], [6, 9]).to(DEVICE)
    whole, end = selective_scan_triton(**given, documents=documents)

    def piece(tokens: slice, documents: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        cut = {name: v[:, tokens] for name, v in given.items() if name in ("x", "dt", "B", "C")}
        return selective_scan_triton(**{**given, **cut, "documents": documents, "initial_state": state})

    first, middle = piece(slice(0, 7), documents[:, :7], given["initial_state"])
    second, last = piece(slice(7, 15), documents[:, 7:] - documents[:, 6:7], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, end, rtol=1e-5, atol=1e-5)


def test_documents_are_isolated_to_the_bit():
    """A change in one document, up to what is no number, does not move the others by one bit."""
    documents = packed([3, 7, 5]).to(DEVICE)
    results = []
    for value in (1.0, float("inf")):
        given = inputs(1, 15)
        x = torch.where((documents == 1)[..., None], value, given["x"].detach()).requires_grad_()
        dt = given["dt"]
        y, _ = selective_scan_triton(**{**given, "x": x, "documents": documents})
        results.append([y, *torch.autograd.grad(y, [x, dt], torch.ones_like(y))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[documents != 1], b[documents != 1])
    assert not results[1][0][documents == 1].isfinite().all()
