"""Averages of checkpoints: exact means, bounded by chunks, in the same format."""

from pathlib import Path

import pytest
import torch

from model.weights.files import CheckpointError
from model.weights.reader import Checkpoint
from tests.train.checkpoint.groups import save, values_at
from train.checkpoint import average as module
from train.checkpoint.average import average, exponential, uniform
from train.checkpoint.transaction import Alone, name_of


def made(root: Path, tokens: int, model: str = "a") -> Checkpoint:
    return Checkpoint(save(root, tokens, Alone(), extra={"model": {"name": model}}))


@pytest.mark.parametrize("chunk", [1 << 24, 7])
def test_the_mean_is_exact(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch):
    """Breaks when a chunk is lost, a share is wrong, or the sum is taken in float32."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    checkpoints = [made(tmp_path / "run", tokens) for tokens in (3, 10, 80)]
    shares = exponential(3, 0.5)
    assert shares == [0.25, 0.25, 0.5] and sum(uniform(7)) == pytest.approx(1)
    folder = average(checkpoints, shares, tmp_path / "averaged")
    assert folder == tmp_path / "averaged" / name_of(80)
    mean = Checkpoint(folder)
    mean.verify()
    for name in ("w", "b"):
        wanted = sum(share * values_at(t)[name].double() for share, t in zip(shares, (3, 10, 80), strict=True))
        assert torch.equal(mean.read(name, "weight"), wanted.float().flatten())
    assert [entry["checkpoint"] for entry in mean.extra["averaged"]] == [name_of(n) for n in (3, 10, 80)]


def test_other_models_and_damage_are_refused(tmp_path: Path):
    """Breaks when apples and pears are mixed, or a flipped bit is averaged in."""
    first, other = made(tmp_path / "a", 1), made(tmp_path / "b", 2, "b")
    with pytest.raises(CheckpointError, match="another model"):
        average([first, other], uniform(2), tmp_path / "out")
    second = made(tmp_path / "a", 2)
    data = next(second.folder.glob("*.safetensors"))
    data.write_bytes(data.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CheckpointError, match="SHA-256"):
        average([first, second], uniform(2), tmp_path / "out")
    with pytest.raises(ValueError, match="--ema"):
        exponential(3, 1.0)
