"""Both sides of a training row: our `train_step` on a recipe's model, and a Hugging Face model of the same shape.

A reading is tokens per second over whole steps: forward, backward, gradient norm, clipping, optimizer. Both sides get
the same packed rows and must learn: a reading whose loss has not fallen since the first step is an error.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import nn

from launch.bench.packed import PackedRows
from launch.bench.row import Reading, Side
from model.config import ModelConfig
from model.hybrid import HybridLM, forward_flops, initialise_model
from model.layers.attention import AttentionConfig
from model.ops.backend import request
from train.config import Recipe
from train.engine import Engine
from train.hardware import Peak, device_peak
from train.health import Health
from train.loop import mean_forward_flops, train_step
from train.optim import build_optimizer, parameter_groups
from train.parallel import Mesh, choose_device, open_mesh
from train.run import Clock, Run

T = TypeVar("T")

PEER_TRIALS = 2
"""Steps in each precision, of which the fastest decides how the peer is run."""


class Unwatched:
    """Stands for the watch of a run: here nobody waits for another rank."""

    def progress(self, what: str) -> None:
        return None


@dataclass
class Bench:
    """What `train_step` reads of a Run; nothing of it is on disk."""

    recipe: Recipe
    mesh: Mesh
    stream: PackedRows
    engine: Engine
    health: Health
    peak: Peak
    clock: Clock
    watch: Unwatched
    steps: int = 0

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.training.tokens_per_step


def packed_rows(recipe: Recipe, rank: int = 0, size: int = 1) -> PackedRows:
    """The rows that both sides train on; of several data ranks, the share of one."""
    training = recipe.training
    share = training.rows_per_step // size
    rows = min(share, training.micro_batch_rows)
    return PackedRows(recipe.model.vocab_size, training.sequence_length, rows, share // rows, seed=rank)


@contextmanager
def opened(recipe: Recipe, mesh: Mesh, rows: PackedRows) -> Iterator[Run]:
    """What `train_step` wants of a run on this rank, whose rows are `rows`."""
    training = recipe.training
    request(training.backends)
    model = HybridLM(recipe.model, training.precision, recompute=training.checkpoint_blocks, mesh=mesh)
    initialise_model(model, recipe.seed)
    stage, placement = recipe.parallel.in_force(mesh.shard.size)
    engine = Engine(
        model,
        model.table(),
        recipe.optimizer,
        zero_stage=stage,
        mesh=mesh,
        reduce_dtype=training.reduction,
        options=recipe.parallel.buckets,
        placement=placement,
    )
    health = Health(model.table(), mesh, max_skipped=1)
    try:
        bench = Bench(recipe, mesh, rows, engine, health, device_peak(mesh.device), Clock(), Unwatched())
        yield cast(Run, bench)
    finally:
        engine.close()


def braid(recipe: Recipe, steps: int) -> Iterator[Reading]:
    """Our side: `steps` steps a reading."""
    tokens = recipe.training.tokens_per_step
    with open_mesh(recipe.parallel.device) as mesh, opened(recipe, mesh, packed_rows(recipe)) as run:
        pool = packed_rows(recipe)
        batches = [batch for _ in range(len(pool.samples) // pool.rows) for batch in pool.next_step()]
        facts = {
            "flops_per_token": 3 * mean_forward_flops(run, batches),
            "peak_flops": run.peak.flops,
            "parameters": sum(parameter.numel() for parameter in run.engine.module.parameters()),
        }
        yield from _readings(lambda: train_step(run)["loss"], steps, tokens, mesh.device, facts)


def braid_rank(rank: int, size: int, argument: tuple[Recipe, int]) -> Iterator[None]:
    """Our side on several ranks, for `launch.bench.together`: `steps` steps a round; the data ranks share the rows."""
    recipe, steps = argument
    mesh = Mesh(torch.device("cpu"), recipe.parallel.sizes)
    with opened(recipe, mesh, packed_rows(recipe, mesh.data.rank, mesh.data.size)) as run:
        first = train_step(run)["loss"]
        yield
        while True:
            losses = [train_step(run)["loss"] for _ in range(steps)]
            if losses[-1] >= first:
                raise RuntimeError(f"the loss went from {first:.3f} to {losses[-1]:.3f}: this model does not train")
            yield


def plain_loop(recipe: Recipe, steps: int) -> Iterator[Reading]:
    """The same model in a loop of plain torch: no engine, no mesh, no record."""
    training, device = recipe.training, choose_device(recipe.parallel.device)
    request(training.backends)
    model = HybridLM(recipe.model, training.precision, recompute=training.checkpoint_blocks, device=device)
    initialise_model(model, recipe.seed)
    groups = parameter_groups(model.named_parameters(), model.table(), recipe.optimizer.weight_decay)
    optimizer, rows = build_optimizer(recipe.optimizer, groups), packed_rows(recipe)

    def step() -> float:
        batches = rows.next_step()
        valid = sum(batch.valid for batch in batches)
        total = torch.zeros((), device=device)
        for batch in batches:
            out = model(batch.tokens.to(device), batch.starts.to(device), batch.targets.to(device))
            loss = out.nll.sum() / valid
            loss.backward()
            total += loss.detach()
        if training.clip_norm > 0:
            nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    length = training.sequence_length
    facts = {
        "flops_per_token": 3 * forward_flops(recipe.model, length, lambda window: (length + 1) / 2),
        "peak_flops": device_peak(device).flops,
        "precision": "ours",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    yield from _readings(step, steps, training.tokens_per_step, device, facts)


def hugging_face(recipe: Recipe, steps: int, build: Callable[[], nn.Module], peer: ModelConfig) -> Iterator[Reading]:
    """The peer's side, in the faster of two precisions: bf16 autocast over float32 weights, or bf16 weights.

    build: the model, in float32. peer: the same model as a config of ours, for its FLOPs.
    """
    device = choose_device(recipe.parallel.device)
    if device.type != "cuda":  # with mamba-ssm importable, transformers would take its CUDA kernels on the CPU too
        sys.modules["mamba_ssm"] = sys.modules["causal_conv1d"] = None  # type: ignore[assignment]
    trials = {}
    for precision in ("bf16 autocast", "bf16 weights"):
        step = peer_step(recipe, build(), precision, device)
        trials[precision] = min(_timed(step, device)[0] for _ in range(PEER_TRIALS))
        del step
        gc.collect()  # modules that know each other would hold the GPU's memory
    fastest = min(trials, key=lambda precision: trials[precision])
    model = build()
    length = recipe.training.sequence_length
    flops = forward_flops(peer, length, lambda window: (length + 1) / 2)
    facts = {
        "flops_per_token": 3 * flops,
        "peak_flops": device_peak(device).flops,
        "precision": fastest,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    step = peer_step(recipe, model, fastest, device)
    yield from _readings(step, steps, recipe.training.tokens_per_step, device, facts)


def without_windows(config: ModelConfig) -> ModelConfig:
    """The same model with full causal attention."""
    layers = {
        letter: replace(layer, window=None) if isinstance(layer, AttentionConfig) else layer
        for letter, layer in config.layers.items()
    }
    return replace(config, layers=layers)


def utilisation(ours: Side, peer: Side | None) -> dict[str, Any]:
    """MFU of both sides against one peak, the highest that either measured; the peer's precision; parameters."""
    sides = [ours] if peer is None else [ours, peer]
    peak = max(side.facts["peak_flops"] for side in sides)
    mfu, *peer_mfu = [side.value * side.facts["flops_per_token"] / peak for side in sides]
    return {
        "mfu": mfu,
        "peer_mfu": peer_mfu[0] if peer_mfu else None,
        "peer_precision": None if peer is None else peer.facts["precision"],
        "parameters": ours.facts["parameters"],
        "peer_parameters": None if peer is None else peer.facts["parameters"],
        **{
            name: side.facts["peak_gib"]
            for name, side in (("peak_gib", ours), ("peer_peak_gib", peer))
            if side is not None and "peak_gib" in side.facts
        },
    }


def peer_step(recipe: Recipe, model: nn.Module, precision: str, device: torch.device) -> Callable[[], float]:
    """One training step of the peer as a function that returns its loss."""
    model.to(device, torch.bfloat16 if precision == "bf16 weights" else torch.float32).train()
    config, clip_norm, rows = recipe.optimizer, recipe.training.clip_norm, packed_rows(recipe)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )

    def step() -> float:
        total = 0.0
        for batch in rows.next_step():
            tokens = batch.tokens.to(device)
            labels = tokens.masked_fill(batch.starts.to(device), -100)
            autocast = precision == "bf16 autocast"
            with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
                loss = model(input_ids=tokens, labels=labels, use_cache=False).loss / rows.micro_batches
            loss.backward()
            total += loss.item()
        if clip_norm > 0:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def _readings(
    step: Callable[[], float], steps: int, tokens: int, device: torch.device, facts: dict[str, Any]
) -> Iterator[Reading]:
    """On a GPU with the most memory that tensors took up since the model was made."""
    first: float | None = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    while True:
        seconds, losses = _timed(lambda: [step() for _ in range(steps)], device)
        if first is None:
            first = losses[0]
        elif losses[-1] >= first:
            raise RuntimeError(f"the loss went from {first:.3f} to {losses[-1]:.3f}: this model does not train")
        held = {"peak_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}
        yield Reading(steps * tokens / seconds, facts | held | {"first_loss": first, "last_loss": losses[-1]})


def _timed(action: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds that `action` took, and what it returned."""
    begin = time.perf_counter()
    result = action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin, result
