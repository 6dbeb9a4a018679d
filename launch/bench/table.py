"""Results as one table for people."""

from collections.abc import Sequence
from typing import Any

from launch.bench.machine import in_words
from launch.bench.measure import Result
from launch.bench.row import Row, Side

HEADINGS = ("row", "ours", "peer", "ratio", "unit", "peer is")
NOT_INSTALLED = "not installed"


def render(results: Sequence[Result], machine: dict[str, Any]) -> str:
    """The table, what each row says besides its numbers, and the machine."""
    lines = _aligned([HEADINGS, *map(_cells, results)])
    lines.append("")
    lines.append(
        "The round with the median ratio, ± half the range of all; a ratio above 1: ours is better (its range)."
    )
    for result in results:
        more = result.row.derive(result.ours, result.peer)
        facts = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in more.items()]
        words = [word for word in (", ".join(facts), result.row.note) if word]
        if words:
            lines.append(f"{result.row.name}: {'. '.join(words)}")
    lines.append(in_words(machine))
    return "\n".join(lines)


def render_list(rows: Sequence[Row]) -> str:
    """What each row measures, and what it is compared with."""
    lines = []
    for row in rows:
        missing = row.missing
        state = f" ({NOT_INSTALLED}: pip install {' '.join(missing)})" if missing else ""
        where = ", on a GPU" if row.cuda else ""
        lines += [f"{row.name} [{row.unit}{where}]", f"  {row.measures}", f"  peer: {row.peer_name}{state}"]
    return "\n".join(lines)


def _cells(result: Result) -> tuple[str, ...]:
    ratio = "-"
    if result.ratio is not None and result.ratios is not None:
        low, high = result.ratios
        ratio = f"{result.ratio:.2f} ({low:.2f}-{high:.2f})"
    peer = NOT_INSTALLED if result.peer is None else _value(result.peer)
    return (result.row.name, _value(result.ours), peer, ratio, result.row.unit, result.row.peer_name)


def _value(side: Side) -> str:
    low, high = side.spread
    share = (high - low) / 2 / side.value if side.value else 0.0
    number = f"{side.value:,.0f}" if abs(side.value) >= 1000 else f"{side.value:.3g}"
    return f"{number} ±{100 * share:.0f}%"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
