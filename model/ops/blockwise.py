"""What the ops that work block by block share: memory that stays warm, and an exponential that is fast on a CPU."""

import math

import torch
from torch import Tensor

LOG2_E = 1 / math.log(2)
ACCELERATOR_BLOCK = 2**26  # elements: 256 MiB in float32, of which an op holds a few


def rows_at_once(device: torch.device, width: int, cpu_block: int) -> int:
    """How many rows of `width` elements an op takes at a time, at least one.

    On a CPU as many as make `cpu_block` elements, the op's own measure of what stays in the cache. Elsewhere a block
    costs launches of kernels and only memory bounds it.
    """
    return max(1, (cpu_block if device.type == "cpu" else ACCELERATOR_BLOCK) // width)


class Scratch:
    """Hands out the same memory in every turn of a loop: on a CPU the first touch of fresh memory, and the cache it
    misses, cost more than the arithmetic on it. What a name held in the turn before is overwritten."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kept: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        n = math.prod(shape)
        flat = self.kept.get(name)
        if flat is None or flat.numel() < n:
            flat = self.kept[name] = torch.empty(n, dtype=dtype, device=self.device)
        assert flat.dtype == dtype, f"{name} was {flat.dtype}, now {dtype}"
        return flat[:n].view(shape)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums, statistics and exponentials of this dtype are computed in: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def least_exponent(dtype: torch.dtype) -> float:
    """The least power of e that is worth computing: products of two such numbers are still normal, 1e-19 in float32."""
    return math.log(torch.finfo(dtype).tiny) / 2


def exp2_(exponent: Tensor) -> Tensor:
    """2 to it, in place; of nothing positive, and of nothing so small that products with it would be subnormal: those
    are several times slower on a CPU, and the bound is far below rounding. exp2 takes a quarter of exp's time there
    (and exp of -inf three times exp's), so callers scale by LOG2_E."""
    return exponent.clamp_(least_exponent(exponent.dtype) * LOG2_E, 0).exp2_()
