"""Trains the model of RECIPE, or resumes it where it stopped.

The run lives in runs/NAME/: recipe.json, metrics.jsonl, checkpoints/. SIGTERM, SIGUSR1, SIGHUP or Ctrl-C save and exit
with 75; the same command resumes. Run `braid prepare` first.
"""

import argparse

from launch.commands.arguments import add_recipe


def configure(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="ranks on this machine (default: 1)")
    parser.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="machines that run this same command (default: 1)"
    )
    parser.add_argument(
        "--rendezvous", metavar="HOST:PORT", help="where they find each other: one of them, a free port"
    )
    parser.add_argument(
        "--restarts", type=int, default=0, metavar="N", help="start failed ranks again, so often at most (default: 0)"
    )


def run(arguments: argparse.Namespace) -> int:
    from launch import local
    from launch.recipes import find_recipe

    machines = local.Machines(arguments.nodes, arguments.rendezvous, arguments.restarts)
    return local.run(find_recipe(arguments.recipe), arguments.overrides, arguments.nproc, machines)
