"""Skips what this machine cannot run, and keeps Triton from tuning in tests."""

import math

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


@pytest.fixture(autouse=True)
def untuned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU mamba-ssm's kernels are compiled in every configuration that might be the fastest, minutes in all; tests
    take the smallest, which fits every GPU."""
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        return
    autotuner = pytest.importorskip("triton.runtime.autotuner").Autotuner
    run = autotuner.run

    def smallest(self, *args, **kwargs):
        self.configs = [min(self.configs, key=lambda config: math.prod(config.kwargs.values()) * config.num_stages)]
        return run(self, *args, **kwargs)

    monkeypatch.setattr(autotuner, "run", smallest)
