"""Every layer kind on a CUDA device: with the kernels that are there, the same model as on the CPU."""

import pytest
import torch

from model.hybrid import HybridLM, Precision
from model.registry import LayerConfig
from tests.contracts.examples import EXAMPLES, braid, tokens_and_starts

pytestmark = pytest.mark.gpu

kinds = pytest.mark.parametrize("layer", EXAMPLES.values(), ids=EXAMPLES.keys())
LENGTHS = [9, 13, 7, 40]
WITHIN = 1e-2
"""Of the norm: products of float32 matrices round to TF32 in some kernels, and two layers add up."""


def gradients(model: HybridLM, device: str) -> dict[str, torch.Tensor]:
    """Of every parameter, and the loss."""
    tokens, starts = tokens_and_starts(LENGTHS)
    out = model.to(device)(tokens.to(device), starts.to(device), tokens.roll(-1, 1).to(device))
    (out.nll.mean() + sum(out.losses.values())).backward()
    found = {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.requires_grad}
    return found | {"loss": out.nll.detach().cpu().double()}


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_loss_and_gradients_are_those_of_the_cpu(layer: LayerConfig, dtype: torch.dtype) -> None:
    """Packed documents; in bfloat16 finite, and near the float32 ones where no router rounds to another expert."""
    want = gradients(braid(layer), "cpu")
    model = braid(layer)
    model.precision = Precision(dtype)
    got = gradients(model, "cuda")
    for name, value in want.items():
        assert got[name].isfinite().all(), name
        if dtype == torch.float32 or (name == "loss" and not getattr(layer, "routed", False)):
            error = (got[name] - value).norm() / value.norm().clamp(min=1e-4)
            assert error <= (WITHIN if dtype == torch.float32 else 5 * WITHIN), f"{name} differs by {error:.1e}"


@kinds
def test_prefill_and_steps_equal_the_full_forward(layer: LayerConfig) -> None:
    """Carried state, one token at a time and several, on the device."""
    model = braid(layer).cuda().eval()
    tokens, starts = (x.cuda() for x in tokens_and_starts([20, 12]))
    with torch.no_grad():
        want = model(tokens, starts).logits
        parts, state = [], None
        for span in (slice(0, 18), *(slice(t, t + 1) for t in range(18, 28)), slice(28, 32)):
            out = model(tokens[:, span], starts[:, span], state=state, carry=True)
            parts.append(out.logits)
            state = out.state
    assert (torch.cat(parts, 1) - want).norm() <= WITHIN * want.norm()
