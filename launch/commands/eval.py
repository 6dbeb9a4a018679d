"""Scores a run: lm-eval tasks and the loss on its held-out documents.

RUN is a run folder (runs/quickstart), its name (quickstart) or one checkpoint's folder; its newest checkpoint is taken.
Without --tasks, the built-in probes and perplexity by length are measured: neither needs a network. The results are
printed and kept in RUN/eval/CHECKPOINT.json, beside those of earlier evaluations of the same checkpoint.
"""

import argparse
import json
import os
import sys
from typing import Any

from launch.optional import need

HERE = ("nproc", "json")
"""Arguments that are not passed on to what evaluates."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder or its name")
    add = parser.add_argument
    add("--checkpoint", metavar="NAME", help="of RUN/checkpoints (default: the newest)")
    add("--tasks", metavar="A,B", help="lm-eval tasks, groups or patterns, or none (default: braid_probes)")
    add("--include-path", metavar="DIR", help="folder with more lm-eval tasks; wants --tasks")
    add("--limit", type=int, metavar="N", help="only the first N items of each task, for trying out")
    add("--num-fewshot", type=int, metavar="K", help="examples before each item, where the task does not fix it")
    add("--batch-rows", type=int, default=16, metavar="N", help="rows of a batch, at most (default: 16)")
    add("--max-length", type=int, metavar="N", help="tokens read at once; longer texts lose their beginning "
        "(default: training.sequence_length)")  # fmt: skip
    add("--lengths", metavar="L,L", help="perplexity on rows of these lengths, in tokens or multiples of training's "
        "(default: 1x,2x,4x, or none with --tasks)")  # fmt: skip
    add("--data", metavar="PATH", help="where the run's prepared data lies now (default: its data.path)")
    add("--dtype", default="float32", metavar="D", help="of matmuls: float32 or bfloat16 (default: float32)")
    add("--nproc", type=int, default=1, metavar="N", help="ranks on this machine that share the work (default: 1)")
    add("--output", metavar="FILE", help="where the results go (default: RUN/eval/CHECKPOINT.json)")
    add("--log-samples", action="store_true", help="also keep every item with its answers, in CHECKPOINT.samples/")
    add("--json", action="store_true", help="print the results as JSON, and nothing else, on stdout")


def run(arguments: argparse.Namespace) -> int:
    if arguments.nproc < 1:
        raise ValueError(f"--nproc: got {arguments.nproc}, wants a positive number of ranks")
    if arguments.include_path is not None and arguments.tasks is None:
        raise ValueError(f"--include-path: got {arguments.include_path} without --tasks, wants the names of its tasks")
    need("lm_eval", "eval")
    if arguments.nproc > 1 and "RANK" not in os.environ:
        from launch import local

        return local.launch(["-m", "launch", "eval", *spelled(arguments)], arguments.nproc)
    from launch.evaluation import Options, evaluate
    from train.rank import die_with_launcher

    if "RANK" in os.environ:
        die_with_launcher()
    done = evaluate(Options(**{key: value for key, value in vars(arguments).items() if key not in HERE}))
    if done is not None:
        results, path = done
        print(json.dumps(results, indent=2, allow_nan=False) if arguments.json else table(results))
        print(f"written to {path}", file=sys.stderr)
    return 0


def spelled(arguments: argparse.Namespace) -> list[str]:
    """The command line of a rank."""
    words = [arguments.run]
    for key, value in vars(arguments).items():
        flag = f"--{key.replace('_', '-')}"
        if key not in ("run", "nproc") and value is not None and value is not False:
            words.append(flag if value is True else f"{flag}={value}")
    return words


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    lines = [f"{results['checkpoint']}, trained on {results['tokens']:,} tokens"]
    if results["tasks"]:
        lines += ["", *_columns([("task", "metric", "value", "stderr", "items", "chance"), *_task_rows(results)])]
    if results["truncated"]:
        longest = next(iter(results["info"].values()))["max_length"]
        lines += [f"{results['truncated']} requests lost their beginning to --max-length {longest}"]
    if results["perplexity"]:
        rows = [_length_row(one) for one in results["perplexity"]]
        names = ("row length", "loss", "bits/byte", "tokens", "beyond training's length", "their loss")
        lines += ["", *_columns([names, *rows])]
    return "\n".join(lines)


def _task_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for task, metrics in results["tasks"].items():
        info = results["info"][task]
        for metric, value in metrics.items():
            if not metric.partition(",")[0].endswith("_stderr"):
                name, comma, used = metric.partition(",")
                error = metrics.get(f"{name}_stderr{comma}{used}")
                rows.append((task, metric, _number(value), _number(error), *_known(info, "items", "chance")))
    return rows


def _length_row(one: dict[str, Any]) -> tuple[str, ...]:
    beyond = one["beyond_training"]
    counts = f"{one['length']:,}", _number(one["loss"]), _number(one["bits_per_byte"]), f"{one['tokens']:,}"
    return *counts, f"{beyond['tokens']:,}", _number(beyond["loss"])


def _known(info: dict[str, Any], *keys: str) -> list[str]:
    return [str(info.get(key, "")) for key in keys]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = [not rows[-1][index].replace(",", "").replace(".", "").isdigit() for index in range(len(widths))]
    lines = []
    for row in rows:
        cells = zip(row, widths, left, strict=True)
        lines.append("  ".join(f"{cell:<{w}}" if words else f"{cell:>{w}}" for cell, w, words in cells).rstrip())
    return lines
