"""`braid verify --resume`: proves on the user's own machine that a killed run resumes on the same curve.

Three short runs of the recipe: one uninterrupted; one killed without warning and started again; one stopped, and
resumed by another number of ranks or, where the recipe has tensor, context or expert ranks, in another layout.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.local import ROOT
from train.config import Recipe, load_recipe
from train.metrics import read_json_lines
from train.parallel import Sizes
from train.stop import EXIT_DONE, EXIT_STOPPED

FACTS = ("step", "batch_hash", "loss", "grad_norm", "learning_rate")
"""What must be equal bit for bit after a kill on the same ranks."""

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Of losses in another layout, relative: sums in another order, rounded to the compute dtype."""

ALONE = ("parallel.tensor=1", "parallel.context=1", "parallel.expert=1")


@dataclass(frozen=True)
class Team:
    """Who trains a leg. sizes: of the mesh that `ranks` ranks fill. overrides: of the recipe, that make it so."""

    ranks: int
    sizes: Sizes
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        shared = ", ".join(f"{axis}={size}" for axis, size in vars(self.sizes).items() if size > 1)
        return ("1 rank" if self.ranks == 1 else f"{self.ranks} ranks") + (f" ({shared})" if shared else "")


def choose_teams(
    recipe: Path, overrides: Sequence[str], ranks: int | None = None, others: int | None = None
) -> tuple[Team, Team]:
    """Who trains every leg, and who resumes the moved one; None for a number that was not given.

    The first is by default the smallest that fills the recipe's mesh. The second is by default one rank, or two after
    one; where the recipe has tensor, context or expert ranks it is one rank without them, so that the layout changes.
    Raises ValueError naming the flag when the recipe cannot be trained so.
    """
    loaded = load_recipe(recipe, overrides)
    sizes = loaded.parallel.sizes
    first = Team(sizes.least if ranks is None else ranks, sizes)
    _check("--nproc", first, loaded, given=ranks is not None)
    if others is None and sizes != Sizes():
        return first, Team(1, Sizes(), ALONE)
    second = Team((1 if first.ranks > 1 else 2) if others is None else others, sizes)
    _check("--other-nproc", second, loaded, given=others is not None)
    if second == first:
        raise ValueError(f"--other-nproc: got {others}, as many ranks as before; wants another number")
    return first, second


def _check(flag: str, team: Team, recipe: Recipe, given: bool) -> None:
    if team.ranks < 1:
        raise ValueError(f"{flag}: got {team.ranks}, wants a positive number of ranks")
    try:
        recipe.check_ranks(team.ranks)
    except ValueError as error:
        raise ValueError(f"{flag} {team.ranks}{'' if given else ' (not given)'}: {error}") from None


@dataclass(frozen=True)
class Outcome:
    """what: was tried. steps: compared. difference: largest relative one of a loss. problem: None when it held."""

    what: str
    steps: int
    difference: float
    problem: str | None


class Drill:
    """recipe: a file. ranks: of the runs; others: that resume the moved one; None for what `choose_teams` takes. steps:
    of each run. folder: where the runs go."""

    def __init__(
        self,
        recipe: Path,
        overrides: Sequence[str],
        *,
        ranks: int | None = None,
        others: int | None = None,
        steps: int,
        folder: Path,
    ) -> None:
        self.recipe, self.steps, self.folder = recipe, steps, folder
        self.team, self.others = choose_teams(recipe, overrides, ranks, others)
        loaded = load_recipe(recipe, overrides)
        every = loaded.training.tokens_per_step * max(1, steps // 6)
        if loaded.training.tokens < steps * loaded.training.tokens_per_step:
            raise ValueError(f"--steps: got {steps}, the recipe has {loaded.training.tokens:,} tokens; wants fewer")
        self.dtype = loaded.training.compute_dtype
        self.overrides = [
            *overrides,
            f"runs={folder}",
            f"checkpoints.every_tokens={every}",
            "checkpoints.keep_last=2",
            "evaluation.every_tokens=none",
            "logging.wandb=none",
        ]

    def uninterrupted(self) -> list[dict[str, Any]]:
        self._train("uninterrupted", self.team, self.steps, signal.SIGTERM)
        return self._curve("uninterrupted")

    def killed(self, reference: list[dict[str, Any]]) -> Outcome:
        """SIGKILL to every process half-way, the same command again: the same bits."""
        self._train("killed", self.team, self.steps // 2, signal.SIGKILL)
        self._train("killed", self.team, self.steps, signal.SIGTERM)
        pairs = list(zip(self._curve("killed"), reference, strict=False))[: self.steps]
        problem = None
        for ours, theirs in pairs:
            differing = [key for key in FACTS if ours[key] != theirs[key]]
            if differing:
                key = differing[0]
                problem = f"step {ours['step']}: {key} is {ours[key]}, uninterrupted {theirs[key]}"
                break
        return Outcome(f"killed and resumed on {self.team}", len(pairs), _difference(pairs), problem)

    def moved(self, reference: list[dict[str, Any]]) -> Outcome:
        """Stopped half-way and resumed by the others: the same batches, losses up to rounding."""
        self._train("moved", self.team, self.steps // 2, signal.SIGTERM)
        self._train("moved", self.others, self.steps, signal.SIGTERM)
        pairs = list(zip(self._curve("moved"), reference, strict=False))[: self.steps]
        problem, allowed = None, TOLERANCE[self.dtype]
        for ours, theirs in pairs:
            if ours["batch_hash"] != theirs["batch_hash"]:
                problem = f"step {ours['step']}: another batch"
                break
            if _difference([(ours, theirs)]) > allowed:
                problem = f"step {ours['step']}: loss {ours['loss']}, uninterrupted {theirs['loss']}"
                break
        return Outcome(f"resumed on {self.others} after {self.team}", len(pairs), _difference(pairs), problem)

    def _curve(self, name: str) -> list[dict[str, Any]]:
        return read_json_lines(self.folder / name / "metrics.jsonl")

    def _train(self, name: str, team: Team, steps: int, number: int) -> None:
        """Trains until `steps` steps are recorded, then sends the signal to all its processes."""
        overrides = [*self.overrides, *team.overrides, f"name={name}"]
        command = ["-m", "launch", "train", str(self.recipe), "--nproc", str(team.ranks), *overrides]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"{name}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *command], env=environment, stdout=file, stderr=file, start_new_session=True
            )
        try:
            while process.poll() is None and len(self._curve(name)) < steps:
                time.sleep(0.05)
            if process.poll() is None:
                if number == signal.SIGKILL:
                    os.killpg(process.pid, number)
                else:
                    process.send_signal(number)
            code = process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code not in (EXIT_DONE, EXIT_STOPPED, -signal.SIGKILL):
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise ValueError(f"training ended with exit code {code}: {' '.join(last)} (log: {log})")


def _difference(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    both = [(a["loss"], b["loss"]) for a, b in pairs if a["loss"] is not None and b["loss"] is not None]
    return max((abs(a - b) / max(abs(b), 1e-9) for a, b in both), default=0.0)


def outcome_lines(outcomes: Sequence[Outcome]) -> str:
    """JSON of the outcomes, for machines."""
    return json.dumps([vars(outcome) for outcome in outcomes], indent=2)
