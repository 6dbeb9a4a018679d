"""Arguments that commands share."""

import argparse


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """RECIPE and its overrides."""
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file, or the name of a shipped recipe (quickstart)")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="keys of the recipe to change; the value is TOML, as in training.tokens=2_000_000",
    )
