"""What every layer kind is: a frozen config that declares its parameters, costs and module, and the module's parts.

Legend: B batch rows, T tokens, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.context import Context
from model.ops.linear import linear
from model.params import WHOLE, Constant, Init, Normal, ParamSpec, Place, Split, Table, Uniform

VisibleKeys = Callable[[int | None], float]
"""`keys(window)`: mean number of keys that a query sees (itself included) under a window, None for no window."""


@dataclass(frozen=True)
class Dims:
    """What the stack tells a layer kind about itself.

    d_model: width. n_residuals: number of layers that add to the residual stream, parallel branches counted one by
    one. init_std: standard deviation of initial matrices, None for uniform in ±1/sqrt(fan_in). rescale_outputs: divide
    the initial output projections by sqrt(n_residuals). norm_eps: epsilon of every norm. place: this rank's part of the
    weights.
    """

    d_model: int
    n_residuals: int
    init_std: float | None = 0.02
    rescale_outputs: bool = True
    norm_eps: float = 1e-5
    place: Place = WHOLE

    def matrix(self, fan_in: int, output: bool = False) -> Init:
        """Initial values of a projection; `output` marks those that write to the residual stream."""
        scale = 1 / math.sqrt(self.n_residuals) if output and self.rescale_outputs else 1.0
        if self.init_std is None:
            bound = scale / math.sqrt(fan_in)
            return Uniform(-bound, bound)
        return Normal(self.init_std * scale)


@dataclass(frozen=True)
class Costs:
    """Costs of one layer.

    flops: model FLOPs per token, forward. saved_compute, saved_float32: elements per token, in the compute dtype and in
    float32, that the forward pass keeps for the backward pass (norm and residual stream aside). state_bytes: decoding
    state per row, given the window or context length it was asked for.
    """

    flops: float
    saved_compute: float
    saved_float32: float
    state_bytes: float

    def saved_bytes(self, compute_bytes: int) -> float:
        return self.saved_compute * compute_bytes + self.saved_float32 * 4


@dataclass(frozen=True)
class Message:
    """One thing that a layer asks of the `Collectives` in a forward pass; its gradient goes the same way back. What
    that weighs on the wire is the mesh's to say.

    ask: the method of `Collectives`. elements: numbers for each token, row or micro-batch of the rank, as `per` says.
    reach: tokens of a halo, to which `elements` belong. dtype: of the numbers; integers have no gradient. ahead: int64
    numbers of each micro-batch that go ahead, without a gradient.
    """

    ask: Literal["sum_over_tensor", "halo", "gather_over_context", "prefix", "at_experts"]
    elements: float
    per: Literal["token", "row", "batch"] = "token"
    reach: int | None = None
    dtype: Literal["compute", "float32", "int64"] = "compute"
    ahead: int = 0


class LayerKind(Protocol):
    """The config of a layer kind: a frozen dataclass. parallel: over which ranks, of "tensor", "context" and "expert",
    a layer of it may be spread besides data-parallel ones. `check` raises ValueError naming the field that is wrong.
    `messages`: all that a layer asks of other ranks in a forward pass, on the rank that `dims.place` names."""

    residual: ClassVar[str]
    parallel: ClassVar[tuple[str, ...]]

    @property
    def kind(self) -> str: ...

    def check(self, d_model: int) -> None: ...

    def table(self, dims: Dims) -> Table: ...

    def costs(self, dims: Dims, length: int, keys: VisibleKeys) -> Costs: ...

    def messages(self, dims: Dims) -> list[Message]: ...

    def build(self, dims: Dims, device: torch.device | str | None = None) -> nn.Module: ...


class Projection(nn.Module):
    """`y = x W^T` in the dtype of x; W: (out, in). Called as a module, so that ZeRO-3 can gather its weight.

    wide: it is always called with x in float32.
    """

    weight: nn.Parameter

    def __init__(self, wide: bool = False) -> None:
        super().__init__()
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def projection_spec(
    dims: Dims, rows: int, columns: int, *, output: bool = False, split: Split | None = None
) -> ParamSpec:
    """The spec of a plain projection (rows, columns)."""
    return ParamSpec((rows, columns), dims.matrix(columns, output), split=split)


def norm_spec(width: int, split: Split | None = None) -> ParamSpec:
    """The spec of a norm's weight (width,)."""
    return ParamSpec((width,), Constant(1.0), split=split, decay=False, update="vector")


def require(ok: bool, key: str, got: object, wants: str) -> None:
    """Raises ValueError naming the config key unless `ok`."""
    if not ok:
        raise ValueError(f"{key}: got {got}, wants {wants}")


def inputs_before(x: Tensor, taps: int, ctx: Context) -> Tensor | None:
    """The state of a convolution of x (B, T, C) with so many taps on a context rank: the inputs of the document that
    goes on, zeros for others, (B, taps-1, C). None where the rank has whole rows."""
    if not ctx.spread or taps == 1:
        return None
    left, length = ctx.before(x, taps - 1)
    slots = left.shape[1]
    own = torch.arange(slots, device=x.device) >= slots - length[:, None]
    return F.pad(torch.where(own[..., None], left, 0), (0, 0, taps - 1 - slots, 0))


def even_groups(leaders: int, units: int, place: Place) -> tuple[int, list[int] | None]:
    """How the leaders (heads) of a tensor rank find their units (groups, key/value heads) among those that it holds.

    Returns the number of units that it holds, and None where each serves equally many leaders, in order; else the
    unit's number, counted from the first that it holds, for each leader.
    """
    first, last = leaders * place.rank // place.size, leaders * (place.rank + 1) // place.size
    unit_of = [leader * units // leaders for leader in range(first, last)]
    start = unit_of[0]
    held = unit_of[-1] + 1 - start
    even = unit_of == [start + index * held // len(unit_of) for index in range(len(unit_of))]
    even = even and len(unit_of) % held == 0
    return held, None if even else [unit - start for unit in unit_of]
