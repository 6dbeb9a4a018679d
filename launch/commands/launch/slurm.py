"""Writes the Slurm job that trains RECIPE: one rank for each GPU of the nodes, or T ranks a node on CPUs.

The job saves shortly before its time limit, requeues itself and resumes, until the run is done; scancel saves and ends
it. The script is plain bash with comments, yours to read and edit. The recipe is checked before anything is written.
"""

import argparse
import sys
from pathlib import Path

from launch.commands.arguments import add_recipe

LINE = 12
"""Width of the first column of what is said about a job."""


def configure(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    ranks = parser.add_argument_group("ranks")
    ranks.add_argument("--nodes", type=int, required=True, metavar="N", help="machines")
    ranks.add_argument("--gpus-per-node", type=int, default=0, metavar="G", help="GPUs of each, one rank for each GPU")
    ranks.add_argument("--tasks-per-node", type=int, metavar="T", help="ranks of each, on a cluster without GPUs")
    ranks.add_argument("--cpus-per-task", type=int, metavar="C", help="cores of a rank, and its OMP_NUM_THREADS")
    job = parser.add_argument_group("the job")
    job.add_argument("--time", metavar="HH:MM:SS", help="time limit of one start (default: the partition's)")
    job.add_argument("--partition", metavar="P", help="where it queues (default: the cluster's)")
    job.add_argument("--account", metavar="A", help="who pays")
    job.add_argument("--qos", metavar="Q", help="quality of service")
    job.add_argument(
        "--signal-before",
        type=int,
        default=300,
        metavar="SECONDS",
        help="how long before the time limit the ranks save (default: 300)",
    )
    job.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, without its dashes: --sbatch mem=0 --sbatch exclusive",
    )
    job.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="shell line to run before the ranks start: --setup 'module load cuda'; may be repeated",
    )
    job.add_argument("--env-file", type=Path, metavar="FILE", help="KEY=value lines to export before the ranks start")
    job.add_argument("--output", metavar="FILE", help="where the script goes, - prints it (default: RUN/job.sbatch)")
    job.add_argument("--submit", action="store_true", help="submit the script and print the job's id")


def run(arguments: argparse.Namespace) -> int:
    from launch import slurm
    from launch.recipes import find_recipe
    from train.config import load_recipe

    if arguments.submit and arguments.output == "-":
        raise ValueError("--output: got '-' with --submit, wants a file")
    if arguments.submit:
        slurm.require_sbatch()
    path = find_recipe(arguments.recipe)
    recipe = load_recipe(path, arguments.overrides)
    shape = slurm.Shape(arguments.nodes, arguments.gpus_per_node, arguments.tasks_per_node, arguments.cpus_per_task)
    job = slurm.Job(
        recipe=path,
        overrides=tuple(arguments.overrides),
        name=recipe.name,
        run=recipe.folder,
        shape=shape,
        time=arguments.time,
        partition=arguments.partition,
        account=arguments.account,
        qos=arguments.qos,
        signal_before=arguments.signal_before,
        sbatch=tuple(arguments.sbatch),
        setup=tuple(arguments.setup),
        env_file=arguments.env_file,
        output=None if arguments.output == "-" else Path(arguments.output or recipe.folder / "job.sbatch"),
    )
    slurm.check_recipe(recipe, shape)
    unprepared = slurm.why_unprepared(recipe)
    if unprepared and arguments.submit:
        raise ValueError(unprepared)
    script = slurm.script(job)
    # Slurm does not make the folder that it writes a job's output into: the job would fail without a word.
    recipe.folder.mkdir(parents=True, exist_ok=True)
    if job.output is None:
        sys.stdout.write(script)
        return 0
    job.output.parent.mkdir(parents=True, exist_ok=True)
    job.output.write_text(script)
    job_id = slurm.submit(job.output) if arguments.submit else None
    print("\n".join(f"{label:{LINE}}{line}" for label, line in slurm.next_steps(job, job_id, unprepared)))
    return 0
