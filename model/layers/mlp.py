"""The feed-forward layer: gated (SwiGLU, arXiv 2002.05202) or plain, with SiLU, GELU, ReLU or squared ReLU.

gated:  y = W_down (act(W_gate x) * W_up x)        plain:  y = W_down act(W_up x)
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.context import Context, LayerOutput
from model.layers.base import Costs, Dims, Message, Projection, VisibleKeys, projection_spec, require
from model.ops.norm import relu2, swiglu
from model.params import Block, ParamSpec, Table, allocate_table, split_evenly

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


def activate(name: Activation, x: Tensor) -> Tensor:
    """The activation of that name, elementwise, in x's dtype."""
    if name == "relu2":
        return relu2(x)
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
    return F.silu(x) if name == "silu" else F.relu(x)


@dataclass(frozen=True)
class MLPConfig:
    """d_hidden: hidden width. activation: "silu", "gelu" (exact), "gelu_tanh" (its tanh form), "relu" or "relu2"
    (squared ReLU). gated: multiply the activated gate with a second projection."""

    d_hidden: int
    activation: Activation = "silu"
    gated: bool = True
    kind: Literal["mlp"] = "mlp"
    residual: ClassVar[str] = "add"
    parallel: ClassVar[tuple[str, ...]] = ("tensor", "context")

    def check(self, d_model: int) -> None:
        require(self.d_hidden > 0, "d_hidden", self.d_hidden, "a positive width")
        known = get_args(Activation)
        require(self.activation in known, "activation", repr(self.activation), f"one of {', '.join(known)}")

    def table(self, dims: Dims) -> Table:
        hidden = split_evenly(0, self.d_hidden)
        names = ("gate", "up") if self.gated else ("up",)
        blocks = tuple(Block(name, self.d_hidden, hidden) for name in names)
        rows = len(blocks) * self.d_hidden
        return {
            "up.weight": ParamSpec((rows, dims.d_model), dims.matrix(dims.d_model), blocks=blocks),
            "down.weight": projection_spec(
                dims, dims.d_model, self.d_hidden, output=True, split=split_evenly(1, self.d_hidden)
            ),
        }

    def costs(self, dims: Dims, length: int, keys: VisibleKeys) -> Costs:
        matrices = 3 if self.gated else 2
        return Costs(
            flops=2 * matrices * dims.d_model * self.d_hidden,
            saved_compute=dims.d_model + matrices * self.d_hidden,
            saved_float32=0,
            state_bytes=0,
        )

    def messages(self, dims: Dims) -> list[Message]:
        return []

    def build(self, dims: Dims, device: torch.device | str | None = None) -> nn.Module:
        return MLP(self, dims, device)


class MLP(nn.Module):
    def __init__(self, config: MLPConfig, dims: Dims, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        self.up, self.down = Projection(), Projection()
        allocate_table(self, config.table(dims), device, dims.place)

    def forward(self, x: Tensor, ctx: Context, state: None = None) -> LayerOutput:
        return LayerOutput(self.down(self._activate(self.up(x))))

    def _activate(self, h: Tensor) -> Tensor:
        name = self.config.activation
        if not self.config.gated:
            return activate(name, h)
        gate, up = h.chunk(2, dim=-1)
        return swiglu(gate, up) if name == "silu" else activate(name, gate) * up
