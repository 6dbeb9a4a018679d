"""The recipes that Braid ships."""

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
    close = difflib.get_close_matches(Path(name).stem, shipped(), n=1)
    hint = f"did you mean {close[0]}?" if close else f"shipped recipes: {', '.join(shipped())}"
    raise ValueError(f"recipe: got {name!r}, which is no file and no shipped recipe; {hint}")
