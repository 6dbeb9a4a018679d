"""The peak that MFU is measured against."""

import pytest
import torch

from train import hardware


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
    ],
)
def test_known_gpus_take_the_data_sheet(monkeypatch: pytest.MonkeyPatch, name: str, expected: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = hardware.device_peak(torch.device("cuda"))
    assert peak.flops == expected
    assert peak.source.startswith("data sheet")


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA RTX A4000", "NVIDIA RTX A1000", "Radeon"])
def test_a_name_that_only_contains_a_known_one_is_measured(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An L40 is no L4: a wrong data sheet would make MFU a wrong number that looks exact."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(hardware, "measured_matmul_flops", lambda device: 1.0)
    peak = hardware.device_peak(torch.device("cuda"))
    assert (peak.flops, peak.source) == (1.0, "measured bf16 matmul")


def test_the_cpu_is_measured() -> None:
    assert hardware.measured_matmul_flops(torch.device("cpu"), size=128, seconds=0.01) > 1e8
