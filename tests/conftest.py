"""Skips what this machine cannot run."""

import shutil

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {
        "gpu": None if torch.cuda.is_available() else pytest.mark.skip(reason="no CUDA device"),
        "slurm": None if shutil.which("sbatch") else pytest.mark.skip(reason="no sbatch"),
    }
    for item in items:
        for name, skip in missing.items():
            if skip is not None and item.get_closest_marker(name):
                item.add_marker(skip)
