"""Our ops against mamba-ssm's own code: the Triton kernels that its models train with, the listing of the paper, and
the reference of its selective scan."""

import math
import sys
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from model.ops.conv import causal_conv_reference
from model.ops.mamba2 import conv_scan_norm
from model.ops.norm import rms_norm_reference
from model.ops.selective_scan_triton import selective_scan_triton
from model.ops.ssd import ssd
from tests.model.ops.kernels import DEVICE, INTERPRETED
from tests.model.ops.support import assert_same, leaf, outputs_and_gradients, packed

FOUND = find_spec("mamba_ssm")
if FOUND is None:
    pytest.skip("mamba-ssm is not installed", allow_module_level=True)
assert FOUND.submodule_search_locations
FOLDER = FOUND.submodule_search_locations[0]
CHUNK = 16
WITHIN = 1e-5 if INTERPRETED else 1e-2
"""On a GPU their products of float32 matrices round to TF32."""


def mamba_ssm(module: str) -> ModuleType:
    """A module of mamba-ssm, without what its packages import at once: CUDA extensions and all its models."""
    for name, path in (("mamba_ssm", FOLDER), ("mamba_ssm.modules", f"{FOLDER}/modules")):
        if name not in sys.modules:
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [path]
    return import_module(module)


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    """One configuration to tune over, the smallest; what the kernels' callers ask of a GPU, answered for the
    interpreter."""
    tune = triton.autotune

    def size(config: triton.Config) -> int:
        return math.prod(config.kwargs.values()) * config.num_stages

    monkeypatch.setattr(triton, "autotune", lambda configs, **rest: tune([min(configs, key=size)], **rest))
    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=1)
        )


def inputs(T: int, G: int, B: int = 2, H: int = 2, P: int = 16, N: int = 16) -> list[Tensor]:
    """x, dt, A, B, C, D, initial state: float32, of the sizes that models have."""
    generator = torch.Generator().manual_seed(T + G)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dt = torch.nn.functional.softplus(normal(B, T, H) - 2)
    A = -torch.exp(normal(H))
    values = [normal(B, T, H, P), dt, A, normal(B, T, G, N), normal(B, T, G, N), normal(H), normal(B, H, P, N)]
    return [v.to(DEVICE).requires_grad_() for v in values]


def compared(T: int, G: int, documents: Tensor | None, carried: bool) -> None:
    theirs = mamba_ssm("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    leaves = inputs(T, G)
    x, dt, A, B, C, D, state = leaves
    documents = None if documents is None else documents.to(DEVICE)
    used = leaves if carried else leaves[:-1]
    first = state if carried else None

    def ours():
        return ssd(x, dt, A, B, C, D=D, documents=documents, initial_state=first, return_state=True, backend="torch")

    def kernels():
        return theirs(x, dt, A, B, C, CHUNK, D=D, initial_states=first, seq_idx=documents, return_final_states=True)

    assert_same(outputs_and_gradients(ours, used), outputs_and_gradients(kernels, used), WITHIN)


def test_row():
    """An odd length, two groups: outputs, final state and the gradients of all inputs."""
    compared(37, 2, None, False)


def test_documents_and_state():
    """Boundaries at, before and after a chunk's edge, and a state that only the first document sees."""
    compared(37, 1, packed([5, 10, 1, 21], [16, 17, 4]), True)


def test_a_state_that_no_document_continues():
    """Rows whose first document has index 1: both leave the state alone and its gradient is zero."""
    compared(19, 2, packed([19], [7, 12], state=False), True)


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 15, 16, 33, 64])
def test_lengths(T):
    """Shorter than a chunk, whole chunks, one token more; without and with a state, alone and with boundaries."""
    compared(T, 2, None, True)
    compared(T, 1, None, False)
    for first in {1, T // 2, T - 1} - {0, T}:
        compared(T, 1, packed([first, T - first], [T]), True)


def convolved(x, weight, bias, seq_idx, initial_states, final_states, silu) -> Tensor:
    """Stands for causal-conv1d, whose kernels are CUDA code: x (B, C, T)."""
    assert initial_states is final_states is None and silu
    return causal_conv_reference(x.mT, weight, bias, seq_idx, None, "silu").mT


def convolved_backward(x, weight, bias, dy, seq_idx, initial_states, d_final_states, dx, want_state, silu):
    leaves = [v.detach().requires_grad_() for v in (x, weight, bias)]
    with torch.enable_grad():
        y = convolved(*leaves, seq_idx, initial_states, d_final_states, silu)
    gradients = torch.autograd.grad(y, leaves, dy)
    return dx.copy_(gradients[0]), *gradients[1:], None


@pytest.mark.parametrize(
    ("groups", "lengths", "norm_before_gate"),
    [
        (2, ([5, 10, 1, 21], [16, 17, 4]), False),
        pytest.param(1, None, False, marks=pytest.mark.slow),
        pytest.param(2, None, True, marks=pytest.mark.slow),
    ],
)
def test_mixer(monkeypatch, groups, lengths, norm_before_gate):
    """Their convolution, scan and gated norm in one against ours one by one: outputs and the gradients of the
    projection and of every weight."""
    theirs = mamba_ssm("mamba_ssm.ops.triton.ssd_combined")
    monkeypatch.setattr(theirs, "causal_conv1d_fwd_function", convolved)
    monkeypatch.setattr(theirs, "causal_conv1d_bwd_function", convolved_backward)
    T, H, P, N = 37, 4, 16, 16
    width = H * P + 2 * groups * N
    documents = None if lengths is None else packed(*lengths).to(DEVICE)
    shapes = [(2, T, H * P + width + H), (width, 4), (width,), (H,), (H,), (H,), (H * P,)]
    leaves = [leaf(*shape, dtype=torch.float32, seed=i).detach().to(DEVICE) for i, shape in enumerate(shapes)]
    leaves[4] = -torch.exp(leaves[4])
    leaves = [v.requires_grad_() for v in leaves]

    def kernels():
        options = {"head_dim": P, "groups": groups, "chunk": CHUNK, "dt_limit": (0.01, 2.0), "backend": "mamba_ssm"}
        return [conv_scan_norm(*leaves, 1e-5, documents=documents, norm_before_gate=norm_before_gate, **options)]

    def ours():
        projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight = leaves
        z, xBC, dt = projected.split([H * P, width, H], -1)
        xBC = causal_conv_reference(xBC, conv_weight, conv_bias, documents, None, "silu")
        x, B, C = xBC.split([H * P, groups * N, groups * N], -1)
        dt = F.softplus(dt + dt_bias).clamp(0.01, 2.0)
        x, B, C = x.unflatten(-1, (H, P)), B.unflatten(-1, (groups, N)), C.unflatten(-1, (groups, N))
        y = ssd(x, dt, A, B, C, D=D, documents=documents, backend="torch")[0].flatten(2)
        if norm_before_gate:
            return [rms_norm_reference(y, norm_weight, 1e-5, groups) * F.silu(z)]
        return [rms_norm_reference(y * F.silu(z), norm_weight, 1e-5, groups)]

    assert_same(outputs_and_gradients(ours, leaves), outputs_and_gradients(kernels, leaves), 10 * WITHIN)


@pytest.mark.parametrize("carried", [False, True])
def test_listing_of_the_paper(carried):
    """Mamba-2's `ssd_minimal_discrete` in float64, which has heads for groups."""
    minimal = mamba_ssm("mamba_ssm.modules.ssd_minimal").ssd_minimal_discrete
    x, dt, A, B, C, _, state = (v.detach().double().requires_grad_() for v in inputs(32, 2))
    leaves = [x, dt, A, B, C, state] if carried else [x, dt, A, B, C]
    first = state if carried else None

    def theirs():
        return minimal(x * dt[..., None], A * dt, B, C, 8, None if first is None else first[:, None])

    def ours():
        return ssd(x, dt, A, B, C, initial_state=first, return_state=True, backend="torch")

    assert_same(outputs_and_gradients(ours, leaves), outputs_and_gradients(theirs, leaves), 1e-10)


def test_selective_scan(monkeypatch):
    """Our kernels against `selective_scan_ref`, which has neither documents nor a state to begin from."""
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", ModuleType("selective_scan_cuda"))
    reference = mamba_ssm("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
    x, dt, A, B, C, D, _ = inputs(19, 1, H=1, P=5, N=4)
    A = -torch.exp(leaf(5, 4, dtype=torch.float32).detach().to(DEVICE))
    dt = (dt.detach() * torch.tensor([0.1, 0.5, 1, 2, 3], device=DEVICE)).requires_grad_()
    x, B, C, A, D = (v.detach().requires_grad_() for v in (x[:, :, 0], B[:, :, 0], C[:, :, 0], A, D.expand(5)))
    leaves = [x, dt, A, B, C, D]

    def theirs():
        y, last = reference(*(v.transpose(1, 2) for v in (x, dt)), A, B.mT, C.mT, D, return_last_state=True)
        return y.transpose(1, 2), last

    want = outputs_and_gradients(theirs, leaves)
    assert_same(outputs_and_gradients(lambda: selective_scan_triton(*leaves), leaves), want, 1e-5)
