"""Sides of made-up benchmarks, which run in worker processes."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launch.bench.row import Reading

if TYPE_CHECKING:
    from train.config import Recipe

TRACE = "BENCH_TEST_TRACE"
"""The variable that names the file in which sides say what they do."""


def _trace(words: str) -> None:
    with Path(os.environ[TRACE]).open("a") as file:
        file.write(words + "\n")


def _scripted(name: str, values: list[float]) -> Iterator[Reading]:
    settings = [os.environ["GLIBC_TUNABLES"], os.environ["OMP_NUM_THREADS"]]
    for number, value in enumerate([-1.0, *values]):
        _trace(f"{name} {'warm-up' if number == 0 else number}")
        yield Reading(value, {"pid": os.getpid(), "settings": settings, "turn": number})


def ours(quick: bool) -> Iterator[Reading]:
    return _scripted("ours", [40.0, 10.0, 30.0])


def peer(quick: bool) -> Iterator[Reading]:
    return _scripted("peer", [20.0, 10.0, 10.0])


def chatty(quick: bool) -> Iterator[Reading]:
    """Prints where the answers go, by Python and below it."""
    print("a library greets the user")
    while True:
        os.write(sys.stdout.fileno(), b'{"value": 99}\n')
        yield Reading(1.0 if quick else 2.0)


def raises(quick: bool) -> Iterator[Reading]:
    yield Reading(1.0)
    raise RuntimeError("out of\nluck")


def dies(quick: bool) -> Iterator[Reading]:
    print("the last words", file=sys.stderr, flush=True)
    os._exit(3)
    yield Reading(1.0)


def small(*overrides: str) -> "Recipe":
    """The tiny recipe, at its full rate from the first step."""
    from launch.recipes import FOLDER
    from train.config import load_recipe

    return load_recipe(FOLDER / "tiny.toml", ["schedule.warmup_fraction=0.0", *overrides])


def trains(quick: bool) -> Iterator[Reading]:
    """Our side of a training row, on the tiny recipe."""
    from launch.bench.training import braid

    return braid(small(), steps=4)


def does_not_train(quick: bool) -> Iterator[Reading]:
    """The same with a rate that spoils the model."""
    from launch.bench.training import braid

    return braid(small("optimizer.learning_rate=3.0"), steps=4)
