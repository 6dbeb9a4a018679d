"""Which implementation of an op runs: each op declares its backends and what they can do, one rule picks, and the
choice is reported.

A backend that the user named is never replaced by another one: if it is missing or cannot do what is asked, that is
an error. `auto` takes the first backend, in the op's order of preference, that is available and can do it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec

import torch

FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
HALVES = frozenset({torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Backend:
    """One implementation of an op and what it declares.

    can: the features it has, out of the op's own words ("documents", "initial_state", ...). dtypes: of the op's main
    input. sizes: those it takes, of the sizes that the op names ("head_dim", ...); any of one that is not here. module:
    the packages it imports, None for plain torch. device: "cuda", "cpu" or "any". capability: the least CUDA compute
    capability. ready: whether what else it needs is here.
    """

    name: str
    can: frozenset[str]
    dtypes: frozenset[torch.dtype] = FLOATS
    sizes: Mapping[str, range] = field(default_factory=dict)
    module: str | None = None
    device: str = "any"
    capability: tuple[int, int] | None = None
    ready: Callable[[], bool] | None = None

    def available(self) -> bool:
        """Its package can be imported, its device exists here, and it is ready."""
        there = self.device != "cuda" or torch.cuda.is_available()
        return there and _importable(self.module) and (self.ready is None or self.ready())

    def lacks(self, needs: Iterable[str], sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> str:
        """Why it cannot serve this call, in words; empty if it can."""
        if self.device not in ("any", device.type):
            return f"it runs on {self.device}, the input is on {device.type}"
        if self.capability is not None and torch.cuda.get_device_capability(device) < self.capability:
            return "it wants a GPU of compute capability {}.{} or more".format(*self.capability)
        if dtype not in self.dtypes:
            return f"it does not take {dtype}"
        for name, taken in self.sizes.items():
            if sizes[name] not in taken:
                wants = f"{taken[0]} to {taken[-1]}" if taken.step == 1 else f"multiples of {taken.step}"
                return f"{name} is {sizes[name]}, it takes {wants}"
        missing = sorted(set(needs) - self.can)
        return f"it has no {', '.join(missing)}" if missing else ""


@cache
def _importable(module: str | None) -> bool:
    return module is None or all(find_spec(name) is not None for name in module.split())


_declared: dict[str, tuple[Backend, ...]] = {}
_requested: dict[str, str] = {}
_chosen: dict[str, set[str]] = {}
_decided: dict[tuple, Backend] = {}
"""Choices on a GPU, where a training step asks the same hundreds of times and whether it is there takes long to find
out. (On a CPU tests take the compiler away.)"""


def declare(op: str, *backends: Backend) -> None:
    """The backends of an op, in its order of preference: called once, by the file that holds the op."""
    assert op not in _declared, f"{op} is declared twice"
    _declared[op] = backends


def check_names(backends: Mapping[str, str]) -> None:
    """Raises ValueError unless `backends` maps ops to "auto" or names of their backends. The ops are those whose files
    have been imported: `model.config` imports all that layer kinds use. Imports no package and asks no device: whether
    a backend is there is found out where it runs."""
    for op, name in backends.items():
        if op not in _declared:
            ops = ", ".join(sorted(_declared))
            raise ValueError(f"backends.{op}: got {name!r} for an unknown op, wants one of {ops}")
        known = [b.name for b in _declared[op]]
        if name not in ("auto", *known):
            raise ValueError(f"backends.{op}: got {name!r}, wants auto or one of {', '.join(known)}")


def request(backends: Mapping[str, str]) -> None:
    """Set the backend per op for this process ("auto" or a name), as a recipe does at its start.

    An op that is not named keeps "auto". Raises ValueError for unknown names, see `check_names`.
    """
    check_names(backends)
    _requested.clear()
    _requested.update(backends)


def requested(op: str) -> str:
    """The backend of `op` that `request` has set: "auto" or a name."""
    return _requested.get(op, "auto")


def chosen() -> dict[str, str]:
    """Op -> the backends its calls have used so far in this process, for the line printed at start."""
    return {op: ", ".join(sorted(names)) for op, names in sorted(_chosen.items())}


def choose(
    op: str,
    named: str | None = None,
    *,
    needs: Iterable[str] = (),
    sizes: Mapping[str, int] = {},
    prefer: str | None = None,
    dtype: torch.dtype,
    device: torch.device,
) -> Backend:
    """The backend for one call of `op`.

    named: a name, "auto", or None for what `request` has set. needs, sizes: the features and the sizes of the call,
    in the op's own words; every size that a backend limits must be here. prefer: what auto takes first, the op's order
    aside. Raises ValueError if the named backend is unknown, missing, or unable to do what the call needs.
    """
    name, needs = named or requested(op), tuple(needs)
    if device.type != "cuda":
        backend = _decide(op, name, needs, sizes, prefer, dtype, device)
    else:
        key = (op, name, needs, tuple(sizes.items()), prefer, dtype, device)
        backend = _decided.get(key) or _decided.setdefault(key, _decide(op, name, needs, sizes, prefer, dtype, device))
    _chosen.setdefault(op, set()).add(backend.name)
    return backend


def _decide(
    op: str,
    name: str,
    needs: tuple[str, ...],
    sizes: Mapping[str, int],
    prefer: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Backend:
    backends = _declared[op]
    if name == "auto":
        order = sorted(backends, key=lambda b: b.name != prefer)
        able = (b for b in order if not b.lacks(needs, sizes, dtype, device) and b.available())
        backend = next(able, None)
        if backend is None:
            raise ValueError(f"{op}: no backend here can do {', '.join(needs) or 'this'} in {dtype} on {device.type}")
    else:
        check_names({op: name})
        backend = next(b for b in backends if b.name == name)
        if not backend.available():
            wants = f"the package {backend.module.replace(' ', ' and ')}" if backend.module else "a CUDA device"
            wants = wants if backend.ready is None else "a C++ compiler (and BRAID_NATIVE unset)"
            raise ValueError(f"{op}: backend {name!r} needs {wants}, which is missing here; install it or use auto")
        if reason := backend.lacks(needs, sizes, dtype, device):
            raise ValueError(f"{op}: backend {name!r} cannot serve this call: {reason}; use auto or another backend")
    return backend
