"""The Slurm script, without Slurm: what is in it, what its shell does when ranks end and signals come, who is refused.

srun, scontrol and sbatch are small scripts here; `test_slurm_cluster.py` has the real ones.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import cli, slurm
from launch.local import MALLOC, ROOT
from train.checkpoint.transaction import name_of

SRUN = """#!/bin/bash
printf '%s\\n' "$@" >"$FAKE/arguments"
env >"$FAKE/environment"
pwd >"$FAKE/folder"
trap 'sleep 0.2; exit "$FAKE_CODE"' USR1 TERM # the real one waits for the ranks
echo ready >"$FAKE/ready"
[ -n "$FAKE_WAITS" ] || exit "$FAKE_CODE"
while :; do sleep 0.02; done
"""
SCONTROL = """#!/bin/bash
[ "$2" = hostnames ] && { printf 'gpu7\\ngpu8\\n'; exit; }
echo "$*" >>"$FAKE/requeues"
exit "${FAKE_REQUEUE_CODE:-0}"
"""
NASTY = 'it\'s a "100%" $HOME folder'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, whose name has to be quoted; with programs in the place of Slurm's."""
    folder = tmp_path / NASTY
    (folder / "fake").mkdir(parents=True)
    monkeypatch.chdir(folder)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return folder


def write(*arguments: str, shape: tuple[str, ...] = ("--nodes", "2", "--gpus-per-node", "4")) -> Path:
    """The script of `braid launch slurm tiny ARGUMENTS`."""
    assert cli.main(["launch", "slurm", "tiny", *shape, *arguments]) == 0
    return Path("runs/tiny/job.sbatch").absolute()


def options(script: Path) -> dict[str, str]:
    """The #SBATCH options; "" for those without a value."""
    lines = [line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


class Start:
    """One start of a script as Slurm would start it, with a stand-in for srun that ends with `code`: at once, or after
    a signal."""

    def __init__(self, script: Path, code: int, waits: bool = False, **environment: str) -> None:
        self.fake = script.parents[2] / "fake"
        (self.fake / "ready").unlink(missing_ok=True)
        slurms = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "gpu[7-8]"}
        fakes = {"FAKE": str(self.fake), "FAKE_CODE": str(code), "FAKE_WAITS": "yes" if waits else ""}
        kept = {
            key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK")
        }
        self.process = subprocess.Popen(
            ["bash", str(script)],
            cwd="/",
            env=kept | slurms | fakes | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + 30
        while not (self.fake / "ready").exists() and self.process.poll() is None:
            assert time.monotonic() < deadline, "srun was never started"
            time.sleep(0.01)

    def time_limit(self) -> "Start":
        self.process.send_signal(signal.SIGUSR1)
        return self

    def scancel(self) -> "Start":
        os.killpg(self.process.pid, signal.SIGTERM)
        return self

    def end(self) -> tuple[int, str]:
        """Exit code and output."""
        output, _ = self.process.communicate(timeout=30)
        return self.process.returncode, output

    @property
    def requeues(self) -> int:
        path = self.fake / "requeues"
        asked = path.read_text().splitlines() if path.exists() else []
        assert set(asked) <= {"requeue 123456"}
        return len(asked)

    def environment(self) -> dict[str, str]:
        lines = (self.fake / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--time", "1-12:00:00", "--partition", "gpu", "--account", "a", "--qos", "long", "--cpus-per-task", "16"),
        ("--setup", "module load cuda", "--setup", "source 'my env'/bin/activate", "--env-file", "my env.sh"),
        ("--sbatch", "mem=0", "--sbatch", "exclusive", "--sbatch=--comment=it's mine", "--sbatch=-C a100"),
        ("seed=1", 'schedule={kind = "cosine"}', "data.path=it's/there $1"),
    ],
)
def test_the_script_is_good_bash(folder: Path, arguments: tuple[str, ...]):
    (folder / "my env.sh").write_text("A=1\n")
    script = write(*arguments)
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck") is None:
        pytest.skip("bash reads it; no shellcheck to say more")
    # Meant: a file that only --setup knows, and a "$" in a folder's name, which nothing may expand.
    checked = subprocess.run(["shellcheck", "--exclude=SC1091,SC2016", script], capture_output=True, text=True)
    assert checked.stdout == ""


def test_what_slurm_is_asked_for(folder: Path):
    asked = options(write("--time", "24:00:00", "--signal-before", "120", "--cpus-per-task", "12", "--sbatch", "mem=0"))
    assert asked == {
        "job-name": "tiny",
        "nodes": "2",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "cpus-per-task": "12",
        "time": "24:00:00",
        "output": shlex.quote(f"{folder}/runs/tiny/slurm-%j.out".replace("100%", "100%%")),
        "open-mode": "append",
        "requeue": "",
        "signal": "B:USR1@120",
        "mem": "0",
    }


def test_a_cluster_without_gpus_is_asked_for_none(folder: Path):
    asked = options(write(shape=("--nodes", "4", "--tasks-per-node", "2")))
    assert (asked["nodes"], asked["ntasks-per-node"]) == ("4", "2")
    assert not {"gpus-per-node", "cpus-per-task", "time", "partition"} & asked.keys()


def test_the_ranks_get_the_command_from_any_folder(folder: Path):
    """Paths are absolute and quoted, overrides arrive as they were given."""
    overrides = ["seed=1", 'schedule={kind = "cosine"}', "data.path=it's/there $HOME"]
    start = Start(write(*overrides, "--cpus-per-task", "3"), 0, SLURM_CPUS_PER_TASK="3")
    assert start.end()[0] == 0
    arguments = (folder / "fake/arguments").read_text().splitlines()
    program = arguments.index(sys.executable)
    assert "--cpus-per-task=3" in arguments[:program]
    assert "--kill-on-bad-exit=0" in arguments[:program], "the first rank to leave after a save would end the others"
    assert arguments[program + 1 :] == ["-m", "train", str(ROOT / "launch/recipes/tiny.toml"), *overrides]
    assert (folder / "fake/folder").read_text() == f"{folder}\n"


def test_the_environment_of_the_ranks(folder: Path):
    (folder / "site.env").write_text("NCCL_SOCKET_IFNAME=ib0\n")
    script = write("--env-file", "site.env", "--setup", "export FROM_SETUP=1")
    start = Start(script, 0, PYTHONPATH="elsewhere", SLURM_CPUS_PER_TASK="6", NCCL_DEBUG="INFO")
    code, output = start.end()
    environment = start.environment()
    assert code == 0
    assert environment["MASTER_ADDR"] == "gpu7"
    assert environment["MASTER_PORT"] == "23456"
    assert "rank 0 at gpu7:23456" in output
    assert (environment["OMP_NUM_THREADS"], environment["GLIBC_TUNABLES"]) == ("6", MALLOC)
    assert environment["PYTHONPATH"] == f"{ROOT}:elsewhere"
    assert (environment["NCCL_SOCKET_IFNAME"], environment["NCCL_DEBUG"]) == ("ib0", "INFO")
    assert environment["FROM_SETUP"] == "1"


def test_what_the_user_has_set_stays(folder: Path):
    start = Start(write(), 0, OMP_NUM_THREADS="9", GLIBC_TUNABLES="glibc.malloc.check=0", SLURM_CPUS_PER_TASK="2")
    assert start.end()[0] == 0
    environment = start.environment()
    assert (environment["OMP_NUM_THREADS"], environment["GLIBC_TUNABLES"]) == ("9", "glibc.malloc.check=0")


@pytest.mark.parametrize("code", [0, 1, 2, 75, 76, 137])
def test_an_end_without_the_time_limit_is_the_jobs_end(folder: Path, code: int):
    start = Start(write(), code)
    assert start.end()[0] == code
    assert start.requeues == 0


@pytest.mark.parametrize("code", [75, 138])
def test_the_time_limit_requeues(folder: Path, code: int):
    """138: Python was still starting and died of the signal."""
    start = Start(write(), code, waits=True).time_limit()
    assert start.end()[0] == code
    assert start.requeues == 1


@pytest.mark.parametrize("code", [0, 1, 76])
def test_a_run_that_ends_or_fails_at_the_time_limit_is_not_requeued(folder: Path, code: int):
    start = Start(write(), code, waits=True).time_limit()
    assert start.end()[0] == code
    assert start.requeues == 0


def test_scancel_ends_the_job(folder: Path):
    """The ranks save and end with 75 here too; that a job that somebody cancelled came back would be a nightmare."""
    start = Start(write(), 75, waits=True).scancel()
    assert start.end()[0] == 75
    assert start.requeues == 0


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(folder: Path):
    script = write()
    for requeues in (1, 2, 2):
        start = Start(script, 75, waits=True).time_limit()
        code, output = start.end()
        assert (code, start.requeues) == (75, requeues)
    assert "not requeued: two requeues in a row brought no new checkpoint" in output


def test_progress_is_the_newest_checkpoint(folder: Path):
    """By tokens, not by the order of letters: the name of 10^12 tokens has one more digit."""
    script = write()
    for number, tokens in enumerate((512, 999_999_999_999, 1_000_000_000_000, 2_000_000_000_000)):
        (folder / "runs/tiny/checkpoints" / name_of(tokens)).mkdir(parents=True)
        start = Start(script, 75, waits=True).time_limit()
        code, output = start.end()
        assert (code, start.requeues) == (75, number + 1)
        assert f"the ranks have ended with exit code 75, newest checkpoint: {name_of(tokens)}\n" in output


def test_a_requeue_that_slurm_refuses_says_how_to_go_on(folder: Path):
    code, output = Start(write(), 75, waits=True, FAKE_REQUEUE_CODE="1").time_limit().end()
    assert code == 75
    assert "could not be requeued; sbatch of the same script resumes the run" in output


def test_a_printed_script_is_the_written_one(folder: Path, capsys: pytest.CaptureFixture[str]):
    written = write().read_text()
    said = capsys.readouterr().out
    assert "8 GPU ranks, 4 on each of 2 nodes" in said
    assert "braid prepare" in said, "the data is not prepared, and nobody said so"
    shutil.rmtree("runs")
    assert cli.main(["launch", "slurm", "tiny", "--nodes", "2", "--gpus-per-node", "4", "--output", "-"]) == 0
    assert capsys.readouterr().out == written.replace(shlex.quote(str(folder / "runs/tiny/job.sbatch")), "FILE")
    assert Path("runs/tiny").is_dir(), "Slurm makes no folder for a job's output: the job would fail without a word"


SHAPE = ("--nodes", "2", "--gpus-per-node", "4")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--gpus-per-node", "4"), "the following arguments are required: --nodes"),
        (("--nodes", "0", "--gpus-per-node", "4"), "--nodes: got 0, wants a positive number"),
        (("--nodes", "1", "--gpus-per-node", "-1"), "--gpus-per-node: got -1, wants a positive number"),
        (("--nodes", "1"), "--gpus-per-node: missing, wants the GPUs of a node, or --tasks-per-node where it has none"),
        (("--nodes", "1", "--tasks-per-node", "0"), "--tasks-per-node: got 0, wants a positive number"),
        ((*SHAPE, "--tasks-per-node", "2"), "--tasks-per-node: got 2 with 4 GPUs, wants one rank for each GPU"),
        ((*SHAPE, "--cpus-per-task", "0"), "--cpus-per-task: got 0, wants a positive number"),
        (("--nodes", "3", "--gpus-per-node", "4"), "training.rows_per_step: got 8, wants a multiple of the 12 ranks"),
        ((*SHAPE, "training.tokns=3"), "command line: training.tokns: unknown key; did you mean training.tokens?"),
        ((*SHAPE, "--time", "2h"), "--time: got '2h', wants HH:MM:SS, D-HH:MM:SS or minutes"),
        (
            (*SHAPE, "--time", "05:00"),
            "--time: got 05:00, which is 300 s, wants more than the 300 s of --signal-before",
        ),
        ((*SHAPE, "--signal-before", "0"), "--signal-before: got 0, wants 1 to 65535 seconds"),
        ((*SHAPE, "--partition", ""), "--partition: got '', wants printable characters"),
        ((*SHAPE, "--sbatch", "array=0-3"), "--sbatch: got 'array=0-3'; braid launch slurm decides array"),
        ((*SHAPE, "--sbatch=--mem 0"), "--sbatch: got '--mem 0', wants an option of sbatch, as in mem=0"),
        ((*SHAPE, "--env-file", "none.env"), "--env-file: got 'none.env', which is no file"),
        ((*SHAPE, "--output", "-", "--submit"), "--output: got '-' with --submit, wants a file"),
        ((*SHAPE, "parallel.device=cpu"), "parallel.device: got 'cpu' for 8 GPU ranks"),
        ((*SHAPE, "checkpoints.resume=never"), "checkpoints.resume: got 'never', but a requeued job resumes"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], line: str
):
    assert cli.main(["launch", "slurm", "tiny", *arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"braid: error: {line}")
    assert errors.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("01:30", 90), ("24:00:00", 86_400), ("2-0", 172_800), ("1-2:30", 95_400), ("1-00:00:01", 86_401)],
)
def test_time_limits_are_read_as_slurm_reads_them(time: str, seconds: int):
    assert slurm.seconds(time) == seconds


@pytest.mark.parametrize("time", ["", "0", "1:99", "1:2:3", "1-1-1", "1:00:00:00", "ten", "1.5"])
def test_other_time_limits_are_refused(time: str):
    with pytest.raises(ValueError, match=r"--time: got .* wants HH:MM:SS"):
        slurm.seconds(time)


def test_submitting_without_slurm_says_so(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    assert cli.main(["launch", "slurm", "tiny", *SHAPE, "--submit"]) == 2
    line = "braid: error: sbatch: not found on PATH; the same command writes the script without --submit\n"
    assert capsys.readouterr().err == line
    assert not Path("runs").exists()


def test_nothing_is_submitted_before_the_data_is_prepared(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder.parent / "sbatch").write_text("#!/bin/bash\n")
    (folder.parent / "sbatch").chmod(0o755)
    assert cli.main(["launch", "slurm", "tiny", *SHAPE, "--submit"]) == 2
    assert "data.path: prepared/tiny holds no prepared data" in capsys.readouterr().err


@pytest.mark.parametrize("refuses", [True, False])
def test_what_sbatch_says_is_passed_on(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch, refuses: bool):
    says = "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1" if refuses else "echo '77;cluster'"
    (folder.parent / "sbatch").write_text(f'#!/bin/bash\ntest "$2" = runs/tiny/job.sbatch || exit 9\n{says}\n')
    (folder.parent / "sbatch").chmod(0o755)
    monkeypatch.setattr(slurm, "why_unprepared", lambda recipe: None)
    code = cli.main(["launch", "slurm", "tiny", *SHAPE, "--submit"])
    output, errors = capsys.readouterr()
    if refuses:
        line = "braid: error: sbatch: invalid partition specified: x; the script is runs/tiny/job.sbatch\n"
        assert (code, output, errors) == (2, "", line)
    else:
        assert (code, errors) == (0, "")
        assert "submitted   77\n" in output
        assert "runs/tiny/slurm-77.out" in output


def test_launching_here_is_what_train_does(monkeypatch: pytest.MonkeyPatch):
    started = []
    monkeypatch.setattr("launch.local.run", lambda *arguments: started.append(arguments) or 75)
    assert cli.main(["launch", "local", "tiny", "--nproc", "3", "seed=1"]) == 75
    assert cli.main(["train", "tiny", "--nproc", "3", "seed=1"]) == 75
    assert started[0] == started[1]
