"""How good a run is: `braid eval`, and the model that `braid lm-eval` calls `braid`.

Needs lm-eval: import this module where lm-eval is known to be there.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.files import DataError, read_json, write_durably, write_json
from data.prepare import open_prepared
from data.shards import ShardSet
from data.stream import Batch
from data.tokenizer import Tokenizer
from eval.benchmarks import TaskScores, find_tasks, run_tasks
from eval.harness import BraidLM
from eval.perplexity import LengthPerplexity, chosen_documents, evaluate_length
from eval.tasks import DEFAULT
from launch.commands.arguments import find_run
from launch.runs import find_checkpoint, load_run
from model.hybrid import HybridLM, Precision
from model.weights.reader import Checkpoint
from train.config import DTYPES, Recipe
from train.parallel import Mesh, open_mesh
from train.reading import read

LENGTHS = "1x,2x,4x"
EVAL_ROWS = 16


@dataclass(frozen=True)
class Options:
    """What `braid eval` is asked for; see its `--help`. tasks, lengths: None where nothing was said."""

    run: str
    checkpoint: str | None = None
    tasks: str | None = None
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_rows: int = EVAL_ROWS
    max_length: int | None = None
    lengths: str | None = None
    data: str | None = None
    dtype: str = "float32"
    output: str | None = None
    log_samples: bool = False

    def __post_init__(self) -> None:
        for key in ("limit", "batch_rows", "max_length"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"--{key.replace('_', '-')}: got {value}, wants a positive number")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"--num-fewshot: got {self.num_fewshot}, wants 0 or more examples")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype: got {self.dtype!r}, wants one of {', '.join(DTYPES)}")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ValueError(f"--include-path: {self.include_path} is no folder, wants one with YAML files of tasks")

    @property
    def task_names(self) -> list[str]:
        """Of lm-eval; none for `--tasks none`."""
        if self.tasks == "none":
            return []
        return [name.strip() for name in (self.tasks or DEFAULT).split(",") if name.strip()]

    def row_lengths(self, trained: int) -> list[int]:
        """Lengths of the rows that perplexity is measured on, in tokens; rising."""
        text = self.lengths if self.lengths is not None else LENGTHS if self.tasks is None else "none"
        return [] if text == "none" else sorted({_length(word.strip(), trained) for word in text.split(",")})


def _length(word: str, trained: int) -> int:
    found = re.fullmatch(r"(\d+)(x?)", word)
    tokens = int(found[1]) * (trained if found[2] else 1) if found else 0
    if not tokens:
        raise ValueError(f"--lengths: got {word!r}, wants multiples (1x,2x,4x), tokens (1024,4096) or none")
    return tokens


@dataclass(frozen=True)
class Opened:
    """A checkpoint that is ready to be evaluated."""

    model: HybridLM
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    recipe: Recipe
    mesh: Mesh

    @property
    def tokens(self) -> int:
        return int(self.checkpoint.extra["clock"]["tokens"])

    def arguments(self, max_length: int | None, batch_rows: int) -> dict[str, Any]:
        """Of a BraidLM. max_length: that of training's rows by default."""
        return {
            "model": self.model,
            "tokenizer": self.tokenizer,
            "max_length": max_length or self.recipe.training.sequence_length,
            "batch_rows": batch_rows,
            "clock": self.tokens,
            "ranks": self.mesh,
        }


def open_checkpoint(mesh: Mesh, run: str, checkpoint: str | None, dtype: str) -> Opened:
    """Loads the model on every rank. Raises ValueError for what is missing, damaged or does not match."""
    folder = find_run(run)
    if checkpoint is not None:
        folder = find_checkpoint(folder, checkpoint)
    precision = Precision(DTYPES[dtype], torch.float32)
    model, tokenizer, opened = mesh.together(lambda: load_run(folder, precision, mesh.device))
    return Opened(model, tokenizer, opened, read(Recipe, opened.extra["recipe"]), mesh)


def evaluate(options: Options) -> tuple[dict[str, Any], Path] | None:
    """Evaluates a run and writes the results; returns them and where they are, on rank 0 alone.

    What can be wrong is found before anything takes long. Raises ValueError for a user's mistake.
    """
    found = _tasks(options)
    with open_mesh() as mesh:
        opened = open_checkpoint(mesh, options.run, options.checkpoint, options.dtype)
        trained = opened.recipe.training.sequence_length
        lengths = options.row_lengths(trained)
        shards = mesh.together(lambda: held_out(opened, options.data)) if lengths else None
        path = _target(opened, options.output)
        mesh.first(lambda: path.parent.mkdir(parents=True, exist_ok=True))
        lm = BraidLM(**opened.arguments(options.max_length, options.batch_rows))
        scores = run_tasks(lm, found, limit=options.limit, num_fewshot=options.num_fewshot) if found else None
        losses = [_perplexity(opened, shards, length, options.batch_rows) for length in lengths] if shards else []
        if not mesh.main:
            return None
        results = _results(opened, lm, options, scores, losses)
        _write(path, results)
        if options.log_samples and scores is not None:
            _write_samples(path.with_suffix(".samples"), scores)
        return results, path


def _tasks(options: Options) -> dict[str, Any]:
    names = options.task_names
    include = None if options.include_path is None else Path(options.include_path)
    return find_tasks(names, include) if names else {}


def held_out(opened: Opened, data: str | None) -> ShardSet:
    """The documents that the run has held out, every byte checked."""
    config = opened.recipe.data if data is None else replace(opened.recipe.data, path=data)
    try:
        prepared = open_prepared(config, verify=False)
        prepared.validation.verify()
    except DataError as error:
        raise ValueError(f"{error} (--data names where it lies now, --lengths none leaves perplexity out)") from None
    if prepared.tokenizer_sha256 != opened.tokenizer.sha256:
        raise ValueError(
            f"data.path: {prepared.folder} was made by another tokenizer than the run's; wants the run's data"
        )
    return prepared.validation


def _perplexity(opened: Opened, shards: ShardSet, length: int, batch_rows: int) -> LengthPerplexity:
    mesh, recipe = opened.mesh, opened.recipe
    trained, limit = recipe.training.sequence_length, recipe.evaluation.max_tokens
    rows = max(1, batch_rows * trained // length)
    documents = chosen_documents(shards, limit)
    tokens = int(shards.lengths[documents].sum())
    with tqdm(
        total=-(-tokens // mesh.size),
        desc=f"rows of {length:,}",
        unit=" tokens",
        unit_scale=True,
        leave=False,
        disable=None if mesh.main else True,
    ) as bar:

        @torch.no_grad()
        def nll(batch: Batch) -> Tensor:
            inputs = (x.to(mesh.device) for x in (batch.tokens, batch.starts, batch.targets))
            out = opened.model(*inputs, clock=opened.tokens)
            bar.update(batch.valid)
            return out.nll

        return evaluate_length(
            nll,
            shards,
            length=length,
            limit=trained,
            rows=rows,
            max_tokens=limit,
            rank=mesh.rank,
            size=mesh.size,
            all_reduce=mesh.sum_,
        )


def _target(opened: Opened, output: str | None) -> Path:
    folder = opened.checkpoint.folder
    return Path(output) if output else folder.parents[1] / "eval" / f"{folder.name}.json"


def _results(
    opened: Opened, lm: BraidLM, options: Options, scores: TaskScores | None, losses: Sequence[LengthPerplexity]
) -> dict[str, Any]:
    asked = {"limit": options.limit, "max_length": lm.max_length, "dtype": options.dtype}
    info = {} if scores is None else {name: {**known, **asked} for name, known in scores.info.items()}
    return {
        "checkpoint": opened.checkpoint.folder.name,
        "tokens": opened.tokens,
        "tasks": {} if scores is None else scores.tasks,
        "info": info,
        "truncated": lm.truncated,
        "perplexity": [
            {
                "length": one.length,
                "loss": one.whole.loss,
                "bits_per_byte": one.whole.bits_per_byte,
                "tokens": one.whole.tokens,
                "beyond_training": {"tokens": one.beyond_tokens, "loss": one.beyond_loss},
            }
            for one in losses
        ],
        "versions": {name: version(name) for name in ("torch", "lm_eval")},
    }


def _write(path: Path, results: dict[str, Any]) -> None:
    """Beside what earlier evaluations of the same checkpoint have found. What is measured again replaces it, but a
    part of a task (`--limit`) does not replace the whole."""
    merged = dict(results)
    before = _earlier(path)
    if (before.get("checkpoint"), before.get("tokens")) == (results["checkpoint"], results["tokens"]):
        whole = {task for task, info in before["info"].items() if info["limit"] is None}
        kept = whole if any(info["limit"] is not None for info in results["info"].values()) else set()
        for key in ("tasks", "info"):
            merged[key] = before[key] | {task: value for task, value in results[key].items() if task not in kept}
        merged["perplexity"] = results["perplexity"] or before["perplexity"]
    write_json(path, merged)


def _earlier(path: Path) -> dict[str, Any]:
    """What an evaluation has written there; nothing where there is no such file."""
    try:
        found = read_json(path)
    except DataError:
        return {}
    complete = isinstance(found, dict) and {"tasks", "info", "perplexity"} <= found.keys()
    return found if complete else {}


def _write_samples(folder: Path, scores: TaskScores) -> None:
    folder.mkdir(exist_ok=True)
    for task, samples in scores.samples.items():
        lines = [json.dumps(sample, default=str, ensure_ascii=False) for sample in samples]
        write_durably(folder / f"{task}.jsonl", ("\n".join(lines) + "\n").encode())


class RunLM(BraidLM):
    """The model that lm-eval's command line calls `braid`: `--model_args run=runs/quickstart`."""

    def __init__(
        self,
        run: str | None = None,
        checkpoint: str | None = None,
        dtype: str = "float32",
        max_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        """device: "cpu", or cuda where there is one. batch_size: rows, or "auto" for as many as `braid eval` takes."""
        if unknown:
            raise ValueError(f"model_args: got {', '.join(unknown)}, wants run, checkpoint, dtype or max_length")
        if run is None:
            raise ValueError("model_args: missing run, wants run=FOLDER")
        rows = EVAL_ROWS if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
        options = Options(str(run), checkpoint, max_length=max_length, batch_rows=rows, dtype=dtype)
        mesh = open_mesh("cpu" if device == "cpu" else "auto")
        opened = open_checkpoint(mesh, options.run, options.checkpoint, options.dtype)
        super().__init__(**opened.arguments(options.max_length, options.batch_rows))
