"""Measures Braid beside the peers that are installed here, one row per benchmark; when none is named, all that can run
here.

Both sides run in the same environment and take turns, round by round. A ratio above 1 means that Braid is better. Exit
code 1 when a row failed; the others are printed all the same.
"""

import argparse
import json
import sys

from launch.bench.row import Measure, Reading, Row

ROUNDS, QUICK_ROUNDS = 7, 2


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", nargs="*", metavar="ROW", help="what to measure (default: all that can run)")
    parser.add_argument("--json", action="store_true", help="a JSON list of rows on stdout, and nothing else there")
    parser.add_argument("--list", action="store_true", help="say what each row measures, and measure nothing")
    parser.add_argument("--quick", action="store_true", help="few and short rounds: the order of magnitude")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"readings of each side (default: {ROUNDS}; quick: {QUICK_ROUNDS})"
    )


def run(arguments: argparse.Namespace) -> int:
    from launch.bench.rows import choose
    from launch.bench.table import render_list

    usual = QUICK_ROUNDS if arguments.quick else ROUNDS
    rounds = usual if arguments.rounds is None else arguments.rounds
    if rounds < 1:
        raise ValueError(f"--rounds: got {rounds}, wants a positive number")
    rows = choose(arguments.rows)
    if arguments.list:
        print(json.dumps([_listed(row) for row in rows], indent=2) if arguments.json else render_list(rows))
        return 0
    rows = _possible(rows, named=bool(arguments.rows))
    return measure_rows(rows, rounds, arguments.quick, arguments.json)


def _possible(rows: list[Row], named: bool) -> list[Row]:
    """The rows that can run here. Raises ValueError when one that was named cannot."""
    import torch

    stuck = [] if torch.cuda.is_available() else [row.name for row in rows if row.cuda]
    if stuck and named:
        raise ValueError(f"row: got {', '.join(stuck)}, which needs a GPU; torch finds no CUDA device here")
    if stuck:
        _say(f"left out, for want of a GPU: {', '.join(stuck)}")
    return [row for row in rows if row.name not in stuck]


def measure_rows(rows: list[Row], rounds: int, quick: bool, as_json: bool) -> int:
    """Measures and prints `rows`; returns the exit code: 1 when a row failed, after the others were measured."""
    from launch.bench import machine
    from launch.bench.measure import SideFailed, environment, measure
    from launch.bench.table import render

    here = machine.describe(environment())
    results, failed = [], False
    known: dict[Measure, list[Reading]] = {}
    for row in rows:
        try:
            results.append(measure(row, rounds, quick, _say, known))
        except SideFailed as error:
            failed = True
            print(f"braid: error: {row.name}: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps([result.to_dict(here) for result in results], indent=2, allow_nan=False))
    elif results:
        print(render(results, here))
    return int(failed)


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _listed(row: Row) -> dict[str, object]:
    return {
        "name": row.name,
        "measures": row.measures,
        "unit": row.unit,
        "higher_is_better": row.higher_is_better,
        "peer_name": row.peer_name,
        "missing": row.missing,
        "cuda": row.cuda,
        "note": row.note,
    }
