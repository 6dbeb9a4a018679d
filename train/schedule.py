"""Learning-rate schedules: pure functions of the token clock."""

import math
from dataclasses import dataclass
from typing import Literal

from train.reading import require

SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "sqrt": lambda x: 1 - math.sqrt(x),
}
"""Shape of a decay: progress in [0, 1] -> from 1 down to 0."""


def _check_span(name: str, tokens: int | None, fraction: float) -> None:
    require(tokens is None or tokens >= 0, f"{name}_tokens", tokens, "a number of tokens, or none")
    require(0 <= fraction <= 1, f"{name}_fraction", fraction, "a fraction in [0, 1]")


def _span(tokens: int | None, fraction: float, total_tokens: int) -> float:
    return fraction * total_tokens if tokens is None else tokens


def _decay(shape: str, progress: float, final_fraction: float) -> float:
    """From 1 at progress 0 to `final_fraction` at progress 1 and beyond."""
    return final_fraction + (1 - final_fraction) * SHAPES[shape](min(1.0, progress))


@dataclass(frozen=True)
class WSD:
    """Warm-up, stable, decay (arXiv 2404.06395): linear from 0 to 1, constant, then `shape` down to `final_fraction`.

    warmup_tokens, decay_tokens: lengths in tokens; where none, warmup_fraction and decay_fraction of the whole run.
    final_fraction: of the peak, at the end. shape: of the decay: linear, cosine or sqrt (1 - sqrt, arXiv 2405.18392).
    """

    warmup_tokens: int | None = None
    warmup_fraction: float = 0.01
    decay_tokens: int | None = None
    decay_fraction: float = 0.2
    final_fraction: float = 0.0
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    kind: Literal["wsd"] = "wsd"

    def __post_init__(self) -> None:
        _check_span("warmup", self.warmup_tokens, self.warmup_fraction)
        _check_span("decay", self.decay_tokens, self.decay_fraction)
        require(0 <= self.final_fraction <= 1, "final_fraction", self.final_fraction, "a fraction in [0, 1]")
        require(self.shape in SHAPES, "shape", self.shape, f"one of {', '.join(SHAPES)}")

    def check(self, total_tokens: int) -> None:
        """Raises ValueError when warm-up and decay do not fit into the run."""
        warmup = _span(self.warmup_tokens, self.warmup_fraction, total_tokens)
        decay = _span(self.decay_tokens, self.decay_fraction, total_tokens)
        fits = warmup + decay <= total_tokens
        require(fits, "decay_tokens", round(decay), f"at most {total_tokens} with the {round(warmup)} of warm-up")

    def factor(self, tokens: float, total_tokens: int) -> float:
        """Multiple of the peak learning rate when `tokens` of `total_tokens` have been trained."""
        warmup = _span(self.warmup_tokens, self.warmup_fraction, total_tokens)
        decay = _span(self.decay_tokens, self.decay_fraction, total_tokens)
        if tokens < warmup:
            return tokens / warmup
        if decay == 0 or tokens <= total_tokens - decay:
            return 1.0
        return _decay(self.shape, (tokens - (total_tokens - decay)) / decay, self.final_fraction)


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine down to `final_fraction` of the peak at the end of the run.

    warmup_tokens: length in tokens; where none, warmup_fraction of the whole run.
    """

    warmup_tokens: int | None = None
    warmup_fraction: float = 0.01
    final_fraction: float = 0.1
    kind: Literal["cosine"] = "cosine"

    def __post_init__(self) -> None:
        _check_span("warmup", self.warmup_tokens, self.warmup_fraction)
        require(0 <= self.final_fraction <= 1, "final_fraction", self.final_fraction, "a fraction in [0, 1]")

    def check(self, total_tokens: int) -> None:
        """Raises ValueError when the warm-up does not fit into the run."""
        warmup = _span(self.warmup_tokens, self.warmup_fraction, total_tokens)
        require(warmup <= total_tokens, "warmup_tokens", round(warmup), f"at most {total_tokens}")

    def factor(self, tokens: float, total_tokens: int) -> float:
        """Multiple of the peak learning rate when `tokens` of `total_tokens` have been trained."""
        warmup = _span(self.warmup_tokens, self.warmup_fraction, total_tokens)
        if tokens < warmup:
            return tokens / warmup
        if warmup >= total_tokens:
            return 1.0
        return _decay("cosine", (tokens - warmup) / (total_tokens - warmup), self.final_fraction)


Schedule = WSD | Cosine
