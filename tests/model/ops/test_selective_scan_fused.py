"""The selective scan's kernels without a GPU: which calls reach them, and that what they are asked is the same map. The
fake stands for mamba-ssm 2.3: it checks what the package checks (csrc/selective_scan/selective_scan.cpp) and gives no
gradient to the final state, which the package's backward drops."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from model.ops import backend
from model.ops.backend import Backend, chosen, request
from model.ops.selective_scan import selective_scan, selective_scan_reference
from tests.model.ops.support import assert_same, outputs_and_gradients, packed
from tests.model.ops.test_selective_scan import B, C, N, documents_for, inputs, leaf


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """As on a machine with every package and a recent GPU; tensors on the CPU pass for CUDA's."""
    here = {op: tuple(replace(b, device="any") for b in backends) for op, backends in backend._declared.items()}
    monkeypatch.setattr(backend, "_declared", here)
    monkeypatch.setattr(backend, "_requested", {})
    monkeypatch.setattr(backend, "_chosen", {})
    monkeypatch.setattr(Backend, "available", lambda self: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    interface = SimpleNamespace(selective_scan_fn=selective_scan_fn)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)

    def ours(x, dt, A, B, C, D, documents, initial_state):
        return selective_scan_reference(x, dt, A, B, C, D=D, documents=documents, initial_state=initial_state)

    triton = SimpleNamespace(selective_scan_triton=ours)
    monkeypatch.setitem(sys.modules, "model.ops.selective_scan_triton", triton)


def selective_scan_fn(u, delta, A, B, C) -> Tensor:
    batch, _, T = u.shape
    assert u.dtype == delta.dtype == B.dtype == C.dtype, "one dtype for all that depends on the token"
    assert A.dtype == torch.float32 and A.is_contiguous() and A.shape[1] <= 256
    assert delta.shape == u.shape and B.shape == C.shape == (batch, A.shape[1], T)
    assert all(v.stride(-1) == 1 or v.shape[-1] == 1 for v in (u, delta, B, C))
    u, delta, B, C = (v.transpose(1, 2) for v in (u, delta, B, C))
    return selective_scan_reference(u, delta, A, B, C)[0].transpose(1, 2)


@pytest.mark.parametrize("T", [1, 2, 16])
def test_tokens_say_documents_and_states_to_mamba_ssm(T):
    """Resets, an initial and a final state: outputs and every gradient are those of the recurrence."""
    leaves = inputs(T, torch.float32)
    x, dt, A, Bm, Cm, D, S = leaves
    for documents in documents_for(T).values():
        for state in (S, None):
            some = leaves if state is S else leaves[:-1]
            run = [
                outputs_and_gradients(
                    lambda name=name, d=documents, s=state: selective_scan(
                        x, dt, A, Bm, Cm, D=D, documents=d, initial_state=s, return_state=True, backend=name
                    ),
                    some,
                )
                for name in ("mamba_ssm", "reference")
            ]
            assert_same(*run, 1e-5)
    assert chosen() == {"selective_scan": "mamba_ssm, reference"}


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_reset_isolates_to_the_bit(where):
    """As far as the kernel's own arithmetic goes, nothing of a document reaches another, forward or backward."""
    documents = packed([5, 6, 5], [5, 6, 5])
    changed = (documents == where)[..., None]

    def run(factor: float) -> list[Tensor]:
        x, dt, A, Bm, Cm, D, S = inputs(16, torch.float32)
        with torch.no_grad():
            for v in (x, dt, Bm, Cm):
                v.copy_(torch.where(changed, factor * v, v))
        y, _ = selective_scan(x, dt, A, Bm, Cm, D=D, documents=documents, initial_state=S, backend="mamba_ssm")
        upstream = torch.where(changed, factor, 1.0).expand_as(y)
        return [y, *torch.autograd.grad(y, [x, dt, Bm, Cm], upstream)]

    for a, b in zip(run(1.0), run(3.7), strict=True):
        assert torch.equal(a[documents != where], b[documents != where])
        assert not torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "expected", "kwargs"),
    [
        (None, "mamba_ssm", {}),
        (None, "mamba_ssm", {"documents": packed([2, 4], [6]), "return_state": True}),
        ("triton", "triton", {"documents": packed([2, 4], [6])}),
        (None, "triton", {"states": 300}),
        (None, "torch", {"dtype": torch.float64}),
        (None, "torch", {"T": 1, "initial_state": torch.ones(B, C, N)}),
        ("mamba_ssm", "mamba_ssm", {"T": 1, "initial_state": torch.ones(B, C, N)}),
    ],
)
def test_which_kernel_runs(name, expected, kwargs):
    """mamba-ssm where it can, then our own; one token after a state is a step in plain torch, unless one is named."""
    T, n, dtype = kwargs.pop("T", 6), kwargs.pop("states", N), kwargs.pop("dtype", torch.bfloat16)
    x, b = leaf(B, T, C, dtype=dtype), leaf(B, T, n, dtype=dtype)
    y, _ = selective_scan(x, torch.ones(B, T, C), -torch.ones(C, n), b, b, backend=name, **kwargs)
    assert chosen() == {"selective_scan": expected}
    assert y.dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "n", "why"),
    [(torch.float64, 4, "it does not take torch.float64"), (torch.float32, 257, "d_state is 257, it takes 1 to 256")],
)
def test_what_mamba_ssm_cannot_do_is_refused(dtype, n, why):
    request({"selective_scan": "mamba_ssm"})
    x, b = leaf(B, 4, C, dtype=dtype), leaf(B, 4, n, dtype=dtype)
    with pytest.raises(ValueError, match=f"backend 'mamba_ssm' cannot serve this call: {why}"):
        selective_scan(x, torch.ones(B, 4, C), -torch.ones(C, n), b, b)
