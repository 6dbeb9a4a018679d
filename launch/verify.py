"""Reads every byte of a run, a checkpoint or prepared data, and says what cannot be trusted."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.files import DataError, sha256_of
from data.permutation import key_of, permutation
from data.shards import MANIFEST, SPLITS, Manifest, ShardSet
from model.weights.manifest import FORMAT
from model.weights.reader import Checkpoint
from train.checkpoint.transaction import discover
from train.config import Recipe
from train.run import RECIPE

Check = tuple[str, Callable[[], str]]
"""What is checked, and the work: returns what it found, raises ValueError or OSError for what is wrong."""


def checks(path: Path) -> Iterator[Check]:
    """Everything that there is to check in a run, a checkpoint or a folder of prepared data.

    Raises ValueError when `path` is none of them.
    """
    if (path / RECIPE).is_file() or (path / "checkpoints").is_dir():
        yield from _run(path)
    elif (path / MANIFEST).is_file():
        body = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        yield from _checkpoint(path) if body.get("format") == FORMAT else _shards(path)
    else:
        raise ValueError(f"verify: got {str(path)!r}, wants a run, a checkpoint or prepared data")


def _run(run: Path) -> Iterator[Check]:
    yield f"{run / RECIPE}", lambda: f"recipe {_recipe(run).name}"
    yield f"{run / 'metrics.jsonl'}", lambda: _metrics(run / "metrics.jsonl")
    yield f"{run / 'events.jsonl'}", lambda: f"{len(_lines(run / 'events.jsonl')):,} events"
    for path in reversed(discover(run / "checkpoints")):
        yield from _checkpoint(path)
    try:
        folder = Path(_recipe(run).data.path)
    except (ValueError, OSError):
        return
    if (folder / MANIFEST).is_file():
        yield from _shards(folder)
    else:
        yield f"{folder}", lambda: "not here: the prepared data was not read"


def _recipe(run: Path) -> Recipe:
    return Recipe.from_json((run / RECIPE).read_text(encoding="utf-8"), str(run / RECIPE))


def _lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a file of JSON objects. An unfinished last one, of a writer that was killed, is left out."""
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(f"line {number} is no JSON") from None
    return records


def _metrics(path: Path) -> str:
    lines = _lines(path)
    for number, line in enumerate(lines, 1):
        if line["step"] != number:
            raise ValueError(f"line {number} is of step {line['step']}, wants one line a step, in order")
    return f"{len(lines):,} steps"


def _checkpoint(path: Path) -> Iterator[Check]:
    def files() -> str:
        checkpoint = Checkpoint(path)
        checkpoint.verify()
        checkpoint.close()
        totals = checkpoint.manifest.totals
        return f"{totals['tensors']:,} tensors in {totals['files']} files, {totals['bytes'] / 2**20:,.1f} MiB"

    def tokenizer() -> str:
        saved = Checkpoint(path).extra["tokenizer"]
        found = sha256_of(path.parents[1] / saved["file"])
        if found != saved["sha256"]:
            raise ValueError(f"{saved['file']} has SHA-256 {found[:12]}, trained with {saved['sha256'][:12]}")
        return f"SHA-256 {found[:12]}"

    yield str(path), files
    yield f"{path} tokenizer", tokenizer


def _shards(folder: Path) -> Iterator[Check]:
    for split in SPLITS:
        yield f"{folder} {split}", partial(_split, folder, split)
    yield f"{folder} order", partial(_order, folder)


def _split(folder: Path, split: str) -> str:
    shards = ShardSet(folder, split)
    shards.verify()
    return f"{shards.documents:,} documents, {shards.total_tokens:,} tokens"


def _order(folder: Path) -> str:
    """The order of an epoch takes every document once."""
    shards = ShardSet(folder, "train")
    order = permutation(shards.documents, key_of("documents", 0, 0, shards.fingerprint, 0))
    if not np.array_equal(np.sort(order), np.arange(shards.documents)):
        raise DataError("the order of documents is no permutation")
    return f"a permutation of {shards.documents:,} documents, fingerprint {Manifest.read(folder).fingerprint[:16]}"
