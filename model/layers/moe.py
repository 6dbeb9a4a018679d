"""Mixture of experts: each token goes to its top-k of E feed-forward experts (Switch, arXiv 2101.03961; MoE-Mamba,
arXiv 2401.04081; Mixtral, arXiv 2401.04088; shared experts, arXiv 2401.06066).

    s = softmax(W_r x) or sigmoid(W_r x)        chosen: the k largest of s + b        w = s of the chosen (renormalised)
    y = sum over the chosen e of w_e Expert_e(x)  +  Shared(x)

The router is float32 throughout. Nothing is dropped unless `capacity_factor` says so. Then an expert takes, of each
document in a row of T tokens, at most ceil(capacity_factor k T / E) choices in the order of (token, choice): a later
token never displaces an earlier one, nor one document another's. With scope = "batch" the limit is counted over all
rows of the micro-batch, as published, and documents share it. A dropped choice adds nothing (the residual passes).
Decoding and evaluation drop nothing.

Balance: an auxiliary loss weight E sum_e f_e P_e, with f the fraction of choices and P the mean probability of expert
e, per row or over the micro-batch; a z-loss (ST-MoE, arXiv 2202.08906); and, without any loss, a bias b on the choice
that moves by `bias_rate` towards the mean load after each optimizer step (arXiv 2408.15664), from global counts.

On context ranks T is the length of whole rows: capacity and balance count what the other ranks' tokens chose, too.

Legend: B batch rows, T tokens, n = B T, D width, E experts, k choices a token, F hidden width of an expert.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.context import Collectives, Context, LayerOutput
from model.layers.base import Costs, Dims, Message, Projection, VisibleKeys, require
from model.layers.mlp import Activation, MLPConfig, activate
from model.ops.grouped import grouped_matmul
from model.ops.norm import swiglu
from model.params import Block, Constant, ParamSpec, Table, allocate_table, split_evenly

Scope = Literal["row", "batch"]
Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class MoEConfig:
    """n_experts: E. top_k: k. d_hidden: F. activation, gated: of the experts, as an MLP's. shared_hidden: width of the
    MLP that every token goes through besides, 0 for none. capacity_factor: none drops nothing. scope: what capacity and
    balance loss count over. balance_weight, z_weight: of the losses. bias_rate: step of the balancing bias, 0 for no
    bias. score: of the router. renormalise: the weights of the chosen add up to 1. route_scale: factor of them."""

    n_experts: int
    d_hidden: int
    top_k: int = 1
    activation: Activation = "silu"
    gated: bool = True
    shared_hidden: int = 0
    capacity_factor: float | None = None
    scope: Scope = "row"
    balance_weight: float = 0.0
    z_weight: float = 0.0
    bias_rate: float = 0.0
    score: Score = "softmax"
    renormalise: bool = False
    route_scale: float = 1.0
    kind: Literal["moe"] = "moe"
    residual: ClassVar[str] = "add"
    parallel: ClassVar[tuple[str, ...]] = ("tensor", "context", "expert")
    routed: ClassVar[bool] = True

    def check(self, d_model: int) -> None:
        require(self.n_experts > 0, "n_experts", self.n_experts, "a positive number")
        require(0 < self.top_k <= self.n_experts, "top_k", self.top_k, f"1 to n_experts={self.n_experts}")
        require(self.d_hidden > 0, "d_hidden", self.d_hidden, "a positive width")
        require(self.shared_hidden >= 0, "shared_hidden", self.shared_hidden, "a width, or 0 for no shared expert")
        factor = self.capacity_factor
        require(factor is None or factor > 0, "capacity_factor", factor, "a positive number, or none to drop nothing")
        for key in ("balance_weight", "z_weight", "bias_rate"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        require(self.route_scale > 0, "route_scale", self.route_scale, "a positive factor")
        for key, kinds in (("activation", Activation), ("scope", Scope), ("score", Score)):
            known = get_args(kinds)
            require(getattr(self, key) in known, key, repr(getattr(self, key)), f"one of {', '.join(known)}")

    @property
    def shares(self) -> str | None:
        """What documents share in training, in words; None when they share nothing."""
        if self.scope == "batch" and self.capacity_factor is not None:
            return "the capacity of experts, counted over a rank's micro-batch"
        return None

    @property
    def shared(self) -> MLPConfig | None:
        return MLPConfig(self.shared_hidden, self.activation, self.gated) if self.shared_hidden else None

    def table(self, dims: Dims) -> Table:
        D, E, hidden = dims.d_model, self.n_experts, self.d_hidden
        names, used = ("gate", "up") if self.gated else ("up",), self.top_k / E
        rows, columns = split_evenly(0, hidden), split_evenly(1, hidden)
        ups = tuple(Block(f"{name} {e}", hidden, rows) for e in range(E) for name in names)
        table = {
            "router.weight": ParamSpec((E, D), dims.matrix(D), comm_dtype=torch.float32),
            "up.weight": ParamSpec((len(ups) * hidden, D), dims.matrix(D), blocks=ups, used=used, experts=E),
            "down.weight": ParamSpec(
                (E * D, hidden),
                dims.matrix(hidden, output=True),
                blocks=tuple(Block(f"down {e}", D, columns) for e in range(E)),
                used=used,
                experts=E,
            ),
        }
        if self.bias_rate:
            table["bias"] = ParamSpec((E,), Constant(0.0), decay=False, update="vector", frozen=True)
        if self.shared is not None:
            table |= {f"shared.{name}": spec for name, spec in self.shared.table(dims).items()}
        return table

    def costs(self, dims: Dims, length: int, keys: VisibleKeys) -> Costs:
        D, k, matrices = dims.d_model, self.top_k, 3 if self.gated else 2
        shared = None if self.shared is None else self.shared.costs(dims, length, keys)
        return Costs(
            flops=2 * D * self.n_experts + 2 * k * matrices * D * self.d_hidden + (shared.flops if shared else 0),
            saved_compute=D + k * (2 * D + matrices * self.d_hidden) + (shared.saved_compute - D if shared else 0),
            saved_float32=D + 2 * self.n_experts,
            state_bytes=0,
        )

    def messages(self, dims: Dims) -> list[Message]:
        E, per_row = self.n_experts, self.scope == "row"
        messages = [Message("at_experts", self.top_k * dims.d_model, ahead=E)]  # where none is dropped
        if self.balance_weight:
            messages.append(Message("gather_over_context", E, per="row" if per_row else "batch", dtype="int64"))
        if self.capacity_factor is not None:
            running = Message("prefix", E + 1) if per_row else Message("gather_over_context", E)
            messages.append(replace(running, per="row", dtype="int64"))
        return messages

    def build(self, dims: Dims, device: torch.device | str | None = None) -> nn.Module:
        return MoE(self, dims, device)


class MoE(nn.Module):
    bias: nn.Parameter | None

    def __init__(self, config: MoEConfig, dims: Dims, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        self.router, self.up, self.down = Projection(wide=True), Experts(), Experts()
        self.register_parameter("bias", None)
        self.shared = None if config.shared is None else config.shared.build(dims)
        allocate_table(self, config.table(dims), device, dims.place)

    def forward(self, x: Tensor, ctx: Context, state: None = None) -> LayerOutput:
        cfg, (B, T, D) = self.config, x.shape
        flat = x.flatten(0, 1)
        logits = self.router(flat.float() if flat.dtype != torch.float64 else flat)
        scores = logits.softmax(-1) if cfg.score == "softmax" else logits.sigmoid()
        chosen = (scores if self.bias is None else scores + self.bias).topk(cfg.top_k, dim=-1).indices  # (n, k)
        weights = scores.gather(1, chosen)
        if cfg.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        kept = self._kept(chosen.view(B, T, -1), ctx)
        y = self._experts(flat, weights * cfg.route_scale, chosen, kept, ctx.mesh).view(B, T, D)
        if self.shared is not None:
            y = y + self.shared(x, ctx).y
        load = F.one_hot(chosen, cfg.n_experts).sum(1)  # (n, E)
        losses = self._losses(logits, scores, load, ctx)
        counts = {"load": load.sum(0).double()}
        if kept is not None:
            counts["dropped"] = (~kept).sum().double()
        return LayerOutput(y, losses=losses, counts=counts)

    def _kept(self, chosen: Tensor, ctx: Context) -> Tensor | None:
        """(n, k) bool, False for choices beyond an expert's capacity; None where nothing can be dropped."""
        cfg, (B, T, k) = self.config, chosen.shape
        if cfg.capacity_factor is None or ctx.carry or not self.training:
            return None
        rows = B if cfg.scope == "batch" else 1
        length = ctx.row if ctx.spread else T
        limit = math.ceil(cfg.capacity_factor * k * length * rows / cfg.n_experts)
        own = F.one_hot(chosen.reshape(B, T * k), cfg.n_experts)  # (B, T k, E), in the order of (token, choice)
        if cfg.scope == "batch":
            before = _count_in_batch(own, ctx)
        else:
            before = _count_in_documents(own, ctx.documents.index.repeat_interleave(k, 1), ctx)
        place = (before * own).sum(-1)  # 1 for the first choice of its expert
        return (place <= limit).view(B * T, k)

    def _experts(self, x: Tensor, weights: Tensor, chosen: Tensor, kept: Tensor | None, mesh: Collectives) -> Tensor:
        """Sum of the weighted outputs of the chosen experts: rows sorted by expert, transformed on the rank that has
        theirs, put back where they came from. Sorting is stable and nothing is added in any order, so results are
        deterministic."""
        cfg, (n, k) = self.config, chosen.shape
        expert = chosen.flatten()
        if kept is not None:
            expert = torch.where(kept.flatten(), expert, cfg.n_experts)  # the dropped lie at the end, in no group
        order = expert.argsort(stable=True)
        counts = torch.bincount(expert, minlength=cfg.n_experts + 1)[: cfg.n_experts]
        out = mesh.at_experts(x[order // k], counts, self._transform)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(n * k, device=order.device))
        return (out[back].view(n, k, -1) * weights[..., None].to(out.dtype)).sum(1)

    def _transform(self, x: Tensor, counts: Tensor) -> Tensor:
        """The experts of this rank, each on its rows: x (n, D) sorted by expert, counts (experts held,)."""
        cfg, h = self.config, self.up(x, counts)
        if cfg.gated:
            gate, up = h.chunk(2, dim=-1)
            h = swiglu(gate, up) if cfg.activation == "silu" else activate(cfg.activation, gate) * up
        else:
            h = activate(cfg.activation, h)
        return self.down(h, counts)

    def _losses(self, logits: Tensor, scores: Tensor, load: Tensor, ctx: Context) -> dict[str, Tensor]:
        """Per token of the micro-batch, summed over its tokens. Context ranks have the f of whole rows, and of P what
        their tokens add to it: what they return adds up to the loss of the rows."""
        cfg, losses = self.config, {}
        E, rows = cfg.n_experts, ctx.documents.starts.shape[0]
        if cfg.balance_weight:
            parts = rows if cfg.scope == "row" else 1
            tokens = (ctx.row if ctx.spread else ctx.documents.starts.shape[1]) * rows // parts
            share = scores if cfg.score == "softmax" else scores / scores.sum(-1, keepdim=True)
            f = _over_context(load.view(parts, -1, E).sum(1), ctx).to(share.dtype) / (tokens * cfg.top_k)
            P = share.view(parts, -1, E).sum(1) / tokens
            losses["balance"] = cfg.balance_weight * E * (f * P).sum() * tokens
        if cfg.z_weight:
            losses["router_z"] = cfg.z_weight * logits.logsumexp(-1).square().sum()
        return losses

    def summarise(self, counts: dict[str, Tensor]) -> dict[str, Any]:
        """expert_load: of each expert, 1 is its even share. load_max: the largest. dropped: fraction of choices."""
        load = counts["load"] / counts["load"].mean()
        found = {"expert_load": [round(value, 4) for value in load.tolist()], "load_max": load.max().item()}
        if "dropped" in counts:
            found["dropped"] = (counts["dropped"] / counts["load"].sum()).item()
        return found

    def adjust(self, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """After an optimizer step: what to add to which parameter, given the step's counts over all ranks."""
        if self.bias is None:
            return {}
        load = counts["load"]
        return {"bias": self.config.bias_rate * torch.sign(load.mean() - load).float()}


class Experts(Projection):
    """A projection per expert, called as a module so that ZeRO-3 can gather its weight (E O, I)."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:  # type: ignore[override]
        return grouped_matmul(x, self.weight.to(x.dtype).unflatten(0, (len(counts), -1)), counts)


def _count_in_documents(own: Tensor, index: Tensor, ctx: Context) -> Tensor:
    """Running sum of own (B, S, E) that starts anew where index (B, S) does; that of a document which begins on a
    context rank to the left goes on here."""
    total = own.cumsum(1)
    first = torch.searchsorted(index.contiguous(), index.contiguous())  # where the token's document begins
    before = torch.cat([torch.zeros_like(total[:, :1]), total], 1)
    count = total - before.gather(1, first[..., None].expand_as(total))
    if ctx.spread:
        goes_on = (index[:, -1:] == 0).to(count.dtype)
        entering = ctx.mesh.prefix(goes_on, count[:, -1])
        count = count + torch.where((index == 0)[..., None], entering[:, None], 0)
    return count


def _count_in_batch(own: Tensor, ctx: Context) -> Tensor:
    """Running sum of own (B, S, E) over rows, one after the other, of which a context rank has a chunk each."""
    count = own.cumsum(1)
    chunks = ctx.mesh.gather_over_context(count[:, -1])  # (context ranks, B, E)
    rows = chunks.sum(0)
    before = rows.cumsum(0) - rows + chunks[: ctx.mesh.context_rank].sum(0)
    return count + before[:, None]


def _over_context(count: Tensor, ctx: Context) -> Tensor:
    return ctx.mesh.gather_over_context(count).sum(0) if ctx.spread else count
