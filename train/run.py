"""A run: everything that `train()` needs, opened in one place and closed in the reverse order.

Order matters: the mesh first (every later step may have to agree across ranks), the lock before anything is written,
the weights before the engine partitions them, the checkpoint after it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from data.files import write_durably
from data.prepare import PreparedData, open_prepared
from data.stream import BatchStream
from eval.perplexity import Perplexity
from model.config import ModelConfig
from model.hybrid import HybridLM, initialise_model, parameter_count
from model.ops.backend import chosen, request
from model.weights.reader import Checkpoint
from train.checkpoint.capture import restore
from train.checkpoint.start import open_start, start_from
from train.checkpoint.store import Saved, Store
from train.config import Recipe
from train.engine import Engine
from train.hardware import Peak, device_peak
from train.health import Health, TrainingHealthError
from train.layout import copied_elements
from train.lock import RunLock
from train.metrics import Metrics, open_wandb
from train.parallel import Mesh, open_mesh
from train.rank import report
from train.spikes import Spike, Spikes
from train.stop import StopRequest
from train.watch import Watch

RECIPE = "recipe.json"


@dataclass
class Clock:
    """Progress: optimizer steps attempted (skipped updates count) and tokens consumed."""

    step: int = 0
    tokens: int = 0


@dataclass
class Run:
    """What one rank holds while it trains."""

    recipe: Recipe
    mesh: Mesh
    lock: RunLock | None
    data: PreparedData
    stream: BatchStream
    model: HybridLM
    engine: Engine
    store: Store
    health: Health
    spikes: Spikes
    watch: Watch
    metrics: Metrics
    stop: StopRequest
    peak: Peak
    clock: Clock
    validated: tuple[int, Perplexity] | None = None
    """The newest validation and its step."""
    backends: dict[str, str] | None = None
    steps: int = 0
    """Taken by this process."""

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.training.tokens_per_step

    @property
    def reported(self) -> bool:
        """Whether the last validation of a finished run has been written down."""
        last = self.metrics.last_event("finished")
        return self.mesh.any(last is not None and last["step"] == self.clock.step)

    @property
    def finished(self) -> bool:
        return self.clock.tokens >= self.recipe.training.tokens

    @property
    def validation(self) -> Perplexity | None:
        """Of the weights as they are now, if they were validated."""
        return self.validated[1] if self.validated is not None and self.validated[0] == self.clock.step else None

    def due(self, every_tokens: int | None) -> bool:
        """Whether the step just taken passed a multiple of `every_tokens` on the token clock; None is never."""
        if every_tokens is None:
            return False
        before = self.clock.tokens - self.tokens_per_step
        return self.clock.tokens // every_tokens > before // every_tokens

    def stop_asked(self) -> bool:
        """Whether a signal asked any rank to stop: the same answer on every rank."""
        asked = self.mesh.any(self.stop.signal is not None)
        if asked:
            self.metrics.event("stopping", step=self.clock.step, signal=self.stop.signal)
        return asked

    def confirm_lock(self) -> None:
        """Raises RunLocked when another job has taken the run folder over."""
        if self.lock is not None:
            self.lock.confirm()

    def announce_backends(self) -> None:
        """Says once, after the first step, which implementation each op has chosen."""
        if self.backends is None:
            self.backends = chosen()
            self.metrics.event("backends", **self.backends)
            self.metrics.say("ops: " + ", ".join(f"{op} by {names}" for op, names in self.backends.items()))

    def save(self) -> None:
        """Begins to save a checkpoint: model, optimizer, data position, clock and what identifies them."""
        with self.watch.unwatched():
            self.mesh.together(self.confirm_lock)
            self._note_saved(self.store.save(self.engine, self.clock.step, self.clock.tokens, self._extra()))

    def check_saved(self) -> None:
        """Writes down a save that has been committed since. Raises CheckpointError when it failed."""
        self._note_saved(self.store.poll())

    def settle_saved(self) -> None:
        """Waits for the save on its way; otherwise like `check_saved`."""
        with self.watch.unwatched():
            self._note_saved(self.store.settle())

    def spiked(self, loss: float, start: int) -> bool:
        """Whether the step just taken, from sample `start` on, completed a loss spike that the run goes back for."""
        spike = self.spikes.observe(self.clock.step, loss, start, self.stream.sample)
        if spike is None:
            return False
        self.metrics.event("spike", **spike._asdict())
        self.metrics.say(
            f"steps {spike.first} to {spike.last}: loss {spike.loss:.3f}, {spike.usual:.3f} before: a spike"
        )
        with self.watch.unwatched():
            return self.recipe.spikes.action == "rollback" and self._roll_back(spike)

    def _roll_back(self, spike: Spike) -> bool:
        """Goes back to the newest checkpoint from before the spike and leaves out the samples that it read.

        Returns False, having said so, when there is none. Raises TrainingHealthError after too many.
        """
        limit = self.recipe.spikes.rollbacks
        if self.spikes.rollbacks >= limit:
            raise TrainingHealthError(
                f"step {spike.last}: the loss spiked again after {limit} rollbacks; "
                "a lower learning rate, more warm-up or the data of these steps is where to look"
            )
        self.settle_saved()
        checkpoint = self.store.back_to(spike.first)
        if checkpoint is None:
            self.metrics.say(f"no checkpoint is older than step {spike.first}: training goes on")
            return False
        rollbacks = self.spikes.rollbacks + 1
        clock = _resume(self.recipe, checkpoint, self.engine, self.stream, self.spikes)
        self.clock.step, self.clock.tokens = clock.step, clock.tokens
        self.spikes.rollbacks = rollbacks
        self.stream.skip(spike.start, spike.stop)
        self.metrics.rewind(clock.step, clock.tokens)
        samples = [spike.start, spike.stop]
        self.metrics.event("rolled_back", step=clock.step, checkpoint=checkpoint.folder.name, skipped=samples)
        self.metrics.say(
            f"rolled back to step {clock.step} ({checkpoint.folder.name}); samples {spike.start} to {spike.stop - 1} "
            "are left out"
        )
        return True

    def _note_saved(self, saved: Saved | None) -> None:
        if saved is not None:
            self.metrics.event("saved", step=saved.step, checkpoint=saved.folder.name)

    def _extra(self) -> dict[str, Any]:
        return {
            "model": self.recipe.model.to_dict(),
            "recipe": self.recipe.to_dict(),
            "clock": {"step": self.clock.step, "tokens": self.clock.tokens},
            "stream": self.stream.state_dict(),
            "spikes": self.spikes.state_dict(),
            "validation": None if self.validation is None else asdict(self.validation),
            "tokenizer": {"file": self.data.tokenizer.name, "sha256": self.data.tokenizer_sha256},
        }


@contextmanager
def open_run(recipe: Recipe) -> Iterator[Run]:
    """Opens or resumes the run of `recipe` on this rank. Raises ValueError for a user's mistake."""
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        layout = recipe.parallel
        mesh = stack.enter_context(
            open_mesh(layout.device, layout.sizes, timeout_s=layout.timeout_s, interface=layout.interface)
        )
        say = partial(report, survivor=True)
        watch = stack.enter_context(Watch(mesh, recipe.folder / "stacks", recipe.parallel.stall_s, say))
        stack.enter_context(watch.naming_the_dead())
        recipe.check_ranks(mesh.size)
        data = mesh.together(lambda: open_prepared(recipe.data, verify=False))
        mesh.together(lambda: data.verify(mesh.rank, mesh.size))
        data.check_vocabulary(recipe.model.vocab_size)
        lock = mesh.first(lambda: stack.enter_context(RunLock(recipe.folder)))
        stream = _open_stream(recipe, data, mesh)
        request(recipe.training.backends)
        model = HybridLM(
            recipe.model, recipe.training.precision, recompute=recipe.training.checkpoint_blocks, mesh=mesh
        )
        initialise_model(model, recipe.seed)
        stage, placement = recipe.parallel.in_force(mesh.shard.size)
        engine = Engine(
            model,
            model.table(),
            recipe.optimizer,
            zero_stage=stage,
            mesh=mesh,
            reduce_dtype=recipe.training.reduction,
            options=recipe.parallel.buckets,
            placement=placement,
        )
        stack.callback(engine.close)
        store = Store(
            recipe.folder / "checkpoints",
            mesh,
            recipe.checkpoints.retention,
            print,
            aside=recipe.checkpoints.aside,
            confirm=lambda: None if lock is None else lock.confirm(),
        )
        stack.callback(store.close)
        checkpoint = store.newest(recipe.checkpoints.resume)
        spikes = Spikes(recipe.spikes)
        started = None
        if checkpoint is not None:
            clock = _resume(recipe, checkpoint, engine, stream, spikes)
        else:
            clock, started = Clock(), _start(recipe, engine)
        run = Run(
            recipe=recipe,
            mesh=mesh,
            lock=lock,
            data=data,
            stream=stream,
            model=model,
            engine=engine,
            store=store,
            spikes=spikes,
            watch=watch,
            health=Health(model.table(), mesh, max_skipped=recipe.training.nonfinite_limit),
            metrics=stack.enter_context(_open_metrics(recipe, mesh, clock)),
            stop=stop,
            peak=device_peak(mesh.device),
            clock=clock,
        )
        _announce(run, checkpoint)
        if started is not None:
            run.metrics.event("started", **started)
            run.metrics.say(f"started from {started['checkpoint']}: {started['taken']} parameters taken")
        yield run


def _open_stream(recipe: Recipe, data: PreparedData, mesh: Mesh) -> BatchStream:
    return BatchStream(
        data.mixture(recipe.training.sequence_length, recipe.seed),
        rows_per_step=recipe.training.rows_per_step,
        micro_rows=recipe.training.micro_batch_rows,
        rank=mesh.data.rank,
        size=mesh.data.size,
    )


def _resume(recipe: Recipe, checkpoint: Checkpoint, engine: Engine, stream: BatchStream, spikes: Spikes) -> Clock:
    """Restores everything from the checkpoint; refuses a recipe of another model or other data. (There is no random
    state to restore: noise is a function of seed, step, layer and sample.)"""
    # Read and written anew: a checkpoint from before an option existed was made without it.
    saved, ours = ModelConfig.from_dict(checkpoint.extra["model"]).to_dict(), recipe.model.to_dict()
    differing = sorted(key for key in ours if saved[key] != ours[key])
    if differing:
        key = differing[0]
        raise ValueError(
            f"model.{key}: got {ours[key]}, but {checkpoint.folder} was saved with {saved[key]}; "
            "wants the saved model, or another name for the run"
        )
    saved_by = checkpoint.extra["recipe"]["optimizer"]["kind"]
    if saved_by != recipe.optimizer.kind:
        raise ValueError(
            f"optimizer.kind: got {recipe.optimizer.kind}, but {checkpoint.folder} was saved with {saved_by}; wants "
            "that, or another name for the run, with start.checkpoint and start.optimizer=false"
        )
    stream.load_state_dict(checkpoint.extra["stream"])
    if "spikes" in checkpoint.extra:
        spikes.load_state_dict(checkpoint.extra["spikes"])
    restore(engine, checkpoint)
    checkpoint.close()
    return Clock(**checkpoint.extra["clock"])


def _start(recipe: Recipe, engine: Engine) -> dict[str, Any] | None:
    """Takes the weights of another run, as the recipe's [start] says; what was done, None for nothing."""
    if not recipe.start.checkpoint:
        return None
    checkpoint = open_start(recipe.start, engine.mesh)
    sources = start_from(engine, checkpoint, recipe.start)
    checkpoint.close()
    new = sorted(name for name, old in sources.items() if old is None)
    renamed = {name: old for name, old in sources.items() if old not in (None, name)}
    taken = len(sources) - len(new)
    return {"checkpoint": str(checkpoint.folder), "taken": taken, "new": new, "renamed": renamed}


def _open_metrics(recipe: Recipe, mesh: Mesh, clock: Clock) -> Metrics:
    wandb = None
    if mesh.main and recipe.logging.wandb is not None:
        wandb = open_wandb(
            recipe.logging.wandb,
            recipe.logging.wandb_mode,
            recipe.name,
            recipe.folder,
            recipe.to_dict(),
        )
    return Metrics(
        recipe.folder if mesh.main else None,
        total_tokens=-(-recipe.training.tokens // recipe.training.tokens_per_step) * recipe.training.tokens_per_step,
        done_tokens=clock.tokens,
        step=clock.step,
        wandb=wandb,
    )


def _announce(run: Run, checkpoint: Checkpoint | None) -> None:
    """Says what is about to run and what changed since the run was saved; writes the resolved recipe and the tokenizer
    into the run folder."""
    recipe, metrics = run.recipe, run.metrics
    if not run.mesh.main:
        return
    shape = f" ({run.mesh.shape})" if run.mesh.shape else ""
    million = parameter_count(recipe.model) / 1e6
    stage, placement = recipe.parallel.in_force(run.mesh.shard.size)
    metrics.say(f"{recipe.name}: {million:.1f}M parameters, {recipe.model.stack}")
    metrics.say(
        f"{run.mesh.size} x {run.mesh.device.type}{shape}, ZeRO {stage}{placement.words(run.mesh.shard.size)}, "
        f"{recipe.training.compute_dtype} over float32 parameters, {torch.get_num_threads()} threads a rank"
    )
    if run.mesh.tensor.size > 1:
        copies = copied_elements(run.model.table(), run.mesh.tensor.size) / 1e6
        metrics.say(f"tensor ranks hold {copies:.2f}M parameters more than once: norms, routers, heads that all need")
    for letter, layer in recipe.model.layers.items():
        if shared := getattr(layer, "shares", None):
            metrics.say(f"layers.{letter}: documents share {shared}")
    metrics.say(f"peak {run.peak.flops / 1e12:.2f} TFLOP/s a rank ({run.peak.source})")
    if run.lock is not None and run.lock.taken_from is not None:
        metrics.event("lock_taken", why=run.lock.taken_from)
        metrics.say(f"lock: {run.lock.taken_from}")
    if checkpoint is not None:
        metrics.event("resumed", step=run.clock.step, checkpoint=checkpoint.folder.name, ranks=run.mesh.size)
        metrics.say(f"resumed from {checkpoint.folder} at step {run.clock.step}")
        for line in changes(checkpoint.extra["recipe"], recipe.to_dict()):
            metrics.event("recipe_changed", change=line)
            metrics.say(f"changed since: {line}")
    write_durably(recipe.folder / RECIPE, recipe.to_json().encode())
    write_durably(recipe.folder / run.data.tokenizer.name, run.data.tokenizer.read_bytes())


def changes(before: Any, after: Any, key: str = "") -> list[str]:
    """`key: old -> new` for every value that differs between two recipes as plain values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [line for k in keys for line in changes(before.get(k), after.get(k), f"{key}.{k}" if key else k)]
    return [] if before == after else [f"{key}: {before} -> {after}"]
