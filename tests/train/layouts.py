"""Tiny braids trained in any layout, and by plain torch on one process: what a layout must not change.

`run_layouts` is for `tests.ranks.run_ranks`: one set of processes goes through many layouts, because starting processes
takes longer than training. `reference` is the same training without engine, mesh or DeepSpeed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from model.config import ModelConfig
from model.context import NoiseKey, chunk_bounds
from model.hybrid import HybridLM, Precision, initialise_model, model_table
from model.layers.attention import AttentionConfig
from model.layers.mamba import MambaConfig
from model.layers.mamba2 import Mamba2Config
from model.layers.mlp import MLPConfig
from model.layers.moe import MoEConfig
from model.weights.fragments import fragments_of
from model.weights.manifest import Manifest
from model.weights.reader import Checkpoint
from model.weights.writer import write_rank_files
from train.checkpoint.capture import layouts, restore, saved_fragments, saved_shapes
from train.checkpoint.start import StartConfig, start_from
from train.engine import Engine, Placement, ZeroOptions
from train.health import Health, clip_coefficient
from train.layout import check_layout
from train.loop import accumulate
from train.optim import AdamWConfig, OptimizerConfig, build_optimizer, parameter_groups
from train.parallel import Mesh, Sizes, open_mesh

OPTIMIZER = AdamWConfig(learning_rate=1e-3, weight_decay=0.1, eps=1e-4)
"""With 1e-8 an element whose gradient is little but rounding would take a whole step in a random direction."""
SMALL = ZeroOptions(reduce_bucket=500, gather_bucket=500, prefetch=400, persistent=0, sub_group=500)
ROWS, LENGTH = 8, 25
CLIP = 0.5


@dataclass(frozen=True)
class Layout:
    """zero: stage. micro: rows of a micro-batch. Data ranks are what the world leaves."""

    zero: int = 0
    tensor: int = 1
    context: int = 1
    expert: int = 1
    micro: int = 1
    recompute: bool = False
    offload: bool = False
    overlap: bool = False
    hpz: int | None = None
    optimizer: OptimizerConfig = OPTIMIZER

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.tensor, self.context, self.expert)

    @property
    def placement(self) -> Placement:
        return Placement(self.offload, self.hpz, self.overlap or None)


def braid(pattern: str, groups: int = 2, kv_heads: int = 2, heads: int = 4, **more: Any) -> ModelConfig:
    """M: mamba2. m: mamba. *: full attention. W: window of 11. -: MLP. E: experts. S: experts with capacity, biased."""
    layers = {
        "M": Mamba2Config(head_dim=4, d_state=6, n_groups=groups, chunk=8),
        "m": MambaConfig(d_state=3, dt_rank=2, inner_norms=True),
        "*": AttentionConfig(n_heads=heads, n_kv_heads=kv_heads, head_dim=6, qk_norm=True),
        "W": AttentionConfig(n_heads=heads, n_kv_heads=kv_heads, head_dim=6, window=11, qkv_conv=3),
        "-": MLPConfig(d_hidden=18),
        "E": MoEConfig(n_experts=4, top_k=2, d_hidden=10, balance_weight=0.05, z_weight=0.01, shared_hidden=6),
        "S": MoEConfig(n_experts=4, top_k=1, d_hidden=10, capacity_factor=1.0, bias_rate=0.01, balance_weight=0.01),
    }
    used = {letter: layer for letter, layer in layers.items() if letter in pattern}
    return ModelConfig(vocab_size=61, d_model=16, pattern=pattern, layers=used, init_std=0.1, **more)


@dataclass(frozen=True)
class Rows:
    tokens: Tensor
    starts: Tensor
    targets: Tensor
    samples: Tensor

    def part(self, chosen: slice) -> "Rows":
        return Rows(self.tokens[chosen], self.starts[chosen], self.targets[chosen], self.samples[chosen])

    @property
    def valid(self) -> int:
        return int((self.targets != -100).sum())


def global_batch(step: int, vocabulary: int = 61, length: int = LENGTH) -> Rows:
    """Packed rows with documents that begin anywhere, and very unequal numbers of predicted tokens."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(vocabulary, (ROWS, length), generator=generator)
    targets = torch.randint(vocabulary, (ROWS, length), generator=generator)
    starts = torch.rand(ROWS, length, generator=generator) < 0.15
    starts[0] = False  # a document over all ranks
    for ranks in (2, 3, 4):  # documents that begin just where a context rank's chunk does
        starts[1, [chunk_bounds(length, rank, ranks)[0] for rank in range(ranks)]] = True
    starts[:, 0] = True
    targets[torch.rand(ROWS, length, generator=generator) < torch.arange(ROWS)[:, None] / ROWS] = -100
    return Rows(tokens, starts, targets, torch.arange(ROWS) + step * ROWS)


def unchanged(model: HybridLM) -> None:
    """The initial weights as they are drawn."""


def reference(
    config: ModelConfig,
    steps: int,
    precision: Precision = Precision(),
    micro: int = ROWS,
    chosen: OptimizerConfig = OPTIMIZER,
    prepare: Callable[[HybridLM], None] = unchanged,
) -> list[dict]:
    """What one process makes of it: loss, norm, gradients before clipping and weights after, of each step. prepare:
    changes initial weights."""
    model = HybridLM(config, precision)
    initialise_model(model, seed=0)
    prepare(model)
    initial = {name: p.detach()[: model.table()[name].shape[0]].clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(chosen, parameter_groups(model.named_parameters(), model.table(), 0.1))
    record = []
    for step in range(steps):
        batch, loss, counts = global_batch(step), 0.0, {}
        for start in range(0, ROWS, micro):
            rows = batch.part(slice(start, start + micro))
            out = model(rows.tokens, rows.starts, rows.targets, noise=NoiseKey(0, step, rows.samples))
            (sum(out.losses.values(), out.nll.sum()) / batch.valid).backward()
            loss += out.nll.sum().item() / batch.valid
            counts = {name: counts.get(name, 0) + value for name, value in out.counts.items()}
        table = model.table()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = {name: p.grad[: table[name].shape[0]].clone() for name, p in trained.items()}
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        for p in trained.values():
            p.grad *= min(1.0, CLIP / norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, delta in model.adjustments(counts).items():
                model.get_parameter(name).add_(delta)
        weights = {name: p.detach()[: table[name].shape[0]].clone() for name, p in model.named_parameters()}
        record.append({"loss": loss, "norm": norm, "gradients": gradients, "weights": weights, "initial": initial})
    return record


def run_layouts(
    cases: Sequence[tuple[ModelConfig, Layout, int]], precision: Precision = Precision()
) -> list[list[dict]]:
    """On one rank: every case, `(model, layout, steps)`, in turn. Gradients and weights are fragments, as checkpoints
    have them: each element of each logical tensor on one rank."""
    with open_mesh("cpu", timeout_s=60) as world:
        return [
            train_layout(Mesh(world.device, layout.sizes), config, layout, steps, precision)
            for config, layout, steps in cases
        ]


@dataclass(frozen=True)
class Leg:
    """Steps `[first, last)` of the training of a case. restore, save: folders of the checkpoints before and after.
    start: the checkpoint is another run's, whose weights and states this one begins with."""

    config: ModelConfig
    layout: Layout
    first: int
    last: int
    restore: Path | None = None
    save: Path | None = None
    start: bool = False


def run_legs(legs: Sequence[Leg]) -> list[dict[str, Any]]:
    """On one rank: the engine's whole state after each leg, weights and moments, as fragments; and what other tensor
    ranks hold a copy of."""
    with open_mesh("cpu", timeout_s=60) as world:
        return [run_leg(Mesh(world.device, leg.layout.sizes), leg) for leg in legs]


def run_leg(mesh: Mesh, leg: Leg) -> dict[str, Any]:
    engine = start_engine(mesh, leg.config, leg.layout)
    if leg.restore is not None:
        checkpoint = Checkpoint(leg.restore)
        if leg.start:
            start_from(engine, checkpoint, StartConfig(checkpoint=str(leg.restore)))
        else:
            restore(engine, checkpoint)
        checkpoint.close()
    for step in range(leg.first, leg.last):
        train_one(engine, leg.layout, step)
    fragments = [(f.kind, f.tensor, f.box, f.start, value.clone()) for f, value in saved_fragments(engine)]
    if leg.save is not None:
        leg.save.mkdir(exist_ok=True)
        records = mesh.gather(write_rank_files(leg.save, mesh.rank, saved_fragments(engine)))
        if mesh.main:
            Manifest.from_records(chain(*records), saved_shapes(engine), {}).save(leg.save)
        mesh.barrier()
    with engine.gathered() as weights:
        copies = [
            (name, piece.box, weights[name].flatten()[piece.offset : piece.offset + piece.numel].clone())
            for name, layout in layouts(engine).items()
            for piece in layout.pieces
            if piece.copies > 1
        ]
    engine.close()
    return {"fragments": fragments, "copies": copies}


def start_engine(
    mesh: Mesh,
    config: ModelConfig,
    layout: Layout,
    precision: Precision = Precision(),
    prepare: Callable[[HybridLM], None] = unchanged,
    **more: Any,
) -> Engine:
    """more: for `Engine`."""

    check_layout(config, layout.sizes, sequence_length=LENGTH, zero_stage=layout.zero)
    model = HybridLM(config, precision, recompute=layout.recompute, mesh=mesh)
    initialise_model(model, seed=0)
    prepare(model)
    settings = {"options": SMALL, "placement": layout.placement} | more
    return Engine(model, model.table(), layout.optimizer, zero_stage=layout.zero, mesh=mesh, **settings)


def logical(engine: Engine, parts) -> list[tuple[str, Any, int, Tensor]]:
    """Ranges of local tensors as fragments of logical ones."""
    placed = layouts(engine)
    return [
        (fragment.tensor, fragment.box, fragment.start, value[low - start : high - start].clone())
        for name, start, stop, value in parts
        for fragment, low, high in fragments_of(name, "", placed[name], start, stop)
    ]


def owned_weights(engine: Engine) -> list[tuple[str, Any, int, Tensor]]:
    return logical(engine, ((o.name, o.start, o.stop, o.values["weight"]) for o in engine.owned()))


def train_one(engine: Engine, layout: Layout, step: int, length: int = LENGTH) -> dict[str, Any]:
    """One step by the loop's own parts; its loss, norm and gradients before clipping."""

    mesh, model = engine.mesh, engine.module
    batch, share = global_batch(step, length=length), ROWS // mesh.data.size
    mine = batch.part(slice(mesh.data.rank * share, (mesh.data.rank + 1) * share))
    micros = [mine.part(slice(start, start + layout.micro)) for start in range(0, share, layout.micro)]
    run = SimpleNamespace(
        engine=engine,
        mesh=mesh,
        recipe=SimpleNamespace(seed=0),
        clock=SimpleNamespace(step=step, tokens=0),
        watch=SimpleNamespace(progress=lambda what: None),
    )
    means, counts = accumulate(cast(Any, run), cast(Any, micros), batch.valid)
    gradients = logical(engine, engine.gradients())
    norm = Health(engine.table, mesh, max_skipped=1).norm(engine)
    assert math.isfinite(norm)
    engine.apply(layout.optimizer.learning_rate, clip_coefficient(norm, CLIP))
    engine.add(model.adjustments(counts))
    return {"loss": means["loss"], "norm": norm, "gradients": gradients}


def train_layout(
    mesh: Mesh,
    config: ModelConfig,
    layout: Layout,
    steps: int,
    precision: Precision,
    prepare: Callable[[HybridLM], None] = unchanged,
) -> list[dict]:
    engine = start_engine(mesh, config, layout, precision, prepare)
    initial = owned_weights(engine)
    record = [train_one(engine, layout, step) | {"weights": owned_weights(engine)} for step in range(steps)]
    record[0]["initial"] = initial
    engine.close()
    return record


def assembled(like: dict[str, Tensor], fragments: Sequence[tuple[str, Any, int, Tensor]]) -> dict[str, Tensor]:
    """Logical tensors from the fragments of all ranks, each element given once."""
    whole = {name: torch.full_like(value, math.nan) for name, value in like.items()}
    for name, box, start, value in fragments:
        view = whole[name][tuple(slice(low, high) for low, high in box)]
        flat = view.flatten()
        assert flat[start : start + value.numel()].isnan().all(), f"{name}: given twice"
        flat[start : start + value.numel()] = value
        view.copy_(flat.view(view.shape))
    assert not any(value.isnan().any() for value in whole.values()), "some elements belong to no rank"
    return whole


def merged(config: ModelConfig, ranks: Sequence[dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """Kind -> logical tensors, from what all ranks save."""
    kinds: dict[str, dict[str, Tensor]] = {}
    for kind, name in dict.fromkeys((f[0], f[1]) for rank in ranks for f in rank["fragments"]):
        if kind != "scalar":
            kinds.setdefault(kind, {})[name] = torch.empty(model_table(config)[name].shape)
    return {
        kind: assembled(like, [f[1:] for rank in ranks for f in rank["fragments"] if f[0] == kind])
        for kind, like in kinds.items()
    }


def differences(expected: list[dict], ranks: list[list[dict]]) -> dict[str, float]:
    """Largest differences from the reference, relative to each tensor's largest number: of the first step's loss, norm
    and gradients, and of the weights after the last."""
    first, last = expected[0], expected[-1]
    found = {key: abs(ranks[0][0][key] / first[key] - 1) for key in ("loss", "norm")}
    for kind, step, wanted in (("gradients", 0, first), ("weights", -1, last)):
        whole = assembled(wanted[kind], [part for rank in ranks for part in rank[step][kind]])
        for name, value in wanted[kind].items():
            scale = max(value.abs().max().item(), 1e-30)
            found[f"{kind} {name}"] = (whole[name] - value).abs().max().item() / scale
    found["last loss"] = abs(ranks[0][-1]["loss"] / last["loss"] - 1)
    return found
