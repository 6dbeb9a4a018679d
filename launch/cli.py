"""The `braid` command: finds the subcommand, runs it, and turns a user's mistakes into one line each."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import NoReturn

from train.mistakes import describe
from train.rank import explained, report
from train.stop import EXIT_USER_ERROR

COMMANDS = {
    "prepare": "raw text to tokenizer and token shards; resumable",
    "train": "train the recipe's model, or resume it where it stopped",
    "launch": "start a run's ranks: here under torchrun's agent, or as a Slurm job",
    "generate": "continue a prompt with a trained run",
    "eval": "score a run: lm-eval tasks, built-in probes, perplexity by length",
    "lm-eval": "lm-eval's own command line, which knows --model braid",
    "report": "one page of curves about a run, or several side by side",
    "export": "publish a run as a Hugging Face folder",
    "checkpoint": "list, show, prune or average the checkpoints of a run",
    "verify": "read every byte of a run and its data, or prove that a recipe resumes exactly",
    "bench": "side-by-side speed against the peers installed here, one table",
}
"""Name of a command, which is that of its module in launch/commands/ (with _ for -), and what it does. A command that
has commands of its own is a package with such a table; one that has `forward` reads its words itself."""

HELP = """\
usage: braid COMMAND [ARGUMENTS]

Pretrains hybrid state-space language models.

{commands}

`braid COMMAND --help` explains a command. RECIPE is a TOML file or the name of a shipped recipe.

exit codes: 0 done; 2 a mistake in what was asked for, named in one line; 74 another rank died or stands still, it is
named; 75 stopped by a signal after saving, the same command resumes; 76 training stopped itself because updates stayed
non-finite; 130 interrupted; others are failures.
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
        if line is None and explained():
            return 1
        if line is None:
            raise
        report(line)
        return EXIT_USER_ERROR


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(commands=_table(COMMANDS)))
        return 0 if arguments else EXIT_USER_ERROR
    name, *rest = arguments
    return _run_one("launch.commands", COMMANDS, "braid", name, rest)


def _run_one(package: str, commands: Mapping[str, str], program: str, name: str, arguments: list[str]) -> int:
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {close[0]}?" if close else f"wants one of {', '.join(commands)}"
        raise ValueError(f"{'command' if program == 'braid' else program}: got {name!r}; {hint}")
    module, program = f"{package}.{name.replace('-', '_')}", f"{program} {name}"
    command = importlib.import_module(module)
    if hasattr(command, "forward"):
        return command.forward(arguments)
    if hasattr(command, "COMMANDS"):
        return _run_group(command, program, arguments)
    parser = Parser(prog=program, description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.configure(parser)
    return command.run(parser.parse_intermixed_args(arguments))


def _run_group(command: ModuleType, program: str, arguments: list[str]) -> int:
    if arguments and arguments[0] not in ("-h", "--help", "help"):
        return _run_one(command.__name__, command.COMMANDS, program, arguments[0], arguments[1:])
    print(f"usage: {program} COMMAND [ARGUMENTS]\n\n{command.__doc__}\n\n{_table(command.COMMANDS)}")
    print(f"\n`{program} COMMAND --help` explains a command.")
    return 0 if arguments else EXIT_USER_ERROR


def _table(commands: Mapping[str, str]) -> str:
    width = max(map(len, commands))
    return "\n".join(f"  {name:{width}}  {what}" for name, what in commands.items())
