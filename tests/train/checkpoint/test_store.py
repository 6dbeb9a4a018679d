"""A run goes on from the newest valid checkpoint: all ranks from the same one, and never silently from nothing."""

import os
from pathlib import Path
from typing import Any

import pytest

from model.weights.files import CheckpointError
from tests.ranks import run_ranks
from tests.train.checkpoint.groups import save
from tests.train.test_engine import same_bits
from tests.train.tiny import run_step, snapshot, start_engine
from train.checkpoint import store as store_module
from train.checkpoint.capture import restore
from train.checkpoint.retention import Retention
from train.checkpoint.store import Store
from train.checkpoint.transaction import Alone, name_of

DATA = "rank-00000-000.safetensors"


class AloneMesh(Alone):
    """What a Store needs of a mesh of one rank."""

    main = True

    def first(self, action: Any) -> Any:
        return action()


def store_of(root: Path, lines: list[str]) -> Store:
    return Store(root, AloneMesh(), keep=Retention(3), say=lines.append, aside=False)  # type: ignore[arg-type]


def names_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_a_damaged_newest_checkpoint_is_set_aside(tmp_path: Path) -> None:
    """A run that stops at every start until somebody deletes a folder by hand wastes the night."""
    for tokens in (1, 2, 3):
        save(tmp_path, tokens, Alone())
    os.truncate(tmp_path / name_of(3) / DATA, 10)
    (tmp_path / name_of(2) / "manifest.json").write_text("{")
    lines: list[str] = []
    found = store_of(tmp_path, lines).newest("auto")
    assert found is not None and found.folder == tmp_path / name_of(1)
    assert names_in(tmp_path) == [f".broken-{name_of(2)}", f".broken-{name_of(3)}", name_of(1)]
    assert f"{tmp_path / name_of(3) / DATA}: has 10 bytes" in lines[0]
    assert f"{tmp_path / name_of(2) / 'manifest.json'}: " in lines[1]
    assert lines[2:] == [
        f"warning: checkpoints/{name_of(n)} is set aside as .broken-{name_of(n)}, an older one is used" for n in (3, 2)
    ]
    again = store_of(tmp_path, lines).newest("auto")
    assert again is not None and again.folder == tmp_path / name_of(1)
    assert len(lines) == 4


def test_only_damaged_checkpoints_never_start_a_run_afresh(tmp_path: Path) -> None:
    """A month of work must not be trained over; the second start must refuse as the first did."""
    for tokens in (1, 2):
        save(tmp_path, tokens, Alone())
        os.truncate(tmp_path / name_of(tokens) / DATA, 10)
    for _ in range(2):
        lines: list[str] = []
        with pytest.raises(CheckpointError, match=rf"{name_of(1)}/{DATA}: has 10 bytes"):
            store_of(tmp_path, lines).newest("auto")
        assert len(lines) == 2
        assert names_in(tmp_path) == [name_of(1), name_of(2)]


def test_resume_never_and_required(tmp_path: Path) -> None:
    """Two runs under one name, or a fresh run where a resumed one was meant. A refusal changes nothing."""
    with pytest.raises(ValueError, match=r"got 'required', but .* holds no checkpoint"):
        store_of(tmp_path, []).newest("required")
    assert store_of(tmp_path, []).newest("never") is None
    for tokens in (1, 2):
        save(tmp_path, tokens, Alone())
    os.truncate(tmp_path / name_of(2) / DATA, 10)
    with pytest.raises(ValueError, match=r"got 'never', but .*tokens-000000000001 exists"):
        store_of(tmp_path, []).newest("never")
    assert names_in(tmp_path) == [name_of(1), name_of(2)]


def resume_on_two_ranks(root: Path) -> dict[str, Any]:
    from train.parallel import open_mesh

    lines: list[str] = []
    with open_mesh("cpu", timeout_s=60) as mesh:
        store = Store(root, mesh, keep=Retention(2), say=lines.append)
        engine = start_engine(mesh, 1)
        states = {}
        for tokens in (1, 2, 3):
            run_step(engine, tokens, 1)
            engine.apply(1e-2)
            store.save(engine, tokens, tokens, {})
            assert store.settle() == (tokens, root / name_of(tokens))
            states[tokens] = snapshot(engine)
        kept = names_in(root)
        mesh.barrier()
        if mesh.main:
            path = root / name_of(3) / "rank-00001-000.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"\x55")
        mesh.barrier()
        checkpoint = store.newest("auto")
        assert checkpoint is not None
        restore(engine, checkpoint)
        same = same_bits(snapshot(engine), states[2])
        mesh.barrier()
        after = names_in(root)
        store.save(engine, 3, 3, {})
        store.settle()
        saved = names_in(root)
        mesh.barrier()
        (root / ".partial-tokens-000000000009").mkdir(exist_ok=True)
        mesh.barrier()
        swept = store.newest("required")
        engine.close()

        def refuse(root: Path) -> list[str]:
            raise PermissionError(13, "Permission denied", str(root))

        store_module.sweep = refuse  # in this process alone
        try:
            refused = str(store.newest("auto"))
        except (OSError, ValueError) as error:
            refused = str(error).lower()
    return {
        "kept": kept,
        "resumed": (checkpoint.folder.name, same),
        "after": after,
        "saved": saved,
        "swept": swept and swept.folder.name,
        "refused": refused,
        "lines": lines,
    }


def test_two_ranks_pass_over_damage_together(tmp_path: Path) -> None:
    """Saved, damaged, resumed, saved again: ranks that resume from different checkpoints train two models; a rank that
    renames what another still reads, or that fails alone, ends or hangs the run."""
    first, second = run_ranks(resume_on_two_ranks, 2, tmp_path)
    lines = first.pop("lines")
    for found in (first, second):
        assert found["kept"] == [name_of(2), name_of(3)]
        assert found["resumed"] == (name_of(2), True)
        assert found["after"] == [f".broken-{name_of(3)}", name_of(2)]
        assert found["saved"] == [f".broken-{name_of(3)}", name_of(2), name_of(3)]
        assert found["swept"] == name_of(3)
        assert "permission denied" in found["refused"]
    assert second["lines"] == []
    assert len(lines) == 3
    assert "rank-00001-000.safetensors: has SHA-256" in lines[0]
    assert lines[1:] == [
        f"warning: checkpoints/{name_of(3)} is set aside as .broken-{name_of(3)}, an older one is used",
        "checkpoints/.partial-tokens-000000000009: removed (partial checkpoint of a killed save)",
    ]
