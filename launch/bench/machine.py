"""What the numbers were taken on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "deepspeed")


def describe(variables: dict[str, str]) -> dict[str, Any]:
    """Plain values: cpu (its model), cores that this process may use, threads of a side, load (average number of busy
    cores over the minute before), gpu (its name or None), and versions of what was compared.

    variables: the environment of the sides.
    """
    import torch

    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": int(variables["OMP_NUM_THREADS"]),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "allocator": variables.get("GLIBC_TUNABLES", ""),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def in_words(machine: dict[str, Any]) -> str:
    """One line for people."""
    versions = ", ".join(f"{package} {machine[package]}" for package in PACKAGES if machine[package])
    gpu = f"{machine['gpu']}, " if machine["gpu"] else ""
    return (
        f"machine: {gpu}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads a side, "
        f"load {machine['load']:.1f} at the start; {versions}, Python {machine['python']}"
    )


def _cpu() -> str:
    """The model's name, as lscpu prints it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
