"""Two ranks beside one process: what the ways to share a model cost on the cores of one machine.

Both sides train the quickstart recipe on the same number of rows a step and have two cores: ours as two ranks of one
thread each, which talk by gloo, the peer as one process of two threads. A ratio of 1 means that sharing is free.
"""

from collections.abc import Iterator

from launch.bench.row import Measure, Reading, Row

STEPS, QUICK_STEPS = 2, 1


def one_process(quick: bool) -> Iterator[Reading]:
    import torch

    from launch.bench.rows.train_quickstart import quickstart
    from launch.bench.training import braid

    torch.set_num_threads(2)
    return braid(quickstart(), QUICK_STEPS if quick else STEPS)


def data_2(quick: bool) -> Iterator[Reading]:
    return _two_ranks(quick)


def tensor_2(quick: bool) -> Iterator[Reading]:
    return _two_ranks(quick, "parallel.tensor=2")


def context_2(quick: bool) -> Iterator[Reading]:
    return _two_ranks(quick, "parallel.context=2")


def _two_ranks(quick: bool, *overrides: str) -> Iterator[Reading]:
    import torch

    from launch.bench.rows.train_quickstart import quickstart
    from launch.bench.together import rounds

    torch.set_num_threads(2)  # of both ranks together
    recipe, steps = quickstart(*overrides), QUICK_STEPS if quick else STEPS
    for seconds in rounds(2, "launch.bench.training:braid_rank", (recipe, steps)):
        yield Reading(steps * recipe.training.tokens_per_step / seconds.value)


NOTE = (
    "the same recipe, rows a step and cores on both sides: two ranks of one thread each, which talk by gloo over the "
    "loopback, beside one process of two threads"
)


def _row(name: str, shared: str, ours: Measure, note: str) -> Row:
    return Row(
        name=name,
        measures=f"Training step of the quickstart recipe on two ranks that share {shared}.",
        ours=ours,
        peer=one_process,
        peer_name="one process, two threads",
        note=f"{NOTE}. {note}",
    )


ROWS = (
    _row("ranks_dp_2", "the batch", data_2, "Gradients are summed and stepped weights gathered (ZeRO 1)"),
    _row("ranks_tp_2", "the weights", tensor_2, "Every layer gathers its input and scatters its output"),
    _row("ranks_cp_2", "the tokens", context_2, "States and the window's keys and values pass from rank to rank"),
)
