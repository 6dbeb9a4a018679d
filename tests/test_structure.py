"""The house keeps its shape: who imports whom, how long files are, what may not appear, how fast `--help` answers."""

import ast
import os
import resource
import statistics
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARROWS = {
    "model": set(),
    "data": set(),
    "eval": {"model", "data"},
    "train": {"model", "data", "eval"},
    "launch": {"model", "data", "eval", "train"},
}
MODEL_MAY_IMPORT = {"torch", "safetensors", "model", *sys.stdlib_module_names}
OPTIONAL_IN_MODEL = {"flash_attn", "mamba_ssm", "causal_conv1d", "triton"}
"""Fused kernels, imported only inside the functions that call them. Files named `*_triton.py`, which hold kernels of
our own, import Triton at once, and are themselves imported only inside functions."""
FORBIDDEN = ("pickle", "torch.load", "NotImplementedError", "TODO", "FIXME")
LONGEST_FILE = 500
HELP_CPU_S = 1.0


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TOP_LEVEL = {*ARROWS, "tests", "pyproject.toml", "README.md", "Makefile", "LICENSE"}
"""What may lie at the top, besides files and folders whose name begins with a dot."""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path, *, at_import: bool = False) -> set[str]:
    """Dotted names that a file imports; `at_import` leaves out what functions import when they are called."""
    names: set[str] = set()
    pending: list[ast.AST] = [tree(path)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        if not (at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            pending.extend(ast.iter_child_nodes(node))
    return names


@pytest.mark.parametrize("package", ARROWS)
def test_imports_follow_the_arrows(package: str):
    for path in sources(package):
        siblings = {name.split(".")[0] for name in imported(path)} & {*ARROWS, "tests"}
        wrong = siblings - ARROWS[package] - {package}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_model_needs_only_torch_safetensors_and_the_standard_library():
    for path in sources("model"):
        at_once = imported(path, at_import=True)
        kernels = {part for name in at_once for part in name.split(".") if part.endswith("_triton")}
        assert not kernels, f"{path.relative_to(ROOT)} imports {kernels} where Triton may be missing"
        always = {name.split(".")[0] for name in at_once}
        if path.stem.endswith("_triton"):
            always -= {"triton"}
        assert always <= MODEL_MAY_IMPORT, f"{path.relative_to(ROOT)} imports {always - MODEL_MAY_IMPORT}"
        ever = {name.split(".")[0] for name in imported(path)}
        assert ever <= MODEL_MAY_IMPORT | OPTIONAL_IN_MODEL, f"{path.relative_to(ROOT)} imports {ever}"


def test_no_import_cycles_between_files():
    modules = {module_name(path): path for path in sources(*ARROWS)}
    graph = {}
    for name, path in modules.items():
        needs = set()
        for target in imported(path, at_import=True):
            known = target if target in modules else target.rpartition(".")[0]
            if known in modules and known != name:
                needs.add(known)
        graph[name] = needs
    assert any(graph.values()), "no import was found: the graph is not read rightly"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_the_engine_imports_deepspeed():
    packages = {path: {name.split(".")[0] for name in imported(path)} for path in sources(*ARROWS)}
    users = {path.relative_to(ROOT).as_posix() for path, names in packages.items() if "deepspeed" in names}
    assert users == {"train/engine.py"}


@pytest.mark.parametrize("package", [*ARROWS, "tests"])
def test_files_stay_short(package: str):
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(package)}
    too_long = {path.name: length for path, length in lengths.items() if length > LONGEST_FILE}
    assert not too_long


def test_nothing_forbidden_appears():
    for path in sources(*ARROWS):
        text = path.read_text(encoding="utf-8")
        found = [word for word in FORBIDDEN if word in text]
        assert not found, f"{path.relative_to(ROOT)} contains {found}"


def test_the_top_level_is_fixed():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: build products cannot be told from sources")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    top = {name.partition("/")[0] for name in files}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_every_folder_is_a_package():
    """A folder without __init__.py would lose to any other package of its name, and not be installed."""
    for path in sources(*ARROWS, "tests"):
        assert (path.parent / "__init__.py").exists(), f"{path.parent.relative_to(ROOT)} has no __init__.py"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["launch", "slurm", "--help"],
        *([name, "--help"] for name in ("train", "prepare", "generate", "eval", "export", "report", "bench")),
    ],
)
def test_help_answers_in_under_a_second(arguments: list[str]):
    """CPU time, so that a busy machine does not decide."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "launch", *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert done.stdout.startswith("usage: braid")
    assert statistics.median(spent) < HELP_CPU_S
