"""Every layer kind where weights are sharded: ZeRO-3 gathers a weight when its module is called, and only then."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.hybrid import HybridLM, Precision, initialise_model
from model.layers.base import Projection
from model.ops.backend import request
from model.ops.native import native_ready
from tests.contracts.examples import D_MODEL, EXAMPLES, braid, shake, tokens_and_starts
from tests.ranks import run_ranks
from train.optim import AdamWConfig

LETTERS = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", EXAMPLES.values(), strict=False))
ROWS, HALF = 4, 2


class Guarded(Projection):
    """A projection that gives its weight to nobody but itself."""

    called = False

    def __getattr__(self, name: str) -> Any:
        assert name != "weight" or self.called, "a projection's weight was read from outside"
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        self.called = True
        try:
            return super().forward(x)
        finally:
            self.called = False


@pytest.mark.parametrize("name", EXAMPLES)
def test_projections_are_called_as_modules(name: str):
    """A fused call that takes a projection's weight, on any backend, would get an empty tensor under ZeRO-3; in
    training, recomputed or not, and in decoding."""
    model = braid(EXAMPLES[name])
    guarded = [module for module in model.modules() if type(module) is Projection]
    for module in guarded:
        module.__class__ = Guarded
    tokens, starts = tokens_and_starts([5, 7])
    for model.recompute in (False, True):
        model(tokens, starts, tokens.roll(-1, 1)).nll.sum().backward()
    with torch.no_grad():
        state = model(tokens, starts, carry=True).state
        model(tokens[:, :1], torch.zeros_like(starts[:, :1]), state=state, carry=True)
    with pytest.raises(AssertionError, match="from outside"):
        guarded[0].weight.sum()


def all_kinds(recompute: str = "") -> HybridLM:
    """All examples in one stack."""
    assert len(LETTERS) == len(EXAMPLES), "more examples than letters: take more letters"
    config = ModelConfig(vocab_size=61, d_model=D_MODEL, pattern="".join(LETTERS), layers=LETTERS)
    model = HybridLM(config, recompute=recompute)
    initialise_model(model, seed=1)
    shake(model, seed=1)
    return model


def even_kinds(recompute: str = "") -> HybridLM:
    """What can run in bfloat16 by the loops of `linear`, which save the parameter itself for the backward."""
    names = ("mamba2", "mamba2 beside an mlp", "attention", "swiglu", "squared relu")
    layers = {letter: EXAMPLES[name] for letter, name in zip("ABCDE", names, strict=True)}
    config = ModelConfig(vocab_size=64, d_model=D_MODEL, pattern="ABCDE", layers=layers)
    request({"linear": "native"})
    model = HybridLM(config, Precision(compute=torch.bfloat16), recompute=recompute and "AC")
    initialise_model(model, seed=1)
    shake(model, seed=1)
    return model


def loss_of(call: Any, rows: slice) -> Tensor:
    tokens, starts = tokens_and_starts([9, 8], rows=ROWS)
    out = call(tokens[rows], starts[rows], tokens.roll(-1, 1)[rows])
    return (out.nll.sum() + sum(out.losses.values())) / tokens.numel()


def gradients_when_sharded(build: Callable[..., HybridLM]) -> tuple[float, list[tuple[str, int, int, Tensor]]]:
    """This rank's share of the loss and the gradients that it owns, with no weight kept whole. Every other block is
    recomputed: its weights are gathered once more."""
    from train.engine import Engine, ZeroOptions
    from train.parallel import open_mesh

    with open_mesh("cpu", timeout_s=60) as mesh:
        model = build(recompute="".join([*LETTERS][::2]))
        optimizer, options = AdamWConfig(learning_rate=1e-3), ZeroOptions(persistent=0, prefetch=2000)
        engine = Engine(model, model.table(), optimizer, zero_stage=3, mesh=mesh, options=options)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        loss = loss_of(engine, slice(mesh.rank * HALF, (mesh.rank + 1) * HALF))
        engine.backward(loss, last=True)
        gradients = [(g.name, g.start, g.stop, g.value.clone()) for g in engine.gradients()]
        engine.close()
        return loss.item(), gradients


@pytest.fixture
def any_backend() -> Iterator[None]:
    yield
    request({})


@pytest.mark.parametrize("build", [all_kinds, even_kinds])
def test_every_kind_trains_with_no_weight_at_hand(build: Callable[..., HybridLM], any_backend: None):
    """Loss and every gradient of all layer kinds on two ranks under ZeRO-3 are those of one process with whole
    weights."""
    if build is even_kinds and not native_ready():
        pytest.skip("no C++ compiler, so no loops in C++")
    model = build()
    total = sum(loss_of(model, slice(first, first + HALF)) for first in (0, HALF))
    total.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    ranks = run_ranks(gradients_when_sharded, 2, build)
    assert sum(loss for loss, _ in ranks) == pytest.approx(total.item(), rel=1e-5)
    seen = dict.fromkeys(wanted, 0)
    for name, start, stop, value in (gradient for _, gradients in ranks for gradient in gradients):
        expected = wanted[name].view(-1)[start:stop]
        assert (value - expected).abs().max() <= 1e-5 * max(1.0, wanted[name].abs().max().item()), name
        seen[name] += stop - start
    assert seen == {name: gradient.numel() for name, gradient in wanted.items()}
