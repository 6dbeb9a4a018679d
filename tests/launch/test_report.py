"""The report: right numbers, every kind of run, nothing loaded from anywhere, and a browser that finds no fault."""

import json
import math
import re
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest

from launch.cli import main
from launch.recipes import find_recipe
from launch.report.page import page, short
from launch.report.record import POINTS, SERIES, marks, names, read_run, thin
from tests.launch.browser import Browser, chromium
from train.config import load_recipe

needs_a_browser = pytest.mark.skipif(chromium() is None, reason="no chromium here")
NASTY = "</script><img src=x onerror=alert(1)>"


def write_run(folder: Path, steps: int = 300, seed: int = 0, spoiled: tuple[int, ...] = (), name: str = "run") -> Path:
    """A run folder as training leaves it, without training."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = None if step in spoiled else 9 * step**-0.2 + draw.normal() * 0.05
            row = {"step": step, "tokens": step * 4096, "loss": loss, "learning_rate": 1e-3 * (1 - step / steps)}
            row |= {"grad_norm": None if loss is None else 1 + abs(draw.normal()), "tokens_per_s": 5000.0, "mfu": 0.4}
            file.write(json.dumps(row) + "\n")
    half = max(1, steps // 2)
    events = [
        {"event": "validation", "time": 1.0, "step": half, "tokens": half * 4096, "loss": 5.0, "bits_per_byte": 2.0},
        {"event": "resumed", "time": 2.0, "step": half, "checkpoint": NASTY},
        {"event": "validation", "time": 3.0, "step": steps, "tokens": steps * 4096, "loss": 4.0, "bits_per_byte": 1.7},
        {"event": "finished", "time": 4.0, "step": steps, "zlib_bits_per_byte": 1.8, "xz_bits_per_byte": 1.6},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    recipe = load_recipe(find_recipe("quickstart"), [f"name={name}", f"seed={seed}"])
    (folder / "recipe.json").write_text(recipe.to_json())
    return folder


def open_page(browser: Browser, folder: Path, *runs: Path) -> None:
    path = folder / "page.html"
    assert main(["report", *map(str, runs), "--output", str(path)]) == 0
    browser.open(path)
    assert not browser.problems


def curve_of(browser: Browser, chart: str, run: int = 0) -> str:
    return browser.run(f"document.querySelectorAll('#{chart} .curve')[{run}].getAttribute('d')")


def test_thinning_keeps_every_spike_and_the_ends():
    """Breaks when a spike of one step in a million disappears, or means are wrong."""
    count = 1_000_000
    rows = {name: np.ones(count) for name in ("step", "tokens", *SERIES)}
    rows["step"] = np.arange(1.0, count + 1)
    rows["tokens"] = rows["step"] * 512
    rows["loss"][777_777], rows["loss"][123_456], rows["loss"][555] = 99.0, np.nan, np.inf
    curves = thin(rows)
    assert len(curves.steps) == POINTS and curves.rows == count and curves.lost == 2
    assert curves.steps[-1] == count and curves.tokens[-1] == count * 512
    assert max(curves.high["loss"]) == 99.0 and min(curves.low["loss"]) == 1.0
    assert max(curves.mean["loss"]) == pytest.approx(1 + 98 / (count / POINTS), rel=1e-2)
    few = thin({name: values[:7] for name, values in rows.items()})
    assert few.steps == [1, 2, 3, 4, 5, 6, 7] and few.mean["loss"] == few.low["loss"] == [1.0] * 7
    gap = thin({name: values[123_456:123_457] for name, values in rows.items()})
    assert gap.mean["loss"] == gap.low["loss"] == gap.high["loss"] == [None]


def test_a_run_is_read_as_it_was_written(tmp_path: Path):
    """Breaks when the summary is about another step, or an unfinished last line ends the report."""
    run = write_run(tmp_path / "run", spoiled=(5, 6))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 301, "los')
    record = read_run(run, "run")
    assert record.curves.steps[-1] == 300 and record.curves.lost == 2
    assert record.status == "finished"
    assert [mark["label"] for mark in marks(record)] == ["resumed"]
    text = page([record])
    assert "1.7000 bits per byte" in text and "9.6M" in text and "steps without a finite loss" in text
    assert NASTY not in text and escape(NASTY) in text
    assert short(1_234_567) == "1.23M" and short(12) == "12"


def test_runs_side_by_side_show_what_differs(tmp_path: Path):
    """Breaks when two runs cannot be told apart, or equal keys drown the different ones."""
    first, second = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", seed=7)
    assert names([first, second]) == ["a/run", "b/run"]
    text = page([read_run(first, "a/run"), read_run(second, "b/run")])
    table = text[text.index("Recipe keys that differ") :]
    table = table[: table.index("</table>")]
    assert "<th>seed</th><td>0</td><td>7</td>" in table
    assert table.count("<tr>") == 2
    with pytest.raises(ValueError, match="each run once"):
        names([first, first])


def test_evaluations_and_samples_are_shown(tmp_path: Path):
    run = write_run(tmp_path / "run")
    (run / "eval").mkdir()
    results = {
        "checkpoint": "tokens-000000001024",
        "tasks": {"probe": {"acc": 0.5, "acc_stderr": 0.01}},
        "perplexity": [{"length": 2048, "loss": 4.0, "bits_per_byte": 1.7}],
        "info": {"probe": {"items": 150}},
    }
    (run / "eval" / "tokens-000000001024.json").write_text(json.dumps(results))
    (run / "samples.md").write_text(f"def f(): {NASTY}")
    text = page([read_run(run, "run")])
    assert (
        "<td>0.5000 ± 0.0100</td><td>150</td>" in text and "rows of 2,048 tokens" in text and "acc_stderr" not in text
    )
    assert NASTY not in text and f"def f(): {escape(NASTY)}" in text


TRAFFIC = {
    "event": "traffic",
    "time": 2.5,
    "step": 3,
    "ranks": 4,
    "bytes": {"shard": {"all_reduce": 1.5e6, "all_gather": 0.5e6}, "tensor": {"all_gather": 2e6}},
    "flops": 8e9,
}


def with_traffic(run: Path) -> Path:
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(TRAFFIC) + "\n")
    return run


def test_what_ranks_sent_is_shown(tmp_path: Path):
    """Breaks when the table is about nothing, appears for one rank, or does not add up."""
    alone = page([read_run(write_run(tmp_path / "alone"), "alone")])
    assert "Communication per step" not in alone
    text = page([read_run(with_traffic(write_run(tmp_path / "run")), "run")])
    table = text[text.index("Communication per step") :]
    assert "<th>shard</th><td>all reduce</td><td>1.5 MB</td><td>37.5%</td>" in table
    assert "<th>all</th><td></td><td>4 MB</td><td>100.0%</td>" in table
    assert "rank 0 of 4 in step 3" in table and "500 bytes for each million FLOPs" in table


def test_a_run_without_recipe_or_validation(tmp_path: Path):
    """Breaks when an old or copied run, of which only the metrics are left, cannot be looked at."""
    run = write_run(tmp_path / "run")
    (run / "recipe.json").unlink()
    (run / "events.jsonl").unlink()
    assert "not finished" in page([read_run(run, "run")])


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)

    def refused(*arguments: str) -> str:
        assert main(["report", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "wants a run folder or its name" in refused("nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no metrics.jsonl" in refused("empty")
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    assert "no complete line" in refused("empty")
    (tmp_path / "empty" / "metrics.jsonl").write_text("{}\nnot json\n")
    assert "line 2 is no JSON" in refused("empty")


def test_where_the_page_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a")
    write_run(tmp_path / "runs" / "b")
    assert main(["report", "a"]) == 0 and (tmp_path / "runs" / "a" / "report.html").is_file()
    assert main(["report", "a", "b"]) == 0 and (tmp_path / "report.html").is_file()
    assert capsys.readouterr().out.split() == ["runs/a/report.html", "report.html"]
    text = (tmp_path / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text)


@needs_a_browser
def test_the_page_in_a_browser(tmp_path: Path):
    """Breaks when a chart is empty, a number under the pointer is wrong, or a control does nothing."""
    first = with_traffic(write_run(tmp_path / "first"))
    second = write_run(tmp_path / "second", seed=3)
    with Browser() as browser:
        open_page(browser, tmp_path, first, second)
        for chart in ("loss", "validation", "grad_norm", "learning_rate", "tokens_per_s", "mfu"):
            assert browser.run(f"document.querySelectorAll('#{chart} .curve').length") == 2
            assert curve_of(browser, chart).count("L") == (1 if chart == "validation" else 299)
        assert browser.run("document.querySelectorAll('.yardstick').length") == 2
        assert browser.run("document.querySelectorAll('.strip b').length") == 32
        assert browser.run("document.images.length") == 0
        heads = "[...document.querySelectorAll('h2')].filter(h => h.textContent.startsWith('Communication'))"
        assert browser.run(f"{heads}.map(h => h.parentElement.querySelectorAll('tbody tr').length)") == [4]

        before = curve_of(browser, "loss")
        slide = (
            "s => { const e = document.getElementById('smoothing'); e.value = s; e.dispatchEvent(new Event('input')) }"
        )
        browser.run(f"({slide})(0)")
        raw = curve_of(browser, "loss")
        assert raw != before
        browser.run(f"({slide})(0.95)")
        assert curve_of(browser, "loss") not in (raw, before)

        box = browser.run(
            "(r => [r.x, r.y, r.width, r.height])(document.querySelector('#loss svg').getBoundingClientRect())"
        )
        at = browser.run("CHARTS[0].toX(runs[0].tokens[99])")
        browser.mouse("mouseMoved", box[0] + at, box[1] + box[3] / 2)
        tip = browser.run("document.querySelector('#loss .tip').innerText")
        loss = json.loads((first / "metrics.jsonl").read_text().splitlines()[99])["loss"]
        assert (f"{loss:.4f}" in tip and "step 100" in tip and "410k" in tip) or "409.6k" in tip
        assert browser.run("CHARTS.every(c => c.cross.getAttribute('visibility') === 'visible')")

        browser.mouse("mousePressed", box[0] + at, box[1] + 100)
        browser.mouse("mouseMoved", box[0] + at + 120, box[1] + 100)
        browser.mouse("mouseReleased", box[0] + at + 120, box[1] + 100)
        assert browser.run("state.zoom[0]") == pytest.approx(409_600, rel=0.02)
        assert not browser.run("document.getElementById('whole').hidden")
        browser.run("document.getElementById('whole').click()")
        assert browser.run("state.zoom") is None

        browser.run("document.querySelector('#toggles button').click()")
        assert browser.run("document.querySelectorAll('#loss .curve').length") == 1
        browser.run("document.querySelectorAll('#toggles button')[1].click()")
        assert browser.run("document.querySelectorAll('#loss .none').length") == 1
        browser.run("document.querySelectorAll('#toggles button').forEach(b => b.click())")

        browser.run("document.querySelector('input[value=steps]').click()")
        assert "100" in browser.run("[...document.querySelectorAll('#loss text')].map(t => t.textContent).join(' ')")
        linear = curve_of(browser, "loss")
        browser.run("document.querySelector('#loss figcaption input').click()")
        assert curve_of(browser, "loss") != linear
        assert not browser.problems


@needs_a_browser
@pytest.mark.parametrize("kind", ["one step", "numbers that are none", "only those", "a million steps"])
def test_unusual_runs_in_a_browser(tmp_path: Path, kind: str):
    """Breaks when a page about a crash, or about a month, cannot be opened."""
    steps = {"one step": 1, "only those": 20, "a million steps": 1000}.get(kind, 300)
    spoiled = {"numbers that are none": (1, 2, 3, 150, 300), "only those": tuple(range(1, 21))}.get(kind, ())
    run = write_run(tmp_path / "run", steps, spoiled=spoiled)
    if kind == "a million steps":
        line = '{"step": %d, "tokens": %d, "loss": %.6f, "learning_rate": 1e-3, "grad_norm": 1, "tokens_per_s": 9e5}\n'
        with (run / "metrics.jsonl").open("w") as file:
            for step in range(1, 1_000_001):
                file.write(line % (step, step * 4_194_304, 50.0 if step == 654_321 else 2 + math.exp(-step / 2e5)))
    with Browser() as browser:
        open_page(browser, tmp_path, run)
        size = (tmp_path / "page.html").stat().st_size
        assert size < 2 << 20
        drawn = browser.run("document.querySelectorAll('#loss .curve').length")
        assert drawn == (0 if kind == "only those" else 1)
        if kind == "one step":
            assert browser.run("document.querySelectorAll('#loss circle').length") == 1
        if kind == "numbers that are none":
            assert curve_of(browser, "loss").count("M") == 2, "a gap in the middle"
        if kind == "a million steps":
            assert browser.run("document.querySelectorAll('#loss .band').length") == 1
            assert browser.run("Math.max(...runs[0].high.loss)") == 50
            assert "1T" in browser.run("[...document.querySelectorAll('#loss text')].map(t => t.textContent).join(' ')")
        browser.run("document.querySelector('input[value=steps]').click()")
        assert not browser.problems


def test_other_recipes_are_drawn_too(tmp_path: Path):
    """Breaks when a stack of another version or kind cannot be drawn."""
    run = write_run(tmp_path / "run")
    record = read_run(run, "run")
    recipe = dict(record.recipe, model=dict(record.recipe["model"], layers={"M": {"kind": "of tomorrow"}}))
    assert "strip" not in page([replace(record, recipe=recipe)]).split("<main>")[1].split("</header>")[0]
