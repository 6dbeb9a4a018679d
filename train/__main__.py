"""One rank of a run: `python -m train RECIPE [section.key=value ...]`, alone or under torchrun or srun."""

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from train.mistakes import describe
from train.stop import EXIT_UNHEALTHY, EXIT_USER_ERROR

EXIT_FAULT = 1
WAIT_FOR_REASON_S = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains or resumes; returns the exit code, as `train.stop` names them."""
    _die_with_launcher()
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    chosen = parser.parse_args(arguments)
    from train.health import TrainingHealthError

    try:
        from train.config import load_recipe
        from train.loop import train

        return train(load_recipe(chosen.recipe, chosen.overrides))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except TrainingHealthError as error:
        _report(str(error))
        return EXIT_UNHEALTHY
    except Exception as error:
        line = describe(error)
        if line is None and _explained():
            return EXIT_FAULT
        if line is None:
            raise
        _report(line)
        return EXIT_USER_ERROR


def _report(message: str) -> None:
    """Says once why the run ends: through the launcher, which prints one rank's words, or else as rank 0."""
    line = f"braid: error: {message}"
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report and "BRAID_LAUNCHER" in os.environ:
        extra = {"py_callstack": "", "timestamp": str(int(time.time()))}
        Path(report).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))
    elif os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def _explained() -> bool:
    """Whether another rank says why the run ends, so that what this one ran into is a consequence.

    A rank that leaves closes its connections, which is what this one noticed, before it has said why.
    """
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not report or "BRAID_LAUNCHER" not in os.environ:
        return False
    deadline = time.monotonic() + WAIT_FOR_REASON_S
    while time.monotonic() < deadline:
        if any(Path(report).parents[1].glob("*/error.json")):
            return True
        time.sleep(0.05)
    return False


def _die_with_launcher() -> None:
    """Asks the kernel to kill this rank when its launcher dies, so that no rank is left in the run folder."""
    launcher = os.environ.get("BRAID_LAUNCHER")
    if launcher is None or sys.platform != "linux":
        return
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):
        sys.exit(128 + signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
