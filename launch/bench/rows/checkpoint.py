"""Saving and loading a model with AdamW's moments: beside the bare bytes, and beside what others do.

The state is that of 100M parameters: weights and two moments in float32, 1.2 GB. Each rank owns an even share.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.bench.row import Reading, Row
from launch.bench.together import rounds

PARAMETERS, QUICK_PARAMETERS = 100_000_000, 10_000_000
TENSORS = 48
CHUNK = 16 << 20
HERE = "launch.bench.rows.checkpoint"


def save_ours(quick: bool) -> Iterator[Reading]:
    return _rounds(1, "commit", quick)


def save_ours_2(quick: bool) -> Iterator[Reading]:
    return _rounds(2, "commit", quick)


def save_raw(quick: bool) -> Iterator[Reading]:
    return _rounds(1, "write_raw", quick)


def save_raw_2(quick: bool) -> Iterator[Reading]:
    return _rounds(2, "write_raw", quick)


def save_dcp(quick: bool) -> Iterator[Reading]:
    return _rounds(1, "write_dcp", quick)


def save_deepspeed(quick: bool) -> Iterator[Reading]:
    return _rounds(1, "write_deepspeed", quick)


def load_ours(quick: bool) -> Iterator[Reading]:
    return _rounds(1, "read_ours", quick)


def load_ours_2(quick: bool) -> Iterator[Reading]:
    return _rounds(2, "read_ours", quick)


def load_raw(quick: bool) -> Iterator[Reading]:
    return _rounds(1, "read_raw", quick)


def load_raw_2(quick: bool) -> Iterator[Reading]:
    return _rounds(2, "read_raw", quick)


def load_dcp(quick: bool) -> Iterator[Reading]:
    return _rounds(1, "read_dcp", quick)


def pause_ours(quick: bool) -> Iterator[Reading]:
    return _rounds(1, "stage", quick)


def pause_copy(quick: bool) -> Iterator[Reading]:
    return _rounds(1, "copy", quick)


def _rounds(size: int, work: str, quick: bool) -> Iterator[Reading]:
    with tempfile.TemporaryDirectory(prefix="braid-bench-", dir=os.environ.get("BRAID_BENCH_DIR")) as folder:
        argument = {"folder": folder, "parameters": QUICK_PARAMETERS if quick else PARAMETERS}
        yield from rounds(size, f"{HERE}:{work}", argument)


# ---- the shares of a rank ----


def _state(rank: int, size: int, parameters: int) -> dict[tuple[str, str], Any]:
    """(kind, name) -> this rank's flat share."""
    import torch

    share = parameters // TENSORS // size
    kinds = ("weight", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    generator = torch.Generator().manual_seed(rank)
    return {
        (kind, f"blocks.{number}.weight"): torch.randn(share, generator=generator)
        for kind in kinds
        for number in range(TENSORS)
    }


def _fragments(rank: int, size: int, parameters: int) -> list[tuple[Any, Any]]:
    from model.weights.fragments import Fragment

    share = parameters // TENSORS // size
    box = ((0, share * size),)
    return [
        (Fragment(name, kind, "", box, rank * share, (rank + 1) * share), value)
        for (kind, name), value in _state(rank, size, parameters).items()
    ]


def commit(rank: int, size: int, argument: dict[str, Any]) -> Iterator[None]:
    """A whole save as a run does it: preflight, write, read back, hash, manifest, rename."""
    from model.weights.writer import write_rank_files
    from train.checkpoint.transaction import commit as commit_together
    from train.parallel import Beside

    root, parameters = Path(argument["folder"]), argument["parameters"]
    items, group = _fragments(rank, size, parameters), Beside(rank, size, None if size == 1 else _world())
    shapes = {(fragment.kind, fragment.tensor): (fragment.box[0][1],) for fragment, _ in items}
    yield
    while True:
        commit_together(
            root,
            1,
            group,
            write=lambda folder: write_rank_files(folder, rank, items),
            shapes=shapes,
            extra={},
            bytes_needed=sum(value.nbytes for _, value in items),
        )
        yield


def _world() -> Any:
    import torch.distributed as dist

    return dist.group.WORLD


def write_raw(rank: int, size: int, argument: dict[str, Any]) -> Iterator[None]:
    """The same bytes: hashed from memory, written to a new file, flushed, and renamed over the last one.

    A file written over in place would find its old blocks and pages again, which no save into a new folder does: it
    took 1.4 s where new ones took 2.4.
    """
    from model.weights.files import byte_view

    path = Path(argument["folder"]) / f"raw-{rank}"
    new = path.with_suffix(".new")
    state = _state(rank, size, argument["parameters"])
    views = [byte_view(value) for value in state.values()]
    yield
    while True:
        digest = hashlib.sha256()
        with new.open("wb") as file:
            for view in views:
                for start in range(0, len(view), CHUNK):
                    part = view[start : start + CHUNK]
                    file.write(part)
                    digest.update(part)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        yield


def write_dcp(rank: int, size: int, argument: dict[str, Any]) -> Iterator[None]:
    """torch.distributed.checkpoint, without a hash."""
    import torch.distributed.checkpoint as dcp

    folder = Path(argument["folder"])
    state = {f"{kind}/{name}": value for (kind, name), value in _state(rank, size, argument["parameters"]).items()}
    yield
    while True:
        shutil.rmtree(folder / "dcp", ignore_errors=True)
        dcp.save(state, checkpoint_id=str(folder / "dcp"))
        os.sync()
        yield


def write_deepspeed(rank: int, size: int, argument: dict[str, Any]) -> Iterator[None]:
    """DeepSpeed's save_checkpoint under ZeRO 1, without a hash."""
    import torch
    from torch import nn

    from train.engine import import_deepspeed

    deepspeed = import_deepspeed(torch.device("cpu"))
    os.environ.update({"LOCAL_RANK": str(rank)})
    width = int((argument["parameters"] / TENSORS) ** 0.5)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(TENSORS)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    engine.backward(engine(torch.randn(1, width)).square().mean())
    engine.step()
    yield
    while True:
        engine.save_checkpoint(argument["folder"], tag="deepspeed")
        os.sync()
        yield


def _forget(folder: Path) -> None:
    """The page cache forgets the files, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_ours(rank: int, size: int, argument: dict[str, Any]) -> Iterator[None]:
    """Every rank finds the checkpoint, verifies its share of the files, and reads its share of the state."""
    import torch

    from model.params import LocalLayout, Piece
    from train.checkpoint.transaction import open_newest
    from train.parallel import Beside

    saved = commit(rank, size, argument)
    next(saved)
    next(saved)
    root = Path(argument["folder"])
    places = {key: torch.empty_like(value) for key, value in _state(rank, size, argument["parameters"]).items()}
    group = Beside(rank, size, None if size == 1 else _world())
    _forget(root)
    yield
    while True:
        checkpoint = open_newest(root, group)
        assert checkpoint is not None
        for (kind, name), place in places.items():
            span = (rank * len(place), (rank + 1) * len(place))
            checkpoint.read_into(place, name, kind, LocalLayout((len(place),), (Piece("", (span,), 0, 1, True),)))
        checkpoint.close()
        _forget(root)
        yield


def read_raw(rank: int, size: int, argument: dict[str, Any]) -> Iterator[None]:
    """The same bytes: read from the disk into memory, and hashed."""
    from model.weights.files import byte_view

    written = write_raw(rank, size, argument)
    next(written)
    next(written)
    path = Path(argument["folder"]) / f"raw-{rank}"
    state = _state(rank, size, argument["parameters"])
    views = [byte_view(value) for value in state.values()]
    _forget(path.parent)
    yield
    while True:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            for view in views:
                for start in range(0, len(view), CHUNK):
                    part = view[start : start + CHUNK]
                    file.readinto(part)
                    digest.update(part)
        _forget(path.parent)
        yield


def read_dcp(rank: int, size: int, argument: dict[str, Any]) -> Iterator[None]:
    """torch.distributed.checkpoint, without a hash."""
    import torch.distributed.checkpoint as dcp

    folder = Path(argument["folder"])
    state = {f"{kind}/{name}": value for (kind, name), value in _state(rank, size, argument["parameters"]).items()}
    dcp.save(state, checkpoint_id=str(folder / "dcp"))
    os.sync()
    _forget(folder)
    yield
    while True:
        dcp.load(state, checkpoint_id=str(folder / "dcp"))
        _forget(folder)
        yield


def stage(rank: int, size: int, argument: dict[str, Any]) -> Iterator[None]:
    """What a step waits for when the save goes on beside training: the copy of the state."""
    from train.checkpoint.background import Staging

    items, staging = _fragments(rank, size, argument["parameters"]), Staging()
    staging.copy(items)
    yield
    while True:
        staging.copy(items)
        yield


def copy(rank: int, size: int, argument: dict[str, Any]) -> Iterator[None]:
    """A memory copy of as many bytes in one piece."""
    import torch

    source = torch.randn(3 * (argument["parameters"] // TENSORS) * TENSORS)
    target = torch.empty_like(source).copy_(source)
    yield
    while True:
        target.copy_(source)
        yield


STATE = "Weights and two moments of 100M parameters in float32 (1.2 GB; --quick: a tenth)"
RAW = "written anew, flushed and hashed raw"


def _row(name: str, what: str, ours: Any, peer: Any, peer_name: str, note: str = "") -> Row:
    return Row(
        name=name,
        measures=f"{what} {STATE}.",
        unit="s",
        higher_is_better=False,
        ours=ours,
        peer=peer,
        peer_name=peer_name,
        note=note,
    )


BACK = "ours also reads every byte back and compares"
ROWS = (
    _row("checkpoint_save", "One rank commits a checkpoint.", save_ours, save_raw, f"same bytes {RAW}", BACK),
    _row("checkpoint_save_2", "Two ranks commit one checkpoint.", save_ours_2, save_raw_2, f"same bytes {RAW}", BACK),
    _row("checkpoint_save_dcp", "One rank commits a checkpoint.", save_ours, save_dcp, "torch DCP, no hash", BACK),
    _row(
        "checkpoint_save_deepspeed",
        "One rank commits a checkpoint.",
        save_ours,
        save_deepspeed,
        "DeepSpeed, no hash",
        BACK,
    ),
    _row("checkpoint_load", "One rank verifies and reads.", load_ours, load_raw, "same bytes read and hashed raw"),
    _row("checkpoint_load_2", "Two ranks verify and read.", load_ours_2, load_raw_2, "same bytes read and hashed raw"),
    _row("checkpoint_load_dcp", "One rank verifies and reads.", load_ours, load_dcp, "torch DCP, no hash"),
    _row("checkpoint_pause", "What a step waits for a save.", pause_ours, pause_copy, "one memory copy"),
)
