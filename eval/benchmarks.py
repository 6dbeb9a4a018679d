"""lm-eval's tasks, found, loaded and run on a BraidLM.

tasks = find_tasks(["braid_probes", "hellaswag"])
scores = run_tasks(lm, tasks)
"""

import contextlib
import difflib
import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.api.task
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from eval.harness import BraidLM
from eval.tasks import FOLDER

FEWSHOT_SEED = 1234
"""lm-eval's own, so that both show the same examples."""

BOOTSTRAP = 1000
"""Resamples for the standard errors that have no formula."""

NETWORK = ("httpx", "httpcore", "huggingface_hub", "requests", "urllib3")
"""Packages whose errors mean that data could not be fetched."""


@dataclass(frozen=True)
class TaskScores:
    """tasks: task or group -> metric -> value, with `METRIC_stderr` where there is one; None for what is no number.
    info: task or group -> version, items, shots and chance, what of it is known. samples: task -> its items with the
    model's answers."""

    tasks: dict[str, dict[str, float | None]]
    info: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]


class Probes(TaskManager):
    """lm-eval's index of tasks, with ours in it. include_path: a folder with more, or several."""

    def __init__(self, *arguments: Any, include_path: Any = None, **named: Any) -> None:
        given = include_path if isinstance(include_path, (list, tuple)) else [include_path] if include_path else []
        super().__init__(*arguments, include_path=[FOLDER, *given], **named)


def find_tasks(names: Sequence[str], include_path: Path | None = None) -> dict[str, Any]:
    """The tasks and groups of these names (`*` matches several), as `TaskManager.load` gives them.

    Raises ValueError for a name that no task has, a folder without tasks, and a task whose data cannot be had.
    """
    if include_path is not None and not any(include_path.glob("**/*.yaml")):
        raise ValueError(f"--include-path: {include_path} holds no task, wants a folder with YAML files of tasks")
    with quiet():
        manager = Probes(include_path=include_path and str(include_path), include_defaults=False)
        if not all(manager.match_tasks([name]) for name in names):
            manager = Probes(include_path=include_path and str(include_path))  # reads 15,000 files: seconds
        found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for match in dict.fromkeys(match for name in names for match in _matches(manager, name)):
            for key, part in _load(manager, match).items():
                found[key] |= part
    return found


def run_tasks(
    lm: BraidLM, found: dict[str, Any], *, limit: int | None = None, num_fewshot: int | None = None
) -> TaskScores:
    """Scores the tasks that `find_tasks` found; every rank returns the same, standard errors aside.

    limit: items of a task, at most. num_fewshot: examples shown before each item, for tasks that do not fix it.
    """
    for task in found["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if num_fewshot is not None and fixed != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif fixed is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    random.seed(0)
    np.random.seed(FEWSHOT_SEED)
    torch.manual_seed(FEWSHOT_SEED)
    with quiet():
        results = evaluate(lm=lm, task_dict=found, limit=limit, bootstrap_iters=BOOTSTRAP if lm.ranks.rank == 0 else 0)
    assert results is not None
    metrics = {name: _metrics(results["results"][name]) for name in _ordered(found)}
    scored = {name: values for name, values in metrics.items() if values}  # not groups that only gather others
    return TaskScores(
        tasks=scored,
        info={name: _info(name, results, found) for name in scored},
        samples=results["samples"],
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval without its log, and with bars that are only shown on a terminal; what it prints goes to stderr."""
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(tqdm, desc="items", leave=False, disable=None)
    # Workers for the bootstrap would be forked from a process with threads and a process group, and may hang.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar


def _matches(manager: TaskManager, name: str) -> list[str]:
    matches = manager.match_tasks([name])
    if matches or (name.endswith(".yaml") and Path(name).is_file()):
        return matches or [name]
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`braid lm-eval ls tasks` lists them"
    raise ValueError(f"--tasks: got {name!r}, which is no task; {hint}")


def _load(manager: TaskManager, name: str) -> dict[str, Any]:
    try:
        return manager.load([name])
    except ModuleNotFoundError as error:
        raise ValueError(f"--tasks: {name} needs the package {error.name}, which is not installed") from None
    except Exception as error:
        if not is_unreachable(error):
            raise
        raise ValueError(_unreachable(name, manager, error)) from None


def is_unreachable(error: Exception) -> bool:
    """Whether a task's data could not be fetched, or is not where the task says."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in NETWORK


def _unreachable(name: str, manager: TaskManager, error: Exception) -> str:
    """One line about a task whose data cannot be had."""
    entry = manager.task_index.get(name)
    path = (entry.cfg or {}).get("dataset_path") if entry is not None else None
    why = str(error).strip().partition("\n")[0].rstrip(".")
    what = f"the data set {path}" if path else "its data"
    return f"--tasks: {name}: {what} is not here ({why}); wants a network, or HF_HOME with a cache that holds it"


def _ordered(found: dict[str, Any]) -> list[str]:
    """Groups before their members, in the order asked for."""
    order: dict[str, None] = {}

    def visit(name: str) -> None:
        order[name] = None
        for child in found["group_map"].get(name, ()):
            visit(child)

    inside = {child for children in found["group_map"].values() for child in children}
    for name in (*found["groups"], *found["tasks"]):
        if name not in inside:
            visit(name)
    return list(order)


def _metrics(result: dict[str, Any]) -> dict[str, float | None]:
    """`acc,none` is `acc`; a filter that has a name keeps it."""
    metrics: dict[str, float | None] = {}
    for key, value in result.items():
        metric, comma, used = key.partition(",")
        if comma and not isinstance(value, dict):
            number = isinstance(value, (int, float, np.number)) and math.isfinite(value)
            metrics[metric if used == "none" else key] = float(value) if number else None
    return {key: value for key, value in metrics.items() if value is not None or "_stderr" not in key}


def _info(name: str, results: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    group = found["groups"].get(name)
    metadata = results["configs"].get(name, {}).get("metadata") or {} if group is None else group.metadata or {}
    known = {
        "version": results["versions"].get(name),
        "items": results["results"][name].get("sample_len"),
        "num_fewshot": results["n-shot"].get(name),
        "chance": metadata.get("chance"),
    }
    return {key: value for key, value in known.items() if value is not None}
