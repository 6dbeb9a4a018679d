"""The selective scan: the sequential recurrence is the oracle of the blocked path, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.ops import selective_scan as module
from model.ops import selective_scan_chunked as chunked
from model.ops.selective_scan import selective_scan, selective_scan_reference, selective_scan_step
from model.ops.selective_scan_chunked import selective_scan_chunked
from tests.model.ops.support import assert_same, largest, leaf, outputs_and_gradients, packed

B, C, N = 2, 6, 5


def inputs(T: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, dt, A, B, C, D, initial_state: all leaves."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dt = F.softplus(leaf(B, T, C, seed=1)).detach().to(wide).requires_grad_()
    A = (-leaf(C, N, seed=2).detach().exp()).to(wide).requires_grad_()
    x, Bm, Cm = leaf(B, T, C, dtype=dtype), leaf(B, T, N, dtype=dtype, seed=3), leaf(B, T, N, dtype=dtype, seed=4)
    return [x, dt, A, Bm, Cm, leaf(C, dtype=wide, seed=5), leaf(B, C, N, dtype=wide, seed=6)]


def documents_for(T: int) -> dict[str, Tensor | None]:
    """No documents; some that continue the state, with one-token ones; one row that starts afresh at once."""
    choices: dict[str, Tensor | None] = {"none": None}
    if T >= 7:
        choices["continuing"] = packed([T // 3, 1, 1, T - T // 3 - 2], [T - 2, 2])
        choices["fresh"] = choices["continuing"] + torch.tensor([[1], [0]], dtype=torch.int32)
    return choices


def scan_quadratic(x, dt, A, B, C, *, D=None, documents=None, initial_state=None) -> tuple[Tensor, Tensor]:
    """y_i = sum_j <C_i, exp(A (dt_{j+1} + ... + dt_i)) B_j> dt_j x_j over the j <= i of i's document, quadratic in T:
    an oracle that shares nothing with the recurrence. Arguments and results as in `selective_scan`."""
    b, T, _ = x.shape
    index = torch.zeros(b, T, dtype=torch.int32) if documents is None else documents
    sums = dt.cumsum(1)
    decay = torch.exp((sums[:, :, None] - sums[:, None]).clamp(min=0)[..., None] * A)  # (b, i, j, C, N)
    visible = torch.ones(T, T, dtype=torch.bool).tril() & (index[:, :, None] == index[:, None])
    L = decay * visible[..., None, None]
    y = torch.einsum("bin,bijcn,bjn,bjc->bic", C, L, B, dt * x)
    state = torch.einsum("bjcn,bjn,bjc->bcn", L[:, -1], B, dt * x)
    if initial_state is not None:
        carried = torch.exp(sums[..., None] * A) * (index == 0)[..., None, None]  # (b, i, C, N)
        y = y + torch.einsum("bin,bicn,bcn->bic", C, carried, initial_state)
        state = state + carried[:, -1] * initial_state
    return y if D is None else y + D * x, state


@pytest.mark.parametrize("T", [1, 2, 7, 16, 33])
def test_blocks_and_quadratic_equal_the_recurrence(T):
    """The math of the fast path, forward and backward, with state, documents, odd lengths and any block size."""
    leaves = inputs(T)
    x, dt, A, Bm, Cm, D, S = leaves
    for documents in documents_for(T).values():
        want = outputs_and_gradients(
            lambda d=documents: selective_scan_reference(x, dt, A, Bm, Cm, D=D, documents=d, initial_state=S), leaves
        )
        got = outputs_and_gradients(
            lambda d=documents: scan_quadratic(x, dt, A, Bm, Cm, D=D, documents=d, initial_state=S), leaves
        )
        assert_same(got, want, 1e-10)
        for chunk in (1, 4, 5, 16, None):
            got = outputs_and_gradients(
                lambda d=documents, c=chunk: selective_scan_chunked(x, dt, A, Bm, Cm, D, d, S, c), leaves
            )
            assert_same(got, want, 1e-10)


@pytest.mark.parametrize("step", [N, 2 * N, 4 * N, C * N, 100 * N])
def test_parts_of_rows_and_channels_make_the_whole(monkeypatch, step):
    """Large models go through in parts of their rows and channels, odd ones included; a part is a part of no sum but
    those over channels."""
    monkeypatch.setattr(chunked, "STEP", step)
    leaves = inputs(9)
    x, dt, A, Bm, Cm, D, S = leaves
    documents = packed([4, 5], [2, 7])
    want = outputs_and_gradients(
        lambda: selective_scan_reference(x, dt, A, Bm, Cm, D=D, documents=documents, initial_state=S), leaves
    )
    got = outputs_and_gradients(lambda: selective_scan_chunked(x, dt, A, Bm, Cm, D, documents, S, 4), leaves)
    assert_same(got, want, 1e-10)


def test_an_accelerators_way_is_the_same_map(monkeypatch):
    """Where the host may not look at the numbers: all rows at once, every exponent bounded, every block masked."""
    leaves = inputs(33, torch.float32)
    x, dt, A, Bm, Cm, D, S = leaves
    for documents in documents_for(33).values():

        def run(d=documents):
            return selective_scan_chunked(x, dt, A, Bm, Cm, D, d, S, 5)

        with monkeypatch.context() as patch:
            patch.setattr(chunked, "_on_cpu", lambda x: False)
            got = outputs_and_gradients(run, leaves)
        assert_same(got, outputs_and_gradients(run, leaves), 1e-6)


def test_without_skip_and_state():
    """D and initial_state are optional, and the state comes back only when asked for."""
    x, dt, A, Bm, Cm, _, _ = leaves = inputs(9)
    want = outputs_and_gradients(lambda: selective_scan_reference(x, dt, A, Bm, Cm), leaves[:5])
    got = outputs_and_gradients(lambda: selective_scan(x, dt, A, Bm, Cm, return_state=True), leaves[:5])
    assert_same(got, want, 1e-10)
    assert selective_scan(x, dt, A, Bm, Cm)[1] is None


def test_gradcheck():
    """Analytic gradients equal numerical ones, independently of the reference's autograd."""
    leaves = inputs(5)
    documents = packed([2, 3], [4, 1])
    assert torch.autograd.gradcheck(
        lambda x, dt, A, b, c, D, S: selective_scan_chunked(x, dt, A, b, c, D, documents, S, 3), leaves
    )


def test_state_carries_a_row_over():
    """Two halves with the state handed on equal the whole row, documents included: prefill in pieces."""
    x, dt, A, Bm, Cm, D, S = inputs(20)
    documents = packed([6, 9, 5], [20])
    whole, last = selective_scan(x, dt, A, Bm, Cm, D=D, documents=documents, initial_state=S, return_state=True)
    first, middle = selective_scan(
        *[v[:, :11] for v in (x, dt)], A, *[v[:, :11] for v in (Bm, Cm)], D=D, documents=documents[:, :11],
        initial_state=S, return_state=True,
    )  # fmt: skip
    second, end = selective_scan(
        *[v[:, 11:] for v in (x, dt)], A, *[v[:, 11:] for v in (Bm, Cm)], D=D,
        documents=documents[:, 11:] - documents[:, 10:11], initial_state=middle, return_state=True,
    )  # fmt: skip
    assert_same([torch.cat([first, second], 1), end], [whole, last], 1e-10)


def test_step_equals_row():
    """Decoding token by token gives the row's outputs and state."""
    x, dt, A, Bm, Cm, D, S = inputs(6)
    want = selective_scan(x, dt, A, Bm, Cm, D=D, initial_state=S, return_state=True)
    ys, state = [], S
    for t in range(6):
        y, state = selective_scan_step(x[:, t], dt[:, t], A, Bm[:, t], Cm[:, t], D, state)
        ys.append(y)
    assert_same([torch.stack(ys, 1), state], want, 1e-10)


@pytest.mark.parametrize("documents", [None, torch.tensor([[0], [1]], dtype=torch.int32)])
def test_one_token_after_a_state_is_a_step(monkeypatch, documents):
    """Decoding skips the blocks; a row whose token begins a document does not see the state."""
    x, dt, A, Bm, Cm, D, S = leaves = inputs(1)

    def run(form, **kwargs):
        return outputs_and_gradients(
            lambda: form(x, dt, A, Bm, Cm, D=D, documents=documents, initial_state=S, **kwargs), leaves
        )

    want = run(scan_quadratic)
    monkeypatch.setattr(module, "selective_scan_chunked", None)
    assert_same(run(selective_scan, return_state=True), want, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_documents_are_isolated_to_the_bit(dtype, where):
    """A change in one document does not move the others by one bit, forward or backward, inside one block or not."""
    T, lengths = 40, [9, 17, 14]
    documents = packed(lengths, lengths)
    which = ["first", "middle", "last"].index(where)
    changed = (documents == which)[..., None]

    def run(factor: float) -> list[Tensor]:
        leaves = inputs(T, dtype)
        with torch.no_grad():
            for v in leaves[:2] + leaves[3:5]:
                v.copy_(torch.where(changed, factor * v, v))
        x, dt, A, Bm, Cm, D, S = leaves
        y = selective_scan_chunked(x, dt, A, Bm, Cm, D, documents, S, 16)[0]
        upstream = torch.where(changed, factor, 1.0).to(dtype).expand_as(y)
        return [y, *torch.autograd.grad(y, [x, dt, Bm, Cm], upstream)]

    for factor in (3.7, 1000.0):  # the latter takes the decays of its document out of the range that needs no bound
        for a, b in zip(run(1.0), run(factor), strict=True):
            assert not torch.equal(a, b)
            assert torch.equal(a[documents != which], b[documents != which])


def test_final_state_belongs_to_the_last_document():
    """The state returned does not know the documents before the last one, nor the state passed in."""
    x, dt, A, Bm, Cm, D, S = inputs(12)
    documents = packed([5, 7], [5, 7])
    _, state = selective_scan(x, dt, A, Bm, Cm, D=D, documents=documents, initial_state=S, return_state=True)
    _, alone = selective_scan(x[:, 5:], dt[:, 5:], A, Bm[:, 5:], Cm[:, 5:], D=D, return_state=True)
    assert_same([state], [alone], 1e-10)


def test_bfloat16_is_rounded_at_the_ends_only():
    """Inputs and outputs in bfloat16, everything between in float32: outputs and gradients within one rounding."""
    leaves = inputs(70, torch.bfloat16)
    single = [v.detach().float().requires_grad_() for v in leaves]

    def run(x, dt, A, Bm, Cm, D, S):
        return selective_scan(x, dt, A, Bm, Cm, D=D, initial_state=S, chunk=16, return_state=True)

    got, want = outputs_and_gradients(lambda: run(*leaves), leaves), outputs_and_gradients(lambda: run(*single), single)
    assert [v.dtype for v in got] == [torch.bfloat16, torch.float32, *(v.dtype for v in leaves)]
    assert_same([v.float() for v in got], want, 2**-8)


def test_strong_and_long_decays_stay_finite():
    """Decays from none to far below the smallest float, mixed in one row: no overflow, no NaN, still the recurrence."""
    leaves = inputs(64, torch.float32)
    x, dt, A, Bm, Cm, D, S = leaves
    with torch.no_grad():
        dt[:, ::3] = 200.0
        dt[:, 1::3] = 0.0
    want = outputs_and_gradients(lambda: selective_scan_reference(x, dt, A, Bm, Cm, D=D, initial_state=S), leaves)
    got = outputs_and_gradients(lambda: selective_scan_chunked(x, dt, A, Bm, Cm, D, None, S, 16), leaves)
    assert all(v.isfinite().all() for v in got)
    assert_same(got, want, 1e-4)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_long_rows_stay_exact(scale):
    """4,096 tokens, with steps that hold a state for thousands of tokens or drop it in one: the float64 recurrence."""
    leaves = [v[:1] if v.dim() == 3 else v for v in inputs(4096, torch.float32)]
    with torch.no_grad():
        leaves[1].mul_(scale)
    x, dt, A, Bm, Cm, D, S = leaves = [v.detach().requires_grad_() for v in leaves]
    exact = [v.detach().double().requires_grad_() for v in leaves]
    got = outputs_and_gradients(lambda: selective_scan_chunked(x, dt, A, Bm, Cm, D, None, S), leaves)
    x, dt, A, Bm, Cm, D, S = exact
    want = outputs_and_gradients(lambda: selective_scan_chunked(x, dt, A, Bm, Cm, D, None, S), exact)
    assert all(v.isfinite().all() for v in got)
    assert_same([v.double() for v in got], want, 1e-4)


def test_not_a_number_is_not_hidden():
    """A NaN step gives NaN from its token on, so that a broken run is seen to be broken."""
    x, dt, A, Bm, Cm, D, _ = inputs(8, torch.float32)
    with torch.no_grad():
        dt[0, 3] = float("nan")
    y = selective_scan_chunked(x, dt, A, Bm, Cm, D, None, None, 2)[0]
    assert y[0, :3].isfinite().all() and y[1].isfinite().all() and y[0, 3:].isnan().all()


def test_under_checkpointing():
    """Gradient checkpointing recomputes the op and gets the same gradients to the bit."""
    leaves = inputs(20, torch.float32)

    def run(*v):
        return selective_scan(*v[:5], D=v[5], chunk=8)[0]

    want = outputs_and_gradients(lambda: [run(*leaves[:6])], leaves[:6])
    got = outputs_and_gradients(lambda: [checkpoint(run, *leaves[:6], use_reentrant=False)], leaves[:6])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("channels", "states"), [(C, N), (C, 1), (1, N), (1, 1)])
def test_inputs_are_left_alone(channels, states):
    """In-place work never reaches the inputs or the upstream gradient, of which some sizes need no copy."""
    x, dt, A, Bm, Cm, D, S = inputs(10, torch.float32)
    leaves = [x[..., :channels], dt[..., :channels], A[:channels, :states], Bm[..., :states], Cm[..., :states]]
    leaves = [v.detach().clone().requires_grad_() for v in (*leaves, D[:channels], S[:, :channels, :states])]
    before = [v.detach().clone() for v in leaves]
    x, dt, A, Bm, Cm, D, S = leaves
    y, state = selective_scan(x, dt, A, Bm, Cm, D=D, initial_state=S, return_state=True)
    upstream = [torch.ones_like(y), torch.ones_like(state)]
    torch.autograd.grad([y, state], leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))
    assert all(bool((g == 1).all()) for g in upstream)


def test_gradients_come_in_any_layout():
    """Upstream gradients that are expanded or transposed, as sums and stacks hand them down."""
    x, dt, A, Bm, Cm, D, S = leaves = inputs(7)

    def run(expand: bool) -> list[Tensor]:
        y, state = selective_scan(x, dt, A, Bm, Cm, D=D, initial_state=S, return_state=True)
        ones = [torch.ones((), dtype=y.dtype).expand_as(v) if expand else torch.ones_like(v) for v in (y, state)]
        return list(torch.autograd.grad([y, state], leaves, ones))

    assert_same(run(True), run(False), 0)


def test_memory_stays_bounded():
    """No tensor holds a state per token: the largest holds the states of a block, or those that blocks start from."""
    T, c, n = 512, 32, 16
    x, b = leaf(1, T, c, dtype=torch.float32), leaf(1, T, n, dtype=torch.float32)
    dt, A = torch.ones(1, T, c), -torch.ones(c, n)
    size = largest(lambda: selective_scan_chunked(x, dt, A, b, b, None, None, None, 16)[0], [x])
    assert size <= T * c * n // 16


def test_nothing_is_kept_for_a_backward_that_cannot_come():
    """Evaluation and prefill hold no states of blocks."""
    x, dt, A, Bm, Cm, D, S = inputs(12)
    with torch.no_grad():
        y, state = selective_scan_chunked(x, dt, A, Bm, Cm, D, None, S, 4)
    want = selective_scan_reference(x, dt, A, Bm, Cm, D=D, initial_state=S)
    assert_same([y, state], want, 1e-10)
