"""Shows what is in one checkpoint: its place on the clock, model, data, tensors by kind, files.

CHECKPOINT is a checkpoint's folder, or a run, whose newest is meant.
"""

import argparse
import json
import sys

from launch.commands.arguments import find_run


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint's folder, or a run")
    parser.add_argument("--tensors", action="store_true", help="every tensor with shape and dtype")
    parser.add_argument("--json", action="store_true", help="the manifest's summary as one object on stdout")


def run(arguments: argparse.Namespace) -> int:
    folder = find_run(arguments.checkpoint)
    from launch.checkpoints import describe, open_one, tensor_lines

    checkpoint = open_one(folder)
    if arguments.json:
        json.dump(describe(checkpoint), sys.stdout, indent=2)
        print()
        return 0
    facts = describe(checkpoint)
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value if isinstance(value, str) else json.dumps(value)}")
    if arguments.tensors:
        print("\n".join(["", *tensor_lines(checkpoint)]))
    return 0
