"""The recipe of model/README.md, followed: a new layer kind is one config with its module, and one union member."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.context import Context, LayerOutput
from model.hybrid import HybridLM, initialise_model, model_table
from model.layers.base import Costs, Dims, Message, Projection, VisibleKeys, projection_spec
from model.layers.mlp import MLPConfig
from model.params import Constant, ParamSpec, Table, allocate_table, split_evenly
from tests.contracts.examples import tokens_and_starts


@dataclass(frozen=True)
class DecayedMeanConfig:
    """y_t = W (a y_{t-1} + (1 - a) x_t), restarted at documents, with one learned decay; reports and penalises it."""

    penalty: float = 0.1
    kind: Literal["decayed_mean"] = "decayed_mean"
    residual: ClassVar[str] = "add"
    parallel: ClassVar[tuple[str, ...]] = ()

    def check(self, d_model: int) -> None:
        assert d_model > 0

    def table(self, dims: Dims) -> Table:
        return {
            "decay": ParamSpec((1,), Constant(0.0), decay=False, update="vector"),
            "out.weight": projection_spec(dims, dims.d_model, dims.d_model, output=True, split=split_evenly(1, 1)),
        }

    def costs(self, dims: Dims, length: int, keys: VisibleKeys) -> Costs:
        return Costs(2 * dims.d_model**2, 2 * dims.d_model, 0, 4 * dims.d_model)

    def messages(self, dims: Dims) -> list[Message]:
        return []

    def build(self, dims: Dims, device: torch.device | str | None = None) -> nn.Module:
        return DecayedMean(self, dims, device)


class DecayedMean(nn.Module):
    decay: nn.Parameter

    def __init__(self, config: DecayedMeanConfig, dims: Dims, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.penalty = config.penalty
        self.out = Projection()
        allocate_table(self, config.table(dims), device)

    def forward(self, x: Tensor, ctx: Context, state: tuple[Tensor] | None = None) -> LayerOutput:
        a = torch.sigmoid(self.decay)
        mean = torch.zeros_like(x[:, 0]) if state is None else state[0]
        rows = []
        for t in range(x.shape[1]):
            mean = torch.where(ctx.documents.starts[:, t, None], 0.0, mean)
            mean = a * mean + (1 - a) * x[:, t]
            rows.append(mean)
        y = self.out(torch.stack(rows, dim=1))
        losses = {"decay_penalty": self.penalty * a.sum() * x.shape[0] * x.shape[1]}
        return LayerOutput(y, (mean,) if ctx.carry else None, losses, {"decay": a.detach().mean()})


def test_a_new_kind_trains_decodes_and_reports() -> None:
    """Nothing but the config class was added: the stack, the table, the losses and decoding pick it up."""
    config = ModelConfig(50, 16, "(A-)x2", {"A": DecayedMeanConfig(), "-": MLPConfig(24)})
    assert "blocks.2.mixer.out.weight" in model_table(config)
    model = HybridLM(config)
    initialise_model(model, seed=0)
    tokens, starts = tokens_and_starts([7, 9], vocab_size=50)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    totals = []
    for _ in range(20):
        out = model(tokens, starts, tokens)
        loss = (out.nll.sum() + sum(out.losses.values())) / tokens.numel()
        assert set(out.losses) == {"decay_penalty"}
        assert set(out.metrics) == {"layers.0.decay", "layers.2.decay"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < 0.7 * totals[0]
    full = model(tokens, starts).logits
    first = model(tokens[:, :10], starts[:, :10], carry=True)
    rest = model(tokens[:, 10:], starts[:, 10:], state=first.state).logits
    assert torch.allclose(rest, full[:, 10:], atol=1e-5)
