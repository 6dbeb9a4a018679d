"""Saving beside training: a step pauses only while its state is copied to host memory; a thread does the rest."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from model.weights.fragments import Fragment


class Staging:
    """Host memory for what this rank saves, allocated once for all saves; pinned for what comes from a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, items: Iterable[tuple[Fragment, Tensor]]) -> list[tuple[Fragment, Tensor]]:
        """The items with copies of their values, complete when this returns. What the call before returned is gone."""
        copies = [(fragment, self._copy(fragment.key, value)) for fragment, value in items]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _copy(self, key: str, value: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(value, non_blocking=True)


class Commit:
    """One save on its way: in a thread, or (thread=False) done when this returns.

    The thread is a daemon: a process that is told to die need not wait for it.
    """

    def __init__(self, work: Callable[[], Path], *, thread: bool) -> None:
        self._work = work
        self._outcome: Path | BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        if thread:
            self._thread.start()
        else:
            self._run()

    def _run(self) -> None:
        try:
            self._outcome = self._work()
        except BaseException as error:
            self._outcome = error

    @property
    def done(self) -> bool:
        return self._outcome is not None

    def result(self) -> Path:
        """Waits; returns the checkpoint's folder, or raises what the save failed with."""
        if self._thread.ident is not None:
            self._thread.join()
        assert self._outcome is not None
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome
