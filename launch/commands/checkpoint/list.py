"""Lists the checkpoints of RUN, oldest first: size, validation, and whether its files are there.

Sizes alone are compared; `braid verify RUN` reads every byte.
"""

import argparse
import json
import sys

from launch.commands.arguments import find_run


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder or its name")
    parser.add_argument("--json", action="store_true", help="a list of objects on stdout")


def run(arguments: argparse.Namespace) -> int:
    folder = find_run(arguments.run)
    from launch.checkpoints import summaries, table

    rows = summaries(folder / "checkpoints")
    if arguments.json:
        json.dump(rows, sys.stdout, indent=2)
        print()
    else:
        print(table(rows))
    return 0
