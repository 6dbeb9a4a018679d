"""Recipes: a TOML file, perhaps over another (`train/bases.py`), read into frozen dataclasses.

    recipe = load_recipe(Path("launch/recipes/quickstart.toml"), ["training.tokens=2_000_000"])

Each section's dataclass lives beside what it configures; those of the run itself are here. Whatever is wrong raises
ConfigError: one line with the file, the key, what it got, what it wants and the nearest valid key.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from data.prepare import DataConfig
from model.config import ModelConfig
from model.hybrid import Precision
from model.ops.backend import check_names
from train.bases import merged, origin, read_stages
from train.checkpoint.retention import Retention
from train.checkpoint.start import StartConfig
from train.engine import Placement, ZeroOptions
from train.layout import check_layout
from train.optim import OptimizerConfig, check_stage
from train.parallel import Sizes
from train.reading import ConfigError, override, parse_override, read, require, write
from train.schedule import WSD, Schedule
from train.spikes import SpikesConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TrainingConfig:
    """The run's length, its batches and its numbers.

    tokens: length of the run, in tokens. sequence_length: tokens per row. rows_per_step: rows of the global batch of
    one optimizer step, over all ranks. micro_batch_rows: rows that a rank takes through the model at a time, at most.
    clip_norm: largest global gradient norm, larger gradients are scaled down to it; 0 switches clipping off.
    nonfinite_limit: stop after this many updates in a row were skipped because their gradient was not finite.
    checkpoint_blocks: recompute each block's activations in the backward pass instead of keeping them (less memory,
    about a third more time); letters of the pattern ("M*") do so only for blocks that hold such a layer. compute_dtype:
    of matmuls, convolutions and attention. residual_dtype: of the residual stream. reduce_dtype: of gradient sums over
    ranks.
    backends: op -> backend, for ops that should not choose by themselves, e.g. ssd = "torch" (see model/ops).
    """

    tokens: int
    sequence_length: int
    rows_per_step: int
    micro_batch_rows: int = 1
    clip_norm: float = 1.0
    nonfinite_limit: int = 10
    checkpoint_blocks: bool | str = False
    compute_dtype: DType = "bfloat16"
    residual_dtype: DType = "float32"
    reduce_dtype: DType = "float32"
    backends: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("tokens", "sequence_length", "rows_per_step", "micro_batch_rows", "nonfinite_limit"):
            require(getattr(self, key) > 0, key, getattr(self, key), "a positive integer")
        require(self.clip_norm >= 0, "clip_norm", self.clip_norm, "a positive number, or 0 for no clipping")
        require(
            self.tokens >= self.tokens_per_step, "tokens", self.tokens, f"one step ({self.tokens_per_step}) or more"
        )
        wants = "true, false, or letters of the pattern"
        require(self.checkpoint_blocks != "", "checkpoint_blocks", self.checkpoint_blocks, wants)
        check_names(self.backends)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.rows_per_step * self.sequence_length

    @property
    def precision(self) -> Precision:
        return Precision(DTYPES[self.compute_dtype], DTYPES[self.residual_dtype])

    @property
    def reduction(self) -> torch.dtype:
        return DTYPES[self.reduce_dtype]


@dataclass(frozen=True)
class ParallelConfig:
    """How the run is laid on its ranks; never changes what is computed.

    device: "cuda", "cpu", or "auto" for cuda where there is one. tensor: ranks that share the weights of each layer.
    context: ranks that share the tokens of each row. expert: data-parallel ranks that share the experts of MoE layers.
    All other ranks are data-parallel: world = data x context x tensor. zero_stage: 0 replicates everything, 1 shards
    optimizer states, 2 also gradients, 3 also weights; see `in_force`. offload_optimizer: master weights, moments and
    summed gradients lie in host memory and are stepped there (ZeRO 1-3). hpz_ranks: ranks of a group, best those of one
    host, that keep a second copy of the weights among themselves, so that of the gathers of a step only the first
    leaves the group (ZeRO 3); none for no such copy. overlap: sum gradients over ranks while the backward pass goes on
    (ZeRO 1-3), none for where there is CUDA. timeout_s: longest wait for another rank, in seconds. stall_s: a rank
    without progress for so many seconds (a micro-batch is progress) writes down its stacks and exits with 74.
    interface: network interface between hosts ("eth0"), none for the one that leads to the host of rank 0 (gloo) or
    that NCCL chooses. buckets: sizes of DeepSpeed's buffers, in elements.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensor: int = 1
    context: int = 1
    expert: int = 1
    zero_stage: int = 1
    offload_optimizer: bool = False
    hpz_ranks: int | None = None
    overlap: bool | None = None
    timeout_s: float = 1800.0
    stall_s: float = 900.0
    interface: str | None = None
    buckets: ZeroOptions = field(default_factory=ZeroOptions)

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.tensor, self.context, self.expert)

    def __post_init__(self) -> None:
        for key in ("tensor", "context", "expert"):
            require(getattr(self, key) > 0, key, getattr(self, key), "a positive number of ranks")
        require(self.zero_stage in (0, 1, 2, 3), "zero_stage", self.zero_stage, "one of 0, 1, 2, 3")
        self.placement.check(self.zero_stage)
        wants = "none beside tensor ranks, because DeepSpeed takes neighbouring ranks for a group"
        require(self.hpz_ranks is None or self.tensor == 1, "hpz_ranks", self.hpz_ranks, wants)
        for key in ("timeout_s", "stall_s"):
            require(getattr(self, key) > 0, key, getattr(self, key), "a positive number of seconds")
        for key, elements in asdict(self.buckets).items():
            require(elements > 0, f"buckets.{key}", elements, "a positive number of elements")

    @property
    def placement(self) -> Placement:
        return Placement(self.offload_optimizer, self.hpz_ranks, self.overlap)

    def in_force(self, ranks: int) -> tuple[int, Placement]:
        """The ZeRO stage and placement where so many ranks share states: a rank that is alone keeps everything, as ZeRO
        0 does, without the copies that the other stages make of weights and gradients; but not in host memory."""
        if ranks == 1 and not self.offload_optimizer:
            return 0, Placement()
        return self.zero_stage, self.placement


def _related(one: str, other: str) -> bool:
    """Whether one dotted key is the other or lies in its section."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _check_interval(every_tokens: int | None) -> None:
    positive = every_tokens is None or every_tokens > 0
    require(positive, "every_tokens", every_tokens, "a positive number of tokens, or none")


@dataclass(frozen=True)
class CheckpointsConfig:
    """What is saved, besides a checkpoint at the end and when the run is asked to stop.

    every_tokens: tokens from one checkpoint to the next, none for no others. keep_last: number of newest checkpoints
    that are kept. keep_every_tokens: also the first of every so many tokens, none for no others. keep_best: also so
    many of the lowest validation loss, among those saved at a step that was validated. aside: training goes on while a
    checkpoint is written, from one more copy of the state in host memory; false stops it for as long. resume: "auto"
    goes on from the newest valid checkpoint or begins, "required" refuses to begin, "never" refuses a folder that holds
    a checkpoint.
    """

    every_tokens: int | None = None
    keep_last: int = 3
    keep_every_tokens: int | None = None
    keep_best: int = 0
    aside: bool = True
    resume: Literal["auto", "required", "never"] = "auto"

    def __post_init__(self) -> None:
        _check_interval(self.every_tokens)
        require(self.keep_last > 0, "keep_last", self.keep_last, "a positive integer")
        every = self.keep_every_tokens
        require(every is None or every > 0, "keep_every_tokens", every, "a positive number of tokens, or none")
        require(self.keep_best >= 0, "keep_best", self.keep_best, "an integer that is not negative")

    @property
    def retention(self) -> Retention:
        return Retention(self.keep_last, self.keep_every_tokens, self.keep_best)


@dataclass(frozen=True)
class EvaluationConfig:
    """Loss on held-out documents, besides one at the end.

    every_tokens: tokens from one to the next, none for no others. max_tokens: held-out tokens read each time, none
    for all.
    """

    every_tokens: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_interval(self.every_tokens)
        positive = self.max_tokens is None or self.max_tokens > 0
        require(positive, "max_tokens", self.max_tokens, "a positive number of tokens, or none")


@dataclass(frozen=True)
class LoggingConfig:
    """Where curves go besides metrics.jsonl.

    wandb: Weights & Biases project, none for off. wandb_mode: "online", or "offline" to write into the run folder.
    """

    wandb: str | None = None
    wandb_mode: Literal["online", "offline"] = "online"


@dataclass(frozen=True)
class GenerationConfig:
    """What `braid generate` does when it is not told otherwise.

    prompt: text to continue, "" for none. max_tokens: length in tokens, at most. temperature: 0 takes the likeliest
    token. top_p: sample from the smallest set of tokens with at least this probability. seed: of the sampling.
    """

    prompt: str = ""
    max_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.max_tokens > 0, "max_tokens", self.max_tokens, "a positive integer")
        require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a number above 0 and at most 1")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run.

    name: of the run and its folder. seed: of initial weights, data order and noise. runs: folder that holds run
    folders. optimizer: AdamW, which a section without `kind` means, or Muon (`train/muon.py`).
    """

    name: str
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    schedule: Schedule = field(default_factory=WSD)
    parallel: ParallelConfig = ParallelConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    start: StartConfig = field(default_factory=StartConfig)
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    generation: GenerationConfig = GenerationConfig()
    seed: int = 0
    runs: str = "runs"

    def __post_init__(self) -> None:
        usable = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None
        require(usable, "name", self.name, "a folder name of letters, digits, '.', '_' and '-'")
        require(0 <= self.seed < 2**63, "seed", self.seed, "an integer that is not negative")
        if isinstance(chosen := self.training.checkpoint_blocks, str):
            letters = dict.fromkeys("".join(self.model.blocks))
            wants = f"true, false, or some of the pattern's letters {''.join(letters)}"
            require({*chosen} <= {*letters}, "training.checkpoint_blocks", chosen, wants)
        length, stage = self.training.sequence_length, self.parallel.zero_stage
        check_stage(self.optimizer, stage)
        try:
            self.schedule.check(self.training.tokens)
        except ValueError as error:
            raise ValueError(f"schedule.{error}") from None
        try:
            check_layout(self.model, self.parallel.sizes, sequence_length=length, zero_stage=stage)
        except ValueError as error:
            raise ValueError(f"parallel.{error}") from None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.runs) / self.name

    def check_ranks(self, size: int) -> None:
        """Raises ConfigError unless the mesh fills `size` ranks and the global batch divides over its data ranks."""
        rows = self.training.rows_per_step
        data = self.parallel.sizes.data(size)
        if rows % data:
            ranks = f"the {size} ranks" if data == size else f"the {data} data ranks"
            raise ConfigError("training.rows_per_step", f"got {rows}, wants a multiple of {ranks}")
        self.parallel.placement.check_ranks(size)

    def to_json(self) -> str:
        """The resolved recipe, defaults and overrides included; `from_json` gives an equal recipe back."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain values."""
        return write(self)

    @staticmethod
    def from_json(text: str, source: str = "recipe.json") -> "Recipe":
        """Raises ConfigError when `text` is no recipe of this version."""
        try:
            return read(Recipe, json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError("", f"not valid JSON: {error}", source) from None
        except ConfigError as error:
            raise error.at(source) from None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file over its bases, with `section.key=value` overrides on top. Raises ConfigError for a user's
    mistake, naming the file that it is in."""
    stages = read_stages(path)
    values = merged(stages)
    parsed = [parse_override(text) for text in overrides]
    for key, value in parsed:
        override(values, key, value)
    try:
        return read(Recipe, values)
    except ConfigError as error:
        overridden = any(_related(error.key, key) for key, _ in parsed)
        raise error.at("command line" if overridden else origin(error.key, stages)) from None
