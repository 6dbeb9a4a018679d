"""Arguments that commands share."""

import argparse
from importlib.util import find_spec
from pathlib import Path


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


def find_run(name: str) -> Path:
    """The run folder, given its path or its name in runs/. Raises ValueError when there is none."""
    for folder in (Path(name), Path("runs") / name):
        if folder.is_dir():
            return folder
    runs = sorted(path.parent.name for path in Path("runs").glob("*/recipe.json"))
    there = f"runs/ has {', '.join(runs)}" if runs else "there is none in runs/ yet, braid train makes one"
    raise ValueError(f"run: got {name!r}, wants a run folder or its name; {there}")


def require_lm_eval() -> None:
    """Raises ValueError when lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed, and evaluation needs it: pip install 'braid[eval]'")
