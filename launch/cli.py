"""The `braid` command: finds the subcommand, runs it, and turns a user's mistakes into one line each."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from train.mistakes import describe
from train.stop import EXIT_USER_ERROR

COMMANDS = {
    "prepare": "raw text to tokenizer and token shards; resumable",
    "train": "train the recipe's model, or resume it where it stopped",
    "generate": "continue a prompt with a trained run",
    "bench": "side-by-side speed against the peers installed here, one table",
}
"""Name of a command, which is that of its module in launch/commands/, and what it does."""

HELP = """\
usage: braid COMMAND [ARGUMENTS]

Pretrains hybrid state-space language models.

{commands}

`braid COMMAND --help` explains a command. RECIPE is a TOML file or the name of a shipped recipe.

exit codes: 0 done; 2 a mistake in what was asked for, named in one line; 75 stopped by a signal after saving, the same
command resumes; 76 training stopped itself because updates stayed non-finite; 130 interrupted; others are failures.
BRAID_DEBUG=1 shows the traceback of a mistake."""

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (`{self.prog} --help` explains)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `braid ARGUMENTS` and returns its exit code."""
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        line = describe(error)
        if line is None:
            raise
        print(f"braid: error: {line}", file=sys.stderr)
        return EXIT_USER_ERROR


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(HELP.format(commands="\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())))
        return 0 if arguments else EXIT_USER_ERROR
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"wants one of {', '.join(COMMANDS)}"
        raise ValueError(f"command: got {name!r}; {hint}")
    command = importlib.import_module(f"launch.commands.{name}")
    parser = Parser(
        prog=f"braid {name}", description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.configure(parser)
    return command.run(parser.parse_intermixed_args(rest))
