"""Flattened sources: complete, minimal, importable where only torch and transformers are."""

import ast
import sys

import pytest

from launch.export.flatten import flatten, rewrite
from model.registry import KINDS
from tests.contracts.examples import EXAMPLES
from tests.launch.export.made import every_kind


def imports(text: str) -> tuple[set[str], set[str]]:
    """Siblings that a file imports, and packages that transformers would demand (those outside `try`)."""
    siblings, packages = set(), set()
    pending: list[ast.AST] = [ast.parse(text)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module
            siblings.add(f"{node.module}.py")
        elif isinstance(node, ast.ImportFrom):
            packages.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        if not isinstance(node, ast.Try):
            pending += ast.iter_child_nodes(node)
    return siblings, packages


def test_a_folder_is_closed_and_asks_for_nothing_else():
    """Breaks when transformers would not copy a file, or would demand a fused kernel."""
    files = flatten(every_kind())
    reached, pending = set(), ["modeling_braid.py", "configuration_braid.py"]
    while pending:
        name = pending.pop()
        if name in reached:
            continue
        reached.add(name)
        siblings, packages = imports(files[name])
        assert packages <= {"torch", "transformers", *sys.stdlib_module_names}, name
        pending += siblings
        compile(files[name], name, "exec")
    assert reached == set(files)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_the_braid_uses_is_there(kind: str):
    """Breaks when every layer kind that exists rides along."""
    letters = [letter for letter, layer in every_kind().layers.items() if layer.kind == kind]
    layers = {letter: every_kind().layers[letter] for letter in letters}
    names = set(flatten(every_kind(pattern="".join(letters), layers=layers)))
    kinds = {name for name in names if name.startswith("braid_layers_")} - {"braid_layers_base.py"}
    assert kinds == {f"braid_{KINDS[kind].__module__.removeprefix('model.').replace('.', '_')}.py"}
    assert len({example.kind for example in EXAMPLES.values()}) == len(KINDS)


def test_imports_are_rewritten_and_nothing_else():
    """Breaks when code, strings or comments change on the way."""
    source = (
        "from model.ops.norm import (\n    rms_norm,\n)\n\n\ndef f():\n"
        "    from flash_attn import (\n        a,\n    )\n    return a  # from model.ops.norm import x\n"
    )
    text, needs = rewrite(source, "model.x")
    assert needs == ["model.ops.norm"]
    assert text == (
        "from .braid_ops_norm import (\n    rms_norm,\n)\n\n\ndef f():\n"
        "    try:\n        from flash_attn import (\n            a,\n        )\n"
        "    except ImportError:\n        raise\n"
        "    return a  # from model.ops.norm import x\n"
    )
    with pytest.raises(AssertionError, match="where it is called"):
        rewrite("import flash_attn\n", "model.x")
    text, _ = rewrite("import triton\n", "model.x_triton")
    assert text == "try:\n    import triton\nexcept ImportError:\n    raise\n"
    with pytest.raises(AssertionError, match="cannot flatten"):
        rewrite("from model.nowhere import x\n", "model.x")
