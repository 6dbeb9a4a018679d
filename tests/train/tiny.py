"""A tiny model with everything that ZeRO can stumble over, and the training that every layout must reproduce.

Tied embedding and head (padded rows included), direct parameters of a module, a custom autograd Function that saves a
weight, odd sizes, recomputed blocks, a parameter that some steps or micro-batches do not use, a frozen parameter and a
buffer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.params import Constant, Normal, ParamSpec, Table, allocate_table, initialise
from train.engine import Engine, ZeroOptions
from train.health import Health
from train.optim import AdamWConfig, OptimizerConfig, build_optimizer, parameter_groups
from train.parallel import Mesh

VOCAB, WIDTH, INNER, LAYERS = 11, 6, 7, 2
OPTIMIZER = AdamWConfig(learning_rate=1e-2, weight_decay=0.1)
STEPS, ROWS, LENGTH = 5, 12, 5


class SavesWeight(torch.autograd.Function):
    """x W^T whose backward reads the saved weight, cast to the dtype of x in forward and backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.to(x.dtype).T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)


class Project(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Mixer(nn.Module):
    """Uses its own parameters directly, as Mamba-2 uses A_log."""

    def __init__(self) -> None:
        super().__init__()
        self.out = Project()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = SavesWeight.apply(x, self.weight)
        y = torch.tanh(y.float() * -torch.exp(self.A_log)).to(x.dtype)
        return {"y": x + self.out(y)}


class Embed(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Head(nn.Module):
    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = (x @ self.weight.to(x.dtype).T).float()[..., :VOCAB]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def tiny_table() -> Table:
    vector = {"decay": False, "update": "vector"}
    table = {
        "embedding.weight": ParamSpec((VOCAB, WIDTH), Normal(0.5), pad_rows=4, update="embedding"),
        "rare": ParamSpec((WIDTH,), Normal(0.5), comm_dtype=torch.float32, **vector),
        "fixed": ParamSpec((5,), Constant(0.5), frozen=True, **vector),
    }
    for index in range(LAYERS):
        table |= {
            f"blocks.{index}.weight": ParamSpec((INNER, WIDTH), Normal(0.5)),
            f"blocks.{index}.A_log": ParamSpec((INNER,), Normal(0.5), **vector),
            f"blocks.{index}.out.weight": ParamSpec((WIDTH, INNER), Normal(0.5)),
        }
    return table


class Tiny(nn.Module):
    def __init__(self, recompute: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.recompute, self.dtype = recompute, dtype
        self.embedding, self.head = Embed(), Head()
        self.blocks = nn.ModuleList(Mixer() for _ in range(LAYERS))
        table = tiny_table()
        allocate_table(self, table)
        for name, parameter in self.named_parameters():
            initialise(parameter, name, table[name], seed=0)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, tokens: Tensor, targets: Tensor, use_rare: bool = True) -> dict[str, Tensor]:
        x = self.embedding(tokens).to(self.dtype)
        if use_rare:
            x = x + self.rare.to(x.dtype)
        for block in self.blocks:
            out = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
            x = out["y"]
        return {"nll": self.head(x * self.fixed.sum().to(x.dtype), targets)}


@dataclass(frozen=True)
class Micro:
    """One micro-batch of one rank. valid: of the whole step. rare: whether it uses the rare parameter."""

    tokens: Tensor
    targets: Tensor
    valid: int
    rare: bool


def micro_batches(step: int, rank: int, size: int, accumulation: int) -> list[Micro]:
    """This rank's part of the global batch of a step, whose rows have very unequal numbers of valid tokens."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    targets = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    targets[torch.arange(LENGTH) > torch.arange(ROWS)[:, None] % LENGTH] = -100
    targets[: ROWS // 3] = -100
    valid = int((targets != -100).sum())
    mine = torch.arange(ROWS).view(accumulation, size, -1)[:, rank]
    unused = {1: accumulation - 1, 2: 0}.get(step) if accumulation > 1 else None
    uses = [step != 3 and number != unused for number in range(accumulation)]
    return [Micro(tokens[rows], targets[rows], valid, use) for rows, use in zip(mine, uses, strict=True)]


def learning_rate(step: int) -> float:
    return OPTIMIZER.learning_rate * (step + 1) / STEPS


def reference(
    accumulation: int,
    dtype: torch.dtype = torch.float32,
    skip: int | None = None,
    config: OptimizerConfig = OPTIMIZER,
) -> list[dict]:
    """The same training by plain torch on one process: gradients, norm and weights of each step."""
    model, table = Tiny(dtype=dtype), tiny_table()
    optimizer = build_optimizer(config, parameter_groups(model.named_parameters(), table, config.weight_decay))
    record = []
    for step in range(STEPS):
        for micro in micro_batches(step, 0, 1, accumulation):
            (model(micro.tokens, micro.targets, micro.rare)["nll"] / micro.valid).backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for parameter in trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = {name: p.grad.clone() for name, p in trained.items()}
        norm = math.sqrt(sum(g[:VOCAB].double().square().sum().item() for g in gradients.values()))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        if step != skip:
            optimizer.step()
        optimizer.zero_grad()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        record.append({"gradients": gradients, "norm": norm, "weights": weights})
    return record


def start_engine(
    mesh: Mesh,
    stage: int,
    *,
    persistent: int = 0,
    recompute: bool = False,
    dtype: torch.dtype = torch.float32,
    optimizer: OptimizerConfig = OPTIMIZER,
    **more,
) -> Engine:
    """The tiny model under a stage, with buckets so small that every way through DeepSpeed is taken."""
    options = ZeroOptions(reduce_bucket=60, gather_bucket=50, prefetch=40, persistent=persistent, sub_group=50)
    model = Tiny(recompute, dtype)
    return Engine(model, tiny_table(), optimizer, zero_stage=stage, mesh=mesh, options=options, **more)


def snapshot(engine: Engine) -> list[tuple[str, int, int, dict[str, Tensor]]]:
    return [(o.name, o.start, o.stop, {k: v.clone() for k, v in o.values.items()}) for o in engine.owned()]


def run_step(engine: Engine, step: int, accumulation: int, poison: bool = False) -> None:
    """Forward and backward of a step; `poison` makes the last rank's last loss NaN."""
    mesh = engine.mesh
    micros = micro_batches(step, mesh.rank, mesh.size, accumulation)
    for number, micro in enumerate(micros):
        last = number == len(micros) - 1
        call = engine.module if number % 2 else engine  # both ways of calling the model must do
        loss = call(micro.tokens.to(mesh.device), micro.targets.to(mesh.device), micro.rare)["nll"] / micro.valid
        engine.backward(loss * math.nan if poison and last and mesh.rank == mesh.size - 1 else loss, last)


def train_steps(engine: Engine, accumulation: int, poison: int | None = None) -> Iterator[dict]:
    """Trains as `reference` does, and records the same things. poison: the step with a NaN on one rank."""
    health = Health(tiny_table(), engine.mesh, max_skipped=2)
    for step in range(STEPS):
        before = snapshot(engine) if step == poison else None
        run_step(engine, step, accumulation, poison=step == poison)
        gradients = [(g.name, g.start, g.stop, g.value.clone()) for g in engine.gradients()]
        norm = health.norm(engine)
        admitted = health.admit(norm, step + 1)
        if admitted:
            engine.apply(learning_rate(step))
        else:
            engine.discard()
        with engine.gathered() as weights:
            weights = {name: weight.clone() for name, weight in weights.items()}
        yield {
            "gradients": gradients,
            "norm": norm,
            "weights": weights,
            "admitted": admitted,
            "before": before,
            "after": snapshot(engine) if before else None,
            "steps": engine.steps,
            "entered": len(engine._entered),
        }
