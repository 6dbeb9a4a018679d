"""The benchmarks: one file each, or each family, which lists its rows in `ROWS`. A new file is all that a row needs."""

import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path

from launch.bench.row import Row


def all_rows() -> dict[str, Row]:
    """Every row by its name, in the order of the files' names."""
    rows: dict[str, Row] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem == "__init__":
            continue
        for row in importlib.import_module(f"{__name__}.{path.stem}").ROWS:
            assert row.name not in rows, f"{path.name}: the row {row.name} is there already"
            rows[row.name] = row
    return rows


def choose(names: Sequence[str]) -> list[Row]:
    """The rows of these names, each once; all when there are none. Raises ValueError for an unknown name."""
    rows = all_rows()
    for name in names:
        if name not in rows:
            close = difflib.get_close_matches(name, rows, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"wants one of {', '.join(rows)}"
            raise ValueError(f"row: got {name!r}; {hint}")
    return [rows[name] for name in dict.fromkeys(names)] if names else list(rows.values())
