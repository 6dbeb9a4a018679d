"""Choice of a backend: what is named is used or refused, never replaced."""

import pytest
import torch

from model.ops import backend
from model.ops.backend import Backend, choose, chosen, declare, request
from model.ops.ssd import ssd
from model.registry import KINDS  # noqa: F401  (its layers declare every op)
from tests.model.ops.support import leaf

CPU = {"dtype": torch.float32, "device": torch.device("cpu")}
TWO = (
    Backend("fancy", frozenset({"documents"}), frozenset({torch.bfloat16}), module="no_such_package", device="cuda"),
    Backend("plain", frozenset({"documents", "state"})),
)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(backend, "_declared", backend._declared | {"op": TWO})
    monkeypatch.setattr(backend, "_requested", {})
    monkeypatch.setattr(backend, "_chosen", {})


def test_auto_takes_the_first_that_can():
    """A missing package is passed over under auto, and the choice is reported."""
    assert choose("op", needs=["documents"], **CPU).name == "plain"
    assert chosen() == {"op": "plain"}


@pytest.mark.parametrize(
    ("name", "needs", "says"),
    [
        ("fancy", [], "no_such_package"),
        ("other", [], "got 'other', wants auto or one of fancy, plain"),
        ("plain", ["windows"], "it has no windows"),
        ("auto", ["windows"], "no backend here can do windows"),
    ],
)
def test_a_named_backend_is_never_replaced(name, needs, says):
    """Missing, unknown or unable: one clear line instead of another backend."""
    with pytest.raises(ValueError, match=says):
        choose("op", name, needs=needs, **CPU)


def test_request_sets_the_process_default():
    """A recipe's choice reaches the ops without being passed through the layers."""
    request({"ssd": "mamba_ssm"})
    x, b = leaf(1, 2, 1, 2, dtype=torch.float32), leaf(1, 2, 1, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match="mamba_ssm"):
        ssd(x, torch.ones(1, 2, 1), -torch.ones(1), b, b)


@pytest.mark.parametrize(
    ("backends", "says"),
    [
        ({"sdd": "torch"}, r"backends\.sdd: got 'torch' for an unknown op, wants one of activation, attention, conv"),
        ({"conv": "torch", "ssd": "cuda"}, r"backends\.ssd: got 'cuda', wants auto or one of mamba_ssm, native, torch"),
    ],
)
def test_request_knows_every_name(backends, says):
    """A misspelt op or backend is refused before anything runs, and nothing is set; a package that is missing here is
    no misspelling."""
    with pytest.raises(ValueError, match=says):
        request(backends)
    assert backend._requested == {}
    request({"attention": "flash_attn", "ssd": "auto", "op": "fancy"})


def test_an_op_is_declared_once():
    """Two files that claim one op would overwrite each other's backends."""
    with pytest.raises(AssertionError, match="op is declared twice"):
        declare("op", *TWO)


@pytest.mark.parametrize("op", ["ssd", "conv", "attention"])
def test_plain_torch_can_do_everything(op):
    """Whatever a fused kernel can do, the plain path can: a machine without kernels refuses nothing."""
    backends = backend._declared[op]
    plain = next(b for b in backends if b.name == "torch")
    assert all(b.can <= plain.can for b in backends)
    assert plain.available()
