"""The recipes that Braid ships; README.md beside this file has a table of them."""

import difflib
from pathlib import Path

FOLDER = Path(__file__).parent


def shipped() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe, given its path or the bare name of a shipped one. Raises ValueError when there is none."""
    if Path(name).is_file():
        return Path(name)
    if name in shipped():
        return FOLDER / f"{name}.toml"
    raise ValueError(f"recipe: got {name!r}, which is no file and no shipped recipe; {_hint(Path(name).stem)}")


def _hint(name: str) -> str:
    """The recipes whose names begin like this, else the nearest name, else all of them."""
    family = [known for known in shipped() if name and known.startswith(name)]
    near = family or difflib.get_close_matches(name, shipped(), n=1)
    return f"did you mean {' or '.join(near)}?" if near else f"shipped recipes: {', '.join(shipped())}"
