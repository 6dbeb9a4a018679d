"""The record of a run: strict JSON, mended after a kill, continued at the step that was resumed."""

import json
from pathlib import Path

import pytest

from train.metrics import Metrics, append_json_line, read_json_lines


def opened(folder: Path, step: int = 0) -> Metrics:
    return Metrics(folder, total_tokens=100, done_tokens=0, step=step)


def test_lines_are_strict_json_even_for_nan(tmp_path: Path) -> None:
    """NaN is no JSON: a browser that reads the record would stop at it."""
    path = tmp_path / "lines.jsonl"
    append_json_line(path, {"step": 1, "loss": float("nan"), "norm": float("inf"), "rate": 0.1})
    assert path.read_text() == '{"step": 1, "loss": null, "norm": null, "rate": 0.1}\n'


def test_a_resumed_run_drops_the_steps_it_takes_again(tmp_path: Path) -> None:
    for step in range(1, 8):
        append_json_line(tmp_path / "metrics.jsonl", {"step": step})
    opened(tmp_path, step=5)
    assert [line["step"] for line in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert read_json_lines(tmp_path / "events.jsonl")[-1]["lines"] == 2


def test_a_torn_line_is_mended(tmp_path: Path) -> None:
    """A kill in the middle of a write must not swallow the next record."""
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).write_text('{"step": 1, "event": "a"}\n{"step": 2, "ev')
    metrics = opened(tmp_path, step=1)
    metrics.event("b", step=1)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["a", "b"]
    assert metrics.last_event("a") == {"step": 1, "event": "a"}
    assert metrics.last_event("c") is None


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = Metrics(None, total_tokens=1, done_tokens=0, step=0)
    metrics.event("x")
    metrics.step({"step": 1})
    metrics.say("nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_log_file_gets_the_progress_in_whole_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """srun keeps back what has no newline: a bar that only returns to the line's start would show up at the end."""
    metrics = opened(tmp_path)
    metrics.step({"step": 1, "tokens": 50, "loss": 1.0, "tokens_per_s": 1.0, "mfu": 0.1})
    metrics.say("said")
    metrics.step({"step": 2, "tokens": 100, "loss": 0.5, "tokens_per_s": 1.0, "mfu": 0.1})
    metrics.close_bar()
    output, lines = capsys.readouterr()
    assert output == "said\n"
    assert "\r" not in lines
    first, *_, last = lines.splitlines()
    assert (first.lstrip()[:2], last[:4]) == ("0%", "100%")
    assert "loss=0.500" in last
    assert lines.count("100%") == 1
