"""Loops in C++ (`cpp/`) for the CPU: compiled by g++ when an op first asks for them, which takes seconds, and
kept for every later run on such a machine. Where there is no compiler, ops go without; nothing needs them.

    if native_ready():
        run_native("relu2_forward", x.dtype, x, x.stride(0), y, n, D)
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).with_name("cpp")
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-mprefer-vector-width=512",
)
COMPILE_S = 120
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
NATIVE_DTYPES = frozenset(DTYPES)
"""The dtypes that the loops take."""
SWITCH = "BRAID_NATIVE"
"""Set to 0 in the environment, the ops do without."""


class Library:
    """The compiled loops."""

    def __init__(self, path: Path) -> None:
        self._loaded = ctypes.CDLL(str(path))

    def call(
        self, name: str, dtype: torch.dtype, *arguments: Tensor | float | None, to: torch.dtype | None = None
    ) -> None:
        """Runs `name` for tensors of `dtype` (and results of `to`) with arguments in the order of its source."""
        suffix = DTYPES[dtype] if to is None else f"{DTYPES[dtype]}_{DTYPES[to]}"
        getattr(self._loaded, f"{name}_{suffix}")(*map(_argument, arguments))

    def fact(self, name: str) -> int:
        """A number that the loops were compiled with."""
        return int(getattr(self._loaded, name)())


def _argument(value: Tensor | float | None) -> Any:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    return ctypes.c_long(value) if isinstance(value, int) else ctypes.c_float(value)


def run_native(name: str, dtype: torch.dtype, *arguments: Tensor | float | None, to: torch.dtype | None = None) -> None:
    """`Library.call` of a library that is known to be there."""
    loaded = library()
    assert loaded is not None
    loaded.call(name, dtype, *arguments, to=to)


def native_ready() -> bool:
    return library() is not None


def native_fact(name: str) -> int:
    """`Library.fact`, 0 where there is none."""
    loaded = library()
    return 0 if loaded is None else loaded.fact(name)


def with_rows(x: Tensor) -> Tensor:
    """x with the elements of its last dimension side by side, as the loops want them: itself, if they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


UNIT = 32
"""What the kernels of attention and SSD fill up the sizes of heads, states and chunks to a multiple of."""


def padded(n: int) -> int:
    return -(-n // UNIT) * UNIT


def with_heads(x: Tensor) -> Tensor:
    """x (B, tokens, heads, size) with the elements of a token side by side, as the kernels want them."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def with_strides(x: Tensor) -> tuple[Tensor, int, int]:
    """x with the strides of a row and of a token."""
    return x, x.stride(0), x.stride(1)


@cache
def library() -> Library | None:
    """The loops for this machine, compiled if need be; None where they are switched off or cannot be compiled."""
    if os.environ.get(SWITCH) == "0" or not FOLDER.is_dir():
        return None
    try:
        return Library(_compiled())
    except (OSError, subprocess.SubprocessError):
        return None


def _compiled() -> Path:
    """The shared object: of these sources, compiler and kind of processor. Raises OSError, SubprocessError."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    threads = _thread_library()
    sources = sorted(FOLDER.iterdir())
    key = "\n".join([*(path.read_text() for path in sources), *FLAGS, compiler, str(threads), _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "braid"
    path = folder / f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as room:  # ranks that start together each make their own
            made = Path(room) / path.name
            objects = {source: Path(room) / f"{source.stem}.o" for source in sources if source.suffix == ".cpp"}

            def run(*arguments: object) -> None:
                command = [compiler, *FLAGS, *map(str, arguments)]
                subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_S)

            with ThreadPoolExecutor() as several:
                list(several.map(lambda source: run("-c", source, "-o", objects[source]), objects))
            run("-shared", "-o", made, *objects.values(), *([threads] if threads else []))
            made.replace(path)
    return path


def _thread_library() -> Path | None:
    """The OpenMP library that torch has loaded: with another one beside it, two pools of threads would compete."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = re.search(r"/\S*lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*", mapped)
    return Path(found[0]) if found else None


def _processor() -> str:
    """What -march=native depends on."""
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    chosen = re.findall(r"^(?:vendor_id|cpu family|model|flags)\s*:.*$", described.split("\n\n")[0], re.MULTILINE)
    return "\n".join(chosen)
