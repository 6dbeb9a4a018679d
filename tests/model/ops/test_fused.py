"""Fused kernels without a GPU: which calls reach them, and what they are asked. Fakes stand for the packages; each
asserts what its package checks (causal-conv1d 1.7 csrc/causal_conv1d.cpp, mamba-ssm 2.3, flash-attn 2.8)."""

import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import backend
from model.ops.attention import Past, attention, attention_reference
from model.ops.backend import Backend, chosen, request
from model.ops.conv import causal_conv, causal_conv_reference
from model.ops.norm import rms_norm_reference
from model.ops.ssd import ssd
from model.registry import KINDS  # noqa: F401  (its layers declare every op)
from tests.contracts.examples import EXAMPLES, braid, tokens_and_starts
from tests.model.ops.support import assert_same, leaf, outputs_and_gradients, packed

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """As on a machine with every package and a recent GPU; tensors on the CPU pass for CUDA's."""
    here = {op: tuple(replace(b, device="any") for b in backends) for op, backends in backend._declared.items()}
    monkeypatch.setattr(backend, "_declared", here)
    monkeypatch.setattr(backend, "_requested", {})
    monkeypatch.setattr(backend, "_chosen", {})
    monkeypatch.setattr(backend, "_decided", {})
    monkeypatch.setattr(Backend, "available", lambda self: self.ready is None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "causal_conv1d", SimpleNamespace(causal_conv1d_fn=conv_kernel))
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash, flash_attn_varlen_func=flash))
    own = SimpleNamespace(causal_conv_triton=causal_conv_reference)
    monkeypatch.setitem(sys.modules, "model.ops.conv_triton", own)
    scan = SimpleNamespace(mamba_chunk_scan_combined=scan_kernel, mamba_split_conv1d_scan_combined=mixer_kernel)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", scan)


def conv_kernel(x, weight, bias, *, seq_idx, initial_states, activation) -> Tensor:
    B, C, T = x.shape
    assert x.stride(1) == 1 and x.stride(2) > 1, "channels last"
    assert C % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
    assert 2 <= weight.shape[1] <= 4
    assert bias is None or bias.dtype == weight.dtype
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous() and seq_idx.shape == (B, T))
    assert seq_idx is None or initial_states is None
    if initial_states is not None:
        assert initial_states.dtype == x.dtype and initial_states.stride(1) == 1
        initial_states = initial_states.transpose(1, 2)
    return causal_conv_reference(x.transpose(1, 2), weight, bias, seq_idx, initial_states, activation).transpose(1, 2)


def flash(q, k, v, *bounds, **options) -> Tensor:
    assert q.shape[-1] <= 256 and q.dtype == k.dtype == v.dtype == HALF
    return q


def scan_kernel(x, dt, A, B, C, chunk, *, D, initial_states, seq_idx, dt_softplus, return_final_states):
    assert x.dtype == B.dtype == C.dtype and x.shape[-1] <= 256
    assert chunk in (16, 32, 64, 128, 256)
    given = {"D": D, "documents": seq_idx, "initial_state": initial_states}
    y, state = ssd(x, dt, A, B, C, **given, return_state=True, backend="torch")
    return (y, state) if return_final_states else y


def mixer_kernel(
    zxbcdt, conv_weight, conv_bias, dt_bias, A, D, chunk, *, seq_idx, dt_limit, rmsnorm_weight, rmsnorm_eps, headdim,
    ngroups, norm_before_gate,
):  # fmt: skip
    assert chunk in (16, 32, 64, 128, 256) and {dt_bias.dtype, A.dtype, D.dtype} == {torch.float32}
    width, H = headdim * len(D), len(D)
    z, xBC, dt = zxbcdt.split([width, len(conv_weight), H], -1)
    xBC = causal_conv_reference(xBC, conv_weight, conv_bias, seq_idx, None, "silu")
    x, B, C = xBC.split([width, (len(conv_weight) - width) // 2, (len(conv_weight) - width) // 2], -1)
    dt = F.softplus(dt.float() + dt_bias).clamp(*dt_limit)
    x, B, C = x.unflatten(-1, (H, -1)), B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1))
    y = ssd(x, dt, A, B, C, D=D, documents=seq_idx, backend="torch")[0].flatten(2)
    if rmsnorm_weight is None:
        return y * F.silu(z)
    if norm_before_gate:
        return rms_norm_reference(y, rmsnorm_weight, rmsnorm_eps, ngroups) * F.silu(z)
    return rms_norm_reference(y * F.silu(z), rmsnorm_weight, rmsnorm_eps, ngroups)


def conv(B: int = 2, T: int = 6, C: int = 8, k: int = 4, dtype=HALF, **kwargs) -> Tensor:
    wide = leaf(B, T, C + 5, dtype=dtype)  # x is a slice, as a fused projection gives it
    return causal_conv(wide[..., :C], leaf(C, k, dtype=dtype), leaf(C, dtype=dtype), **kwargs)[0]


def attend(P: int = 8, dtype=HALF, **kwargs) -> Tensor:
    q = leaf(1, 6, 2, P, dtype=dtype)
    return attention(q, q, q, **kwargs)


def scan(P: int = 4, chunk: int = 128, dtype=HALF, **kwargs) -> Tensor:
    B, C = (leaf(1, 6, 1, 4, dtype=torch.float32, seed=seed).to(dtype) for seed in (1, 2))
    x, dt = leaf(1, 6, 2, P, dtype=dtype), torch.ones(1, 6, 2)
    return ssd(x, dt, -torch.ones(2), B, C, chunk=chunk, **kwargs)[0]


@pytest.mark.parametrize(
    "run",
    [
        conv,
        lambda: conv(k=2, dtype=torch.float32),
        lambda: conv(documents=packed([2, 4], [6])),
        lambda: conv(state=leaf(2, 3, 8, dtype=HALF)),
        lambda: conv(B=1, T=1),
        lambda: conv(B=2, T=1, C=16, k=3),
        attend,
        lambda: attend(P=12, window=3),
        lambda: attend(P=256, documents=packed([2, 4])),
        lambda: attend(past=Past(*[leaf(1, 2, 2, 8, dtype=HALF)] * 2, torch.tensor([2]))),
        scan,
        lambda: scan(chunk=40),
        lambda: scan(chunk=5),
        lambda: scan(chunk=1000),
        lambda: scan(P=256, dtype=torch.float32, documents=packed([2, 4]), initial_state=torch.ones(1, 2, 256, 4)),
    ],
)
def test_auto_takes_the_fused_kernel(run):
    """What a package can do goes to it, in the layout that it checks for."""
    run()
    assert set(chosen().values()) & {"causal_conv1d", "flash_attn", "mamba_ssm", "mamba_ssm, torch"}


@pytest.mark.parametrize(
    ("run", "op", "name", "why"),
    [
        (lambda: conv(k=5), "conv", "causal_conv1d", "taps is 5, it takes 2 to 4"),
        (lambda: conv(k=1), "conv", "causal_conv1d", "taps is 1, it takes 2 to 4"),
        (lambda: conv(C=12), "conv", "causal_conv1d", "channels is 12, it takes multiples of 8"),
        (lambda: conv(dtype=torch.float64), "conv", "causal_conv1d", "it does not take torch.float64"),
        (
            lambda: conv(documents=packed([2, 4], [6]), state=leaf(2, 3, 8, dtype=HALF)),
            "conv",
            "causal_conv1d",
            "it has no documents with state",
        ),
        (lambda: attend(P=264), "attention", "flash_attn", "head_dim is 264, it takes 1 to 256"),
        (lambda: attend(dtype=torch.float32), "attention", "flash_attn", "it does not take torch.float32"),
        (lambda: scan(P=512), "ssd", "mamba_ssm", "head_dim is 512, it takes 1 to 256"),
        (lambda: scan(dtype=torch.float64), "ssd", "mamba_ssm", "it does not take torch.float64"),
    ],
)
def test_what_a_kernel_cannot_do_never_reaches_it(run, op, name, why):
    """auto goes past it, to our own kernel or to plain torch; named by the user, it is refused in words instead of
    failing inside."""
    run()
    instead = {op: "torch"} if op != "conv" or "float64" in why else {op: "triton"}
    assert chosen() == instead
    request({op: name})
    with pytest.raises(ValueError, match=f"{op}: backend '{name}' cannot serve this call: {why}"):
        run()


def test_one_token_after_a_state_goes_to_plain_torch():
    """Decoding: a step of the recurrence is less work than a kernel's whole chunk. A kernel can still be named."""
    x, b, state = leaf(1, 1, 2, 4, dtype=HALF), leaf(1, 1, 1, 4, dtype=HALF), torch.ones(1, 2, 4, 4)
    args = (x, torch.ones(1, 1, 2), -torch.ones(2), b, b)
    ssd(*args, initial_state=state)
    conv(T=1, state=leaf(2, 3, 8, dtype=HALF))
    assert chosen() == {"ssd": "torch", "conv": "torch"}
    ssd(*args, initial_state=state, backend="mamba_ssm")
    conv(T=1, state=leaf(2, 3, 8, dtype=HALF), backend="causal_conv1d")
    assert chosen() == {"ssd": "mamba_ssm, torch", "conv": "causal_conv1d, torch"}


@pytest.mark.parametrize("grouped", ["by the kernel", "by us", "by flash-attn"])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("lengths", [None, ([2, 4, 5], [11])])
@pytest.mark.parametrize("past", [None, [0, 5], [3, 1]])
def test_packed_sequences_are_asked_for_the_same(monkeypatch, grouped, window, lengths, past):
    """Documents, windows, groups of heads and what is past, in the conventions of kernels for packed sequences: a fake
    computes what it was asked, and leaves rubbish where kernels leave what they found."""

    class Rubbish(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, used):
            ctx.used = used
            return x

        @staticmethod
        def backward(ctx, d):
            d = d.clone()
            d[ctx.used :] = float("nan")
            return d, None

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k) and cu_q[-1] == len(q)
        assert max_q >= cu_q.diff().max() and max_k >= cu_k.diff().max() and window_size[1] == 0
        assert enable_gqa == (q.shape[1] != k.shape[1])
        k, v = Rubbish.apply(k, int(cu_k[-1])), Rubbish.apply(v, int(cu_k[-1]))
        limit = len(k) if window_size[0] < 0 else window_size[0] + 1
        rows, seen = ([slice(a, b) for a, b in pairwise(cu)] for cu in (cu_q, cu_k))
        parts = [
            attention_reference(q[None, i], k[None, j], v[None, j], None, limit, scale)[0]
            for i, j in zip(rows, seen, strict=True)
        ]
        return torch.cat(parts)

    def older(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        return kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)

    def flash_attn(q, k, v, *ends, softmax_scale, causal, window_size, deterministic):
        assert causal and deterministic
        if not ends:
            rows = torch.arange(0, q.shape[0] * q.shape[1] + 1, q.shape[1], dtype=torch.int32)
            packed_ = (x.flatten(0, 1) for x in (q, k, v))
            return flash_attn(
                *packed_,
                rows,
                rows,
                11,
                11,
                softmax_scale=softmax_scale,
                causal=True,
                window_size=window_size,
                deterministic=True,
            ).view(q.shape)
        visible = (window_size[0], 0)
        return kernel(q, k, v, *ends, scale=softmax_scale, window_size=visible, enable_gqa=q.shape[1] != k.shape[1])

    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(varlen, "varlen_attn", kernel if grouped == "by the kernel" else older)
    package = SimpleNamespace(flash_attn_func=flash_attn, flash_attn_varlen_func=flash_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    q, k, v = leaf(2, 11, 4, 8, dtype=HALF), leaf(2, 11, 2, 8, dtype=HALF), leaf(2, 11, 2, 8, dtype=HALF, seed=1)
    cached = [leaf(2, 5, 2, 8, dtype=HALF, seed=seed) for seed in (2, 3)]
    before = None if past is None else Past(*cached, torch.tensor(past))
    documents = None if lengths is None else packed(*lengths)
    if documents is not None and past == [3, 1]:
        documents = documents + torch.tensor([[0], [1]])  # the second row begins with a document: it sees no past
    leaves = [q, k, v, *(cached if past else [])]

    def run(backend: str) -> list[Tensor]:
        ask = {"window": window, "documents": documents, "scale": 0.3, "past": before}
        return outputs_and_gradients(lambda: [attention(q, k, v, backend=backend, **ask)], leaves)

    got, want = run("flash_attn" if grouped == "by flash-attn" else "torch_varlen"), run("reference")
    assert_same(got[:1], want[:1], 1e-6)
    assert_same(got[1:], want[1:], 1e-2)  # keys' gradients are rounded before heads are added up
    with pytest.raises(ValueError, match="torch_varlen' cannot serve this call: it has no"):
        attention(q, k, v, backend="torch_varlen", cap=2.0)


def test_flash_attn_wants_an_ampere_gpu(monkeypatch):
    """An older GPU gets plain torch, not an error from the kernel."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    attend()
    assert chosen() == {"attention": "torch"}
    with pytest.raises(ValueError, match=r"it wants a GPU of compute capability 8\.0 or more"):
        attend(backend="flash_attn")


def test_our_convolution_wants_an_ampere_gpu(monkeypatch):
    """An older GPU gets plain torch where causal-conv1d cannot serve."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    conv(k=5)
    assert chosen() == {"conv": "torch"}


@pytest.mark.parametrize("state", [None, leaf(2, 3, 8, dtype=torch.float32)])
def test_the_convolution_kernel_is_asked_for_the_same_map(state):
    """Through the kernel's layout and back: the plain path's values."""
    for documents in (None, packed([2, 4], [6])) if state is None else (None,):
        run = [
            conv(dtype=torch.float32, documents=documents, state=state, activation="silu", backend=name)
            for name in ("causal_conv1d", "torch")
        ]
        assert_same(run[:1], run[1:], 1e-6)


MAMBA2 = [name for name, layer in EXAMPLES.items() if layer.kind == "mamba2"]


@pytest.mark.parametrize("name", MAMBA2)
@pytest.mark.parametrize("lengths", [[23], [9, 13, 7]])
def test_the_mixer_is_asked_for_the_same_layer(monkeypatch, name, lengths):
    """Every option of Mamba-2 in mamba-ssm's conventions, documents too; what it has not, an MLP beside it, is composed
    of the ops."""
    layer = EXAMPLES[name]
    model, (tokens, starts) = braid(layer), tokens_and_starts(lengths)
    request(
        {"mamba2": "composed", "conv": "torch", "ssd": "torch", "norm": "torch", "activation": "torch", "head": "torch"}
    )
    want = model(tokens, starts).logits
    others = {"norm": "torch", "activation": "torch", "head": "torch"}
    request({"mamba2": "auto" if layer.d_ssm else "mamba_ssm", "conv": "torch", "ssd": "torch", **others})
    got = model(tokens, starts).logits
    assert chosen()["mamba2"] == ("composed" if layer.d_ssm else "composed, mamba_ssm")
    assert_same([got], [want], 1e-5)


def test_a_backend_of_a_part_that_is_named_is_called():
    """Else a recipe that wants plain torch for its scan would not get it."""
    model, (tokens, starts) = braid(EXAMPLES["mamba2"]), tokens_and_starts([23])
    request({"ssd": "torch", "norm": "torch", "activation": "torch"})
    with torch.no_grad():
        model(tokens, starts)
    assert chosen()["mamba2"] == "composed"
    assert "torch" in chosen()["ssd"]
