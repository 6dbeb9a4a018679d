"""`braid eval` and `braid lm-eval` on a real tiny run, and what they say about mistakes."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.cli import main
from launch.commands.eval import configure, spelled, table
from tests.train.runs import braid, environment, events, prepare_tiny, trained

PROBES = "braid_brackets,braid_repeat,braid_passages"
STANDARD = "lambada_openai,hellaswag,piqa,arc_easy,winogrande"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, runs/tiny."""
    folder = prepare_tiny(tmp_path_factory.mktemp("evaluated"))
    trained(cwd=folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(workplace: Path) -> dict:
    """What `braid eval tiny --json` prints: nothing but JSON."""
    return json.loads(braid("eval", "tiny", "--json", cwd=workplace).stdout)


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Commands of this process run there; a process group that an error has left open is closed."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield workplace
    if dist.is_initialized():
        dist.destroy_process_group()


def kept(workplace: Path, checkpoint: str = "tokens-000000008192") -> dict:
    return json.loads((workplace / "runs" / "tiny" / "eval" / f"{checkpoint}.json").read_text())


def test_a_run_is_scored_without_a_network(workplace: Path, evaluated: dict) -> None:
    assert (evaluated["checkpoint"], evaluated["tokens"]) == ("tokens-000000008192", 8192)
    assert {"braid_copy", "braid_recall", "braid_brackets", "braid_repeat", "braid_passages"} <= evaluated[
        "tasks"
    ].keys()
    assert 0 <= evaluated["tasks"]["braid_copy"]["acc"] <= 1
    assert evaluated["tasks"]["braid_copy"]["acc_stderr"] > 0
    assert {"torch", "lm_eval"} <= evaluated["versions"].keys()
    assert evaluated["truncated"] > 0


def test_perplexity_is_that_of_training_and_of_the_same_tokens(workplace: Path, evaluated: dict) -> None:
    """Breaks when evaluation reads other documents, or another loss, than the run's own validation."""
    (finished,) = events(workplace / "runs" / "tiny", "finished")
    by_length = {one["length"]: one for one in evaluated["perplexity"]}
    assert list(by_length) == [64, 128, 256]
    assert by_length[64]["loss"] == pytest.approx(finished["loss"], rel=1e-5)
    assert by_length[64]["bits_per_byte"] == pytest.approx(finished["bits_per_byte"], rel=1e-5)
    assert len({one["tokens"] for one in by_length.values()}) == 1
    beyond = [one["beyond_training"]["tokens"] for one in by_length.values()]
    assert beyond[0] == 0 < beyond[1] < beyond[2]


def test_two_ranks_give_the_same_numbers(workplace: Path, evaluated: dict) -> None:
    words = ["--json", "--nproc", "2", "--tasks", PROBES, "--lengths", "1x,2x", "--output", "two.json"]
    two = json.loads(braid("eval", "tiny", *words, cwd=workplace).stdout)
    for task, metrics in two["tasks"].items():
        assert metrics == pytest.approx(evaluated["tasks"][task], abs=1e-6), task
    for mine, theirs in zip(two["perplexity"], evaluated["perplexity"], strict=False):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    assert json.loads((workplace / "two.json").read_text()) == two


def test_torchrun_starts_the_ranks_too(workplace: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "launch", "eval", "tiny"]
    words = ["--json", "--tasks", "braid_repeat", "--limit", "4", "--output", "torchrun.json"]
    done = subprocess.run([*command, *words], cwd=workplace, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["info"]["braid_repeat"]["items"] == 4


def test_lm_evals_command_line_knows_the_model(workplace: Path, evaluated: dict) -> None:
    """The same score as `braid eval` gives, by lm-eval's own way."""
    words = ["--model", "braid", "--model_args", "run=tiny", "--tasks", "braid_brackets", "--batch_size", "16"]
    done = braid("lm-eval", *words, "--output_path", "by-lm-eval", cwd=workplace)
    (path,) = (workplace / "by-lm-eval").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["braid_brackets"]["acc,none"]
    assert found == pytest.approx(evaluated["tasks"]["braid_brackets"]["acc"])
    assert "braid_brackets" in done.stdout


def test_results_add_up_and_a_part_replaces_no_whole(
    here: Path, evaluated: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "tiny", "--tasks", "braid_brackets", "--limit", "3"]) == 0
    assert "braid_brackets" in capsys.readouterr().out
    after = kept(here)
    assert after["tasks"] == evaluated["tasks"]
    assert after["perplexity"] == evaluated["perplexity"]


def test_another_checkpoint_has_its_own_file_and_samples(here: Path) -> None:
    words = ["--checkpoint", "tokens-000000004096", "--tasks", "braid_re*", "--limit", "2", "--log-samples"]
    assert main(["eval", "runs/tiny", *words]) == 0
    found = kept(here, "tokens-000000004096")
    assert found["tokens"] == 4096
    assert {"braid_recall_4", "braid_repeat"} <= found["tasks"].keys()
    samples = here / "runs" / "tiny" / "eval" / "tokens-000000004096.samples" / "braid_repeat.jsonl"
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["target"] for line in lines] == [line["doc"]["target"] for line in lines]
    assert len(lines) == 2


def test_tasks_of_ones_own(here: Path, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text(json.dumps({"text": "braid", "next": "state"}) + "\n")
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path}/items.jsonl}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{next}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    words = ["--tasks", "mine", "--include-path", str(tmp_path), "--output", str(tmp_path / "mine.json")]
    assert main(["eval", "tiny", *words]) == 0
    assert json.loads((tmp_path / "mine.json").read_text())["tasks"]["mine"]["acc"] in (0.0, 1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "0"], "--limit: got 0, wants a positive number"),
        (["--batch-rows", "-2"], "--batch-rows: got -2"),
        (["--max-length", "0"], "--max-length: got 0"),
        (["--num-fewshot", "-1"], "--num-fewshot: got -1"),
        (["--nproc", "0"], "--nproc: got 0"),
        (["--dtype", "float8"], "--dtype: got 'float8', wants one of float32, bfloat16"),
        (["--lengths", "2y"], "--lengths: got '2y'"),
        (["--include-path", "."], "without --tasks"),
        (["--tasks", "braid_probes", "--include-path", "corpus"], "holds no task"),
        (["--checkpoint", "newest"], "tokens-000000008192"),
        (["--tasks", "none", "--lengths", "1x", "--data", "moved"], "data.path: moved"),
        (["--tasks", "none", "--lengths", "1x", "--data", "moved"], "--lengths none"),
        (["--tasks", "braid_repeat", "--max-length", "8"], "max_length: got 8, wants more than the 24 tokens"),
    ],
)
def test_mistakes_are_one_line(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["eval", "tiny", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("braid: error: ")
    assert message in said[0]


def test_without_lm_eval_the_extra_is_named(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in (["eval", "tiny"], ["lm-eval", "--help"]):
        assert main(command) == 2
        assert "pip install 'braid[eval]'" in capsys.readouterr().err


def test_an_unknown_task_is_answered_with_near_names_and_lost_data_with_what_is_missing(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard tasks are found by name; their data is not here, and nothing can be fetched."""
    from eval import benchmarks

    manager = benchmarks.Probes()
    monkeypatch.setattr(benchmarks, "Probes", lambda *arguments, **named: manager)
    assert main(["eval", "tiny", "--tasks", "braid_braket"]) == 2
    assert "did you mean braid_brackets" in capsys.readouterr().err

    def unreachable(path: str, *arguments: object, **named: object) -> None:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    assert main(["eval", "tiny", "--tasks", STANDARD]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "lambada_openai: the data set EleutherAI/lambada_openai is not here" in said[0]
    assert "HF_HOME" in said[0]


def test_a_damaged_checkpoint_and_another_tokenizer_are_refused(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(here / "runs" / "tiny", run)
    (run / "tokenizer.model").write_bytes(b"other")
    assert main(["eval", str(run), "--tasks", "braid_repeat"]) == 2
    assert "tokenizer" in capsys.readouterr().err
    (data,) = (run / "checkpoints" / "tokens-000000008192").glob("*.safetensors")
    with data.open("r+b") as file:
        file.seek(os.path.getsize(data) // 2)
        file.write(b"damage")
    if dist.is_initialized():
        dist.destroy_process_group()
    assert main(["eval", str(run), "--tasks", "braid_repeat"]) == 2
    assert data.name in capsys.readouterr().err


def test_a_rank_is_told_all_but_the_number_of_ranks() -> None:
    parser = argparse.ArgumentParser()
    configure(parser)
    given = ["tiny", "--tasks", "a,b", "--limit", "3", "--json", "--nproc", "4"]
    again = parser.parse_args(spelled(parser.parse_args(given)))
    expected = parser.parse_args(given)
    expected.nproc = 1
    assert again == expected


def test_the_table_shows_every_number(evaluated: dict) -> None:
    shown = table(evaluated)
    for task in evaluated["tasks"]:
        assert task in shown
    assert f"{evaluated['perplexity'][2]['loss']:.4f}" in shown
    assert "lost their beginning to --max-length 64" in shown
