"""Arguments that commands share."""

import argparse
from pathlib import Path


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """RECIPE and its overrides."""
    known = "quickstart, tiny-samba, samba-421m, ...; launch/recipes/README.md has all"
    parser.add_argument("recipe", metavar="RECIPE", help=f"a TOML file, or the name of a shipped recipe ({known})")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="keys of the recipe to change; the value is TOML, as in training.tokens=2_000_000",
    )


def find_run(name: str) -> Path:
    """The run folder, given its path or its name in runs/. Raises ValueError when there is none."""
    for folder in (Path(name), Path("runs") / name):
        if folder.is_dir():
            return folder
    runs = sorted(path.parent.name for path in Path("runs").glob("*/recipe.json"))
    there = f"runs/ has {', '.join(runs)}" if runs else "there is none in runs/ yet, braid train makes one"
    raise ValueError(f"run: got {name!r}, wants a run folder or its name; {there}")
