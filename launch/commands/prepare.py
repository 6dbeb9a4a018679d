"""Turns the recipe's raw text into a tokenizer and token shards, which `braid train` reads.

What is done already is not done again: an interrupted preparation goes on, a finished one is checked and kept.
"""

import argparse

from launch.commands.arguments import add_recipe


def configure(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)


def run(arguments: argparse.Namespace) -> int:
    from launch.recipes import find_recipe

    path = find_recipe(arguments.recipe)
    from data.prepare import prepare
    from train.config import load_recipe

    prepare(load_recipe(path, arguments.overrides).data)
    return 0
