"""Attention: windows, caps, grouped heads, documents and cached keys against the explicit masked softmax; RoPE."""

import sys
from itertools import pairwise
from types import SimpleNamespace as FakeModule

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import attention as module
from model.ops.attention import Past, attention, document_bounds, rotary
from model.ops.rope import YarnScaling, frequencies
from tests.model.ops.support import assert_same, largest, leaf, outputs_and_gradients, packed

B, H, K, P = 2, 4, 2, 6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of queries even in a short row."""
    monkeypatch.setattr(module, "BLOCK", 16)


@pytest.mark.parametrize("T", [1, 5, 16, 75])
@pytest.mark.parametrize("window", [None, 1, 4, 40])
@pytest.mark.parametrize("cap", [None, 0.7])
def test_equals_reference(T, window, cap):
    """Values and gradients, with and without documents and cached keys of unequal valid length."""
    q, k, v = leaf(B, T, H, P), leaf(B, T, K, P, seed=1), leaf(B, T, K, P, seed=2)
    past = Past(leaf(B, 9, K, P, seed=3), leaf(B, 9, K, P, seed=4), torch.tensor([9, 2]))
    documents = packed([T // 2, 1, T - T // 2 - 1], [T - 1, 1]) if T > 4 else None
    for d in (None, documents):
        for cached in (None, past, Past(past.k, past.v, torch.tensor([0, 4]))):
            leaves = [q, k, v] + ([] if cached is None else [past.k, past.v])

            def run(backend, d=d, cached=cached):
                return [attention(q, k, v, window=window, documents=d, cap=cap, past=cached, backend=backend)]

            want = outputs_and_gradients(lambda run=run: run("reference"), leaves)
            assert_same(outputs_and_gradients(lambda run=run: run("torch"), leaves), want, 1e-10)


def test_reference_equals_torch():
    """The reference itself is torch's attention with an explicit window mask, and the scale is ours to set."""
    q, k, v = leaf(B, 20, H, P), leaf(B, 20, H, P, seed=1), leaf(B, 20, H, P, seed=2)
    distance = torch.arange(20)[:, None] - torch.arange(20)
    mask = (distance >= 0) & (distance < 7)
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=0.3)
    got = attention(q, k, v, window=7, scale=0.3, backend="reference")
    assert_same([got], [want.transpose(1, 2)], 1e-12)


def test_a_cap_bounds_the_scores():
    """The reference's cap written out for one query, and no cap where it is far from every score."""
    q, k, v = leaf(1, 5, 1, P), leaf(1, 5, 1, P, seed=1), leaf(1, 5, 1, P, seed=2)
    weights = (0.5 * torch.tanh(0.3 * (k[0, :, 0] @ q[0, 4, 0]) / 0.5)).softmax(0)
    got = attention(q, k, v, scale=0.3, cap=0.5, backend="reference")
    assert_same([got[0, 4, 0]], [weights @ v[0, :, 0]], 1e-12)
    assert_same([attention(q, k, v, cap=1e6)], [attention(q, k, v)], 1e-9)


def test_past_continues_a_row():
    """A row in two pieces, the second with the first's keys as its past, equals the row: prefill in pieces."""
    q, k, v = leaf(B, 30, H, P), leaf(B, 30, K, P, seed=1), leaf(B, 30, K, P, seed=2)
    for window in (None, 5, 13):
        whole = attention(q, k, v, window=window)
        past = Past(k[:, :18], v[:, :18], torch.full((B,), 18))
        rest = attention(q[:, 18:], k[:, 18:], v[:, 18:], window=window, past=past)
        assert_same([rest], [whole[:, 18:]], 1e-12)


@pytest.mark.parametrize("cap", [None, 0.6])
def test_gradcheck(cap):
    """Analytic gradients equal numerical ones, independently of the reference's autograd."""
    args = (leaf(1, 5, 2, 2), leaf(1, 5, 1, 2), leaf(1, 5, 1, 2, seed=1))
    documents = packed([2, 3])
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, window=2, documents=documents, cap=cap), args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (11, None), (None, 1.5), (11, 1.5)])
def test_documents_are_isolated_to_the_bit(dtype, window, cap):
    """A change in one document does not move the others by one bit, forward or backward."""
    documents = packed([20, 9, 31], [20, 9, 31])
    for which in range(3):
        changed = (documents == which)[..., None, None]

        def run(factor: float, changed=changed) -> list[Tensor]:
            qkv = [leaf(B, 60, n, P, dtype=dtype, seed=n).detach() for n in (H, K, K)]
            q, k, v = (torch.where(changed, factor * x, x).requires_grad_() for x in qkv)
            y = attention(q, k, v, window=window, documents=documents, cap=cap)
            upstream = torch.where(changed, factor, 1.0).to(dtype).expand_as(y)
            return [y, *torch.autograd.grad(y, [q, k, v], upstream)]

        for a, b in zip(run(1.0), run(3.7), strict=True):
            assert not torch.equal(a, b)
            assert torch.equal(a[documents != which], b[documents != which])


def test_inputs_are_left_alone():
    """In-place work never reaches the inputs or the upstream gradient, also where a block is a view of them."""
    for T in (1, 20):
        q, k, v = leaves = [leaf(1, T, 1, P, dtype=torch.float32, seed=i) for i in range(3)]
        before = [x.detach().clone() for x in leaves]
        upstream = torch.ones(1, T, 1, P)
        y = attention(q, k, v, window=3, documents=packed([T]))
        torch.autograd.grad(y, leaves, upstream)
        assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))
        assert bool((upstream == 1).all())


@pytest.mark.parametrize("cap", [None, 1.5])
def test_bfloat16_is_close_to_float32(cap):
    """Scores and softmax are float32: outputs and gradients within bfloat16's rounding of inputs and weights."""
    leaves = [leaf(B, 60, n, P, dtype=torch.bfloat16, seed=n) for n in (H, K, K)]
    single = [v.detach().float().requires_grad_() for v in leaves]
    got = outputs_and_gradients(lambda: [attention(*leaves, window=20, cap=cap)], leaves)
    want = outputs_and_gradients(lambda: [attention(*single, window=20, cap=cap)], single)
    assert_same([v.float() for v in got], want, 2e-2)


@pytest.mark.parametrize("window", [None, 32])
def test_memory_does_not_grow_with_tokens_squared(window):
    """No intermediate is T x T: a window costs T x window, documents T x block."""
    T = 512
    q, k, v = (leaf(1, T, 1, 4, dtype=torch.float32, seed=i) for i in range(3))
    for cap in (None, 2.0):
        halves = packed([T // 2, T // 2])
        size = largest(lambda cap=cap, d=halves: attention(q, k, v, window=window, documents=d, cap=cap), [q, k, v])
        assert size <= T * 64


@pytest.fixture
def flash(monkeypatch):
    """A flash-attn of plain torch, so that the calls to it can be tested without a GPU: the options of each call."""
    calls = []

    def fixed(q, k, v, *, softmax_scale, causal, window_size, deterministic, softcap=0.0):
        calls.append({"window": window_size, "causal": causal, "deterministic": deterministic})
        window = window_size[0] + 1 if window_size[0] >= 0 else None
        return attention(q, k, v, window=window, scale=softmax_scale, cap=softcap or None, backend="reference")

    def ragged(q, k, v, bounds_q, bounds_k, longest_q, longest_k, **options):
        pieces = list(pairwise(bounds_q.tolist()))
        assert max(stop - start for start, stop in pieces) <= longest_q == longest_k
        assert bounds_q.dtype == bounds_k.dtype == torch.int32
        return torch.cat([fixed(*(x[None, start:stop] for x in (q, k, v)), **options)[0] for start, stop in pieces])

    monkeypatch.setitem(sys.modules, "flash_attn", FakeModule(flash_attn_func=fixed, flash_attn_varlen_func=ragged))
    return calls


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("documents", [None, packed([5, 1, 14], [20])])
@pytest.mark.parametrize("cap", [None, 0.4])
def test_flash_attn_is_asked_for_the_same_map(flash, window, documents, cap):
    """Windows, caps and document bounds in flash-attn's own terms, with the backward that repeats itself to the bit."""
    q, k, v = leaf(B, 20, H, P), leaf(B, 20, K, P, seed=1), leaf(B, 20, K, P, seed=2)
    bounds = None if documents is None else document_bounds(documents)
    got = module._flash(q, module._Keys.of(k, v, None, bounds, None), window, 0.3, cap)
    options = {"window": window, "documents": documents, "scale": 0.3, "cap": cap}
    assert_same([got], [attention(q, k, v, **options, backend="reference")], 1e-12)
    assert all(call["deterministic"] and call["causal"] for call in flash)


def test_flash_attn_waits_for_nothing(monkeypatch):
    """Given bounds, no value is read on the host, which fails on meta: a wait per layer leaves the GPU idle."""
    fake = FakeModule(flash_attn_func=None, flash_attn_varlen_func=lambda q, *rest, **options: q)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    q, bounds = torch.empty(B, 20, H, P, device="meta"), torch.empty(4, dtype=torch.int32, device="meta")
    past = Past(q[:, :7], q[:, :7], torch.empty(B, dtype=torch.int64, device="meta"))
    for before in (None, past):
        assert module._flash(q, module._Keys.of(q, q, None, bounds, before), 4, 0.3).shape == q.shape


def test_document_bounds():
    """Every row begins a document; indices need not begin at 0."""
    assert document_bounds(packed([5, 1, 14], [20])).tolist() == [0, 5, 6, 20, 40]
    assert document_bounds(packed([3], [1, 2], state=False)).tolist() == [0, 3, 4, 6]


def test_rotary_turns_by_relative_position():
    """Scores depend on distances only, dimensions beyond `dims` stay, and the gradient is the inverse rotation."""
    q, k = leaf(1, 1, 1, 8), leaf(1, 1, 1, 8, seed=1)
    at = [
        [(rotary(x, torch.tensor([[p]]), 100.0, dims=6)) for p in positions]
        for x, positions in ((q, (3, 40)), (k, (1, 38)))
    ]
    scores = [(a * b).sum() for a, b in zip(*at, strict=True)]
    assert torch.allclose(scores[0], scores[1], atol=1e-12)
    assert not torch.allclose(scores[0], (q * k).sum())
    assert torch.equal(at[0][0][..., 6:], q[..., 6:])
    assert torch.autograd.gradcheck(lambda x: rotary(x, torch.tensor([[5]]), 100.0, dims=6), (q,))


def test_rotary_under_a_scaling():
    """Other angles and longer vectors, on the turned dimensions alone, with the gradient of that map."""
    x, at, scaling = leaf(1, 2, 1, 8), torch.tensor([[3, 90]]), YarnScaling(factor=4.0, original_length=32)
    turn = frequencies(100.0, 6, scaling, torch.float64, x.device)
    angle = at[:, :, None, None] * turn
    turned = scaling.amplitude * torch.complex(x[..., :3], x[..., 3:6]) * torch.polar(torch.ones_like(angle), angle)
    got = rotary(x, at, 100.0, 6, scaling)
    assert scaling.amplitude > 1
    assert_same([got], [torch.cat([turned.real, turned.imag, x[..., 6:]], -1)], 1e-12)
    assert torch.autograd.gradcheck(lambda x: rotary(x, at, 100.0, 6, scaling), (x,))


def test_rotary_matches_complex_rotation():
    """The angle of pair i at position p is p * theta^(-2i/dims)."""
    x, positions = leaf(2, 3, 2, 8), torch.tensor([[0, 1, 2], [7, 0, 1]])
    angle = positions[..., None] * 1e4 ** -(torch.arange(4, dtype=torch.float64) / 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    assert_same([rotary(x, positions, 1e4)], [torch.cat([turned.real, turned.imag], -1)], 1e-12)


def test_rotary_far_positions_in_bfloat16():
    """Angles are float32 whatever the input's dtype: neighbours at position 10,000 still differ in bfloat16."""
    x = torch.ones(1, 2, 1, 4, dtype=torch.bfloat16)
    y = rotary(x, torch.tensor([[10000, 10001]]), 10.0)
    assert not torch.equal(y[:, 0], y[:, 1])
