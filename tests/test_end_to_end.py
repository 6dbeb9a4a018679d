"""The README's commands on a tiny recipe, as a newcomer runs them, and the typical mistakes in real folders."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.train.runs import braid, curve, events, kill_group, start, wait_for_step, write_corpus

TOKENS_PER_STEP = 8 * 64


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `braid prepare tiny` has run."""
    folder = tmp_path_factory.mktemp("newcomer")
    write_corpus(folder / "corpus")
    done = braid("prepare", "tiny", cwd=folder)
    assert "corpus" in done.stdout
    assert "bits per byte" in done.stdout
    return folder


@pytest.fixture(scope="module")
def trained(workplace: Path) -> Path:
    """The run folder after `braid train tiny`."""
    done = braid("train", "tiny", cwd=workplace)
    assert "validation loss" in done.stdout
    assert "zlib" in done.stdout
    assert "xz" in done.stdout
    return workplace / "runs" / "tiny"


def test_the_run_folder_holds_the_record(trained: Path) -> None:
    lines = curve(trained)
    assert [line["step"] for line in lines] == list(range(1, 17))
    needed = {"step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu", "batch_hash"}
    assert all(needed <= line.keys() for line in lines)
    assert lines[-1]["tokens"] == 16 * TOKENS_PER_STEP
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert json.loads((trained / "recipe.json").read_text())["name"] == "tiny"
    (final,) = events(trained, "finished")
    assert 0 < final["bits_per_byte"] < 9
    assert final["zlib_bits_per_byte"] > 0
    assert not (trained / "lock.json").exists()


def test_a_finished_run_is_left_as_it_is(trained: Path, workplace: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    braid("train", "tiny", cwd=workplace)
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_generation_continues_the_prompt_and_repeats(trained: Path, workplace: Path) -> None:
    texts = [braid("generate", "tiny", "--prompt", "braid state", cwd=workplace).stdout for _ in range(2)]
    assert texts[0].startswith("braid state")
    assert texts[0] == texts[1]
    assert len(texts[0]) > len("braid state\n")


def test_a_run_can_be_moved(trained: Path, workplace: Path, tmp_path: Path) -> None:
    """The run folder alone is enough to generate: weights, configuration and tokenizer are in it."""
    shutil.copytree(trained, tmp_path / "elsewhere")
    text = braid("generate", str(tmp_path / "elsewhere"), "--prompt", "braid state", cwd=tmp_path).stdout
    assert text == braid("generate", "tiny", "--prompt", "braid state", cwd=workplace).stdout


def test_a_text_can_be_kept_for_the_report(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    said = braid("generate", "run", "--prompt", "braid state", "--keep", cwd=tmp_path).stdout
    kept = (tmp_path / "run" / "samples.md").read_text()
    assert kept.startswith("## tokens-000000008192: temperature 0.8, top_p 0.95, seed 0\n\n    braid state")
    assert len(kept.splitlines()) == len(said.splitlines()) + 3
    braid("report", "run", cwd=tmp_path)
    assert "    braid state" in (tmp_path / "run" / "report.html").read_text()


def test_another_tokenizer_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "changed")
    with (tmp_path / "changed" / "tokenizer.model").open("ab") as file:
        file.write(b"x")
    assert "tokenizer" in mistake(tmp_path, "generate", "changed", "--prompt", "x")


def test_two_ranks_finish_too(workplace: Path, trained: Path) -> None:
    braid("train", "tiny", "--nproc", "2", "name=two", cwd=workplace)
    ours, theirs = curve(workplace / "runs" / "two"), curve(trained)
    assert [line["batch_hash"] for line in ours] == [line["batch_hash"] for line in theirs]
    assert abs(ours[-1]["loss"] - theirs[-1]["loss"]) < 1e-4
    braid("train", "tiny", "--nproc", "2", "name=two", cwd=workplace)
    assert curve(workplace / "runs" / "two") == ours, "a finished run is left as it is, by all ranks"


def test_weights_and_biases_offline(workplace: Path) -> None:
    """One recipe line; no network."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    wandb = "logging.wandb=braid-test", "logging.wandb_mode=offline"
    braid("train", "tiny", "name=logged", f"training.tokens={4 * TOKENS_PER_STEP}", *wandb, cwd=workplace)
    assert list((workplace / "runs" / "logged" / "wandb").glob("offline-run-*/*.wandb"))


def mistake(workplace: Path, *arguments: str) -> str:
    """The one line (the progress bar aside) that a mistake gives: exit code 2, no traceback."""
    done = braid(*arguments, cwd=workplace, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "tokens [" not in line and line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("braid: error: ")
    return lines[0]


def test_unknown_key(workplace: Path) -> None:
    assert "did you mean training.tokens" in mistake(workplace, "train", "tiny", "training.tokns=5")


def test_unknown_letter(workplace: Path) -> None:
    line = mistake(workplace, "train", "tiny", "model.pattern=(M-Q-)x2")
    assert "unknown letter" in line
    assert "character 4" in line


def test_missing_folder(workplace: Path) -> None:
    line = mistake(workplace, "prepare", "tiny", "data.source.path=nowhere", "data.path=prepared/none")
    assert "nowhere" in line


def test_data_not_prepared(workplace: Path) -> None:
    assert "braid prepare" in mistake(workplace, "train", "tiny", "name=bare", "data.path=prepared/none")


def test_empty_corpus(workplace: Path) -> None:
    (workplace / "empty").mkdir(exist_ok=True)
    line = mistake(workplace, "prepare", "tiny", "data.source.path=empty", "data.path=prepared/empty")
    assert "empty" in line


def test_vocabulary_larger_than_the_corpus_supports(workplace: Path) -> None:
    line = mistake(workplace, "prepare", "tiny", "data.tokenizer.vocab_size=30000", "data.path=prepared/large")
    assert "vocab_size" in line
    assert "30000" in line.replace(",", "")


def test_model_vocabulary_smaller_than_the_tokenizer(workplace: Path) -> None:
    assert "model.vocab_size" in mistake(workplace, "train", "tiny", "name=small", "model.vocab_size=100")


def test_sequence_longer_than_the_data(workplace: Path) -> None:
    sizes = "training.sequence_length=10_000_000", "training.tokens=80_000_000"
    assert "sequence_length" in mistake(workplace, "train", "tiny", "name=long", *sizes)


def test_a_run_folder_in_use(workplace: Path) -> None:
    """A second job on the same run exits naming the owner; the first goes on."""
    command = ["train", "tiny", "name=busy", f"training.tokens={4000 * TOKENS_PER_STEP}"]
    first = start(*command, cwd=workplace)
    try:
        wait_for_step(first, workplace / "runs" / "busy", 2)
        assert f"process {first.pid}" in mistake(workplace, *command)
        assert first.poll() is None
    finally:
        kill_group(first)


def test_another_model_in_the_same_run_folder(workplace: Path, trained: Path) -> None:
    line = mistake(workplace, "train", "tiny", "model.d_model=64")
    assert "model.d_model: got 64" in line


def test_no_space_left(workplace: Path, tmp_path: Path) -> None:
    """A disk of 400 KiB: the checkpoint's preflight says what is missing and what it needs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.strip()}")
    try:
        assert "free" in mistake(workplace, "train", "tiny", "name=full", f"runs={disk}")
        assert not list((disk / "full" / "checkpoints").glob("tokens-*"))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(workplace: Path, tmp_path: Path) -> None:
    sealed = tmp_path / "sealed"
    sealed.mkdir(mode=0o500)
    assert str(sealed) in mistake(workplace, "train", "tiny", f"runs={sealed}")
