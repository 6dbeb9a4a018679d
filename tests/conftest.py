"""Skips what this machine cannot run."""

import pytest
import torch

from tests.launch.cluster import why_not_here


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_slurm = why_not_here()
    missing = {
        "gpu": None if torch.cuda.is_available() else pytest.mark.skip(reason="no CUDA device"),
        "slurm": None if no_slurm is None else pytest.mark.skip(reason=f"no Slurm can be started here: {no_slurm}"),
    }
    for item in items:
        for name, skip in missing.items():
            if skip is not None and item.get_closest_marker(name):
                item.add_marker(skip)
