"""The frame of `braid bench` with made-up rows, and one real one. No number is judged: machines differ."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch import cli
from launch.bench import rows as registry
from launch.bench.measure import SideFailed, environment, measure, started
from launch.bench.row import Row
from launch.local import MALLOC
from tests.launch import bench_sides

ROOT = Path(__file__).parents[2]
KEYS = {"name", "ours", "peer", "peer_name", "unit", "ratio", "spread", "machine"}

FAKE = Row(
    name="fake",
    measures="Nothing.",
    unit="tokens/s",
    higher_is_better=True,
    ours=bench_sides.ours,
    peer=bench_sides.peer,
    peer_name="theirs",
)
CHATTY = replace(FAKE, name="chatty", ours=bench_sides.chatty, peer=bench_sides.chatty)


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("GLIBC_TUNABLES", "OMP_NUM_THREADS", "BRAID_DEBUG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(bench_sides.TRACE, str(tmp_path / "trace"))
    return tmp_path / "trace"


def bench(rows: list[Row], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`braid bench ARGUMENTS` with these rows in the place of the shipped ones."""
    monkeypatch.setattr(registry, "all_rows", lambda: {row.name: row for row in rows})
    return cli.main(["bench", *arguments])


def test_sides_take_turns_in_processes_of_one_environment(trace: Path):
    """Otherwise noise, or the allocator's settings, would meet one side alone."""
    result = measure(FAKE, 3, False, lambda words: None)
    turns = ["ours 1", "peer 1", "ours 2", "peer 2", "ours 3", "peer 3"]
    assert trace.read_text().splitlines() == ["ours warm-up", "peer warm-up", *turns]
    ours, peer = result.ours.facts, result.peer.facts
    assert len({os.getpid(), ours["pid"], peer["pid"]}) == 3
    assert ours["settings"] == peer["settings"] == [MALLOC, str(len(os.sched_getaffinity(0)))]
    assert ours["turn"] == peer["turn"] == 1  # of the round that the values are of


def test_on_a_gpu_sides_follow_each_other_and_shared_ones_are_measured_once(trace: Path):
    """Two models may not fit into its memory, and a minute of a GPU is dear."""
    row = replace(FAKE, cuda=True)
    known: dict = {}
    first = measure(row, 2, False, lambda words: None, known)
    second = measure(replace(row, peer=bench_sides.chatty), 2, False, lambda words: None, known)
    turns = [f"{side} {turn}" for side in ("ours", "peer") for turn in ("warm-up", "1", "2")]
    assert trace.read_text().splitlines() == turns
    assert first.ours.values == second.ours.values == [40.0, 10.0]


def test_without_a_gpu_its_rows_are_left_out_or_refused(
    trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """In one line each: nobody waits for a row that cannot run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = [CHATTY, replace(FAKE, name="big", cuda=True)]
    assert bench(rows, monkeypatch, "--quick", "--json") == 0
    output, errors = capsys.readouterr()
    assert [row["name"] for row in json.loads(output)] == ["chatty"]
    assert "left out, for want of a GPU: big\n" in errors
    assert bench(rows, monkeypatch, "big", "--quick") == 2
    assert capsys.readouterr().err == (
        "braid: error: row: got big, which needs a GPU; torch finds no CUDA device here\n"
    )
    assert bench(rows, monkeypatch, "--list") == 0
    assert "big [tokens/s, on a GPU]" in capsys.readouterr().out


@pytest.mark.parametrize(("higher", "ratio", "low", "high"), [(True, 2.0, 1.0, 3.0), (False, 0.5, 1 / 3, 1.0)])
def test_the_median_round_its_spread_and_a_ratio_above_one_for_the_better(
    trace: Path, higher: bool, ratio: float, low: float, high: float
):
    """Seconds and bytes are better when low: a ratio the wrong way round would praise the slower side. Both numbers are
    of one round, that of the median ratio (the first of 40/20, 10/10, 30/10); the warm-up counts nowhere."""
    row = measure(replace(FAKE, higher_is_better=higher), 3, False, lambda words: None).to_dict({"cpu": "x"})
    assert (row["ours"], row["peer"], row["ratio"]) == (40.0, 20.0, ratio)
    assert row["spread"]["ours"] == [10.0, 40.0]
    assert row["spread"]["peer"] == [10.0, 20.0]
    assert row["spread"]["ratio"] == pytest.approx([low, high])
    assert (row["rounds"], row["machine"]) == (3, {"cpu": "x"})


def test_a_row_may_add_keys(trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    row = replace(FAKE, derive=lambda ours, peer: {"mfu": ours.value / 80, "same": ours.facts != peer.facts})
    assert bench([row], monkeypatch, "--rounds", "3", "--json") == 0
    (printed,) = json.loads(capsys.readouterr().out)
    assert (printed["mfu"], printed["same"]) == (0.5, True)
    assert bench([row], monkeypatch, "--rounds", "3") == 0
    assert "fake: mfu 0.5, same True" in capsys.readouterr().out


def test_a_missing_peer_is_said_and_no_failure(
    trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    row = replace(FAKE, needs=("json", "no_such_package"))
    assert bench([row], monkeypatch, "--rounds", "3", "--json") == 0
    (printed,) = json.loads(capsys.readouterr().out)
    assert (printed["ours"], printed["peer"], printed["ratio"]) == (30.0, None, None)
    assert printed["peer_name"] == "theirs (not installed)"
    assert bench([row], monkeypatch, "--rounds", "3") == 0
    assert "not installed" in capsys.readouterr().out
    assert bench([row], monkeypatch, "--list") == 0
    assert "pip install no_such_package" in capsys.readouterr().out
    assert "peer" not in trace.read_text()


@pytest.mark.parametrize(
    ("side", "function", "why"),
    [
        ("ours", bench_sides.raises, "broken: ours: RuntimeError: out of luck"),
        ("peer", bench_sides.raises, "broken: theirs: RuntimeError: out of luck"),
        ("peer", bench_sides.dies, "broken: theirs: died with exit code 3 (the last words)"),
    ],
)
def test_a_row_that_crashes_is_named_and_the_others_go_on(
    trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, side: str, function, why: str
):
    broken = replace(FAKE, name="broken", **{side: function})
    assert bench([broken, CHATTY], monkeypatch, "--quick", "--json") == 1
    output, errors = capsys.readouterr()
    assert [row["name"] for row in json.loads(output)] == ["chatty"]
    assert f"braid: error: {why}\n" in errors
    assert "Traceback" not in errors


def test_what_a_side_prints_is_no_answer_and_stdout_is_json_alone(
    trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Libraries greet on stdout; machines read ours. Progress is on stderr."""
    assert bench([CHATTY], monkeypatch, "--quick", "--json") == 0
    output, errors = capsys.readouterr()
    (row,) = json.loads(output)
    assert (row["ours"], row["peer"], row["ratio"]) == (1.0, 1.0, 1.0)
    assert row.keys() >= KEYS
    assert "chatty: round 2 of 2: ours 1, theirs 1 tokens/s" in errors


def test_the_table_has_a_line_a_row(trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert bench([FAKE, CHATTY], monkeypatch, "--rounds", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["row", "ours", "peer", "ratio", "unit", "peer", "is"]
    assert lines[1].split() == ["fake", "40", "±38%", "20", "±25%", "2.00", "(1.00-3.00)", "tokens/s", "theirs"]
    assert lines[2].split()[:2] == ["chatty", "2"]
    assert lines[-1].startswith("machine: ")


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("BRAID_DEBUG", raising=False)
    assert bench([FAKE, CHATTY], monkeypatch, "fkae") == 2
    assert bench([FAKE, CHATTY], monkeypatch, "chatty", "zzz") == 2
    assert bench([FAKE], monkeypatch, "--rounds", "0") == 2
    assert capsys.readouterr().err.splitlines() == [
        "braid: error: row: got 'fkae'; did you mean fake?",
        "braid: error: row: got 'zzz'; wants one of fake, chatty",
        "braid: error: --rounds: got 0, wants a positive number",
    ]


def test_rows_are_listed_without_torch():
    """`--list` answers at once only while row files import heavy things inside their functions."""
    code = "import sys; from launch.bench.rows import all_rows; all_rows(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    rows = registry.all_rows()
    assert {"matmul_peak", "train_quickstart"} <= rows.keys()
    assert [row.name for row in registry.choose(["train_quickstart", "matmul_peak", "train_quickstart"])] == [
        "train_quickstart",
        "matmul_peak",
    ]


def test_the_matmul_peak_is_measured():
    """The one shipped row that needs a second only, as a user runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "launch", "bench", "matmul_peak", "--quick", "--json"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row.keys() >= KEYS
    assert row["ours"] > 0 and row["peer"] > 0
    assert row["ratio"] == row["ours"] / row["peer"]
    assert (row["peer_name"], row["unit"]) == ("torch float32", "TFLOP/s")
    assert row["machine"]["cpu"] and row["machine"]["threads"] > 0 and row["machine"]["torch"]


def test_a_training_row_trains():
    """It goes through `train_step` and the engine, and what it reports is what MFU needs."""
    with started("ours", bench_sides.trains, False, environment()) as worker:
        readings = [worker.reading() for _ in range(2)]
    assert readings[1].facts["last_loss"] < readings[0].facts["first_loss"]
    assert readings[1].facts["flops_per_token"] > 3 * readings[1].facts["parameters"]
    assert readings[1].facts["peak_flops"] > 0


def test_a_model_that_does_not_train_is_no_benchmark():
    """A step that leaves something out could be fast."""
    row = replace(FAKE, ours=bench_sides.does_not_train, needs=("no_such_package",))
    with pytest.raises(SideFailed, match=r"^ours: RuntimeError: the loss went from .* does not train$"):
        measure(row, 5, False, lambda words: None)


def test_the_peer_of_the_quickstart_has_its_weights():
    """The same number of weights of every shape (ours in one matrix where the peer has several, and the other way
    round, aside): else the ratio compares two models."""
    pytest.importorskip("transformers")
    from launch.bench.rows.train_quickstart import granite, quickstart
    from model.hybrid import parameter_count

    recipe = quickstart()
    peer = granite(recipe.model, recipe.training.sequence_length)
    assert sum(parameter.numel() for parameter in peer.parameters()) == parameter_count(recipe.model)
    assert peer.config.layer_types == ["linear_attention", "full_attention"] * 4


@pytest.mark.parametrize("family", ["nemotron_h", "mamba2"])
def test_the_peers_of_the_hybrids_start_from_our_weights(family: str):
    """The same function of the same weights, or a ratio compares two models."""
    from launch.bench.rows import train_hybrids
    from model.hybrid import HybridLM, initialise_model

    recipe = getattr(train_hybrids, family)()
    ours = HybridLM(recipe.model)
    initialise_model(ours, recipe.seed)
    theirs = getattr(train_hybrids, f"hf_{family}")(recipe).eval()
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    tokens = torch.arange(40).view(2, 20) * 7
    starts = torch.zeros(tokens.shape, dtype=torch.bool)
    with torch.no_grad():
        difference = (ours(tokens, starts).logits - theirs(input_ids=tokens, use_cache=False).logits).abs().max()
    assert difference < 1e-4


def test_the_peers_on_a_gpu_have_our_shapes(monkeypatch: pytest.MonkeyPatch):
    """As many weights, or a ratio compares two models. Built without memory; mamba-ssm's needs its GPU."""
    pytest.importorskip("transformers")
    from launch.bench.rows import gpu_training
    from model.hybrid import parameter_count

    def on_meta(build: Callable) -> torch.nn.Module:
        with torch.device("meta"):
            return build()

    monkeypatch.setattr(gpu_training, "_on_the_gpu", on_meta)
    for recipe, build in (
        (gpu_training.mamba2(), gpu_training.build_hf_mamba2),
        (gpu_training.nemotron_h(32768), gpu_training.build_hf_nemotron_h),
    ):
        theirs = build(recipe)
        assert sum(parameter.numel() for parameter in theirs.parameters()) == parameter_count(recipe.model)
        assert theirs.config.chunk_size == recipe.model.layers["M"].chunk == 256


def test_the_plain_loop_trains_as_the_engine_does():
    """What the engine's cost is measured against takes the same steps."""
    from launch.bench.training import braid, plain_loop

    recipe = bench_sides.small()
    losses = [[next(side).facts["last_loss"] for _ in range(2)] for side in (braid(recipe, 2), plain_loop(recipe, 2))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_minimal_scan_computes_what_ours_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The peer of the SSD row gets the arguments in its own conventions; where it is not there the row says so."""
    from launch.bench.rows import ssd as row
    from model.ops.ssd import ssd

    if row.absent():
        assert row.absent() == ["mamba_ssm (make peers)"]
        pytest.skip("no mamba-ssm beside the environment (make peers)")
    runs: list[Callable] = []
    monkeypatch.setattr(row, "_tokens_per_s", lambda run, length: runs.append(run) or 1.0)
    before = dict(sys.modules)
    next(row.peer(True))
    next(row.ours(True))
    for name in set(sys.modules) - set(before):
        if name.startswith("mamba_ssm"):
            del sys.modules[name]
    generator = torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(1, 128, n, p, generator=generator) for n, p in ((16, 64), (1, 128), (1, 128)))
    dt, A = torch.rand(1, 128, 16, generator=generator) * 0.1, -torch.rand(16, generator=generator) * 8
    theirs, ours = runs[0](x, dt, A, B, C), runs[1](x, dt, A, B, C)
    assert torch.allclose(theirs, ours, atol=1e-3, rtol=1e-3)
    assert torch.equal(ours, ssd(x, dt, A, B, C)[0])


def test_serving_rows_serve(monkeypatch: pytest.MonkeyPatch):
    """Prefill and decoding of both sides, on a short context."""
    from launch.bench.rows import serving

    monkeypatch.setattr(serving, "QUICK_CONTEXT", 16)
    monkeypatch.setattr(serving, "STEPS", 2)
    for side in (serving.prefill_ours, serving.decode_ours, serving.decode_llama, serving.decode_samba_short):
        readings = side(True)
        assert next(readings).value > 0 and next(readings).value > 0


def test_the_peak_of_memory_is_that_of_the_step():
    """A tensor that lives within a step only counts, and not in the next one."""
    from launch.bench.rows.serving import _peaks

    def steps():
        for size in (256 << 18, 1):  # much more than what tests before it left behind, to be freed meanwhile
            held = torch.ones(size)
            del held
            yield None

    first, second = (reading.value for reading in _peaks(steps()))
    assert first > 0.2 and second < first
