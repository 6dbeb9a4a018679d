"""Ops that have loops in C++ are tested with them and without."""

import pytest

from model.ops import native

WITH_LOOPS = {"test_attention", "test_conv", "test_head", "test_norm", "test_ssd"}
WITHOUT = {"test_blockwise", "test_fused"}
"""Of the plain torch paths, also where they stand for those of a GPU."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.module.__name__.rpartition(".")[2]
    if name in WITH_LOOPS | WITHOUT:
        metafunc.parametrize("loops", ["native", "torch"] if name in WITH_LOOPS else ["torch"], indirect=True)


@pytest.fixture(autouse=True)
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = getattr(request, "param", None)
    if wanted == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif wanted == "native" and not native.native_ready():
        pytest.skip("no C++ compiler")
