"""Signals that ask a run to stop: save at the end of the step, exit with EXIT_STOPPED, resume on the next start.

A signal that the process was started to ignore (SIGHUP under nohup) stays ignored.
"""

import signal
from types import FrameType, TracebackType
from typing import Any

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""EX_TEMPFAIL: stopped by a signal after saving; the same command resumes."""
EXIT_UNHEALTHY = 76
"""Training stopped itself: too many updates in a row were not finite."""
EXIT_STALLED = 74
"""EX_IOERR: another rank died, or a step made no progress; the same command resumes. Below EXIT_STOPPED, because srun
reports the highest code of the ranks."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class StopRequest:
    """Remembers the first stop signal while active; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue  # as nohup asks
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
