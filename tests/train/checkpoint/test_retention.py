"""Old checkpoints go, the only good one never does."""

import os
import signal
from pathlib import Path

import pytest

from tests.train.checkpoint.groups import PROCESSES, die_at, save
from train.checkpoint.retention import Retention, retain, sweep
from train.checkpoint.transaction import Alone, discover, leftovers, name_of, open_newest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for tokens in (1, 2, 3, 4):
        save(tmp_path / "checkpoints", tokens, Alone())
    return tmp_path / "checkpoints"


def left(root: Path) -> list[int]:
    return [int(path.name.removeprefix("tokens-")) for path in discover(root)]


def test_the_newest_are_kept(root: Path) -> None:
    """A disk that fills up ends the run; deleting the wrong end ends it worse."""
    assert retain(root, Retention(2)) == [root / name_of(2), root / name_of(1)]
    assert left(root) == [4, 3]
    assert retain(root, Retention(2)) == []
    assert retain(root, Retention(9)) == []
    with pytest.raises(ValueError, match=r"checkpoints.keep_last: got 0, wants at least 1"):
        retain(root, Retention(0))


def test_milestones_stay(tmp_path: Path) -> None:
    """The checkpoints of a scaling study, or the one from before a bad month, must outlive the newest few."""
    kept = []
    for tokens in range(4, 40, 4):
        save(tmp_path, tokens, Alone())
        retain(tmp_path, Retention(2, every_tokens=10))
        kept.append(left(tmp_path))
    assert kept[3] == [16, 12]
    assert kept[-1] == [36, 32, 20, 12]


def test_the_best_stay(tmp_path: Path) -> None:
    """The checkpoint that one would publish must outlive worse ones that came later."""
    losses = {1: 3.0, 2: 2.0, 3: None, 4: 2.5, 5: 2.2, 6: 4.0}
    for tokens, loss in losses.items():
        extra = {"validation": None if loss is None else {"loss": loss}}
        save(tmp_path, tokens, Alone(), extra=extra)
    assert retain(tmp_path, Retention(1, best=2)) == [tmp_path / name_of(n) for n in (4, 3, 1)]
    assert left(tmp_path) == [6, 5, 2]


def test_damaged_ones_do_not_count(root: Path) -> None:
    """Keeping one means one that can be resumed from."""
    (root / name_of(4) / "manifest.json").write_text("")
    os.truncate(root / name_of(3) / "rank-00000-000.safetensors", 10)
    assert retain(root, Retention(1)) == [root / name_of(1)]
    assert left(root) == [4, 3, 2]


def test_nothing_is_deleted_when_nothing_is_good(root: Path) -> None:
    """Even a damaged checkpoint may be the only trace of a month of work."""
    for path in discover(root):
        (path / "manifest.json").write_text("")
    assert retain(root, Retention(1)) == []
    assert left(root) == [4, 3, 2, 1]


def test_what_cannot_be_deleted_is_a_warning(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A permission changed by hand must not end a run whose new checkpoint is safe."""

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.warns(UserWarning, match=r"tokens-000000000002: cannot be deleted: Operation not permitted"):
        assert retain(root, Retention(2)) == []
    assert left(root) == [4, 3, 2, 1]


def test_an_earlier_unfinished_deletion_is_no_obstacle(root: Path) -> None:
    """A run without a sweep in between must still be able to delete a checkpoint of the same name."""
    (root / f".deleting-{name_of(1)}").mkdir()
    (root / f".deleting-{name_of(1)}" / "rest").write_text("")
    assert retain(root, Retention(3)) == [root / name_of(1)]
    assert leftovers(root) == []


def test_links_are_never_followed(root: Path, tmp_path: Path) -> None:
    """A linked data set inside, or a linked checkpoint, must not lose its target's files."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_text("kept")
    (root / name_of(1) / "link").symlink_to(precious)
    (root / name_of(0)).symlink_to(precious)
    (root / ".deleting-tokens-000000000000").symlink_to(precious)
    assert retain(root, Retention(1)) == [root / name_of(3), root / name_of(2), root / name_of(1)]
    sweep(root)
    assert (precious / "data").read_text() == "kept"
    assert (root / name_of(0)).is_symlink()
    assert leftovers(root) == []


@pytest.mark.parametrize("stage", ["retire", "delete"])
def test_a_kill_during_deletion(root: Path, stage: str) -> None:
    """A half-deleted folder must not be found as a checkpoint, and the rerun must finish the job."""
    child = PROCESSES.Process(target=retain, args=(root, Retention(3), die_at(stage)))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert left(root) == [4, 3, 2, 1] if stage == "retire" else [4, 3, 2]
    newest = open_newest(root)
    assert newest is not None and newest.folder == root / name_of(4)
    assert sweep(root) == [".deleting-tokens-000000000001: removed (unfinished deletion)"] * (stage == "delete")
    retain(root, Retention(3))
    assert left(root) == [4, 3, 2]
    assert leftovers(root) == []
