"""The fused head and loss against torch's cross entropy over explicit logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from model.ops import head
from model.ops.blockwise import wide_dtype
from model.ops.head import IGNORE, linear_cross_entropy, linear_cross_entropy_reference
from tests.model.ops.support import Largest, assert_same, leaf, outputs_and_gradients

B, T, D, V, PADDED = 2, 19, 8, 37, 40


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 16 * V)


@pytest.fixture
def targets():
    t = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))
    t[0, 3] = t[1, :9] = IGNORE
    t[1, 10] = V - 1
    return t


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_equals_cross_entropy(targets, z_loss):
    """Loss per token and gradients of any weighting of the tokens, over several chunks."""
    leaves = [leaf(B, T, D), leaf(PADDED, D)]
    want = outputs_and_gradients(lambda: [linear_cross_entropy_reference(*leaves, targets, V, z_loss)], leaves)
    got = outputs_and_gradients(lambda: [linear_cross_entropy(*leaves, targets, vocab_size=V, z_loss=z_loss)], leaves)
    assert_same(got, want, 1e-10)


class Matmuls(TorchDispatchMode):
    """Counts them."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("even", [True, False])
def test_gradients_taken_ahead(targets, dtype, even):
    """Where all tokens weigh alike the backward has nothing left to multiply; where they do not, and in a second
    backward, it computes the logits again. All are right."""
    weights = torch.full((B, T), 0.375) if even else torch.linspace(0.1, 2, B * T).view(B, T)
    weights[targets == IGNORE] = 5.0  # whatever those are weighed by
    hidden, weight = leaf(B, T, D, dtype=dtype), leaf(PADDED, D, dtype=wide_dtype(dtype))
    column = torch.stack([targets, targets.flip(1)], -1)[..., 0]  # as of wider rows
    nll = linear_cross_entropy(hidden, weight, column, vocab_size=V, z_loss=0.1)
    exact = [v.detach().double().requires_grad_() for v in (hidden, weight)]
    reference = linear_cross_entropy_reference(*exact, targets, V, 0.1)
    want = torch.autograd.grad((reference * weights).sum(), exact)
    for again in (False, True):
        with Matmuls() as counted:
            got = torch.autograd.grad((nll * weights).sum(), [hidden, weight], retain_graph=True)
        assert (counted.n == 0) == (even and not again)
        assert [v.dtype for v in got] == [hidden.dtype, weight.dtype]
        assert_same([v.double() for v in got], want, {torch.bfloat16: 2e-2, torch.float32: 1e-5}.get(dtype, 1e-10))


def test_gradients_are_taken_ahead_for_training_alone():
    """An evaluation, and a head of which one side is frozen, would pay for what nobody asks."""
    hidden, weight = leaf(B, T, D), leaf(PADDED, D)
    targets = torch.zeros(B, T, dtype=torch.int64)
    chunks = -(-B * T // 16)

    def matmuls(hidden: Tensor, weight: Tensor) -> int:
        with Matmuls() as counted:
            linear_cross_entropy(hidden, weight, targets, vocab_size=V)
        return counted.n

    assert matmuls(hidden, weight) == 3 * chunks
    assert matmuls(hidden, weight.detach()) == matmuls(hidden.detach(), weight) == chunks
    with torch.no_grad():
        assert matmuls(hidden, weight) == chunks


def test_reference_equals_torch(targets):
    """The reference itself: logits of the padding at -inf, torch's mean over the valid tokens."""
    hidden, weight = leaf(B, T, D), leaf(PADDED, D)
    logits = (hidden @ weight.t()).flatten(0, 1)
    logits[:, V:] = float("-inf")
    want = F.cross_entropy(logits, targets.flatten())
    nll = linear_cross_entropy(hidden, weight, targets, vocab_size=V)
    assert_same([nll.sum() / (targets != IGNORE).sum()], [want], 1e-12)


def test_padding_and_ignored_tokens_get_exactly_nothing(targets):
    """Padded rows have no probability and no gradient; ignored tokens have no loss and no gradient, even for NaN."""
    hidden, weight = leaf(B, T, D), leaf(PADDED, D).detach()
    weight[V:] = 1e6
    weight.requires_grad_()
    nll = linear_cross_entropy(hidden, weight, targets, vocab_size=V)
    dh, dw = torch.autograd.grad(nll.sum(), [hidden, weight])
    assert bool((nll[targets == IGNORE] == 0).all())
    assert bool((dh[targets == IGNORE] == 0).all())
    assert bool((dw[V:] == 0).all())
    assert float(nll.detach().max()) < 100


def test_gradcheck():
    """Analytic gradients equal numerical ones, independently of the reference's autograd."""
    targets = torch.tensor([[0, 3, IGNORE]])
    args = (leaf(1, 3, 2), leaf(5, 2))
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, vocab_size=4, z_loss=0.1), args)


def test_bfloat16_and_float32_weight(targets):
    """The parameter stays float32 and gets a float32 gradient; the loss is float32, within bfloat16's rounding."""
    hidden, weight = leaf(B, T, D, dtype=torch.bfloat16), leaf(PADDED, D, dtype=torch.float32)
    got = outputs_and_gradients(lambda: [linear_cross_entropy(hidden, weight, targets, vocab_size=V)], [hidden, weight])
    assert [v.dtype for v in got] == [torch.float32, torch.bfloat16, torch.float32]
    single = [v.detach().float().requires_grad_() for v in (hidden, weight)]
    want = outputs_and_gradients(lambda: [linear_cross_entropy(*single, targets, vocab_size=V)], single)
    assert_same([v.float() for v in got], want, 2e-2)


def test_tokens_do_not_see_each_other(targets):
    """Changing some tokens leaves the loss and gradient of the others bit-identical."""

    def run(factor: float):
        hidden = leaf(B, T, D, dtype=torch.bfloat16).detach()
        hidden[:, 5] *= factor
        hidden.requires_grad_()
        nll = linear_cross_entropy(hidden, leaf(PADDED, D), targets, vocab_size=V)
        return nll, torch.autograd.grad(nll.sum(), hidden)[0]

    others = torch.arange(T) != 5
    for a, b in zip(run(1.0), run(3.0), strict=True):
        assert torch.equal(a[:, others], b[:, others])


def test_saved_parameter_and_checkpointing(targets):
    """Saved for backward: the parameter itself (ZeRO-3 frees and gathers its storage), and no cast copy of it."""
    hidden, weight = (
        leaf(B, T, D, dtype=torch.bfloat16),
        torch.nn.Parameter(leaf(PADDED, D, dtype=torch.float32).detach()),
    )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        nll = linear_cross_entropy(hidden, weight, targets, vocab_size=V)
    assert any(x is weight for x in saved)
    assert max(x.numel() for x in saved if x is not weight) <= hidden.numel()
    want = torch.autograd.grad(nll.sum(), [hidden, weight])

    def run(h, w):
        return linear_cross_entropy(h, w, targets, vocab_size=V)

    again = checkpoint(run, hidden, weight, use_reentrant=False)
    got = torch.autograd.grad(again.sum(), [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_memory_never_holds_all_logits():
    """No tensor of tokens x vocabulary, in any dtype, forward or backward."""
    tokens, V = 256, 64
    hidden, weight = leaf(1, tokens, 4, dtype=torch.float32), leaf(V, 4, dtype=torch.float32)
    with Largest() as record:
        nll = linear_cross_entropy(hidden, weight, torch.zeros(1, tokens, dtype=torch.int64), vocab_size=V)
        torch.autograd.grad(nll.sum(), [hidden, weight])
    assert max(record.elements.values()) <= tokens * V // 4
