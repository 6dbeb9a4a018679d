"""Trains the model of RECIPE, or resumes it where it stopped.

The run lives in runs/NAME/: recipe.json, metrics.jsonl, checkpoints/. SIGTERM, SIGUSR1, SIGHUP or Ctrl-C save and exit
with 75; the same command resumes. Run `braid prepare` first.
"""

import argparse

from launch.commands.arguments import add_recipe


def configure(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="ranks on this machine (default: 1)")


def run(arguments: argparse.Namespace) -> int:
    from launch import local
    from launch.recipes import find_recipe

    return local.run(find_recipe(arguments.recipe), arguments.overrides, arguments.nproc)
