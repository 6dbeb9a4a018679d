"""Written in one layout, read in another: every element comes back where it belongs."""

import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from model.params import Place, box_shape, local_layout
from model.weights.fragments import boxes_of_range, flat_index, fragments_of, whole_layout
from model.weights.manifest import Manifest
from model.weights.reader import Checkpoint, _readable
from model.weights.writer import OVERHEAD_BYTES, write_rank_files
from tests.model.weights.layouts import local_tensor, random_cuts, random_samples, write_random, write_simple


@pytest.mark.parametrize("seed", range(12))
def test_any_layout_is_read_into_any_other(tmp_path: Path, seed: int) -> None:
    """A resume on another number of tensor ranks or with another ZeRO partition would get wrong weights."""
    generator = random.Random(seed)
    samples = random_samples(generator, 10)
    write_random(tmp_path, generator, samples)
    checkpoint = Checkpoint(tmp_path)
    for sample in samples:
        size = generator.randint(1, 5)
        for rank in range(size):
            layout = local_layout(sample.spec, Place(rank, size))
            wanted = local_tensor(sample.values, layout).flatten()
            wanted[sum(piece.numel for piece in layout.pieces) :] = 0
            for start, stop in random_cuts(generator, wanted.numel(), 3):
                found = torch.full((stop - start,), 99, dtype=wanted.dtype)
                checkpoint.read_into(found, sample.name, "weight", layout, start, stop)
                assert torch.equal(found, wanted[start:stop]), f"{sample.name} {layout} [{start}, {stop})"


@pytest.mark.parametrize("seed", range(4))
def test_any_box_and_range_of_a_tensor_is_read(tmp_path: Path, seed: int) -> None:
    """Export and resharding ask for arbitrary boxes and flat ranges inside them."""
    generator = random.Random(100 + seed)
    samples = random_samples(generator, 8)
    write_random(tmp_path, generator, samples)
    checkpoint = Checkpoint(tmp_path)
    for sample in samples:
        assert torch.equal(checkpoint.read(sample.name, "weight"), sample.values.flatten())
        for _ in range(6):
            ends = [sorted(generator.sample(range(n + 1), 2)) for n in sample.spec.shape]
            box = tuple((low, high) for low, high in ends)
            wanted = sample.values[tuple(slice(*span) for span in box)].flatten()
            start, stop = sorted(generator.choices(range(wanted.numel() + 1), k=2))
            assert torch.equal(checkpoint.read(sample.name, "weight", box, start, stop), wanted[start:stop])


def test_flat_ranges_become_few_boxes_in_order() -> None:
    """Reads are planned on these boxes: a lost, doubled or misplaced element would be a wrong weight."""
    for box in [((2, 5),), ((1, 4), (0, 5)), ((0, 3), (2, 4), (1, 4)), ()]:
        total = 1
        for n in box_shape(box):
            total *= n
        for start in range(total + 1):
            for stop in range(start, total + 1):
                boxes = list(boxes_of_range(box, start, stop))
                points = (
                    [
                        flat_index(box, point)
                        for part in boxes
                        for point in torch.cartesian_prod(*[torch.arange(*span) for span in part])
                        .view(-1, len(part))
                        .tolist()
                    ]
                    if box
                    else [0] * len(boxes)
                )
                assert points == list(range(start, stop))
                assert len(boxes) <= max(1, 2 * len(box) - 1)


def test_scalars_and_buffers_are_stored(tmp_path: Path) -> None:
    """A 0-d optimizer step or a buffer would be lost on resume."""
    step, balance = torch.tensor(41.0), torch.tensor([True, False, True])
    items = [
        (fragment, value.flatten()[low:high])
        for name, kind, value in [("w", "optimizer/step", step), ("router.seen", "buffer", balance)]
        for fragment, low, high in fragments_of(name, kind, whole_layout(tuple(value.shape)))
    ]
    records = write_rank_files(tmp_path, 0, items)
    Manifest.from_records(records, {("optimizer/step", "w"): (), ("buffer", "router.seen"): (3,)}, {}).save(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.kinds() == ["buffer", "optimizer/step"]
    assert checkpoint.read("w", "optimizer/step").item() == 41.0
    assert torch.equal(checkpoint.read("router.seen", "buffer"), balance)
    assert checkpoint.names("buffer") == ["router.seen"]


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    """Anyone must be able to open a checkpoint with the public library."""
    values = {"a": torch.randn(5, 3), "b": torch.arange(7)}
    manifest = write_simple(tmp_path, values)
    (file,) = manifest.files
    with safe_open(tmp_path / file, "pt") as opened:
        found = {key: opened.get_tensor(key) for key in list(opened.keys())}
    entries = {name: tensor.entries[0].key for (_, name), tensor in manifest.tensors.items()}
    assert all(torch.equal(found[entries[name]], value.flatten()) for name, value in values.items())


def test_large_fragments_and_many_small_ones_spill_into_more_files(tmp_path: Path) -> None:
    """One file of hundreds of GiB cannot be moved or hashed in parallel; the reserved header must not overflow."""
    values = {f"layers.{index:04d}.a_rather_long_name_for_a_weight.{'x' * 60}": torch.randn(3) for index in range(900)}
    values["large"] = torch.randn(20_000)
    manifest = write_simple(tmp_path / "many", values)
    assert len(manifest.files) > 1
    assert all(torch.equal(Checkpoint(tmp_path / "many").read(n, "weight"), v) for n, v in list(values.items())[-3:])
    generator = random.Random(3)
    samples = random_samples(generator, 6)
    (tmp_path / "small").mkdir()
    manifest = write_random(tmp_path / "small", generator, samples, max_file_bytes=OVERHEAD_BYTES + 64)
    assert max(info.size for info in manifest.files.values()) <= OVERHEAD_BYTES + 64
    checkpoint = Checkpoint(tmp_path / "small")
    assert all(torch.equal(checkpoint.read(s.name, "weight"), s.values.flatten()) for s in samples)


def test_items_may_be_gathered_one_at_a_time(tmp_path: Path) -> None:
    """ZeRO-3 gathers a tensor, writes it and frees it: the writer must not collect its items first."""
    alive: list[str] = []

    def gather():
        for index in range(5):
            alive.append(f"{index}")
            assert len(list(tmp_path.iterdir())) == (index > 0)
            yield from fragments_with(index)

    def fragments_with(index: int):
        value = torch.full((4,), index)
        return [(f, value[a:b]) for f, a, b in fragments_of(f"t{index}", "weight", whole_layout((4,)))]

    (record,) = write_rank_files(tmp_path, 3, gather())
    assert record.name == "rank-00003-000.safetensors"
    assert len(record.items) == len(alive) == 5


def test_reads_are_cut_into_bounded_mostly_wanted_runs() -> None:
    """A narrow column of a wide matrix must not pull the matrix through memory."""
    box, strides = ((0, 100_000), (0, 16)), (16_384, 1)
    parts = list(_readable(box, strides, 4))
    assert len(parts) == 100_000
    wide = list(_readable(((0, 100_000), (0, 16_000)), strides, 4))
    assert all((high - low) * 16_384 * 4 <= 16 << 20 for (low, high), _ in wide)
    assert sum(high - low for (low, high), _ in wide) == 100_000


def test_floating_point_is_converted_and_nothing_else(tmp_path: Path) -> None:
    """Reading float32 masters into bfloat16 is meant; reading token counts into a weight never is."""
    write_simple(tmp_path, {"f": torch.randn(6), "i": torch.arange(6)})
    checkpoint = Checkpoint(tmp_path)
    local = torch.empty(6, dtype=torch.bfloat16)
    checkpoint.read_into(local, "f", "weight", whole_layout((6,)))
    assert torch.equal(local, checkpoint.read("f", "weight").bfloat16())
    with pytest.raises(ValueError, match=r"weight 'i' is torch.int64, cannot be read as torch.bfloat16"):
        checkpoint.read_into(local, "i", "weight", whole_layout((6,)))
    with pytest.raises(ValueError, match=r"shape \(6,\), the layout reaches beyond"):
        checkpoint.read_into(torch.empty(7), "f", "weight", whole_layout((7,)))
    with pytest.raises(ValueError, match="holds no weight 'g'"):
        checkpoint.read("g", "weight")
