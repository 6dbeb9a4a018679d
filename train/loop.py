"""The training loop. `train()` is the whole cadence: step, record, validate, save, stop."""

import math
import time
from typing import Any, cast

import torch
from torch import Tensor

from data.stream import Batch, combine, row_digests
from eval.perplexity import Perplexity, chosen_documents, compressed, evaluate
from model.block import add_losses
from model.context import Documents, NoiseKey
from model.hybrid import HybridLM, ModelOutput, forward_flops
from train.config import Recipe
from train.counter import SETTLED, count_traffic
from train.health import clip_coefficient
from train.run import Run, open_run
from train.stop import EXIT_DONE, EXIT_STOPPED


def train(recipe: Recipe) -> int:
    """Trains the run of `recipe`, or resumes it where it stopped. Returns the exit code.

    Raises ValueError (one clear line) for a user's mistake, TrainingHealthError when updates stay non-finite.
    """
    with open_run(recipe) as run:
        while not run.finished:
            start = run.stream.sample
            record = train_step(run) if run.steps != SETTLED - 1 else counted_step(run)
            run.metrics.step(record)
            run.announce_backends()
            run.check_saved()
            if run.spiked(record["loss"], start):
                continue
            stopping = run.stop_asked()
            if (run.finished or run.due(recipe.evaluation.every_tokens)) and not stopping:
                validate(run)
            if stopping or run.finished or run.due(recipe.checkpoints.every_tokens):
                run.save()
            if stopping and not run.finished:
                run.settle_saved()
                run.metrics.say(f"stopped after step {run.clock.step} and saved; the same command resumes")
                return EXIT_STOPPED
        run.settle_saved()
        if not run.reported:
            finish(run)
    return EXIT_DONE


def counted_step(run: Run) -> dict[str, Any]:
    """`train_step`, noting what rank 0 sends in it, where there are ranks to send to."""
    if run.mesh.size == 1:
        return train_step(run)
    with count_traffic(run.mesh, run.engine.hpz) as sent:
        record = train_step(run)
    flops = record["mfu"] * run.peak.flops * record["seconds"]
    run.metrics.event("traffic", step=run.clock.step, ranks=run.mesh.size, bytes=sent.bytes, flops=flops)
    return record


def train_step(run: Run) -> dict[str, Any]:
    """One optimizer step on the next global batch; returns its line of `metrics.jsonl`.

    The gradient is that of the sum over all valid tokens divided by their global count, whatever the number of ranks
    and micro-batches. A non-finite gradient norm skips the update on every rank.
    """
    begin = time.perf_counter()
    batches = run.stream.next_step()
    valid = run.mesh.sum(sum(batch.valid for batch in batches) if run.mesh.tells_rows else 0)
    means, counts = accumulate(run, batches, max(valid, 1))
    rate, norm, updated = update(run)
    model = cast(HybridLM, run.engine.module)
    if updated:
        run.engine.add(model.adjustments(counts))
    run.clock.step += 1
    run.steps += 1
    run.clock.tokens += run.tokens_per_step
    mine = row_digests(batches) if run.mesh.tells_rows else []
    digests = [digest for rank in run.mesh.gather(mine) for digest in rank]
    seconds = time.perf_counter() - begin
    speed = run.tokens_per_step / seconds
    return {
        "step": run.clock.step,
        "tokens": run.clock.tokens,
        "loss": means.pop("loss"),
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens_per_s": speed,
        "mfu": 3 * mean_forward_flops(run, batches) * speed / (run.peak.flops * run.mesh.size),
        "batch_hash": combine(digests),
        "updated": updated,
        "valid_tokens": int(valid),
        "seconds": seconds,
        **means,
        **model.summaries(counts),
    }


def accumulate(run: Run, batches: list[Batch], valid: float) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Adds up the gradients of all micro-batches; returns the loss and auxiliary losses per valid token with the
    layers' metrics averaged over micro-batches, and the layers' counts; all over all ranks."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        run.watch.progress(f"step {run.clock.step + 1}")
        out = forward(run, batch)
        assert out.nll is not None
        # Tensor ranks have the same tokens: each has all of the loss, whose gradient it shares with the others, and all
        # of the layers' own losses, whose gradient it has for itself.
        loss = out.nll.sum() + sum(out.losses.values()) / run.mesh.tensor.size
        run.engine.backward(loss / valid, last=index == len(batches) - 1)
        sums = {"loss": out.nll.detach().double().sum(), **out.losses}
        shares = {name: value / (len(batches) * run.mesh.shard.size) for name, value in out.metrics.items()}
        for name, value in ({name: value / valid for name, value in sums.items()} | shares).items():
            totals[name] = totals.get(name, 0.0) + value.detach().double()
        counts = add_losses(counts, out.counts)
    together = list((totals | counts).values())
    own = torch.cat([value.double().flatten() for value in together])
    summed = run.mesh.tell(own if run.mesh.tells_tokens else torch.zeros_like(own))
    parts = summed.split([value.numel() for value in together])
    means = {name: part.item() for name, part in zip(totals, parts, strict=False)}
    return means, dict(zip(counts, parts[len(totals) :], strict=True))


def update(run: Run) -> tuple[float, float, bool]:
    """Steps the optimizer unless the gradient is not finite; returns learning rate, gradient norm, whether it did."""
    training, step = run.recipe.training, run.clock.step + 1
    middle = run.clock.tokens + run.tokens_per_step / 2
    rate = run.recipe.optimizer.learning_rate * run.recipe.schedule.factor(middle, training.tokens)
    norm = run.health.norm(run.engine)
    if not math.isfinite(norm):
        run.metrics.event("update_skipped", step=step, grad_norm=str(norm))
    updated = run.health.admit(norm, step)
    if updated:
        run.engine.apply(rate, clip_coefficient(norm, training.clip_norm))
    else:
        run.engine.discard()
    return rate, norm, updated


def forward(run: Run, batch: Batch) -> ModelOutput:
    """The model on one micro-batch, on this rank's device."""
    device = run.mesh.device
    noise = NoiseKey(run.recipe.seed, run.clock.step, batch.samples)
    tokens, starts, targets = (x.to(device, non_blocking=True) for x in (batch.tokens, batch.starts, batch.targets))
    return run.engine(tokens, starts, targets, clock=run.clock.tokens, noise=noise)


def mean_forward_flops(run: Run, batches: list[Batch]) -> float:
    """Model FLOPs per token of a forward pass over this rank's rows, with the keys that their documents really show."""
    positions = torch.cat([Documents.from_starts(batch.starts).positions for batch in batches])

    def keys(window: int | None) -> float:
        visible = positions + 1
        return (visible if window is None else visible.clamp(max=window)).double().mean().item()

    return forward_flops(run.recipe.model, run.recipe.training.sequence_length, keys)


@torch.no_grad()
def validate(run: Run) -> Perplexity:
    """Loss and bits per byte of the held-out documents, the same on every number of ranks."""

    def nll(batch: Batch) -> Tensor:
        run.watch.progress(f"validation at step {run.clock.step}")
        out = forward(run, batch)
        assert out.nll is not None
        return run.mesh.whole_rows(out.nll, batch.tokens.shape[1])

    run.engine.module.eval()
    result = evaluate(
        nll,
        run.data.validation,
        sequence_length=run.recipe.training.sequence_length,
        rows=run.recipe.training.micro_batch_rows,
        max_tokens=run.recipe.evaluation.max_tokens,
        rank=run.mesh.data.rank,
        size=run.mesh.data.size,
        all_reduce=run.mesh.sum_over_data,
    )
    run.engine.module.train()
    clock, bits = run.clock, result.bits_per_byte
    run.validated = clock.step, result
    run.metrics.event("validation", step=clock.step, tokens=clock.tokens, loss=result.loss, bits_per_byte=bits)
    run.metrics.say(f"step {clock.step}: validation loss {result.loss:.4f}, {bits:.3f} bits per byte")
    return result


def finish(run: Run) -> None:
    """The last validation, beside what general compressors make of the same text."""
    run.metrics.close_bar()
    result = run.validation or validate(run)
    if not run.mesh.main:
        return
    shards = run.data.validation
    yardstick = compressed(shards, chosen_documents(shards, run.recipe.evaluation.max_tokens))
    zlib, xz = yardstick.zlib_bits_per_byte, yardstick.xz_bits_per_byte
    run.metrics.event(
        "finished",
        step=run.clock.step,
        loss=result.loss,
        bits_per_byte=result.bits_per_byte,
        zlib_bits_per_byte=zlib,
        xz_bits_per_byte=xz,
    )
    run.metrics.say(
        f"held-out text, {result.documents} documents of {result.bytes:,} bytes: {result.bits_per_byte:.3f} bits per "
        f"byte; zlib -9 needs {zlib:.3f}, xz -9 {xz:.3f}"
    )
