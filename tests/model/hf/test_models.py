"""Whole models of transformers and ours with the same weights: logits and the gradients of all weights, in float32.

What breaks if one fails: a published checkpoint would not mean the same here, or a recipe would train another model
than the one that it is named after.
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from model.hybrid import HybridLM
from model.params import count_parameters
from tests.model.hf.definers import Definer, V, padded
from tests.model.hf.experts import WITH_EXPERTS
from tests.model.hf.families import FAMILIES

transformers = pytest.importorskip("transformers", reason="the models to compare with are transformers'")

ROWS, LENGTH = 2, 27
TOLERANCE = 1e-4
"""Relative to the largest value where that exceeds 1."""


def settle(model: nn.Module) -> nn.Module:
    """Weights of ordinary size everywhere, so that no part of the model is as good as absent."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("A_log"):
                weight.copy_(0.5 * noise)
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                weight.copy_(noise - 1)
            elif weight.dim() > 1:
                weight.copy_(noise / weight.shape[-1] ** 0.5)
            else:
                weight.add_(0.2 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


def assert_close(ours: Tensor, theirs: Tensor, name: str) -> None:
    largest = theirs.abs().max().item()
    worst = (ours - theirs).abs().max().item()
    assert worst <= TOLERANCE * max(1.0, largest), f"{name}: off by {worst:.2e} where the largest is {largest:.2e}"


@pytest.mark.skipif(
    importlib.util.find_spec("mamba_ssm") is not None,
    reason="mamba_ssm is installed, whose kernels transformers would call with tensors of the CPU",
)
@pytest.mark.parametrize("family", FAMILIES | WITH_EXPERTS)
def test_logits_and_gradients_are_those_of_transformers(family: str):
    definer: Definer = (FAMILIES | WITH_EXPERTS)[family]()
    torch.manual_seed(0)
    theirs = settle(definer.make(transformers)).train()
    tokens = torch.randint(1, V, (ROWS, LENGTH + 1))  # 0 is their padding, whose embedding takes no gradient
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    starts = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    starts[:, 0] = True
    weights = dict(theirs.named_parameters())

    logits = theirs(input_ids=tokens, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    expected = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    ours = HybridLM(definer.config, device="meta")
    tied = definer.config.tie_embeddings
    parts = definer.weights(weights | dict(theirs.named_buffers()))
    assert {name: tuple(w.shape) for name, w in parts.items()} == {n: s.shape for n, s in ours.table().items()}
    trained = {name: spec for name, spec in ours.table().items() if not spec.frozen}
    assert count_parameters(trained) == sum(weight.numel() for weight in weights.values())
    found = functional_call(ours, padded(parts, tied), (tokens, starts))
    assert_close(found.logits, logits, "logits")
    nll = functional_call(ours, padded(parts, tied), (tokens, starts, targets)).nll.sum()
    for name, gradient in zip(weights, torch.autograd.grad(nll, list(weights.values())), strict=True):
        assert expected[name].abs().max() > 1e-3, f"{name}: no gradient to speak of, nothing would be compared"
        assert_close(gradient, expected[name], name)
