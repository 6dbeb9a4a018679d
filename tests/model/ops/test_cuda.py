"""The ops on a CUDA device: each backend that is there against the reference in float64, values and gradients, with
documents and states, in float32 and bfloat16. What a package would do is checked without a GPU in `test_fused.py`."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import backend as backends
from model.ops.attention import Past, attention, attention_reference
from model.ops.backend import chosen
from model.ops.conv import causal_conv
from model.ops.grouped import grouped_matmul
from model.ops.head import IGNORE, linear_cross_entropy, linear_cross_entropy_reference
from model.ops.norm import gated_rms_norm, relu2, rms_norm, rms_norm_reference, swiglu
from model.ops.selective_scan import selective_scan
from model.ops.softplus import softplus
from model.ops.ssd import ssd
from model.registry import KINDS  # noqa: F401  (its layers declare every op)
from tests.model.ops.support import leaf, outputs_and_gradients, packed

pytestmark = pytest.mark.gpu

T = 300
DOCUMENTS = ([60, 1, 3, 136, 100], [T])
WITHIN = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
"""Of the norm of what is compared: products of float32 matrices round to TF32 in mamba-ssm's kernels and ours."""
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def nothing_requested(monkeypatch):
    monkeypatch.setattr(backends, "_requested", {})
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_decided", {})


def compare(
    run: Callable[..., Sequence[Tensor | None]],
    plain: Callable[..., Sequence[Tensor | None]],
    given: Sequence[Tensor],
    within: float,
) -> None:
    """`run` on the GPU and `plain` in float64 on the CPU give the same outputs and gradients of `given`."""
    here = [v.detach().cuda().requires_grad_() for v in given]
    exact = [v.detach().double().requires_grad_() for v in given]
    got = outputs_and_gradients(lambda: [y for y in run(*here) if y is not None], here)
    want = outputs_and_gradients(lambda: [y for y in plain(*exact) if y is not None], exact)
    assert len(got) == len(want)
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        assert a.isfinite().all(), f"number {number} is not finite"
        error = (a.cpu().double() - b).norm() / b.norm().clamp(min=1e-6)
        assert error <= within, f"number {number} of {[tuple(v.shape) for v in want]} differs by {error:.1e}"


def can(op: str, name: str, dtype: torch.dtype, needs: Sequence[str] = ()) -> None:
    """Skips what is not installed and what the backend does not claim to do."""
    backend = next(b for b in backends._declared[op] if b.name == name)
    if not backend.available():
        pytest.skip(f"no {backend.module}")
    if missing := set(needs) - backend.can:
        pytest.skip(f"{name} has no {', '.join(sorted(missing))}")
    if dtype not in backend.dtypes:
        pytest.skip(f"{name} does not take {dtype}")


CASES = pytest.mark.parametrize(
    ("documents", "carried"), [(False, False), (True, False), (False, True), (True, True)],
    ids=["row", "documents", "state", "documents and state"],
)  # fmt: skip


@BOTH
@CASES
@pytest.mark.parametrize("name", ["mamba_ssm", "torch"])
@pytest.mark.parametrize("groups", [1, 2])
def test_ssd(name, documents, carried, dtype, groups):
    can("ssd", name, dtype)
    H, P, N = 4, 64, 128
    given = [
        leaf(2, T, H, P).to(dtype),
        F.softplus(leaf(2, T, H) - 3).float(),
        -torch.exp(leaf(H)).float(),
        leaf(2, T, groups, N, seed=1).mul(N**-0.5).to(dtype),
        leaf(2, T, groups, N, seed=2).mul(N**-0.5).to(dtype),
        leaf(H).float(),
        *([leaf(2, H, P, N).float()] if carried else []),
    ]
    index = packed(*DOCUMENTS, state=carried) if documents else None

    def run(backend: str, x, dt, A, B, C, D, state=None):
        seen = None if index is None else index.to(x.device)
        options = {"documents": seen, "initial_state": state, "return_state": True, "backend": backend}
        return ssd(x, dt, A, B, C, D=D, **options)

    compare(lambda *v: run(name, *v), lambda *v: run("torch", *v), given, WITHIN[dtype])


@BOTH
@CASES
@pytest.mark.parametrize("name", ["causal_conv1d", "triton", "torch"])
@pytest.mark.parametrize(("channels", "taps"), [(96, 4), (40, 2)])
def test_conv(name, documents, carried, dtype, channels, taps):
    needs = [*(["documents"] if documents else []), *(["state"] if carried else [])]
    can("conv", name, dtype, [*needs, "documents with state"] if documents and carried else needs)
    index = packed(*DOCUMENTS, state=carried) if documents else None
    given = [
        leaf(2, T, 2 * channels + 24).to(dtype),
        leaf(channels, taps).float(),
        leaf(channels).float(),
        *([leaf(2, taps - 1, channels).to(dtype)] if carried else []),
    ]

    def run(backend: str, wide, weight, bias, state=None):
        seen = None if index is None else index.to(wide.device)
        x = wide[..., channels : 2 * channels]  # a slice of a projection
        options = {"documents": seen, "state": state, "activation": "silu", "backend": backend}
        return causal_conv(x, weight, bias, return_state=True, **options)

    compare(lambda *v: run(name, *v), lambda *v: run("reference", *v), given, WITHIN[dtype])


@BOTH
@CASES
@pytest.mark.parametrize("name", ["mamba_ssm", "triton", "torch"])
def test_selective_scan(name, documents, carried, dtype):
    can("selective_scan", name, dtype)
    C, N = 48, 16
    given = [
        leaf(2, T, C).to(dtype),
        F.softplus(leaf(2, T, C, seed=3) - 3).float(),
        -torch.arange(1, N + 1).float().expand(C, N),
        leaf(2, T, N, seed=1).to(dtype),
        leaf(2, T, N, seed=2).to(dtype),
        leaf(C).float(),
        *([leaf(2, C, N).float()] if carried else []),
    ]
    index = packed(*DOCUMENTS, state=carried) if documents else None

    def run(backend: str, x, dt, A, B, C, D, state=None):
        seen = None if index is None else index.to(x.device)
        options = {"documents": seen, "initial_state": state, "return_state": True, "backend": backend}
        return selective_scan(x, dt, A, B, C, D=D, **options)

    compare(lambda *v: run(name, *v), lambda *v: run("torch", *v), given, WITHIN[dtype])


@BOTH
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("name", ["flash_attn", "torch_varlen", "torch"])
def test_attention(name, cap, window, documents, kv_heads, dtype):
    needs = {"cap": cap, "window": window, "documents": documents or None}
    can("attention", name, dtype, [key for key, value in needs.items() if value is not None])
    q, k, v = leaf(2, T, 4, 64), leaf(2, T, kv_heads, 64, seed=1), leaf(2, T, kv_heads, 64, seed=2)
    index = packed(*DOCUMENTS) if documents else None

    def run(q, k, v):
        seen = None if index is None else index.cuda()
        return [attention(q, k, v, window=window, documents=seen, cap=cap, backend=name)]

    def plain(q, k, v):
        return [attention_reference(q, k, v, index, window or T, 64**-0.5, cap)]

    compare(run, plain, [q.to(dtype), k.to(dtype), v.to(dtype)], WITHIN[dtype])


@BOTH
def test_attention_after_cached_keys(dtype):
    """Several tokens, and one, after a prompt: what decoding runs."""
    k, v = leaf(2, 40, 2, 64, seed=1).to(dtype), leaf(2, 40, 2, 64, seed=2).to(dtype)
    length = torch.tensor([40, 7])
    for tokens in (5, 1):
        q, k1, v1 = (leaf(2, tokens, heads, 64, seed=seed).to(dtype) for heads, seed in ((4, 3), (2, 4), (2, 5)))
        past = Past(k.detach().cuda(), v.detach().cuda(), length.cuda())
        exact = Past(k.detach().double(), v.detach().double(), length)
        compare(
            lambda q, k, v, past=past: [attention(q, k, v, past=past, window=16)],
            lambda q, k, v, past=exact: [attention(q, k, v, past=past, window=16, backend="reference")],
            [q, k1, v1],
            WITHIN[dtype],
        )


@pytest.mark.parametrize("counts", [[5, 0, 40, 19], [0, 0, 0, 0], [16, 16, 16, 16], [60, 0, 0, 0]])
@pytest.mark.parametrize("name", ["torch_grouped_mm", "torch"])
def test_grouped_matmul(name, counts):
    """Empty groups, none at all, and rows that belong to no group."""
    can("grouped_matmul", name, torch.bfloat16)
    x, weight = leaf(64, 32).to(torch.bfloat16), leaf(4, 48, 32).to(torch.bfloat16)

    def run(backend: str, x, weight):
        return [grouped_matmul(x, weight, torch.tensor(counts, device=x.device), backend=backend)]

    compare(lambda *v: run(name, *v), lambda *v: run("reference", *v), [x, weight], WITHIN[torch.bfloat16])


@BOTH
@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("groups", [1, 4])
def test_norms_and_activations(monkeypatch, name, groups, dtype):
    for op in ("norm", "activation"):
        can(op, name, dtype)
        monkeypatch.setitem(backends._requested, op, name)
    D = 768
    wide, weight = leaf(3, T, 2 * D).to(dtype), leaf(D).float()
    tight = 1e-5 if dtype == torch.float32 else 1e-2

    def halves(v: Tensor) -> tuple[Tensor, Tensor]:
        return v[..., :D], v[..., D:]

    def gated(v, w):
        y, z = halves(v)
        return [gated_rms_norm(y, z, w, 1e-5, groups, norm_before_gate=first) for first in (False, True)]

    def gated_plain(v, w):
        y, z = halves(v)
        return [rms_norm_reference(y * F.silu(z), w, 1e-5, groups), rms_norm_reference(y, w, 1e-5, groups) * F.silu(z)]

    compare(gated, gated_plain, [wide, weight], tight)
    compare(
        lambda v, w: [rms_norm(halves(v)[0], w, 1e-5)],
        lambda v, w: [rms_norm_reference(halves(v)[0], w, 1e-5)],
        [wide, weight],
        tight,
    )
    compare(lambda v: [swiglu(*halves(v))], lambda v: [F.silu(halves(v)[0]) * halves(v)[1]], [wide], tight)
    compare(lambda v: [relu2(halves(v)[0])], lambda v: [F.relu(halves(v)[0]).square()], [wide], tight)
    assert chosen() == {"norm": name, "activation": name}


@BOTH
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_head(monkeypatch, name, dtype):
    """Padded rows of the vocabulary, tokens without a target, several chunks of tokens."""
    can("head", name, dtype)
    monkeypatch.setitem(backends._requested, "head", name)
    monkeypatch.setattr("model.ops.blockwise.ACCELERATOR_BLOCK", 2**17)
    V, D = 1000, 128
    hidden, weight = leaf(2, T, D).to(dtype), leaf(1024, D).mul(0.1).float()
    targets = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(0))
    targets[:, ::7] = IGNORE

    def run(h, w):
        return [linear_cross_entropy(h, w, targets.cuda(), vocab_size=V, z_loss=1e-3)]

    compare(run, lambda h, w: [linear_cross_entropy_reference(h, w, targets, V, 1e-3)], [hidden, weight], WITHIN[dtype])


@BOTH
def test_softplus(dtype):
    given = [leaf(2, T, 64).to(dtype), leaf(64).float()]
    tight = 1e-5 if dtype == torch.float32 else 1e-2
    compare(lambda x, b: [softplus(x, b)], lambda x, b: [F.softplus(x + b)], given, tight)


def test_auto_takes_a_fused_kernel_for_every_op():
    """bfloat16 with documents: what a training step asks for. Only what is installed can be taken."""
    have = {op: [b.name for b in declared if b.available()] for op, declared in backends._declared.items()}
    index, x = packed([100, 200]).cuda(), leaf(1, T, 64).cuda().bfloat16()
    weight = torch.ones(64, device="cuda")
    dt, A = torch.ones(1, T, 1, device="cuda"), -torch.ones(1, device="cuda")
    heads = x[:, :, None]
    causal_conv(x, torch.ones(64, 4, device="cuda"), None, documents=index)
    ssd(heads, dt, A, heads, heads, documents=index)
    attention(heads, heads, heads, documents=index)
    rms_norm(x, weight, 1e-5)
    swiglu(x, x)
    linear_cross_entropy(
        x, torch.ones(128, 64, device="cuda"), torch.zeros(1, T, dtype=int, device="cuda"), vocab_size=99
    )
    assert chosen() == {op: have[op][0] for op in chosen()}
    assert chosen()["norm"] == chosen()["activation"] == chosen()["head"] == "triton"
    assert chosen()["attention"] in ("flash_attn", "torch_varlen")
