"""Puts the page together: text is written here, curves are drawn by `report.js` in the browser."""

import datetime
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

from launch.report.record import RunRecord, marks
from model.config import ModelConfig
from model.hybrid import parameter_count

HERE = Path(__file__).parent
RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5fb0", "#8a8a3a")
"""Okabe and Ito's palette, which most colour-blind people tell apart, and two more."""
KIND_COLOURS = ("#3b6fb6", "#c8553d", "#8fa998", "#e0a458", "#7d5ba6", "#4c9f9b", "#b56576", "#6c757d")
SHOWN_EVENTS = 500


def page(runs: Sequence[RunRecord]) -> str:
    """The whole page as HTML, without anything to load."""
    template = (HERE / "page.html").read_text(encoding="utf-8")
    title = ", ".join(run.name for run in runs)
    parts = {
        "TITLE": escape(title),
        "STYLE": (HERE / "report.css").read_text(encoding="utf-8"),
        "SCRIPT": (HERE / "report.js").read_text(encoding="utf-8"),
        "HEAD": "\n".join(_head(run, colour) for run, colour in zip(runs, _colours(runs), strict=True)),
        "SUMMARY": _comparison(runs) if len(runs) > 1 else "",
        "AFTER": "\n".join(_after(run, alone=len(runs) == 1) for run in runs),
        "MADE": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "DATA": _embedded([_data(run, colour) for run, colour in zip(runs, _colours(runs), strict=True)]),
    }
    pieces = template.split("@@")
    assert set(pieces[1::2]) == set(parts), "page.html and its parts do not match"
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def _colours(runs: Sequence[RunRecord]) -> list[str]:
    return [RUN_COLOURS[index % len(RUN_COLOURS)] for index in range(len(runs))]


def _embedded(value: Any) -> str:
    """JSON that no text in it can end."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _data(run: RunRecord, colour: str) -> dict[str, Any]:
    """What the script draws."""
    finished = run.of("finished")
    by_step = {event["step"]: event for event in run.of("validation")}
    checks = sorted(by_step.values(), key=lambda event: event["step"])
    return {
        "name": run.name,
        "colour": colour,
        "steps": run.curves.steps,
        "tokens": run.curves.tokens,
        "mean": run.curves.mean,
        "low": run.curves.low,
        "high": run.curves.high,
        "thinned": run.curves.rows > len(run.curves.steps),
        "validation": {
            "steps": [event["step"] for event in checks],
            "tokens": [event["tokens"] for event in checks],
            "loss": [event["loss"] for event in checks],
            "bits_per_byte": [event["bits_per_byte"] for event in checks],
        },
        "zlib": finished[-1].get("zlib_bits_per_byte") if finished else None,
        "xz": finished[-1].get("xz_bits_per_byte") if finished else None,
        "marks": marks(run),
    }


def config_of(run: RunRecord) -> ModelConfig | None:
    """The architecture of a run, None when its recipe is not there or of another version."""
    try:
        return ModelConfig.from_dict(run.recipe["model"])
    except (KeyError, TypeError, ValueError):
        return None


def _head(run: RunRecord, colour: str) -> str:
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in summary(run).items())
    config = config_of(run)
    return (
        f'<section class="run" style="--run:{colour}"><h2><i></i>{escape(run.name)}</h2><dl>{facts}</dl>'
        f"{strip(config) if config is not None else ''}</section>"
    )


def summary(run: RunRecord) -> dict[str, str]:
    """The numbers that one asks for first, ready to read."""
    config, last = config_of(run), run.last
    best = min((event["bits_per_byte"] for event in run.of("validation")), default=None)
    target = run.recipe.get("training", {}).get("tokens")
    tokens = run.curves.tokens[-1]
    facts = {
        "status": run.status,
        "parameters": "?" if config is None else short(parameter_count(config)),
        "tokens": short(tokens) + (f" of {short(target)}" if target and tokens < target else ""),
        "steps": f"{run.curves.steps[-1]:,}",
        "last loss": "none" if last["loss"] is None else f"{last['loss']:.4f}",
        "best validation": "none" if best is None else f"{best:.4f} bits per byte",
        "throughput": "?" if not last["tokens_per_s"] else f"{short(last['tokens_per_s'])} tokens/s",
        "MFU": "?" if last["mfu"] is None else f"{last['mfu']:.1%}",
    }
    if run.curves.lost:
        facts["steps without a finite loss"] = f"{run.curves.lost:,}"
    times = [event["time"] for event in run.events if "time" in event]
    if times:
        facts["last event"] = datetime.datetime.fromtimestamp(max(times)).astimezone().strftime("%Y-%m-%d %H:%M")
    return facts


def short(number: float, units: Sequence[str] = "TBMk") -> str:
    """1,234,567 -> 1.23M."""
    for least, unit in zip((1e12, 1e9, 1e6, 1e3), units, strict=True):
        if abs(number) >= least:
            return f"{number / least:.3g}{unit}"
    return f"{number:.3g}"


def size(bytes_: float) -> str:
    """1,234,567 -> 1.23 MB."""
    return short(bytes_, (" TB", " GB", " MB", " kB")) if bytes_ >= 1e3 else f"{bytes_:.3g} B"


def strip(config: ModelConfig) -> str:
    """The braid as a row of coloured cells, one a layer and parallel ones above each other, with a legend."""
    kinds = sorted({layer.kind for layer in config.layers.values()})
    stacked = "".join(config.blocks)
    letters = list(dict.fromkeys(stacked))
    shades = {letter: _shade(letter, letters, config, kinds) for letter in letters}

    def cell(index: int, letter: str) -> str:
        title = f"layer {index}: {escape(_describe(letter, config))}"
        return f'<b style="background:{shades[letter]}" title="{title}">{escape(letter)}</b>'

    cells = ""
    for index, parallel in enumerate(config.blocks):
        cell_or_more = "".join(cell(index, letter) for letter in parallel)
        cells += cell_or_more if len(parallel) == 1 else f"<span>{cell_or_more}</span>"
    legend = "".join(
        f'<li><b style="background:{shades[letter]}">{escape(letter)}</b>{stacked.count(letter)} × '
        f"{escape(_describe(letter, config))}{', one set of weights' if letter in config.shared else ''}</li>"
        for letter in letters
    )
    return f'<div class="strip">{cells}</div><ul class="legend">{legend}</ul>'


def _shade(letter: str, letters: Sequence[str], config: ModelConfig, kinds: Sequence[str]) -> str:
    """The kind's colour; further letters of one kind are lighter."""
    kind = config.layers[letter].kind
    place = [other for other in letters if config.layers[other].kind == kind].index(letter)
    colour = KIND_COLOURS[kinds.index(kind) % len(KIND_COLOURS)]
    return colour if place == 0 else f"color-mix(in srgb, {colour} {max(40, 100 - 25 * place)}%, white)"


def _describe(letter: str, config: ModelConfig) -> str:
    """The kind, its whole numbers and words, and the switches that are not as usual."""
    values = config.to_dict()["layers"][letter]
    usual = {field.name for field in fields(config.layers[letter]) if field.default is values[field.name]}
    switches = {k for k, v in values.items() if isinstance(v, bool)}
    plain = {k: v for k, v in values.items() if k not in {"kind", *(switches & usual)} and isinstance(v, (int, str))}
    return f"{values['kind']} ({', '.join(f'{k} {v}' for k, v in plain.items())})"


def _comparison(runs: Sequence[RunRecord]) -> str:
    """Summaries side by side, then the recipe keys that differ."""
    summaries = [summary(run) for run in runs]
    keys = list(dict.fromkeys(key for found in summaries for key in found))
    rows = [[key, *(found.get(key, "") for found in summaries)] for key in keys]
    flat: list[dict[str, Any]] = [dict(_flatten(run.recipe)) for run in runs]
    differing = [key for key in dict.fromkeys(key for found in flat for key in found) if _differs(key, flat)]
    recipe = [[key, *(_text(found[key]) if key in found else "—" for found in flat)] for key in differing]
    heads = ["", *(run.name for run in runs)]
    return (
        f"<section><h2>Side by side</h2>{_table(heads, rows)}</section>"
        f"<section><h2>Recipe keys that differ</h2>{_table(heads, recipe) if recipe else '<p>None.</p>'}</section>"
    )


def _differs(key: str, recipes: Sequence[dict[str, Any]]) -> bool:
    return any(recipe.get(key, recipes) != recipes[0].get(key, recipes) for recipe in recipes)


def _flatten(value: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(text)}</td>' for text in rest)}</tr>"
        for first, *rest in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _after(run: RunRecord, *, alone: bool) -> str:
    """Evaluation, samples, events and recipe of one run."""
    name = "" if alone else f" — {escape(run.name)}"
    parts = []
    if run.evaluations:
        parts.append(f"<section><h2>Evaluation{name}</h2>{_evaluations(run)}</section>")
    if run.samples:
        parts.append(f"<section><h2>Samples{name}</h2><pre>{escape(run.samples)}</pre></section>")
    if run.of("traffic"):
        parts.append(f"<section><h2>Communication per step{name}</h2>{_traffic(run.of('traffic')[-1])}</section>")
    shown = run.events[-SHOWN_EVENTS:]
    note = f" (the last {SHOWN_EVENTS} of {len(run.events):,})" if len(run.events) > SHOWN_EVENTS else ""
    rows = [[_when(event), event.get("event", ""), _fields(event)] for event in shown]
    parts.append(
        f"<details><summary>Events{name}: {len(run.events):,}{note}</summary>"
        f"{_table(['when', 'what', 'details'], rows)}</details>"
    )
    if run.recipe:
        text = escape(json.dumps(run.recipe, indent=2))
        parts.append(f"<details><summary>Resolved recipe{name}</summary><pre>{text}</pre></details>")
    return "\n".join(parts)


def _evaluations(run: RunRecord) -> str:
    rows = []
    for found in run.evaluations:
        for entry in found.get("perplexity") or []:
            what = f"held-out text, rows of {entry['length']:,} tokens"
            rows.append([found["checkpoint"], what, "bits per byte", f"{entry['bits_per_byte']:.4f}", ""])
        for task, metrics in sorted(found.get("tasks", {}).items()):
            items = str(found.get("info", {}).get(task, {}).get("items", ""))
            for metric, value in sorted(metrics.items()):
                if isinstance(value, (int, float)) and not metric.endswith("_stderr"):
                    error = metrics.get(f"{metric}_stderr")
                    spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                    rows.append([found["checkpoint"], task, metric, f"{value:.4f}{spread}", items])
    return _table(["checkpoint", "what", "metric", "value", "items"], rows)


def _traffic(event: dict[str, Any]) -> str:
    """What rank 0 sent in one step, by axis of the mesh and operation."""
    total = sum(sum(operations.values()) for operations in event["bytes"].values())
    rows = [
        [axis, operation.replace("_", " "), size(bytes_), f"{bytes_ / total:.1%}"]
        for axis, operations in event["bytes"].items()
        for operation, bytes_ in operations.items()
    ]
    rows.append(["all", "", size(total), "100.0%"])
    note = f"Sent by rank 0 of {event['ranks']:,} in step {event['step']:,}, by axis of the mesh"
    if event.get("flops"):
        note += f"; {total / event['flops'] * 1e6:.3g} bytes for each million FLOPs of the model"
    return f"{_table(['axis', 'operation', 'bytes', 'share'], rows)}<p>{escape(note)}.</p>"


def _when(event: dict[str, Any]) -> str:
    if "time" not in event:
        return ""
    return datetime.datetime.fromtimestamp(event["time"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _fields(event: dict[str, Any]) -> str:
    return ", ".join(f"{k} {_text(v)}" for k, v in event.items() if k not in ("event", "time"))
