"""How often ZeRO 3 gathers each weight in a micro-batch: DeepSpeed 0.19.8's coordinator, replayed without a model.

A weight is gathered when a module that holds it begins, forward or backward, or ahead of that; it is let go when the
module ends, unless modules that begin within the next `live` elements use it again, or what is fetched ahead has passed
such a use. Modules begin in the order of the table, and backward the other way round.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from model.config import ModelConfig
from model.params import Table


class Turn(NamedTuple):
    """A module begins or ends. weights: those directly in it."""

    module: str
    begins: bool
    weights: tuple[str, ...]


def gathers(
    numel: Mapping[str, int],
    turns: list[Turn],
    *,
    kept: Collection[str],
    live: int,
    prefetch: int,
) -> Counter[str]:
    """How often each weight is gathered on the way through `turns`, one micro-batch.

    numel: elements of a weight. kept: weights that stay gathered. live, prefetch: see `ZeroOptions`.
    """
    steps = [turn.weights for turn in turns if turn.begins]
    queue = deque((name, step) for step, weights in enumerate(steps) for name in weights)
    found: Counter[str] = Counter()
    here = set(kept)
    passed: dict[str, int] = defaultdict(lambda: -1)  # the last use that was fetched for, also ahead
    users: dict[str, set[str]] = defaultdict(set)
    gathered = step = 0

    def gather(names: Collection[str]) -> int:
        found.update(list(names))
        here.update(names)
        return sum(numel[name] for name in names)

    for module, begins, weights in turns:
        if begins:
            gathered += gather([name for name in weights if name not in here])
            late = {name for name in weights if passed[name] < step}
            while queue and late:
                name, passed_step = queue.popleft()
                passed[name] = passed_step
                late.discard(name)
            ahead: dict[str, int] = {}
            while queue and sum(ahead.values()) < min(live - gathered, prefetch):
                name, passed_step = queue.popleft()
                passed[name] = max(passed[name], passed_step)
                if name not in here:
                    ahead[name] = numel[name]
            gathered += gather(ahead)
            for name in weights:
                users[name].add(module)
            step += 1
            continue
        soon = _used_within(steps[step:], numel, live)
        for name in weights:
            users[name].discard(module)
            if name in here and not (name in kept or users[name] or passed[name] > step or name in soon):
                here.remove(name)
                gathered -= numel[name]
    return found


def _used_within(steps: list[tuple[str, ...]], numel: Mapping[str, int], live: int) -> set[str]:
    used: set[str] = set()
    elements = 0
    for weights in steps:
        if elements >= live:
            break
        used.update(weights)
        elements += sum(numel[name] for name in weights)
    return used


def turns_of(config: ModelConfig, table: Table, recomputed: Collection[int]) -> list[Turn]:
    """The modules of a model forward and backward. recomputed: places of the stack whose block runs again."""
    head = ("embedding.weight" if config.tie_embeddings else "head.weight",)
    first = [*_module("embedding", table)]
    blocks = [list(_module(f"blocks.{place}", table)) for place in config.places]
    last = [*_module("norm", table), Turn("head", True, head), Turn("head", False, head)]
    turns = [*first, *(turn for block in blocks for turn in block), *last, *_backward(last)]
    for index in reversed(range(len(blocks))):
        block, again = _backward(blocks[index]), blocks[index] if index in recomputed else []
        reach = next((at for at, turn in enumerate(block) if not turn.begins), 0)
        turns += [*block[:reach], *_until_last(again), *block[reach:]]
    return turns + _backward(first)


def _module(path: str, table: Table) -> Iterator[Turn]:
    """A module, with those in it between its begin and its end."""
    inside = [name.removeprefix(f"{path}.") for name in table if name.startswith(f"{path}.")]
    own = tuple(f"{path}.{name}" for name in inside if "." not in name)
    yield Turn(path, True, own)
    for child in dict.fromkeys(name.partition(".")[0] for name in inside if "." in name):
        yield from _module(f"{path}.{child}", table)
    yield Turn(path, False, own)


def _backward(turns: list[Turn]) -> list[Turn]:
    return [turn._replace(begins=not turn.begins) for turn in reversed(turns)]


def _until_last(turns: list[Turn]) -> list[Turn]:
    """What runs again: it stops in the last module, as soon as all that the backward pass wants is there."""
    at = max((index for index, turn in enumerate(turns) if turn.begins), default=-1)
    return turns[: at + 1]
