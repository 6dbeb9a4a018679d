"""The causal convolution: taps, documents, state and backward against the plain equation."""

import pytest
import torch
from torch import Tensor

from model.ops import conv
from model.ops.conv import causal_conv, causal_conv_reference, causal_conv_step
from tests.model.ops.support import assert_same, leaf, outputs_and_gradients, packed

B, C = 2, 5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks even in a short row, so that what crosses their borders is tested."""
    monkeypatch.setattr(conv, "BLOCK", B * C * 4)


def documents_for(T: int, several: bool) -> Tensor | None:
    return packed([2, 1, T - 3], [T - 1, 1]) if several else None


@pytest.mark.parametrize("T", [1, 3, 4, 18])
@pytest.mark.parametrize("k", [2, 4, 5])
def test_equals_reference(T, k):
    """Values and gradients with and without documents, state, bias and SiLU; rows shorter than the kernel too."""
    x, w, bias, state = leaf(B, T, C), leaf(C, k), leaf(C), leaf(B, k - 1, C)
    for several in (False, True) if T > 3 else (False,):
        documents = documents_for(T, several)
        for s in (None, state):
            for b in (None, bias):
                for activation in (None, "silu"):
                    leaves = [v for v in (x, w, b, s) if v is not None]

                    def run(backend, d=documents, s=s, b=b, a=activation):
                        return causal_conv(
                            x, w, b, documents=d, state=s, activation=a, return_state=True, backend=backend
                        )

                    want = outputs_and_gradients(lambda run=run: run("reference"), leaves)
                    assert_same(outputs_and_gradients(lambda run=run: run("torch"), leaves), want, 1e-10)


def test_reference_equals_torch():
    """The reference itself is torch's conv1d with a causal padding."""
    x, w, b = leaf(B, 9, C), leaf(C, 4), leaf(C)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    want = torch.nn.functional.conv1d(padded, w[:, None], b, groups=C).transpose(1, 2)
    assert_same([causal_conv_reference(x, w, b)], [want], 1e-12)


def test_gradcheck():
    """Analytic gradients equal numerical ones, independently of the reference's autograd."""
    args = (leaf(2, 6, 2), leaf(2, 3), leaf(2), leaf(2, 2, 2))
    documents = packed([2, 4], [5, 1])

    def run(x, w, b, s):
        return causal_conv(x, w, b, documents=documents, state=s, activation="silu", return_state=True)

    assert torch.autograd.gradcheck(run, args)


def test_pieces_and_steps_equal_the_row():
    """The state hands a row over to the next piece, or token by token, across a document's start."""
    x, w, b, s = leaf(B, 11, C), leaf(C, 4), leaf(C), leaf(B, 3, C)
    documents = packed([4, 7], [6, 5])
    whole, last = causal_conv(x, w, b, documents=documents, state=s, activation="silu", return_state=True)
    first, middle = causal_conv(
        x[:, :7], w, b, documents=documents[:, :7], state=s, activation="silu", return_state=True
    )
    rest = documents[:, 7:] - documents[:, 6:7]
    second, end = causal_conv(x[:, 7:], w, b, documents=rest, state=middle, activation="silu", return_state=True)
    assert_same([torch.cat([first, second], 1), end], [whole, last], 1e-12)
    state, ys = middle, []
    for t in range(7, 11):
        y, state = causal_conv_step(x[:, t], w, b, state, "silu")
        ys.append(y)
    assert_same([torch.stack(ys, 1), state], [second, end], 1e-12)


def test_one_token_after_a_state_is_a_step(monkeypatch):
    """Decoding skips the blocks; a row whose token begins a document does not see the state."""
    x, w, b, s = leaf(B, 1, C), leaf(C, 4), leaf(C), leaf(B, 3, C)
    monkeypatch.setattr(conv, "_CausalConv", None)
    for documents in (None, torch.tensor([[0], [1]], dtype=torch.int32)):

        def run(backend, documents=documents):
            return causal_conv(x, w, b, documents=documents, state=s, return_state=True, backend=backend)

        want = outputs_and_gradients(lambda run=run: run("reference"), [x, w, b, s])
        assert_same(outputs_and_gradients(lambda run=run: run("torch"), [x, w, b, s]), want, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_are_isolated_to_the_bit(dtype):
    """A change in one document does not move the others by one bit, forward or backward."""
    documents = packed([7, 2, 9], [7, 2, 9])
    for which in range(3):
        changed = (documents == which)[..., None]

        def run(factor: float, changed=changed) -> list[Tensor]:
            x = leaf(B, 18, C, dtype=dtype).detach()
            x = torch.where(changed, factor * x, x).requires_grad_()
            y, _ = causal_conv(x, leaf(C, 4), leaf(C), documents=documents, activation="silu")
            upstream = torch.where(changed, factor, 1.0).to(dtype).expand_as(y)
            return [y, *torch.autograd.grad(y, [x], upstream)]

        for a, b in zip(run(1.0), run(3.7), strict=True):
            assert not torch.equal(a, b)
            assert torch.equal(a[documents != which], b[documents != which])


def test_bfloat16_sums_in_float32():
    """One rounding at the end: equal to the float32 convolution, rounded."""
    x, w, b = leaf(B, 20, C, dtype=torch.bfloat16), leaf(C, 4, dtype=torch.float32), leaf(C, dtype=torch.float32)
    want = causal_conv_reference(x.float(), w, b, activation="silu").to(torch.bfloat16)
    assert torch.equal(causal_conv(x, w, b, activation="silu")[0], want)
