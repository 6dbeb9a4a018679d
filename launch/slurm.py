"""Trains a recipe as a Slurm job: writes the sbatch script, submits it.

The script is for the person who has to find out at night why a job stands still: what depends on the job stands at its
top, the rest is the same in every script.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.prepare import open_prepared
from launch.local import RANK_DEFAULTS, ROOT
from train.config import Recipe
from train.reading import require

OURS = (
    *("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus", "gpus-per-node", "gpus-per-task", "time"),
    *("partition", "account", "qos", "signal", "requeue", "no-requeue", "open-mode", "job-name", "array"),
)
"""Options of sbatch that have an option of their own here, or that would break what the script does."""
LONGEST_NOTICE_S = 65_535
"""Slurm keeps the time of --signal in 16 bits."""


@dataclass(frozen=True)
class Shape:
    """Where the ranks run: one on each GPU, or `tasks_per_node` on each node when `gpus_per_node` is 0.

    cpus_per_task: cores of a rank; None leaves them to Slurm.
    """

    nodes: int
    gpus_per_node: int
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None

    def __post_init__(self) -> None:
        for option, number in (("nodes", self.nodes), ("tasks-per-node", self.tasks_per_node)):
            require(number is None or number > 0, f"--{option}", number, "a positive number")
        require(
            self.cpus_per_task is None or self.cpus_per_task > 0,
            "--cpus-per-task",
            self.cpus_per_task,
            "a positive number",
        )
        require(self.gpus_per_node >= 0, "--gpus-per-node", self.gpus_per_node, "a positive number")
        if self.gpus_per_node == 0 and self.tasks_per_node is None:
            raise ValueError(
                "--gpus-per-node: missing, wants the GPUs of a node, or --tasks-per-node where it has none"
            )
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"--tasks-per-node: got {self.tasks_per_node} with {self.gpus_per_node} GPUs, wants one rank for each "
                "GPU, which needs no --tasks-per-node"
            )

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def __str__(self) -> str:
        kind = "GPU" if self.gpus_per_node else "CPU"
        return f"{_count(self.ranks, f'{kind} rank')}, {self.ranks_per_node} on each of {_count(self.nodes, 'node')}"


@dataclass(frozen=True)
class Job:
    """One Slurm job. recipe, run, env_file, output: paths, which the script makes absolute. output: None prints it.
    time: limit of one start, None for the partition's. signal_before: seconds before it in which the ranks save.
    sbatch: further options. setup: shell lines before the ranks start."""

    recipe: Path
    overrides: tuple[str, ...]
    name: str
    run: Path
    shape: Shape
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    signal_before: int = 300
    sbatch: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    env_file: Path | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        notice = self.signal_before
        require(0 < notice <= LONGEST_NOTICE_S, "--signal-before", notice, f"1 to {LONGEST_NOTICE_S} seconds")
        if self.time is not None and seconds(self.time) <= notice:
            raise ValueError(
                f"--time: got {self.time}, which is {seconds(self.time)} s, wants more than the {notice} s of "
                "--signal-before"
            )
        if self.env_file is not None and not self.env_file.is_file():
            raise ValueError(f"--env-file: got {str(self.env_file)!r}, which is no file")

    @property
    def log(self) -> Path:
        """Where the job's output goes; Slurm puts the job's id in the place of %j."""
        return self.run.absolute() / "slurm-%j.out"


def seconds(time: str) -> int:
    """A time limit as Slurm reads it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    wants = "HH:MM:SS, D-HH:MM:SS or minutes"
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?", time, re.ASCII)
    require(match is not None, "--time", time, wants)
    assert match is not None
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    require(all(number < 60 for number in numbers[1:]), "--time", time, wants)
    if days is not None:
        hours, minutes, left = [*numbers, 0, 0][:3]
    else:
        hours, minutes, left = numbers if len(numbers) == 3 else [0, *numbers, 0][:3]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + left
    require(total > 0, "--time", time, wants)
    return total


def check_recipe(recipe: Recipe, shape: Shape) -> None:
    """Raises ValueError when the ranks of the job would refuse the recipe, or its requeued start would."""
    recipe.check_ranks(shape.ranks)
    wanted, device = ("cuda" if shape.gpus_per_node else "cpu"), recipe.parallel.device
    if device not in ("auto", wanted):
        raise ValueError(f"parallel.device: got {device!r} for {shape}, wants {wanted!r} or 'auto'")
    if recipe.checkpoints.resume == "never":
        raise ValueError("checkpoints.resume: got 'never', but a requeued job resumes; wants 'auto'")


def why_unprepared(recipe: Recipe) -> str | None:
    """What is wrong with the recipe's prepared data, None when it is there and fits the model."""
    try:
        open_prepared(recipe.data, verify=False).check_vocabulary(recipe.model.vocab_size)
    except ValueError as error:
        return str(error)
    return None


def script(job: Job) -> str:
    """The sbatch script. Raises ValueError for what no script can hold."""
    return "\n".join([*_head(job), "", *_directives(job), "", *_settings(job), "", RENDEZVOUS, *_ranks(job), AFTER])


def require_sbatch() -> None:
    """Raises ValueError when jobs cannot be submitted from this machine."""
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch: not found on PATH; the same command writes the script without --submit")


def submit(path: Path) -> str:
    """Submits the script; returns the job's id. Raises ValueError with what sbatch says when it refuses."""
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines()]
        reason = "; ".join(dict.fromkeys(line for line in lines if line)) or f"exit code {done.returncode}"
        raise ValueError(f"sbatch: {reason}; the script is {path}")
    return done.stdout.strip().partition(";")[0]


def next_steps(job: Job, job_id: str | None, unprepared: str | None) -> Iterator[tuple[str, str]]:
    """What to do with a script that was written or submitted: label, line."""
    assert job.output is not None
    recipe = shlex.join([str(job.recipe), *job.overrides])
    number = job_id or "JOBID"
    yield "script", f"{job.output}: {job.shape}, {_limit(job)}"
    if unprepared:
        yield "first", f"braid prepare {recipe}    ({unprepared})"
    if job_id is None:
        yield "submit", f"sbatch {shlex.quote(str(job.output))}"
    else:
        yield "submitted", job_id
    yield "watch", f"squeue --job {number}; tail -F {shlex.quote(str(job.run / 'slurm-'))}{number}.out"
    yield "end", f"scancel --signal=TERM {number}    (saves; `sbatch` of the script resumes)"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _limit(job: Job) -> str:
    if job.time is None:
        return "as long as the partition allows"
    minutes = -(-seconds(job.time) // 60)
    return f"{minutes // 60} h {minutes % 60:02d} min a start"


def _head(job: Job) -> list[str]:
    path = "FILE" if job.output is None else shlex.quote(str(job.output.absolute()))
    log = shlex.quote(str(job.log).replace("%j", "JOBID"))
    return [
        "#!/bin/bash",
        f"# Trains {job.name}: {job.shape}, {_limit(job)}.",
        "# Written by `braid launch slurm`, which writes it anew each time; yours to edit under another name.",
        "#",
        f"#   sbatch {path}",
        f"#   tail -F {log}",
        "#   scancel --signal=TERM JOBID            saves and ends; `sbatch` of this file resumes",
        "#   scancel JOBID                          the same, but Slurm kills what has not saved in KillWait (30 s)",
        "#   scancel --batch --signal=USR1 JOBID    saves, requeues and resumes, as before the time limit",
        "#",
        "# The job's exit code is that of the ranks: 0 done; 2 a mistake, named in the output; 74 a rank died, and the",
        "# others name it; 75 saved after a signal; 76 training stopped itself because updates stayed non-finite;",
        "# anything else is a failure.",
    ]


def _directives(job: Job) -> Iterator[str]:
    """The #SBATCH lines. Slurm reads them before it runs anything, so nothing in them is expanded by the shell."""
    shape = job.shape
    yield _directive("job-name", job.name)
    yield _directive("nodes", str(shape.nodes))
    yield _directive("ntasks-per-node", str(shape.ranks_per_node))
    if shape.gpus_per_node:
        yield _directive("gpus-per-node", str(shape.gpus_per_node))
    if shape.cpus_per_task is not None:
        yield _directive("cpus-per-task", str(shape.cpus_per_task))
    for name in ("time", "partition", "account", "qos"):
        value = getattr(job, name)
        if value is not None:
            yield _directive(name, value)
    yield _directive("output", str(job.log.parent).replace("%", "%%") + f"/{job.log.name}")
    yield "# A start goes on writing where the one before it stopped."
    yield _directive("open-mode", "append")
    yield "# When a node fails, Slurm itself puts the job back into the queue."
    yield "#SBATCH --requeue"
    yield "# B: is this shell alone; the traps below say why. Slurm may send it up to a minute early."
    yield _directive("signal", f"B:USR1@{job.signal_before}")
    if job.sbatch:
        yield "# Asked for with --sbatch:"
    yield from map(_further_directive, job.sbatch)


def _directive(name: str, value: str) -> str:
    require(value != "" and value.isprintable(), f"--{name}", value, "printable characters")
    return f"#SBATCH --{name}={shlex.quote(value)}"


def _further_directive(option: str) -> str:
    if re.match(r"-\w", option):
        require(option.isprintable(), "--sbatch", option, "one option of sbatch")
        return f"#SBATCH {option}"
    name, equals, value = option.removeprefix("--").partition("=")
    require(re.fullmatch(r"[a-z][a-z0-9-]*", name) is not None, "--sbatch", option, "an option of sbatch, as in mem=0")
    if name in OURS:
        raise ValueError(f"--sbatch: got {option!r}; braid launch slurm decides {name} (its --help shows the options)")
    return _directive(name, value) if equals else f"#SBATCH --{name}"


def _settings(job: Job) -> Iterator[str]:
    """The environment: what was asked for, then what a rank needs where nothing is set."""
    if job.setup:
        yield "# Asked for with --setup:"
        yield from job.setup
        yield ""
    if job.env_file is not None:
        yield "# Asked for with --env-file: every variable that the file sets is exported."
        yield "set -a"
        yield "# shellcheck source=/dev/null"
        yield f"source {_quoted(job.env_file)} || exit 2"
        yield "set +a"
        yield ""
    yield "# What is set already stays. NCCL_*, GLOO_* and all else reach the ranks as they are here."
    yield 'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"'
    for name, value in RANK_DEFAULTS.items():
        yield f'export {name}="${{{name}:-{value}}}"'
    yield f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"
    yield ""
    yield "# Relative paths in the recipe begin here, on every node; all nodes must see this folder."
    yield f"run={_quoted(job.run)}"
    yield f"cd {_quoted(Path.cwd())} || exit 2"


def _ranks(job: Job) -> Iterator[str]:
    cpus = '--cpus-per-task="$SLURM_CPUS_PER_TASK" ' if job.shape.cpus_per_task is not None else ""
    if cpus:
        yield "# srun has to be told the --cpus-per-task of the job."
    yield f"srun {cpus}--kill-on-bad-exit=0 --wait=600 \\"
    yield (
        f"    {shlex.quote(sys.executable)} -m train {_quoted(job.recipe)} "
        + "".join(f"\\\n    {shlex.quote(text)} " for text in job.overrides)
        + "&"
    )


def _quoted(path: Path) -> str:
    return shlex.quote(os.path.abspath(path))


RENDEZVOUS = """\
# Where the ranks find each other: rank 0 runs on the first node. The port differs between jobs that share it, and is
# below those that the kernel hands out.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || exit 1
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

say() { echo "job $SLURM_JOB_ID, $(date '+%F %T'): $*"; }
newest_checkpoint() {
    local newest
    newest=$(find "$run/checkpoints" -maxdepth 1 -name 'tokens-*' -printf '%f\\n' 2>/dev/null | sort -V | tail -n 1)
    echo "${newest:-none}"
}
say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, rank 0 at $MASTER_ADDR:$MASTER_PORT," \\
    "newest checkpoint: $(newest_checkpoint)"

# Ranks exit with 75 after any signal to stop. Whether the job goes on is decided here: it does after the time limit's
# SIGUSR1, which Slurm sends to this shell alone (B:), not after scancel's SIGTERM, which Slurm sends to the ranks too.
srun_pid="" time_is_up=no heard=""
trap 'heard=USR1 time_is_up=yes
    say "SIGUSR1: the time limit is near, the ranks save"
    [ -z "$srun_pid" ] || kill -USR1 "$srun_pid"' USR1 # srun passes it on to every rank
trap 'heard=TERM time_is_up=no' TERM

# A rank that fails does not end the others at once: ranks that have saved do not leave at the same moment either. Those
# still there ten minutes after the first has left are ended. That is longer than Slurm needs to notice a dead node
# (SlurmdTimeout, 300 s): a job that ended before would fail, where Slurm requeues it. srun's exit code is the highest
# of the ranks'."""

AFTER = """\
srun_pid=$!
[ "$time_is_up" = no ] || kill -USR1 "$srun_pid" # the signal came before srun was there

# A signal interrupts `wait`, whose code is then the signal's: wait again for that of srun.
while
    heard=""
    wait "$srun_pid"
    code=$?
    [ -n "$heard" ]
do :; done
say "the ranks have ended with exit code $code, newest checkpoint: $(newest_checkpoint)"

# 138 = 128 + SIGUSR1: the signal came before a rank could hear it, while Python was starting.
if [ "$time_is_up" = yes ] && { [ "$code" -eq 75 ] || [ "$code" -eq 138 ]; }; then
    # Three starts in a row that ended at the same checkpoint: the time is too short to get anywhere.
    ends="$run/slurm-$SLURM_JOB_ID.ends"
    newest_checkpoint >>"$ends"
    if [ "$(tail -n 3 "$ends" | wc -l)" -eq 3 ] && [ "$(tail -n 3 "$ends" | uniq | wc -l)" -eq 1 ]; then
        say "not requeued: two requeues in a row brought no new checkpoint; it needs a longer time limit"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "requeued"
    else
        say "could not be requeued; sbatch of the same script resumes the run"
    fi
fi
exit "$code"
"""
