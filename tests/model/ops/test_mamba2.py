"""What stands between the projections of Mamba-2, in one op, against the equations of its parts in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from model.ops.conv import causal_conv, causal_conv_reference
from model.ops.mamba2 import conv_scan_norm
from model.ops.native import native_ready
from model.ops.norm import gated_rms_norm, rms_norm_reference
from model.ops.ssd import ssd, ssd_reference
from tests.model.ops.support import assert_same, leaf, outputs_and_gradients, packed

B, T, H, P, N, K = 2, 70, 4, 6, 5, 4

pytestmark = pytest.mark.skipif(not native_ready(), reason="no C++ compiler, so no loops in C++")


def drawn(groups: int, bias: bool, dtype: torch.dtype) -> list:
    """projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight."""
    width = H * P + 2 * groups * N
    shapes = [(B, T, H * P + width + H), (width, K), (width,), (H,), (H,), (H,), (H * P,)]
    leaves: list = [leaf(*shape, dtype=torch.float32, seed=i).detach() for i, shape in enumerate(shapes)]
    leaves[0] = leaves[0].to(dtype)
    leaves[4] = -torch.exp(leaves[4])
    if not bias:
        leaves[2] = None
    return leaves


def run(call, values, dtype=None):
    leaves = [None if v is None else v.to(dtype or v.dtype).requires_grad_() for v in values]
    return outputs_and_gradients(lambda: [call(*leaves)], [v for v in leaves if v is not None])


def composed(conv, scan, norm, groups, documents, dt_limit, norm_before_gate):
    """The op, of these of its parts."""

    def call(projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight):
        channels = [H * P, groups * N, groups * N]
        z, xBC, dt = projected.split([H * P, sum(channels), H], -1)
        x, Bm, C = conv(xBC, conv_weight, conv_bias, documents).split(channels, -1)
        x, Bm, C = x.unflatten(-1, (H, P)), Bm.unflatten(-1, (groups, N)), C.unflatten(-1, (groups, N))
        dt = F.softplus(dt.to(dt_bias.dtype) + dt_bias)
        dt = dt if dt_limit is None else dt.clamp(*dt_limit)
        y = scan(x, dt, A, Bm, C, D=D, documents=documents)[0].flatten(2)
        return norm(y, z, norm_weight, 1e-5, groups, norm_before_gate)

    return call


def native(groups, documents, dt_limit, norm_before_gate):
    options = {"head_dim": P, "groups": groups, "chunk": 16, "dt_limit": dt_limit, "backend": "native"}
    options |= {"norm_before_gate": norm_before_gate, "documents": documents}
    return lambda *leaves: conv_scan_norm(*leaves, 1e-5, **options)


def reference_norm(y, z, weight, eps, groups, norm_before_gate):
    if norm_before_gate:
        return rms_norm_reference(y, weight, eps, groups) * F.silu(z)
    return rms_norm_reference(y * F.silu(z), weight, eps, groups)


cases = pytest.mark.parametrize(
    ("groups", "lengths", "dt_limit", "norm_before_gate", "bias"),
    [
        (1, None, None, False, True),
        (2, ([5, 30, 1, 34], [64, 6]), (0.4, 1.2), True, True),
        (4, ([70], [3, 67]), (0.0, 1.0), False, False),
    ],
)


@cases
def test_native_equals_the_equations(groups, lengths, dt_limit, norm_before_gate, bias):
    """The output and the gradients of the projection and of every weight."""
    documents = None if lengths is None else packed(*lengths)
    values, options = drawn(groups, bias, torch.float32), (groups, documents, dt_limit, norm_before_gate)
    conv = partial(causal_conv_reference, activation="silu")
    want = run(composed(conv, ssd_reference, reference_norm, *options), values, torch.float64)
    assert_same(run(native(*options), values), [v.float() for v in want], 1e-5)


@cases
def test_native_is_its_parts_in_bfloat16(groups, lengths, dt_limit, norm_before_gate, bias):
    """The same loops: nothing differs but where a gradient was rounded once more on its way."""
    documents = None if lengths is None else packed(*lengths)
    values, options = drawn(groups, bias, torch.bfloat16), (groups, documents, dt_limit, norm_before_gate)

    def conv(x, weight, bias, documents):
        return causal_conv(x, weight, bias, documents=documents, activation="silu")[0]

    def norm(y, z, weight, eps, groups, norm_before_gate):
        return gated_rms_norm(y, z, weight, eps, groups, norm_before_gate=norm_before_gate)

    want = run(composed(conv, ssd, norm, *options), values)
    got = run(native(*options), values)
    assert [v.dtype for v in got] == [torch.bfloat16, torch.bfloat16, *[torch.float32] * (len(got) - 2)]
    assert torch.equal(got[0], want[0])
    assert_same(got, want, 1e-2)
