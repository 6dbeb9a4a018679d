"""Deletes the checkpoints of RUN that a policy lets go, as training does by the keys of [checkpoints].

The newest good ones always stay, and so does anything newer. A run that is training is left alone.
"""

import argparse

from launch.commands.arguments import find_run


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder or its name")
    parser.add_argument("--keep-last", type=int, required=True, metavar="N", help="newest good ones that stay")
    parser.add_argument("--keep-every-tokens", type=int, metavar="K", help="also the first of every K tokens")
    parser.add_argument("--keep-best", type=int, default=0, metavar="N", help="also the N of lowest validation loss")
    parser.add_argument("--broken", action="store_true", help="also damaged ones that were set aside (.broken-*)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")


def run(arguments: argparse.Namespace) -> int:
    folder = find_run(arguments.run)
    from launch.checkpoints import prune
    from train.checkpoint.retention import Retention

    policy = Retention(arguments.keep_last, arguments.keep_every_tokens, arguments.keep_best)
    gone = prune(folder, policy, broken=arguments.broken, dry_run=arguments.dry_run)
    verb = "would go" if arguments.dry_run else "deleted"
    for path in gone:
        print(f"{path.name}: {verb}")
    if not gone:
        print("nothing to delete")
    return 0
