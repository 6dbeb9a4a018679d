"""The denominator of every MFU on a machine without a data sheet: how fast a bf16 matrix product can be."""

from collections.abc import Iterator

from launch.bench.row import Reading, Row

SIZE = 2048
SECONDS, QUICK_SECONDS = 0.5, 0.2


def bfloat16(quick: bool) -> Iterator[Reading]:
    return _rates("bfloat16", quick)


def float32(quick: bool) -> Iterator[Reading]:
    return _rates("float32", quick)


def _rates(dtype: str, quick: bool) -> Iterator[Reading]:
    import torch

    from train.hardware import measured_matmul_flops
    from train.parallel import choose_device

    device, seconds = choose_device(), QUICK_SECONDS if quick else SECONDS
    while True:
        yield Reading(measured_matmul_flops(device, SIZE, seconds, getattr(torch, dtype)) / 1e12)


ROWS = (
    Row(
        name="matmul_peak",
        measures=f"Best rate of a ({SIZE} x {SIZE}) matrix product in bf16, as `train/hardware.py` takes it for MFU.",
        unit="TFLOP/s",
        higher_is_better=True,
        ours=bfloat16,
        peer=float32,
        peer_name="torch float32",
    ),
)
