"""Routed experts against Hugging Face's Mixtral and Jamba blocks, written by others: weights copied, outputs and every
gradient compared."""

import pytest
import torch
from torch import Tensor, nn

from model.context import Context, Documents
from model.layers.base import Dims
from model.layers.moe import MoE, MoEConfig

D, E, HIDDEN = 24, 6, 20


def block(family: str) -> nn.Module:
    if family == "mixtral":
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(hidden_size=D, intermediate_size=HIDDEN, num_local_experts=E, num_experts_per_tok=2)
        return MixtralSparseMoeBlock(config)
    from transformers import JambaConfig
    from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock

    return JambaSparseMoeBlock(
        JambaConfig(hidden_size=D, intermediate_size=HIDDEN, num_experts=E, num_experts_per_tok=2)
    )


@pytest.mark.parametrize("family", ["mixtral", "jamba"])
def test_outputs_and_gradients(family: str):
    """Mixtral lets the two weights add up to 1, Jamba takes the probabilities as they are."""
    theirs, generator = block(family), torch.Generator().manual_seed(0)
    ours = MoE(MoEConfig(E, HIDDEN, top_k=2, renormalise=family == "mixtral"), Dims(D, 1))
    router = theirs.gate if family == "mixtral" else theirs.router
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = [
        (ours.router.weight, router.weight),
        (ours.up.weight, theirs.experts.gate_up_proj),
        (ours.down.weight, theirs.experts.down_proj),
    ]
    with torch.no_grad():
        for mine, other in pairs:
            other.normal_(std=0.3, generator=generator)
            mine.copy_(other.view(mine.shape))
    x = torch.randn(2, 17, D, generator=generator)
    functional = torch.randn(x.shape, generator=generator)
    ctx = Context(Documents.from_starts(torch.zeros(2, 17, dtype=torch.bool)))
    results: list[list[Tensor]] = []
    for run, weights in ((lambda v: ours(v, ctx).y, [p[0] for p in pairs]), (theirs, [p[1] for p in pairs])):
        v = x.clone().requires_grad_()
        y = run(v)
        results.append([y, *torch.autograd.grad(y, [v, *weights], functional)])
    for mine, other in zip(*results, strict=True):
        assert (mine - other.view(mine.shape)).abs().max() <= 1e-4 * max(1.0, other.abs().max().item())
