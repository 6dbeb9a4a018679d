"""Loss spikes: found on the global loss, which is the same number on every rank, so that all decide alike."""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from train.reading import require

NORMAL = 1.4826
"""Standard deviations of a normal distribution per median absolute deviation."""


@dataclass(frozen=True)
class SpikesConfig:
    """What counts as a loss spike, and what is done about it.

    action: "log" writes it into events.jsonl; "rollback" also goes back to the newest checkpoint from before it and
    leaves out the samples that it was trained on; "ignore" does not look. A step is high when its loss exceeds the
    median of the last `window` ordinary steps by `deviations` robust standard deviations (of the median absolute
    deviation) and by `margin` nats; `patience` high steps in a row are a spike. Nothing is looked for before `warmup`
    ordinary steps have been seen. rollbacks: at most in a run; one more ends it.
    """

    action: Literal["ignore", "log", "rollback"] = "log"
    window: int = 128
    warmup: int = 64
    deviations: float = 8.0
    margin: float = 0.1
    patience: int = 4
    rollbacks: int = 5

    def __post_init__(self) -> None:
        for key in ("window", "warmup", "patience"):
            require(getattr(self, key) > 0, key, getattr(self, key), "a positive number of steps")
        require(self.warmup <= self.window, "warmup", self.warmup, f"at most window={self.window}")
        for key in ("deviations", "margin", "rollbacks"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "a number that is not negative")


class Spike(NamedTuple):
    """Steps `first` to `last`, which read samples `[start, stop)`. loss: of the last. usual: median before."""

    first: int
    last: int
    start: int
    stop: int
    loss: float
    usual: float


class Spikes:
    """Watches the loss. Its state belongs into the checkpoint, so that a resumed run decides as the first one did."""

    def __init__(self, config: SpikesConfig) -> None:
        self.config = config
        self.rollbacks = 0
        self._usual: deque[float] = deque(maxlen=config.window)
        self._high: list[tuple[int, int]] = []
        """(step, first sample) of the high steps in a row."""

    def observe(self, step: int, loss: float, start: int, stop: int) -> Spike | None:
        """One step, which read samples `[start, stop)`. Returns the spike that it completes."""
        if self.config.action == "ignore" or not math.isfinite(loss):
            return None
        if not self._is_high(loss):
            self._usual.append(loss)
            self._high.clear()
            return None
        self._high.append((step, start))
        if len(self._high) < self.config.patience:
            return None
        first, begin = self._high[0]
        self._high.clear()
        return Spike(first, step, begin, stop, loss, statistics.median(self._usual))

    def _is_high(self, loss: float) -> bool:
        if len(self._usual) < self.config.warmup:
            return False
        middle = statistics.median(self._usual)
        spread = NORMAL * statistics.median(abs(value - middle) for value in self._usual)
        return loss > middle + max(self.config.deviations * spread, self.config.margin)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"usual": list(self._usual), "high": [list(pair) for pair in self._high], "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._usual = deque(state["usual"], maxlen=self.config.window)
        self._high = [(step, start) for step, start in state["high"]]
        self.rollbacks = state["rollbacks"]
