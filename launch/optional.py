"""Packages that only some commands need."""

import importlib.util


def need(package: str, extra: str) -> None:
    """Raises ValueError, saying how to install it, unless `package` is there. extra: of Braid, which brings it."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{package} is not installed; pip install 'braid[{extra}]' brings it")
