"""Starts the ranks that train a recipe, each of them `python -m train RECIPE`."""

COMMANDS = {
    "local": "on this machine, as `braid train --nproc N` does",
    "slurm": "on a cluster: writes a job that saves, requeues itself and resumes; --submit submits it",
}
