"""SSD: the sequential recurrence is the oracle of the dual form and of the chunked path, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.ops import ssd as module
from model.ops.blockwise import wide_dtype
from model.ops.ssd import ssd, ssd_reference, ssd_step
from model.ops.ssd_chunked import ssd_chunked
from tests.model.ops.support import assert_same, largest, leaf, outputs_and_gradients, packed

B, H, P, G, N = 2, 4, 3, 2, 5


def inputs(T: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, dt, A, B, C, D, initial_state: all leaves."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dt = F.softplus(leaf(B, T, H, seed=1)).detach().to(wide).requires_grad_()
    A = (-leaf(H, seed=2).detach().exp()).to(wide).requires_grad_()
    x, Bm, Cm = (
        leaf(B, T, H, P, dtype=dtype),
        leaf(B, T, G, N, dtype=dtype, seed=3),
        leaf(B, T, G, N, dtype=dtype, seed=4),
    )
    return [x, dt, A, Bm, Cm, leaf(H, dtype=wide, seed=5), leaf(B, H, P, N, dtype=wide, seed=6)]


def documents_for(T: int) -> dict[str, Tensor | None]:
    """No documents; some that continue the state, with one-token ones; one row that starts afresh at once."""
    choices: dict[str, Tensor | None] = {"none": None}
    if T >= 7:
        choices["continuing"] = packed([T // 3, 1, 1, T - T // 3 - 2], [T - 2, 2])
        choices["fresh"] = choices["continuing"] + torch.tensor([[1], [0]], dtype=torch.int32)
    return choices


def ssd_quadratic(x, dt, A, B, C, *, D=None, documents=None, initial_state=None) -> tuple[Tensor, Tensor]:
    """The dual form, Y = (L o C B^T) (dt X) with L[i, j] = exp(a_{j+1} + ... + a_i), quadratic in T: an oracle that
    shares nothing with the recurrence. Arguments and results as in `ssd`."""
    b, T, H = dt.shape
    wide, repeats = wide_dtype(x.dtype), H // B.shape[2]
    xw, dt = x.to(wide), dt.to(wide)
    Bh, Ch = B.to(wide).repeat_interleave(repeats, 2), C.to(wide).repeat_interleave(repeats, 2)
    index = torch.zeros(b, T, dtype=torch.int32, device=x.device) if documents is None else documents
    log_decay = (dt * A.to(wide)).transpose(1, 2)  # (B, H, T)
    later = torch.ones(T, T, dtype=torch.bool, device=x.device).tril(-1)
    # Segment sums by a masked cumulative sum: column j sums the decays of the tokens after j.
    segment = log_decay[..., None].expand(b, H, T, T).masked_fill(~later, 0).cumsum(-2)
    visible = (later | torch.eye(T, dtype=torch.bool, device=x.device)) & (index[:, :, None] == index[:, None])
    L = segment.masked_fill(~visible[:, None], float("-inf")).exp()
    dtx = dt[..., None] * xw
    y = torch.einsum("bhij,bihn,bjhn,bjhp->bihp", L, Ch, Bh, dtx)
    state = torch.einsum("bhj,bjhn,bjhp->bhpn", L[:, :, -1], Bh, dtx)
    if initial_state is not None:
        carried = log_decay.cumsum(-1).masked_fill((index != 0)[:, None], float("-inf")).exp()  # (B, H, T)
        y = y + torch.einsum("bhi,bihn,bhpn->bihp", carried, Ch, initial_state)
        state = state + carried[:, :, -1, None, None] * initial_state
    if D is not None:
        y = y + D.to(wide)[:, None] * xw
    return y.to(x.dtype), state


@pytest.mark.parametrize("T", [1, 2, 7, 16, 33])
def test_chunked_and_quadratic_equal_the_recurrence(T):
    """The math of the fast path, forward and backward, with state, documents, odd lengths and any chunk size."""
    leaves = inputs(T)
    x, dt, A, Bm, Cm, D, S = leaves
    for documents in documents_for(T).values():
        want = outputs_and_gradients(
            lambda d=documents: ssd_reference(x, dt, A, Bm, Cm, D=D, documents=d, initial_state=S), leaves
        )
        got = outputs_and_gradients(
            lambda d=documents: ssd_quadratic(x, dt, A, Bm, Cm, D=D, documents=d, initial_state=S), leaves
        )
        assert_same(got, want, 1e-10)
        for chunk in (1, 4, 5, 16, 64):
            got = outputs_and_gradients(lambda d=documents, c=chunk: ssd_chunked(x, dt, A, Bm, Cm, D, d, S, c), leaves)
            assert_same(got, want, 1e-10)


def test_without_skip_and_state():
    """D and initial_state are optional, and the state comes back only when asked for."""
    x, dt, A, Bm, Cm, _, _ = leaves = inputs(9)
    want = outputs_and_gradients(lambda: ssd_reference(x, dt, A, Bm, Cm), leaves[:5])
    assert_same(outputs_and_gradients(lambda: ssd(x, dt, A, Bm, Cm, return_state=True), leaves[:5]), want, 1e-10)
    assert ssd(x, dt, A, Bm, Cm)[1] is None


def test_gradcheck():
    """Analytic gradients equal numerical ones, independently of the reference's autograd."""
    leaves = [v.detach()[:, :5].clone().requires_grad_() if v.dim() > 1 and v.shape[1] == 7 else v for v in inputs(7)]
    documents = packed([2, 3], [4, 1])
    assert torch.autograd.gradcheck(
        lambda x, dt, A, b, c, D, S: ssd_chunked(x, dt, A, b, c, D, documents, S, 3), leaves
    )


def test_state_carries_a_row_over():
    """Two halves with the state handed on equal the whole row, documents included: prefill in pieces."""
    x, dt, A, Bm, Cm, D, S = inputs(20)
    documents = packed([6, 9, 5], [20])
    whole, last = ssd(x, dt, A, Bm, Cm, D=D, documents=documents, initial_state=S, return_state=True)
    cut = 11
    first, middle = ssd(
        x[:, :cut], dt[:, :cut], A, Bm[:, :cut], Cm[:, :cut], D=D, documents=documents[:, :cut], initial_state=S,
        return_state=True,
    )  # fmt: skip
    rest = documents[:, cut:] - documents[:, cut - 1 : cut]
    second, end = ssd(
        x[:, cut:], dt[:, cut:], A, Bm[:, cut:], Cm[:, cut:], D=D, documents=rest, initial_state=middle,
        return_state=True,
    )  # fmt: skip
    assert_same([torch.cat([first, second], 1), end], [whole, last], 1e-10)


def test_step_equals_row():
    """Decoding token by token gives the row's outputs and state."""
    x, dt, A, Bm, Cm, D, S = inputs(6)
    want = ssd(x, dt, A, Bm, Cm, D=D, initial_state=S, return_state=True)
    ys, state = [], S
    for t in range(6):
        y, state = ssd_step(x[:, t], dt[:, t], A, Bm[:, t], Cm[:, t], D, state)
        ys.append(y)
    assert_same([torch.stack(ys, 1), state], want, 1e-10)


@pytest.mark.parametrize("documents", [None, torch.tensor([[0], [1]], dtype=torch.int32)])
def test_one_token_after_a_state_is_a_step(monkeypatch, documents):
    """Decoding skips the chunks; a row whose token begins a document does not see the state."""
    x, dt, A, Bm, Cm, D, S = leaves = inputs(1)

    def run(form, **kwargs):
        return outputs_and_gradients(
            lambda: form(x, dt, A, Bm, Cm, D=D, documents=documents, initial_state=S, **kwargs), leaves
        )

    want = run(ssd_quadratic)
    monkeypatch.setattr(module, "ssd_chunked", None)
    assert_same(run(ssd, return_state=True), want, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_documents_are_isolated_to_the_bit(dtype, where):
    """A change in one document does not move the others by one bit, forward or backward, inside one chunk or not."""
    T, lengths = 40, [9, 17, 14]
    documents = packed(lengths, lengths)
    which = ["first", "middle", "last"].index(where)
    changed = (documents == which)[..., None]

    def run(factor: float) -> list[Tensor]:
        leaves = inputs(T, dtype)
        with torch.no_grad():
            for v in leaves[:2] + leaves[3:5]:
                mask = changed if v.dim() == 3 else changed[..., None]
                v.copy_(torch.where(mask, factor * v, v))
        x, dt, A, Bm, Cm, D, S = leaves
        y = ssd_chunked(x, dt, A, Bm, Cm, D, documents, S, 16)[0]
        upstream = torch.where(changed[..., None], factor, 1.0).to(dtype).expand_as(y)
        return [y, *torch.autograd.grad(y, [x, dt, Bm, Cm], upstream)]

    for a, b in zip(run(1.0), run(3.7), strict=True):
        assert not torch.equal(a, b)
        assert torch.equal(a[documents != which], b[documents != which])


def test_final_state_belongs_to_the_last_document():
    """The state returned does not know the documents before the last one, nor the state passed in."""
    x, dt, A, Bm, Cm, D, S = inputs(12)
    documents = packed([5, 7], [5, 7])
    _, state = ssd(x, dt, A, Bm, Cm, D=D, documents=documents, initial_state=S, return_state=True)
    _, alone = ssd(x[:, 5:], dt[:, 5:], A, Bm[:, 5:], Cm[:, 5:], D=D, return_state=True)
    assert_same([state], [alone], 1e-10)


def test_bfloat16_is_close_to_float32():
    """Matmuls in bfloat16, the rest in float32: outputs and gradients within bfloat16's rounding."""
    leaves = inputs(70, torch.bfloat16)
    single = [v.detach().float().requires_grad_() for v in leaves]

    def run(x, dt, A, Bm, Cm, D, S):
        return ssd(x, dt, A, Bm, Cm, D=D, initial_state=S, chunk=16, return_state=True)

    got, want = outputs_and_gradients(lambda: run(*leaves), leaves), outputs_and_gradients(lambda: run(*single), single)
    assert got[0].dtype == torch.bfloat16
    assert got[1].dtype == torch.float32
    assert_same([v.float() for v in got], want, 2e-2)


def test_strong_and_long_decays_stay_finite():
    """Decays from none to far below the smallest float, mixed in one row: no overflow, no NaN, still the recurrence."""
    x, dt, A, Bm, Cm, D, S = inputs(64, torch.float32)
    with torch.no_grad():
        dt[:, ::3] = 200.0
        dt[:, 1::3] = 0.0
    leaves = [x, dt, A, Bm, Cm, D, S]
    want = outputs_and_gradients(lambda: ssd_reference(x, dt, A, Bm, Cm, D=D, initial_state=S), leaves)
    got = outputs_and_gradients(lambda: ssd_chunked(x, dt, A, Bm, Cm, D, None, S, 16), leaves)
    assert all(v.isfinite().all() for v in got)
    assert_same(got, want, 1e-4)


def test_under_checkpointing():
    """Gradient checkpointing recomputes the op and gets the same gradients to the bit."""
    leaves = inputs(20, torch.float32)

    def run(*v):
        return ssd(*v[:5], D=v[5], chunk=8)[0]

    want = outputs_and_gradients(lambda: [run(*leaves[:6])], leaves[:6])
    got = outputs_and_gradients(lambda: [checkpoint(run, *leaves[:6], use_reentrant=False)], leaves[:6])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_inputs_are_left_alone():
    """In-place work never reaches the inputs or the upstream gradient (float32 inputs need no cast that would copy)."""
    leaves = inputs(10, torch.float32)
    before = [v.detach().clone() for v in leaves]
    x, dt, A, Bm, Cm, D, S = leaves
    y, state = ssd(x, dt, A, Bm, Cm, D=D, initial_state=S, return_state=True)
    upstream = [torch.ones_like(y), torch.ones_like(state)]
    torch.autograd.grad([y, state], leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))
    assert all(bool((g == 1).all()) for g in upstream)


def test_memory_does_not_grow_with_tokens_squared():
    """No intermediate is T x T, nor the decays of all chunks at once."""
    T, H = 512, 2
    x, b = leaf(1, T, H, 4, dtype=torch.float32), leaf(1, T, 1, 4, dtype=torch.float32)
    dt = torch.ones(1, T, H)
    size = largest(lambda: ssd_chunked(x, dt, -torch.ones(H), b, b, None, None, None, 32)[0], [x])
    assert size <= T * H * 4
