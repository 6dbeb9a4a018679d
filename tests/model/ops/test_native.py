"""Loops in C++: they give what plain torch gives, in float32 and bfloat16, on any number of threads, and nothing needs
them. (The tests of each op run with and without them, see conftest.py.)"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.ops.attention import Past, attention
from model.ops.backend import chosen, request
from model.ops.conv import causal_conv
from model.ops.head import linear_cross_entropy
from model.ops.native import native_ready
from model.ops.norm import gated_rms_norm, relu2, rms_norm, swiglu
from model.ops.ssd import ssd
from model.ops.ssd_native import native_scan
from tests.model.ops.support import leaf, outputs_and_gradients, packed

ROOT = Path(__file__).parents[3]
Run = tuple[Callable[[], list], list[Tensor]]

pytestmark = pytest.mark.skipif(not native_ready(), reason="no C++ compiler, so no loops in C++")


def slice_of(wider: Tensor, width: int) -> Tensor:
    """As a layer's split gives it: rows with a stride."""
    return wider[..., 3 : 3 + width]


def a_norm(dtype: torch.dtype, gate: str, out: torch.dtype, groups: int = 1) -> Run:
    x, z, w = leaf(3, 50, 93, dtype=dtype), leaf(3, 50, 97, dtype=dtype), leaf(90, dtype=torch.float32)
    inputs = [x, w] if gate == "none" else [x, z, w]
    if gate == "none":
        return lambda: [rms_norm(slice_of(x, 90), w, 1e-5, dtype=out)], inputs
    first = gate == "norm first"
    return (
        lambda: [gated_rms_norm(slice_of(x, 90), slice_of(z, 90), w, 1e-5, groups, norm_before_gate=first, dtype=out)],
        inputs,
    )


def a_conv(dtype: torch.dtype, k: int, documents: bool, bias: bool, activation: str | None, state: bool = False) -> Run:
    x, w, b = leaf(2, 41, 150, dtype=dtype), leaf(147, k, dtype=torch.float32), leaf(147, dtype=torch.float32)
    index = packed([1, 2, 20, 18], [41]) if documents else None
    offset, before = b if bias else None, leaf(2, k - 1, 147, dtype=dtype, seed=1) if state else None
    return (
        lambda: [causal_conv(slice_of(x, 147), w, offset, documents=index, state=before, activation=activation)[0]],
        [v for v in (x, w, offset, before) if v is not None],
    )


def a_scan(dtype: torch.dtype, documents: bool, state: bool, chunk: int, G: int, T: int = 45, skip: bool = True) -> Run:
    B, H, P, N = 2, 4, 6, 5
    x, Bm, C = leaf(B, T, H, P, dtype=dtype), leaf(B, T, G, N, dtype=dtype), leaf(B, T, G, N, dtype=dtype, seed=1)
    dt, A, D = leaf(B, T, H, dtype=torch.float32), leaf(H, dtype=torch.float32), leaf(H, dtype=torch.float32, seed=2)
    S = leaf(B, H, P, N, dtype=torch.float32)
    index = packed([1, 20, 11, 13], [45]) if documents else None
    given = {"D": D if skip else None, "documents": index, "initial_state": S if state else None}

    def run() -> list:
        step, decay = torch.nn.functional.softplus(dt), -torch.exp(A)
        return list(ssd(x, step, decay, Bm, C, **given, chunk=chunk, return_state=True))

    return run, [x, dt, A, Bm, C, *([D] if skip else []), *([S] if state else [])]


def an_attention(dtype: torch.dtype, T: int, window: int | None, cap: float | None, documents: bool, past: bool) -> Run:
    q, k, v = (leaf(2, T, n, 40, dtype=dtype, seed=i) for i, n in enumerate((6, 2, 2)))
    cached = [leaf(2, 70, 2, 40, dtype=dtype, seed=i) for i in (3, 4)]
    before = Past(*cached, torch.tensor([70, 9])) if past else None
    index = packed([5, 70, 1, T - 76], [T]) if documents else None
    return (
        lambda: [attention(q, k, v, window=window, documents=index, cap=cap, past=before)],
        [q, k, v, *(cached if past else [])],
    )


def a_head(dtype: torch.dtype, z_loss: float) -> Run:
    x, w = leaf(2, 30, 16, dtype=dtype), leaf(128, 16, dtype=torch.float32)
    targets = torch.arange(60).view(2, 30) - 1
    targets[targets < 0] = -100
    ends = targets[:, -1:]  # one column of wider rows, as the only token of a chunk
    return (
        lambda: [
            linear_cross_entropy(x, w, targets, vocab_size=100, z_loss=z_loss),
            linear_cross_entropy(x[:, -1:], w, ends, vocab_size=100, z_loss=z_loss),
        ],
        [x, w],
    )


def an_activation(dtype: torch.dtype, name: str) -> Run:
    x = leaf(3, 17, 70, dtype=dtype)
    if name == "relu2":
        return lambda: [relu2(slice_of(x, 65))], [x]
    return lambda: [swiglu(slice_of(x, 32), x[..., 35:67])], [x]


F32, BF16 = torch.float32, torch.bfloat16
RUNS: dict[str, Callable[[], Run]] = {
    "norm": lambda: a_norm(F32, "none", F32),
    "norm to bfloat16": lambda: a_norm(F32, "none", BF16),
    "norm of bfloat16": lambda: a_norm(BF16, "none", BF16),
    "norm of bfloat16 to float32": lambda: a_norm(BF16, "none", F32),
    "gate first": lambda: a_norm(F32, "gate first", F32, 3),
    "gate first in bfloat16": lambda: a_norm(BF16, "gate first", BF16, 2),
    "norm first": lambda: a_norm(F32, "norm first", F32, 2),
    "norm first in bfloat16": lambda: a_norm(BF16, "norm first", BF16),
    "conv": lambda: a_conv(F32, 4, True, True, "silu"),
    "conv in bfloat16": lambda: a_conv(BF16, 4, True, True, "silu"),
    "conv after a state": lambda: a_conv(F32, 4, True, True, "silu", state=True),
    "conv after a state in bfloat16": lambda: a_conv(BF16, 3, False, True, "silu", state=True),
    "conv of one tap": lambda: a_conv(F32, 1, True, False, None),
    "conv of sixteen taps": lambda: a_conv(F32, 16, False, True, None),
    "scan": lambda: a_scan(F32, False, False, 16, 1),
    "scan of documents": lambda: a_scan(F32, True, True, 7, 2),
    "scan in bfloat16": lambda: a_scan(BF16, True, True, 16, 4),
    "scan in one chunk": lambda: a_scan(F32, True, False, 128, 1),
    "scan of five tokens without a skip": lambda: a_scan(F32, False, False, 64, 1, T=5, skip=False),
    "scan of a token in bfloat16": lambda: a_scan(BF16, False, False, 64, 2, T=1),
    "attention": lambda: an_attention(F32, 150, None, None, False, False),
    "attention in bfloat16": lambda: an_attention(BF16, 150, None, None, False, False),
    "attention in a window": lambda: an_attention(F32, 200, 70, None, False, True),
    "attention to documents": lambda: an_attention(F32, 140, None, 1.5, True, True),
    "attention to documents in bfloat16": lambda: an_attention(BF16, 140, 90, 1.5, True, False),
    "head": lambda: a_head(F32, 0.0),
    "head with z loss": lambda: a_head(F32, 1e-2),
    "head in bfloat16": lambda: a_head(BF16, 1e-2),
    "swiglu": lambda: an_activation(F32, "swiglu"),
    "swiglu in bfloat16": lambda: an_activation(BF16, "swiglu"),
    "relu2": lambda: an_activation(F32, "relu2"),
    "relu2 in bfloat16": lambda: an_activation(BF16, "relu2"),
}
OPS = ("attention", "norm", "activation", "conv", "ssd", "head")


def by(backend: str, name: str) -> list[Tensor]:
    request(dict.fromkeys(OPS, backend))
    try:
        return outputs_and_gradients(*RUNS[name]())
    finally:
        request({})


@pytest.mark.parametrize("name", RUNS)
def test_the_loops_agree_with_plain_torch(name: str):
    """They round once where torch rounds at each step, and add in another order; nothing else may differ."""
    for got, want in zip(by("native", name), by("torch", name), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        within = 5e-6 if want.dtype == F32 and "bfloat16" not in name else 1e-2
        assert (got.double() - want.double()).abs().max() <= within * want.double().abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("name", RUNS)
def test_the_number_of_threads_changes_nothing(name: str):
    """A run that moves to a machine with more cores must stay on its curve."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(by("native", name))
        assert all(torch.equal(a, b) for one in results[1:] for a, b in zip(one, results[0], strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("H", "P", "G", "N", "T"), [(4, 64, 1, 128, 200), (6, 80, 2, 48, 130), (2, 33, 2, 16, 64)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_scans_of_real_sizes(dtype: torch.dtype, H: int, P: int, G: int, N: int, T: int):
    """Whole tiles, tiles that are filled up and a short last chunk, beside the chunked form in float64."""
    x, Bm, C = leaf(2, T, H, P), leaf(2, T, G, N), leaf(2, T, G, N, seed=1)
    dt, A = torch.nn.functional.softplus(leaf(2, T, H) - 2), -torch.exp(leaf(H, seed=1))
    given = [v.detach().to(dtype) for v in (x, Bm, C)] + [
        v.detach().float() for v in (dt, A, leaf(H), leaf(2, H, P, N))
    ]
    index = packed([40, T - 55, 15], [T])

    def run(form: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [v.double().to(dtype if i < 3 else torch.promote_types(dtype, F32)) for i, v in enumerate(given)]
        x, b, c, step, decay, D, state = leaves = [v.requires_grad_() for v in leaves]
        return outputs_and_gradients(
            lambda: list(
                ssd(
                    x, step, decay, b, c, D=D, documents=index, initial_state=state, return_state=True, backend=form
                )
            ),
            leaves,
        )  # fmt: skip

    want = run("torch", torch.float64)
    for got, wanted in zip(run("native", dtype), want, strict=True):
        assert (got.double() - wanted).abs().max() <= (1e-5 if dtype == F32 else 2e-2) * wanted.abs().max()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(poison: float):
    """A diverging run must be seen, not rounded into range."""
    x = torch.ones(1, 2, 64, dtype=BF16)
    x[0, 1, 3] = poison
    w = torch.ones(64)
    for y in (
        rms_norm(x, w, 1e-5),
        gated_rms_norm(x, x, w, 1e-5),
        swiglu(x, x),
        relu2(x),
        causal_conv(x, w[:, None], None)[0],
        linear_cross_entropy(x, torch.ones(40, 64), torch.zeros(1, 2, dtype=torch.int64), vocab_size=40),
    ):
        assert not y[0, 1].isfinite().all() and y[0, 0].isfinite().all()


def test_a_scan_with_a_decay_that_is_none_gives_none():
    x = torch.ones(1, 2, 1, 64)
    assert not ssd(x, torch.ones(1, 2, 1), torch.tensor([float("nan")]), x, x)[0][0, 1].isfinite().any()


def test_one_logit_or_key_that_is_none_is_seen():
    """Among numbers that are some: a maximum or a mask may leave it out."""
    weight, targets = torch.ones(40, 64), torch.zeros(1, 2, dtype=torch.int64)
    for at in (0, 17, 35):
        spoilt = weight.clone()
        spoilt[at] = float("nan")
        assert linear_cross_entropy(torch.ones(1, 2, 64, dtype=BF16), spoilt, targets, vocab_size=40).isnan().all()
    q = torch.ones(1, 100, 1, 64, dtype=BF16)
    k = q.clone()
    k[0, 3] = float("nan")
    y = attention(q, k, q)
    assert y[0, :3].isfinite().all() and y[0, 3:].isnan().all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_scan_keeps_its_states_for_a_backward_only(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """They are twice what it reads; evaluation and the first pass of a recomputed block have no use for them."""
    kept: list[bool] = []

    def watched(*arguments):
        y, states = native_scan(*arguments)
        kept.append(states is not None)
        return y, states

    monkeypatch.setattr("model.ops.ssd_native.native_scan", watched)
    run, _ = a_scan(dtype, True, True, 16, 2)
    want = [y.detach() for y in run()]
    with torch.no_grad():
        assert all(map(torch.equal, run(), want))
    assert kept == [True, False]


PROBE = """
import torch
from model.ops.attention import Past, attention
from model.ops.backend import chosen
from model.ops.norm import rms_norm
rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5)
print(chosen()["norm"])
"""


@pytest.mark.parametrize(
    ("variables", "backend"),
    [({}, "native"), ({"BRAID_NATIVE": "0"}, "torch"), ({"CXX": "/bin/false"}, "torch"), ({"CXX": "nowhere"}, "torch")],
)
def test_nothing_needs_a_compiler(tmp_path: Path, variables: dict[str, str], backend: str):
    """A machine without one, or with a broken one, trains all the same; the start-up lines say with what."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == (backend, "")
    kept = list((tmp_path / "braid").glob("*")) if (tmp_path / "braid").exists() else []
    assert [path.suffix for path in kept] == ([".so"] if backend == "native" else [])


def test_a_named_backend_says_what_it_wants(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("model.ops.native.library", lambda: None)
    with pytest.raises(ValueError, match=r"conv: backend 'native' needs a C\+\+ compiler"):
        causal_conv(torch.ones(1, 2, 3), torch.ones(3, 2), None, backend="native")


def test_the_choice_is_told():
    rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5)
    assert "native" in chosen()["norm"]
