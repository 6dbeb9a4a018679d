"""What a rank does for its launcher: dies with it, and says once why the run ends."""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

WAIT_FOR_REASON_S = 2.0
VERDICT = "BRAID_VERDICT"
"""Names the file for exit codes that no restart would change; set by a launcher."""


def report(message: str, *, survivor: bool = False) -> None:
    """Says once why the run ends: through the launcher, which prints one rank's words, or else as rank 0. survivor: of
    another rank's death, which may be rank 0's."""
    line = f"braid: error: {message}"
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    launched = "BRAID_LAUNCHER" in os.environ
    if report and launched:
        extra = {"py_callstack": "", "timestamp": str(int(time.time()))}
        Path(report).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))
    if (not report or not launched or _restarted()) and (survivor or os.environ.get("RANK", "0") == "0"):
        print(line, file=sys.stderr)


def _restarted() -> bool:
    """Whether the launcher starts failed ranks again, and so keeps their words to itself."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def final(code: int) -> int:
    """What a rank exits with that has come to `code`, which a restart would not change (a mistake, a stop, a run that
    diverges): itself, or 0 after leaving it to a launcher that would start it again."""
    if code != 0 and VERDICT in os.environ and _restarted():
        Path(os.environ[VERDICT]).write_text(str(code))
        return 0
    return code


def read_verdict() -> int:
    """The exit code that the ranks of this launcher left, 0 if none did."""
    path = Path(os.environ[VERDICT])
    return int(path.read_text()) if path.exists() else 0


def explained() -> bool:
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


def die_with_launcher() -> None:
    """Asks the kernel to kill this rank when its launcher dies, so that no rank is left in the run folder."""
    launcher = os.environ.get("BRAID_LAUNCHER")
    if launcher is None or sys.platform != "linux":
        return
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):
        sys.exit(128 + signal.SIGKILL)
