"""Writes one HTML page about RUN, or about several runs side by side, that needs no network and no server.

Loss, validation, learning rate, gradient norm, throughput and MFU, with the braid drawn as a strip of layers, samples,
evaluations, events and the recipe.
"""

import argparse
from pathlib import Path

from launch.commands.arguments import find_run


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder or its name")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.html in the run, or here for several"
    )


def run(arguments: argparse.Namespace) -> int:
    folders = [find_run(name) for name in arguments.runs]
    from data.files import write_durably
    from launch.report.page import page
    from launch.report.record import names, read_run

    output = arguments.output or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    records = [read_run(folder, name) for folder, name in zip(folders, names(folders), strict=True)]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_durably(output, page(records).encode())
    print(output)
    return 0
