"""Checks that nothing is damaged: every file and hash of a run, a checkpoint or prepared data, read in full.

With --resume, PATH is a recipe: three short runs prove on this machine that a killed run resumes on the same curve, bit
for bit, and on another number of ranks with the same batches. A recipe with tensor, context or expert ranks is resumed
on one rank without them, unless --other-nproc says on how many with them.
"""

import argparse
import tempfile
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a run or its name, a checkpoint, prepared data; or a recipe")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="of the recipe")
    parser.add_argument("--resume", action="store_true", help="train the recipe, kill it, resume it, and compare")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="of each run of --resume (default: 12)")
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks of --resume (default: as few as fill its mesh)")
    parser.add_argument("--other-nproc", type=int, metavar="N", help="ranks that resume (default: 1, or 2 after 1)")
    parser.add_argument("--json", action="store_true", help="the results as JSON on stdout")


def run(arguments: argparse.Namespace) -> int:
    return _drill(arguments) if arguments.resume else _verify(arguments)


def _verify(arguments: argparse.Namespace) -> int:
    from launch.commands.arguments import find_run

    if arguments.overrides:
        raise ValueError(f"verify: got {arguments.overrides[0]!r}, which only --resume understands")
    folder = find_run(arguments.path)
    import json

    from launch.verify import checks

    results = []
    for what, check in checks(folder):
        try:
            found, problem = check(), None
        except (ValueError, OSError) as error:
            found, problem = "", str(error)
        results.append({"what": what, "found": found, "problem": problem})
        if not arguments.json:
            print(f"{what}: {found}" if problem is None else f"{what}: DAMAGED: {problem}", flush=True)
    if arguments.json:
        print(json.dumps(results, indent=2))
    damaged = [result for result in results if result["problem"] is not None]
    if damaged:
        raise ValueError(f"{arguments.path}: {len(damaged)} of {len(results)} checks failed")
    return 0


def _drill(arguments: argparse.Namespace) -> int:
    from launch.recipes import find_recipe

    if arguments.steps < 6:
        raise ValueError(f"--steps: got {arguments.steps}, wants at least 6")
    recipe = find_recipe(arguments.path)
    from launch.drill import Drill, outcome_lines

    with tempfile.TemporaryDirectory(prefix="braid-verify-") as scratch:
        drill = Drill(
            recipe,
            arguments.overrides,
            ranks=arguments.nproc,
            others=arguments.other_nproc,
            steps=arguments.steps,
            folder=Path(scratch),
        )
        reference = drill.uninterrupted()
        outcomes = []
        for attempt in (drill.killed, drill.moved):
            outcome = attempt(reference)
            outcomes.append(outcome)
            if not arguments.json:
                verdict = "holds" if outcome.problem is None else f"DIFFERS: {outcome.problem}"
                print(f"{outcome.what}: {outcome.steps} steps, losses within {outcome.difference:.1e}: {verdict}")
    if arguments.json:
        print(outcome_lines(outcomes))
    if any(outcome.problem for outcome in outcomes):
        raise ValueError(f"{arguments.path}: does not resume exactly on this machine")
    return 0
