"""Continues a prompt with the newest checkpoint of RUN.

RUN is a run folder (runs/quickstart), its name (quickstart) or one checkpoint's folder. What is not given comes from
the [generation] section of the run's recipe.
"""

import argparse
from dataclasses import replace

from launch.commands.arguments import find_run


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder or its name")
    parser.add_argument("--prompt", help="text to continue")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="length of the continuation, in tokens")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, metavar="X", help="sample from the likeliest tokens of this total share")
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling")
    parser.add_argument("--keep", action="store_true", help="also add the text to RUN/samples.md, for braid report")


def run(arguments: argparse.Namespace) -> int:
    folder = find_run(arguments.run)
    from launch.sample import keep, sample
    from train.config import GenerationConfig, Recipe

    stored = folder / "recipe.json"
    settings = Recipe.from_json(stored.read_text(), str(stored)).generation if stored.exists() else GenerationConfig()
    given = {key: value for key, value in vars(arguments).items() if key not in ("run", "keep") and value is not None}
    settings = replace(settings, **given)
    if not settings.prompt:
        raise ValueError("--prompt: missing, and the run's recipe has none; wants text to continue")
    checkpoint, pieces = sample(folder, settings)
    text = settings.prompt
    print(text, end="", flush=True)
    for piece in pieces:
        text += piece
        print(piece, end="", flush=True)
    print()
    if arguments.keep:
        keep(checkpoint, settings, text)
    return 0
