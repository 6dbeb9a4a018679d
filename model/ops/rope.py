"""Frequencies of the rotary embedding (arXiv 2104.09864), plain or stretched for contexts longer than the trained one.

Pair i of d turned dimensions turns by position * theta^(-2i/d). A scaling changes these frequencies; YaRN's also makes
queries and keys longer, by its `amplitude`. The formulas are those of Hugging Face's `rope_parameters`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv 2306.15595). factor: divides every frequency."""

    factor: float
    kind: Literal["linear"] = "linear"

    def __post_init__(self) -> None:
        _check(self.factor >= 1, "factor", self.factor, "1 or more")

    @property
    def amplitude(self) -> float:
        return 1.0

    def stretch(self, plain: Tensor, theta: float) -> Tensor:
        return plain / self.factor


@dataclass(frozen=True)
class NTKScaling:
    """NTK-aware interpolation: theta grows so that the slowest pair is slowed by `factor` and the fastest not at all.
    The factor is fixed; Hugging Face's "dynamic" takes it from the length at hand."""

    factor: float
    kind: Literal["ntk"] = "ntk"

    def __post_init__(self) -> None:
        _check(self.factor >= 1, "factor", self.factor, "1 or more")

    @property
    def amplitude(self) -> float:
        return 1.0

    def stretch(self, plain: Tensor, theta: float) -> Tensor:
        pairs = torch.arange(len(plain), dtype=plain.dtype, device=plain.device)
        return plain * self.factor ** -(pairs / max(len(plain) - 1, 1))


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071, section 3.2). factor: of the context. original_length: tokens that the model was trained
    on. beta_fast, beta_slow: pairs that turn more often than beta_fast over it keep their frequency, those that turn
    less often than beta_slow are interpolated, a ramp between. attention_factor: of queries and keys each, none for
    0.1 ln(factor) + 1. truncate: round the ends of the ramp outwards, to whole pairs."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    kind: Literal["yarn"] = "yarn"

    def __post_init__(self) -> None:
        _check(self.factor >= 1, "factor", self.factor, "1 or more")
        _check(self.original_length > 0, "original_length", self.original_length, "a positive number of tokens")
        _check(self.beta_slow > 0, "beta_slow", self.beta_slow, "a positive number of turns")
        _check(self.beta_fast > self.beta_slow, "beta_fast", self.beta_fast, f"more than beta_slow={self.beta_slow}")
        ok = self.attention_factor is None or self.attention_factor > 0
        _check(ok, "attention_factor", self.attention_factor, "a positive number, or none")

    @property
    def amplitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def stretch(self, plain: Tensor, theta: float) -> Tensor:
        pairs = len(plain)
        low, high = (self._pair(turns, pairs, theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        steps = torch.arange(pairs, dtype=plain.dtype, device=plain.device)
        slowed = ((steps - low) / (high - low or 1e-3)).clamp(0, 1)
        return plain * (1 - slowed) + plain / self.factor * slowed

    def _pair(self, turns: float, pairs: int, theta: float) -> float:
        """Which pair, as a fraction, turns so often over the original length."""
        return pairs * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(theta)


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling (arXiv 2407.21783 and its public code). factor: of the context. original_length: tokens that
    the model was trained on. low_frequency, high_frequency: pairs that turn less than low_frequency times over it are
    slowed by `factor`, those that turn more than high_frequency times are not, between them in proportion."""

    factor: float
    original_length: int
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    kind: Literal["llama3"] = "llama3"

    def __post_init__(self) -> None:
        _check(self.factor >= 1, "factor", self.factor, "1 or more")
        _check(self.original_length > 0, "original_length", self.original_length, "a positive number of tokens")
        ok = self.high_frequency > self.low_frequency > 0
        _check(
            ok, "high_frequency", self.high_frequency, f"more than low_frequency={self.low_frequency}, both positive"
        )

    @property
    def amplitude(self) -> float:
        return 1.0

    def stretch(self, plain: Tensor, theta: float) -> Tensor:
        turns = self.original_length * plain / (2 * math.pi)
        kept = ((turns - self.low_frequency) / (self.high_frequency - self.low_frequency)).clamp(0, 1)
        return plain / self.factor * (1 - kept) + plain * kept


RopeScaling = LinearScaling | NTKScaling | YarnScaling | Llama3Scaling


def frequencies(
    theta: float, dims: int, scaling: RopeScaling | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(dims/2,) radians a position, of each pair."""
    plain = theta ** -(torch.arange(0, dims, 2, device=device, dtype=dtype) / dims)
    return plain if scaling is None else scaling.stretch(plain, theta)


def _check(ok: bool, key: str, got: object, wants: str) -> None:
    if not ok:
        raise ValueError(f"{key}: got {got}, wants {wants}")
