"""Which implementation of an op runs: each backend declares what it can do, one rule picks, and the choice is reported.

A backend that the user named is never replaced by another one: if it is missing or cannot do what is asked, that is
an error. `auto` takes the first backend, in the op's order of preference, that is available and can do it.
"""

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

OPS = ("ssd", "conv", "attention")
FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
HALVES = frozenset({torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Backend:
    """One implementation of an op and what it declares.

    can: the features it has, out of the op's own words ("documents", "initial_state", ...). dtypes: of the op's main
    input. module: the package it imports, None for plain torch. device: "cuda", or "any".
    """

    name: str
    can: frozenset[str]
    dtypes: frozenset[torch.dtype] = FLOATS
    module: str | None = None
    device: str = "any"

    def available(self) -> bool:
        """Its package can be imported and its device exists here."""
        return _importable(self.module) and (self.device == "any" or torch.cuda.is_available())

    def lacks(self, needs: Iterable[str], dtype: torch.dtype, device: torch.device) -> str:
        """Why it cannot serve this call, in words; empty if it can."""
        if self.device not in ("any", device.type):
            return f"it runs on {self.device}, the input is on {device.type}"
        if dtype not in self.dtypes:
            return f"it does not take {dtype}"
        missing = sorted(set(needs) - self.can)
        return f"it has no {', '.join(missing)}" if missing else ""


@cache
def _importable(module: str | None) -> bool:
    return module is None or importlib.util.find_spec(module) is not None


_requested: dict[str, str] = {}
_chosen: dict[str, set[str]] = {}


def request(backends: Mapping[str, str]) -> None:
    """Set the backend per op for this process ("auto" or a name), as a recipe does at its start.

    An op that is not named keeps "auto". Raises ValueError for an op that has no backends to choose from; the names of
    backends are checked by the op that uses them (`choose`).
    """
    for op in backends:
        if op not in OPS:
            raise ValueError(f"backends: got {op!r}, wants ops among {', '.join(OPS)}")
    _requested.clear()
    _requested.update(backends)


def chosen() -> dict[str, str]:
    """Op -> the backends its calls have used so far in this process, for the line printed at start."""
    return {op: ", ".join(sorted(names)) for op, names in sorted(_chosen.items())}


def choose(
    op: str,
    backends: Sequence[Backend],
    requested: str | None = None,
    *,
    needs: Iterable[str] = (),
    dtype: torch.dtype,
    device: torch.device,
) -> Backend:
    """The backend for one call of `op`.

    requested: a name, "auto", or None for what `request` has set. Raises ValueError if the named backend is unknown,
    missing, or unable to do what the call needs.
    """
    name = requested or _requested.get(op, "auto")
    needs = tuple(needs)
    if name == "auto":
        able = (b for b in backends if not b.lacks(needs, dtype, device) and b.available())
        backend = next(able, None)
        if backend is None:
            raise ValueError(f"{op}: no backend here can do {', '.join(needs) or 'this'} in {dtype} on {device.type}")
    else:
        backend = next((b for b in backends if b.name == name), None)
        if backend is None:
            known = ", ".join(b.name for b in backends)
            raise ValueError(f"{op}: no backend is called {name!r}; use auto or one of {known}")
        if not backend.available():
            wants = f"the package {backend.module}" if backend.module else "a CUDA device"
            raise ValueError(f"{op}: backend {name!r} needs {wants}, which is missing here; install it or use auto")
        if reason := backend.lacks(needs, dtype, device):
            raise ValueError(f"{op}: backend {name!r} cannot serve this call: {reason}; use auto or another backend")
    _chosen.setdefault(op, set()).add(backend.name)
    return backend
