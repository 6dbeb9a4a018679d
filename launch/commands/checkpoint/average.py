"""Averages the weights of the newest checkpoints of RUN into a new one, in the same format.

It lies in RUN/averaged-.../ and works wherever a checkpoint's folder does: braid eval, generate, export. It has no
optimizer states, so training does not resume from it.
"""

import argparse
from pathlib import Path

from launch.commands.arguments import find_run


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder or its name")
    parser.add_argument("--last", type=int, metavar="N", help="the newest N good checkpoints (default: all)")
    parser.add_argument("--ema", type=float, metavar="DECAY", help="exponential moving average instead of the mean")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: in RUN, named after what was averaged")


def run(arguments: argparse.Namespace) -> int:
    folder = find_run(arguments.run)
    from launch.checkpoints import average_run

    done = average_run(folder, arguments.last, arguments.ema, arguments.output)
    for entry in done.extra["averaged"]:
        print(f"{entry['share']:.4f} of {entry['checkpoint']}")
    print(done.folder)
    return 0
