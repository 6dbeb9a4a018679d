"""Blocks of the stack: a norm, one layer or several parallel ones, and the residual; and their place in the stack.

    one layer           y = x + layer(norm(x))                  or the layer alone, for kinds with their own residual
    parallel branches   y = x + sum_i g_i branch_i(norm(x))     one norm for all; the gates g_i are learned, or 1

Legend: B batch rows, T tokens, D width.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.context import Context, LayerOutput
from model.layers.base import Dims, LayerKind, norm_spec
from model.ops.norm import rms_norm
from model.params import Constant, ParamSpec, Table, allocate_table


class Norm(nn.Module):
    """RMSNorm with float32 statistics."""

    weight: nn.Parameter

    def __init__(self, dims: Dims, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.eps = dims.norm_eps
        allocate_table(self, {"weight": norm_spec(dims.d_model)}, device)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return rms_norm(x, self.weight, self.eps, dtype=dtype)


class Block(nn.Module):
    """`x + layer(norm(x))`, or the layer alone for kinds that bring their own residual."""

    def __init__(self, kind: LayerKind, dims: Dims, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.norm = Norm(dims, device) if kind.residual == "add" else None
        self.mixer = kind.build(dims, device)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> LayerOutput:
        if self.norm is None:
            out = self.mixer(x, ctx=ctx, state=state)
            return out._replace(counts=_prefixed("mixer.", out.counts))
        out = self.mixer(ctx.enter(self.norm(x, dtype=ctx.dtype)), ctx=ctx, state=state)
        return out._replace(y=x + ctx.mesh.leave(out.y), counts=_prefixed("mixer.", out.counts))


class Branch(nn.Module):
    """One of the parallel layers of a block. gate: initial value of a learned factor of its output, None for none."""

    gate: nn.Parameter | None

    def __init__(
        self, kind: LayerKind, dims: Dims, gate: float | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.mixer = kind.build(dims, device)
        self.register_parameter("gate", None)
        allocate_table(self, _gate_table(gate), device)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> LayerOutput:
        out = self.mixer(x, ctx=ctx, state=state)
        return out if self.gate is None else out._replace(y=(self.gate * out.y).to(out.y.dtype))


class ParallelBlock(nn.Module):
    """`x + sum of branches(norm(x))`. Its state is a tuple of theirs, its metrics are named `branches.0.NAME`."""

    def __init__(
        self,
        kinds: Sequence[LayerKind],
        gates: Sequence[float | None],
        dims: Dims,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.norm = Norm(dims, device)
        self.branches = nn.ModuleList(Branch(k, dims, gate, device) for k, gate in zip(kinds, gates, strict=True))

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> LayerOutput:
        h, total = ctx.enter(self.norm(x, dtype=ctx.dtype)), None
        states: list[Any] = []
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        for index, branch in enumerate(self.branches):
            before = None if state is None else state[index]
            out = branch(h, ctx=ctx.at(ctx.layer + index), state=before)
            total = out.y.to(x.dtype) if total is None else total + out.y
            states.append(out.state)
            losses = add_losses(losses, out.losses)
            metrics |= _prefixed(f"branches.{index}.", out.metrics)
            counts |= _prefixed(f"branches.{index}.mixer.", out.counts)
        assert total is not None, "a block has branches"
        y = x + ctx.mesh.leave(total)
        return LayerOutput(y, tuple(states) if ctx.carry else None, losses, metrics, counts)


class Blocks(nn.Module):
    """The blocks in the order of the stack. A block that stands at several places is registered at the first of them
    only: its parameters have one name.

    places: for each place of the stack, the place whose block stands there.
    """

    def __init__(self, blocks: Mapping[int, nn.Module], places: Sequence[int]) -> None:
        super().__init__()
        self.places = tuple(places)
        for place, block in blocks.items():
            self.add_module(str(place), block)

    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(str(self.places[index]))

    def __iter__(self) -> Iterator[nn.Module]:
        return map(self.__getitem__, range(len(self)))

    def __len__(self) -> int:
        return len(self.places)


def build_block(
    kinds: Sequence[LayerKind],
    gates: Sequence[float | None],
    dims: Dims,
    device: torch.device | str | None = None,
) -> nn.Module:
    """The block of one layer, or of parallel ones. gates: initial value of each layer's gate, None for none."""
    return Block(kinds[0], dims, device) if len(kinds) == 1 else ParallelBlock(kinds, gates, dims, device)


def block_table(kinds: Sequence[LayerKind], gates: Sequence[float | None], dims: Dims) -> Table:
    """The parameters of such a block, by their names in it."""
    table: dict[str, ParamSpec] = {}
    if kinds[0].residual == "add":
        table["norm.weight"] = norm_spec(dims.d_model)
    for index, (kind, gate) in enumerate(zip(kinds, gates, strict=True)):
        prefix = "" if len(kinds) == 1 else f"branches.{index}."
        table |= {prefix + name: spec for name, spec in _gate_table(gate).items()}
        table |= {f"{prefix}mixer.{name}": spec for name, spec in kind.table(dims).items()}
    return table


def _gate_table(gate: float | None) -> Table:
    return {} if gate is None else {"gate": ParamSpec((1,), Constant(gate), decay=False, update="vector")}


def _prefixed(prefix: str, values: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in (values or {}).items()}


def add_losses(total: dict[str, Tensor], more: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Losses, or counts, by name; those of one name are added."""
    for name, value in (more or {}).items():
        total = total | {name: total[name] + value if name in total else value}
    return total
