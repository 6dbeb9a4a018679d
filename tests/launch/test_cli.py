"""A user's mistakes at the command line: one line on stderr that says what to change, exit code 2, no traceback."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from launch.commands import launch
from launch.commands.arguments import find_run
from launch.local import Machines
from launch.recipes import FOLDER, find_recipe, shipped
from train import mistakes

ROOT = Path(__file__).parents[2]


def braid(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`braid ARGUMENTS` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        cwd=cwd,
        env={key: value for key, value in os.environ.items() if key != "BRAID_DEBUG"} | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that `braid ARGUMENTS` says on stderr."""
    assert cli.main(arguments) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("braid: error: ")
    assert errors.count("\n") == 1
    return errors.removeprefix("braid: error: ").rstrip("\n")


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert complaint(capsys, "trian") == "command: got 'trian'; did you mean train?"
    assert "wants one of prepare, train, launch" in complaint(capsys, "frobnicate")


def test_an_unknown_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]):
    line = complaint(capsys, "train", "quikstart")
    assert line == "recipe: got 'quikstart', which is no file and no shipped recipe; did you mean quickstart?"
    assert f"shipped recipes: {', '.join(shipped())}" in complaint(capsys, "prepare", "xyz.toml")


def test_a_missing_run_says_which_there_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert "there is none in runs/ yet" in complaint(capsys, "generate", "nothing", "--prompt", "x")
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/recipe.json").write_text("{}")
    assert "got 'nothing', wants a run folder or its name; runs/ has first" in complaint(capsys, "generate", "nothing")
    assert find_run("first") == Path("runs/first")


def test_arguments_that_argparse_refuses_are_one_line_too(capsys: pytest.CaptureFixture[str]):
    assert complaint(capsys, "train") == (
        "the following arguments are required: RECIPE (`braid train --help` explains)"
    )
    assert "--nproc: invalid int value: 'two'" in complaint(capsys, "train", "tiny", "--nproc", "two")
    assert "unrecognized arguments: --fast" in complaint(capsys, "train", "tiny", "--fast")
    assert "--nproc: got 0" in complaint(capsys, "train", "tiny", "--nproc", "0")


@pytest.mark.parametrize("nproc", ["1", "2"])
def test_a_wrong_recipe_is_one_line_from_any_number_of_ranks(tmp_path: Path, nproc: str):
    done = braid("train", "tiny", "--nproc", nproc, "training.tokns=3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("braid: error: command line: training.tokns: unknown key; did you mean training.tokens?\n")


def test_options_may_stand_between_a_recipe_and_its_overrides(monkeypatch: pytest.MonkeyPatch):
    started = []
    monkeypatch.setattr("launch.local.run", lambda *arguments: started.append(arguments) or 75)
    assert cli.main(["train", "tiny", "--nproc", "3", "seed=1", "name=x"]) == 75
    assert started == [(FOLDER / "tiny.toml", ["seed=1", "name=x"], 3, Machines())]


def test_a_file_is_preferred_to_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("tiny") == FOLDER / "tiny.toml"
    (tmp_path / "tiny").write_text("")
    assert find_recipe("tiny") == Path("tiny")
    assert "quickstart" in shipped()


def test_no_command_shows_help_and_is_a_mistake(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 2
    assert capsys.readouterr().out.startswith("usage: braid")
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)


def test_every_command_has_its_module():
    modules = {path.stem for path in (ROOT / "launch/commands").iterdir()}
    assert modules >= {name.replace("-", "_") for name in cli.COMMANDS}
    assert {path.stem for path in (ROOT / "launch/commands/launch").iterdir()} >= set(launch.COMMANDS)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\n  two"), "one two"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"), "a/b: no such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: no space left on the device"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the device"),
        (OSError(errno.EIO, "Input/output error"), None),
        (RuntimeError("a fault of ours"), None),
    ],
)
def test_mistakes_are_told_from_faults(error: Exception, line: str | None):
    assert mistakes.describe(error) == line


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BRAID_DEBUG", "1")
    with pytest.raises(ValueError, match="got 'trian'"):
        cli.main(["trian"])
