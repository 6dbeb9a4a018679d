"""What the device could do at best: the denominator of model FLOPs utilisation."""

import re
import time
from dataclasses import dataclass

import torch

# Dense bfloat16 tensor-core peak in FLOP/s, from the vendors' data sheets; longest matching name wins.
DATASHEET_FLOPS = {
    "A100": 312e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI250X": 191.5e12,
    "MI300X": 1307e12,
}


@dataclass(frozen=True)
class Peak:
    """flops: dense bf16 FLOP/s of one rank's device. source: where the number comes from, for the log."""

    flops: float
    source: str


def device_peak(device: torch.device) -> Peak:
    """The data sheet's peak of a known GPU, else the measured rate of a bf16 matrix product on this rank."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [model for model in DATASHEET_FLOPS if re.search(rf"\b{re.escape(model)}\b", name)]
        if known:
            model = max(known, key=len)
            return Peak(DATASHEET_FLOPS[model], f"data sheet of {model}")
    flops = measured_matmul_flops(device)
    return Peak(
        flops,
        f"measured bf16 matmul on {torch.get_num_threads()} threads"
        if device.type == "cpu"
        else "measured bf16 matmul",
    )


def measured_matmul_flops(
    device: torch.device, size: int = 2048, seconds: float = 0.5, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Best rate of a (size x size) product in `dtype` over about `seconds`, in FLOP/s."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    best, spent = float("inf"), 0.0
    while spent < seconds or best == float("inf"):
        begin = time.perf_counter()
        torch.matmul(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - begin
        best, spent = min(best, took), spent + took
    return 2 * size**3 / best
