"""`braid verify` and `braid checkpoint` on a real run: damage is found and named, good things stay."""

import json
import os
import shutil
from pathlib import Path

import pytest

from launch.cli import main
from launch.drill import Drill, choose_teams
from launch.recipes import FOLDER
from tests.train.runs import prepare_tiny, trained
from train.config import load_recipe
from train.lock import RunLock


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare_tiny(tmp_path_factory.mktemp("verify"))
    settings = "checkpoints.every_tokens=1024", "evaluation.every_tokens=2048", "checkpoints.keep_last=9"
    trained("training.tokens=5120", *settings, cwd=folder)
    return folder


@pytest.fixture
def copy(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(workplace, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work" / "runs" / "tiny"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    assert main(list(map(str, arguments))) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1, said.err
    return said.out, said.err


def test_an_undamaged_run_passes(copy: Path, capsys: pytest.CaptureFixture[str]):
    """Breaks when a check cries wolf, or is left out."""
    assert main(["verify", "tiny", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert all(result["problem"] is None for result in results)
    found = " ".join(result["found"] for result in results)
    for part in ("recipe tiny", "10 steps", "events", "tensors in 1 files", "SHA-256", "documents", "a permutation of"):
        assert part in found
    assert main(["verify", str(copy / "checkpoints" / "tokens-000000005120")]) == 0
    assert main(["verify", "prepared/tiny"]) == 0


@pytest.mark.parametrize("what", ["checkpoint", "data", "metrics", "tokenizer", "recipe"])
def test_damage_anywhere_is_found(copy: Path, what: str, capsys: pytest.CaptureFixture[str]):
    """Breaks when a flipped byte goes unnoticed until the day it is needed."""
    path = {
        "checkpoint": next((copy / "checkpoints" / "tokens-000000002048").glob("*.safetensors")),
        "data": next((copy.parents[1] / "prepared" / "tiny").glob("validation*.bin")),
        "metrics": copy / "metrics.jsonl",
        "tokenizer": copy / "tokenizer.model",
        "recipe": copy / "recipe.json",
    }[what]
    if what == "metrics":
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:4] + lines[5:]))
    else:
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 0xFF
        path.write_bytes(damaged)
    out, err = refused(capsys, "verify", "tiny")
    assert "DAMAGED" in out and "checks failed" in err
    named = next(line for line in out.splitlines() if "DAMAGED" in line)
    assert {"data": "validation", "tokenizer": "tokenizer"}.get(what, path.name) in named


def test_checkpoints_are_listed_shown_averaged_and_pruned(copy: Path, capsys: pytest.CaptureFixture[str]):
    """Breaks when the list hides damage, the average cannot be used, or pruning takes a good one too many."""
    (copy / "checkpoints" / "tokens-000000003072" / "manifest.json").write_text("{}")
    assert main(["checkpoint", "list", "tiny", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["tokens"] for row in rows] == [1024, 2048, 3072, 4096, 5120]
    assert [row["problem"] is None for row in rows] == [True, True, False, True, True]
    assert [row["bits_per_byte"] is not None for row in rows] == [False, True, False, True, True]
    assert main(["checkpoint", "list", "tiny"]) == 0
    assert "damaged: " in capsys.readouterr().out

    assert main(["checkpoint", "show", "tiny", "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert "M-W-" in shown and "optimizer/exp_avg" in shown and "embedding.weight  [320, 32]  float32" in shown

    assert main(["checkpoint", "average", "tiny", "--last", "3"]) == 0
    folder = copy / "averaged-last-3" / "tokens-000000005120"
    assert str(folder.name) in capsys.readouterr().out
    assert main(["generate", str(folder), "--prompt", "braid", "--max-tokens", "2"]) == 0
    capsys.readouterr()
    assert "--last" in refused(capsys, "checkpoint", "average", "tiny", "--last", "9")[1]

    prune = ["checkpoint", "prune", "tiny", "--keep-last", "1"]
    assert main([*prune, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("would go") == 4
    with RunLock(copy):
        assert f"process {os.getpid()} on " in refused(capsys, *prune)[1]
    assert main([*prune, "--keep-every-tokens", "2000"]) == 0
    left = sorted(path.name for path in (copy / "checkpoints").glob("tokens-*"))
    assert left == ["tokens-000000002048", "tokens-000000004096", "tokens-000000005120"]


def test_mistakes_are_one_line(copy: Path, capsys: pytest.CaptureFixture[str]):
    """Breaks when a typo is a traceback."""
    assert "wants a run folder or its name" in refused(capsys, "verify", "nowhere")[1]
    assert "wants a run, a checkpoint or prepared data" in refused(capsys, "verify", "corpus")[1]
    assert "only --resume" in refused(capsys, "verify", "tiny", "training.tokens=3")[1]
    assert "--steps" in refused(capsys, "verify", "--resume", "tiny", "--steps", "2")[1]
    assert "--nproc: got 0, wants a positive" in refused(capsys, "verify", "--resume", "tiny", "--nproc", "0")[1]
    same = ("--nproc", "2", "--other-nproc", "2")
    assert "--other-nproc: got 2, as many ranks" in refused(capsys, "verify", "--resume", "tiny", *same)[1]
    assert "keep_last" in refused(capsys, "checkpoint", "prune", "tiny", "--keep-last", "0")[1]
    assert "--ema" in refused(capsys, "checkpoint", "average", "tiny", "--ema", "2")[1]


def test_exact_resume_is_proved(copy: Path, capsys: pytest.CaptureFixture[str]):
    """The whole drill on the tiny recipe: killed and resumed, and resumed by two ranks after one."""
    assert main(["verify", "--resume", "tiny", "--json"]) == 0
    killed, moved = json.loads(capsys.readouterr().out)
    assert killed["steps"] == moved["steps"] == 12
    assert killed["difference"] == 0 and killed["problem"] is None
    assert moved["difference"] < 1e-5 and moved["problem"] is None


@pytest.mark.parametrize(
    ("overrides", "numbers", "words"),
    [
        ((), {}, "2 ranks after 1 rank"),
        ((), {"ranks": 2}, "1 rank after 2 ranks"),
        ((), {"ranks": 2, "others": 4}, "4 ranks after 2 ranks"),
        (("parallel.tensor=2",), {}, "1 rank after 2 ranks (tensor=2)"),
        (("parallel.tensor=2",), {"ranks": 4}, "1 rank after 4 ranks (tensor=2)"),
        (("parallel.tensor=2",), {"others": 4}, "4 ranks (tensor=2) after 2 ranks (tensor=2)"),
        (("parallel.tensor=2", "parallel.context=2"), {}, "1 rank after 4 ranks (tensor=2, context=2)"),
    ],
)
def test_the_moved_run_changes_its_layout(overrides: tuple[str, ...], numbers: dict[str, int], words: str):
    """Breaks when what was asked for is not done, or when nothing moves."""
    team, others = choose_teams(FOLDER / "tiny.toml", overrides, **numbers)
    assert f"{others} after {team}" == words
    recipe = load_recipe(FOLDER / "tiny.toml", [*overrides, *others.overrides])
    assert recipe.parallel.sizes == others.sizes
    recipe.check_ranks(others.ranks)


def test_experts_are_moved_too():
    """Breaks when expert ranks, which are data ranks, do not count."""
    team, others = choose_teams(FOLDER / "tiny-moe-mamba.toml", ["parallel.expert=2", "parallel.zero_stage=1"])
    assert f"{others} after {team}" == "1 rank after 2 ranks (expert=2)"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["parallel.tensor=2", "--nproc", "3"], "--nproc 3: parallel: got tensor=2 x context=1, which does not divide"),
        (["parallel.tensor=2", "--other-nproc", "1"], "--other-nproc 1: parallel: got tensor=2 x context=1, which do"),
        (["--other-nproc", "3"], "--other-nproc 3: training.rows_per_step: got 8, wants a multiple of the 3 ranks"),
        (["training.rows_per_step=1"], "--other-nproc 2 (not given): training.rows_per_step: got 1, wants a multiple"),
        (["--other-nproc", "-1"], "--other-nproc: got -1, wants a positive number of ranks"),
        (["parallel.tensor=9"], "command line: parallel.tensor: got 9, wants at most 2, because"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Breaks when the mistake is found after minutes of training, in the log of a rank."""
    monkeypatch.setattr(Drill, "_train", lambda *_: pytest.fail("training was started"))
    assert line in refused(capsys, "verify", "--resume", "tiny", *words)[1]


@pytest.mark.slow
def test_exact_resume_is_proved_for_tensor_ranks(copy: Path, capsys: pytest.CaptureFixture[str]):
    """Two ranks that share every weight, killed and resumed; then one rank that has all of them."""
    assert main(["verify", "--resume", "tiny", "parallel.tensor=2", "--steps", "6", "--json"]) == 0
    killed, moved = json.loads(capsys.readouterr().out)
    assert killed["what"] == "killed and resumed on 2 ranks (tensor=2)"
    assert moved["what"] == "resumed on 1 rank after 2 ranks (tensor=2)"
    assert killed["steps"] == moved["steps"] == 6
    assert killed["difference"] == 0 and moved["difference"] < 1e-5
