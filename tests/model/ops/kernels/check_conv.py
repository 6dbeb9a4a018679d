"""The convolution's Triton kernels against the plain equation in float64."""

import pytest
import torch
from torch import Tensor

from model.ops import conv_triton as kernels
from model.ops.conv import causal_conv_reference
from model.ops.conv_triton import causal_conv_triton
from tests.model.ops.kernels import DEVICE
from tests.model.ops.support import leaf, outputs_and_gradients, packed

B, C = 2, 11


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several programs even in a small input; none is filled."""
    monkeypatch.setattr(kernels, "TOKENS", 8)
    monkeypatch.setattr(kernels, "CHANNELS", 8)


def inputs(T: int, k: int, channels: int = C, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    given = {
        "x": leaf(B, T, channels).to(dtype),
        "weight": leaf(channels, k).float(),
        "bias": leaf(channels).float(),
        "state": leaf(B, k - 1, channels).to(dtype),
    }
    return {name: v.detach().to(DEVICE).requires_grad_() for name, v in given.items()}


def compare(
    given: dict[str, Tensor], documents: Tensor | None = None, activation: str | None = "silu", within: float = 1e-5
) -> None:
    """y and the gradients of what is given, each error against the largest number of its kind."""
    documents = None if documents is None else documents.to(DEVICE)

    def run(values: dict[str, Tensor], call) -> list[Tensor]:
        args = (values["x"], values["weight"], values.get("bias"), documents, values.get("state"), activation)
        return outputs_and_gradients(lambda: [call(*args)], list(values.values()))

    exact = {name: v.detach().double().requires_grad_() for name, v in given.items()}
    results = zip(["y", *given], run(given, causal_conv_triton), run(exact, causal_conv_reference), strict=True)
    for name, got, want in results:
        assert got.dtype == given["x" if name == "y" else name].dtype, name
        assert got.shape == want.shape, name
        if got.numel():
            error = (got.double() - want).abs().max() / max(1.0, float(want.abs().max()))
            assert error <= within, f"{name} differs by {error:.1e}"


def without(given: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: v for name, v in given.items() if name not in names}


@pytest.mark.parametrize("names", [(), ("state",), ("bias",), ("state", "bias")])
def test_row(names):
    """With and without a bias and a state, at an odd length; and without the activation."""
    compare(without(inputs(13, 4), *names))
    compare(without(inputs(13, 4), *names), activation=None)


@pytest.mark.parametrize("T", [1, 2, 8])
def test_short_rows(T):
    """Fewer tokens than taps reach, so that a token's state is part of what reaches the next call's; a whole block."""
    compare(inputs(T, 4))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_taps(k):
    """More taps than causal-conv1d has, and none but the token itself."""
    compare(inputs(9, k), packed([2, 7], [8, 1]))


@pytest.mark.parametrize("names", [(), ("state",)])
def test_documents(names):
    """Boundaries at a block's edge, one token before and after it, and closer together than the taps reach."""
    compare(without(inputs(18, 4), *names), packed([8, 1, 2, 7], [1, 1, 15, 1]))


def test_documents_that_continue_no_state():
    """A row whose first document is not that of the state neither sees it nor gives it a gradient."""
    given, documents = inputs(6, 4), torch.tensor([[1] * 6, [0, 2, 2, 2, 2, 5]], dtype=torch.int32)
    compare(given, documents)
    args = (given["x"], given["weight"], given["bias"], documents.to(DEVICE), given["state"], "silu")
    (gradient,) = torch.autograd.grad(causal_conv_triton(*args).sum(), given["state"])
    assert gradient[0].abs().max() == 0 < gradient[1].abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("names", [(), ("state",)])
@pytest.mark.parametrize("T", [3, 9, 17])
def test_lengths(T, names):
    """A boundary at every place."""
    for first in range(1, T):
        compare(without(inputs(T, 4), *names), packed([first, T - first], [T]))


def test_as_shipped(monkeypatch):
    """Whole blocks of the sizes that run, in bfloat16, rounded once at the end."""
    monkeypatch.undo()
    compare(inputs(35, 4, 40, torch.bfloat16), packed([32, 3], [31, 4]), within=1e-2)


def test_a_slice_of_a_projection():
    """x as part of a wider tensor, and an upstream gradient with strides of its own."""
    whole = leaf(B, 9, C + 6).detach().float().to(DEVICE)
    weight, gradients = leaf(C, 4).detach().float().to(DEVICE), []
    for x in (whole[..., 2 : C + 2], whole[..., 2 : C + 2].clone()):
        x = x.detach().requires_grad_()
        y = causal_conv_triton(x, weight, None)
        gradients.append((y, *torch.autograd.grad(y, x, torch.ones(B, 9, device=DEVICE)[..., None].expand(y.shape))))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_documents_are_isolated_to_the_bit():
    """A change in one document, up to what is no number, does not move the others by one bit."""
    documents = packed([3, 9, 6], [2, 8, 8]).to(DEVICE)
    results = []
    for value in (1.0, float("inf")):
        given = inputs(18, 4)
        x = torch.where((documents == 1)[..., None], value, given["x"].detach()).requires_grad_()
        y = causal_conv_triton(x, given["weight"], given["bias"], documents, given["state"], "silu")
        results.append([y, *torch.autograd.grad(y, x, torch.ones_like(y))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[documents != 1], b[documents != 1])
    assert not results[1][0][documents == 1].isfinite().all()
