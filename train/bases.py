"""Recipes that build on others: `base = "samba-421m"` takes that recipe and lays this file's keys over it.

A base is the bare name of a recipe beside the file or of a shipped one, or a path, and may have a base itself. Tables
are merged key by key; a section of another `kind` replaces the base's, and a layer that is "none" takes it out. `name`
is not inherited: it is the run's folder.
"""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.reading import ConfigError

SHIPPED = Path(__file__).parents[1] / "launch" / "recipes"


class Stage(NamedTuple):
    """One file's own keys, without `base`. source: its path, for errors."""

    source: str
    values: dict[str, Any]


def read_stages(path: Path) -> list[Stage]:
    """The recipe's file, then its base, then that one's. Raises ConfigError naming the file that is wrong."""
    stages: list[Stage] = []
    seen: list[Path] = []
    following: Path | None = path
    while following is not None:
        if following.resolve() in seen:
            raise ConfigError("base", f"got {following.stem!r}, which builds on this recipe", stages[-1].source)
        seen.append(following.resolve())
        values = read_toml(following)
        base = values.pop("base", None)
        if stages:
            values.pop("name", None)
        stages.append(Stage(str(following), values))
        following = None if base is None else _find(base, following)
    return stages


def merged(stages: Sequence[Stage]) -> dict[str, Any]:
    """One table of all stages, the first uppermost."""
    values: dict[str, Any] = {}
    for stage in reversed(stages):
        values = _over(values, stage.values)
    match values:
        case {"model": {"layers": dict(layers)}} if len(stages) > 1:
            values["model"]["layers"] = {letter: layer for letter, layer in layers.items() if layer != "none"}
    return values


def origin(key: str, stages: Sequence[Stage]) -> str:
    """The file that a dotted key of the merged table comes from; the recipe's own for keys that none has."""
    return next((stage.source for stage in stages if _has(stage.values, key)), stages[0].source)


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError("", "no such recipe file", str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError("", f"not valid UTF-8 at byte {error.start}", str(path)) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("", f"not valid TOML: {error}", str(path)) from None


def _find(base: Any, path: Path) -> Path:
    """The file that the recipe at `path` names as its base."""
    if not isinstance(base, str):
        raise ConfigError("base", f"got {base!r}, wants the name of a recipe or a path, as a string", str(path))
    places = (path.parent / base, path.parent / f"{base}.toml", SHIPPED / f"{base}.toml")
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        names = {place.stem for folder in (path.parent, SHIPPED) for place in folder.glob("*.toml")} - {path.stem}
        close = difflib.get_close_matches(base, sorted(names), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        wants = "a path, or the name of a recipe beside it or of a shipped one"
        raise ConfigError("base", f"got {base!r}, wants {wants}{hint}", str(path))
    return found


def _over(below: Any, above: Any) -> Any:
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    if "kind" in above and below.get("kind", above["kind"]) != above["kind"]:
        return above
    return {**below, **{key: _over(below.get(key), value) for key, value in above.items()}}


def _has(values: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return False
        values = values[name]
    return True
