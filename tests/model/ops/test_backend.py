"""Choice of a backend: what is named is used or refused, never replaced."""

import pytest
import torch

from model.ops import backend
from model.ops.attention import BACKENDS as ATTENTION
from model.ops.backend import Backend, choose, chosen, request
from model.ops.conv import BACKENDS as CONV
from model.ops.ssd import BACKENDS as SSD
from model.ops.ssd import ssd
from tests.model.ops.support import leaf

CPU = {"dtype": torch.float32, "device": torch.device("cpu")}
TWO = (
    Backend("fancy", frozenset({"documents"}), frozenset({torch.bfloat16}), module="no_such_package", device="cuda"),
    Backend("plain", frozenset({"documents", "state"})),
)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(backend, "_requested", {})
    monkeypatch.setattr(backend, "_chosen", {})


def test_auto_takes_the_first_that_can():
    """A missing package is passed over under auto, and the choice is reported."""
    assert choose("op", TWO, needs=["documents"], **CPU).name == "plain"
    assert chosen() == {"op": "plain"}


@pytest.mark.parametrize(
    ("name", "needs", "says"),
    [
        ("fancy", [], "no_such_package"),
        ("other", [], "use auto or one of fancy, plain"),
        ("plain", ["windows"], "it has no windows"),
        ("auto", ["windows"], "no backend here can do windows"),
    ],
)
def test_a_named_backend_is_never_replaced(name, needs, says):
    """Missing, unknown or unable: one clear line instead of another backend."""
    with pytest.raises(ValueError, match=says):
        choose("op", TWO, name, needs=needs, **CPU)


def test_request_sets_the_process_default():
    """A recipe's choice reaches the ops without being passed through the layers."""
    request({"ssd": "mamba_ssm"})
    x, b = leaf(1, 2, 1, 2, dtype=torch.float32), leaf(1, 2, 1, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match="mamba_ssm"):
        ssd(x, torch.ones(1, 2, 1), -torch.ones(1), b, b)


@pytest.mark.parametrize("backends", [SSD, CONV, ATTENTION])
def test_plain_torch_can_do_everything(backends):
    """Whatever a fused kernel can do, the plain path can: a machine without kernels refuses nothing."""
    plain = next(b for b in backends if b.name == "torch")
    assert all(b.can <= plain.can for b in backends)
    assert plain.available()
