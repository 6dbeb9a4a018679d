"""The manifest: every element has one owner, and nothing in the file is taken on trust."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.weights.files import CheckpointError
from model.weights.fragments import Fragment
from model.weights.manifest import Entry, FileRecord, Manifest, StoredTensor, _digest, check_coverage
from tests.model.weights.layouts import write_simple


def tensor(shape: tuple[int, ...], *owned: tuple[tuple[tuple[int, int], ...], int, int]) -> StoredTensor:
    entries = (Entry("f.safetensors", str(i), "", box, start, stop) for i, (box, start, stop) in enumerate(owned))
    return StoredTensor(shape, "F32", tuple(entries))


@pytest.mark.parametrize(
    "stored",
    [
        tensor((4,), (((0, 4),), 0, 4)),
        tensor((4, 3), (((0, 4), (0, 3)), 5, 12), (((0, 4), (0, 3)), 0, 5)),
        tensor((4, 4), (((0, 4), (0, 2)), 0, 8), (((0, 4), (2, 4)), 0, 3), (((0, 4), (2, 4)), 3, 8)),
        tensor((3, 2), (((0, 2), (0, 1)), 0, 2), (((0, 2), (1, 2)), 0, 2), (((2, 3), (0, 2)), 0, 2)),
        tensor((), ((), 0, 1)),
    ],
)
def test_complete_tensors_pass(stored: StoredTensor) -> None:
    check_coverage("weight 'w'", stored)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (tensor((4,), (((0, 4),), 0, 3)), "ends at element 4, found owners up to 3"),
        (tensor((4,), (((0, 4),), 0, 2), (((0, 4),), 3, 4)), r"elements \[2, 3\) .* are missing"),
        (tensor((4,), (((0, 4),), 0, 3), (((0, 4),), 2, 4)), r"elements \[2, 3\) .* have two owners"),
        (tensor((4,), (((0, 4),), 0, 4), (((0, 4),), 0, 4)), "have two owners"),
        (tensor((4,), (((0, 3),), 0, 3)), r"boxes hold 3 elements, the shape \(4,\) has 4"),
        (tensor((4,), (((0, 5),), 0, 5)), "outside the shape"),
        (tensor((4,), (((0, 4), (0, 1)), 0, 4)), "outside the shape"),
        (tensor((4, 4), (((0, 3), (0, 4)), 0, 12), (((2, 4), (0, 2)), 0, 4)), "overlap"),
        (tensor((2, 4), (((0, 2), (0, 3)), 0, 6), (((0, 2), (2, 3)), 0, 2)), "overlap"),
        (tensor((4,)), "boxes hold 0 elements"),
        (tensor((), ((), 0, 1), ((), 0, 1)), "have two owners"),
    ],
)
def test_gaps_and_overlaps_are_found(stored: StoredTensor, message: str) -> None:
    """An element without an owner resumes as garbage; one with two resumes as either."""
    with pytest.raises(CheckpointError, match=rf"weight 'w': .*{message}"):
        check_coverage("weight 'w'", stored)


def test_coverage_of_a_large_run_is_cheap() -> None:
    """Quadratic checks over 1,000 ranks would make every save wait for minutes."""
    rows = [(((4 * i, 4 * i + 4), (0, 8)), j * 4, j * 4 + 4) for i in range(1000) for j in range(8)]
    begin = time.process_time()
    for _ in range(3):
        check_coverage("weight 'w'", tensor((4000, 8), *rows))
    assert time.process_time() - begin < 3


def record(name: str, *items: tuple[Fragment, str]) -> FileRecord:
    return FileRecord(name, 8, "0" * 64, items)


def test_ranks_must_agree_and_write_what_was_declared() -> None:
    """A rank that forgot a tensor, wrote it in another dtype or wrote a stranger must fail the save, not the resume."""
    half = Fragment("w", "weight", "", ((0, 4),), 0, 2)
    rest = replace(half, start=2, stop=4)
    shapes = {("weight", "w"): (4,)}
    for records, message in [
        ([record("a.safetensors", (half, "F32"))], "ends at element 4"),
        ([record("a.safetensors", (half, "F32")), record("b.safetensors", (rest, "BF16"))], "found BF16 and F32"),
        ([], "weight 'w': found no element"),
        ([record("a.safetensors", (half, "F32"), (rest, "F32"))] * 2, "written by two ranks"),
        ([record("a.safetensors", (replace(half, tensor="v"), "F32"))], "weight 'v', whose shape was not given"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            Manifest.from_records(records, shapes, {})
    Manifest.from_records([record("a.safetensors", (half, "F32"), (rest, "F32"))], shapes, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_simple(tmp_path, {"a": torch.zeros(2, 3)}, {"tokens": 12, "loss": 0.1 + 0.2, "seen": (1, 2)})
    return tmp_path


def test_it_reads_back_equal(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.extra == {"tokens": 12, "loss": 0.1 + 0.2, "seen": [1, 2]}
    assert manifest.totals["elements"] == 6
    assert manifest.totals["bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def edit(folder: Path, change: Any) -> None:
    """Applies `change` to the manifest and signs it anew, as an attacker or another program would."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    document.pop("sha256")
    change(document)
    path.write_text(json.dumps(document | {"sha256": _digest(document)}))


def rename_file(name: str) -> Any:
    def change(document: dict) -> None:
        (info,) = document["files"].values()
        document["files"] = {name: info}
        document["tensors"][0]["entries"][0]["file"] = name

    return change


@pytest.mark.parametrize(
    "name",
    [
        "../rank.safetensors",
        "/etc/passwd",
        "sub/rank.safetensors",
        "..",
        ".safetensors",
        "..safetensors",
        "a/../b.safetensors",
        "a\0.safetensors",
        "a.safetensors\n",
        "a\\b.safetensors",
        "w.pt",
    ],
)
def test_names_that_lead_out_of_the_folder_are_refused(folder: Path, name: str) -> None:
    """A downloaded checkpoint must not make the reader open other files of its user."""
    edit(folder, rename_file(name))
    with pytest.raises(CheckpointError, match=r"manifest.json: file name .*, wants a plain name"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version 2, this program reads version 1"),
        (lambda d: d.update(format="other"), "no manifest of format"),
        (lambda d: d.pop("totals"), r"missing keys \['totals'\]"),
        (lambda d: d.update(code="import os"), r"unknown keys \['code'\]"),
        (lambda d: d["totals"].update(elements=7), "totals are"),
        (lambda d: d["tensors"].append(d["tensors"][0]), "listed twice"),
        (lambda d: d["tensors"][0].update(shape=[2, True]), "impossible shape"),
        (lambda d: d["tensors"][0].update(shape=[6, 1]), "outside the shape"),
        (lambda d: d["tensors"][0].update(dtype="object"), "unknown dtype 'object'"),
        (lambda d: d["tensors"][0]["entries"][0].pop("key"), r"missing keys \['key'\]"),
        (lambda d: d["tensors"][0]["entries"][0].update(box=[[0, 2]]), "outside the shape"),
        (lambda d: d["tensors"][0]["entries"][0].update(box=[[0, 2], [0, -3]]), "impossible box"),
        (lambda d: d["tensors"][0]["entries"][0].update(stop=6.0), "stop is 6.0, wants int"),
        (lambda d: d["tensors"][0]["entries"][0].update(file="other.safetensors"), "not listed under files"),
        (lambda d: d["files"]["rank-00000-000.safetensors"].update(sha256="00"), "impossible"),
        (lambda d: d["files"]["rank-00000-000.safetensors"].update(size=-1), "impossible"),
    ],
)
def test_every_field_is_checked(folder: Path, change: Any, message: str) -> None:
    """An unchecked field is a crash, or a wrong weight, somewhere later."""
    edit(folder, change)
    with pytest.raises(CheckpointError, match=rf"manifest.json: .*{message}"):
        Manifest.load(folder)


def test_one_changed_digit_is_found(folder: Path) -> None:
    """The clock and the data position live here: a flipped bit would resume at another token."""
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"tokens": 12', '"tokens": 13'))
    with pytest.raises(CheckpointError, match="its contents have SHA-256"):
        Manifest.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1, "a": 2}', '{"a": NaN}', "\ufeff{}", "[" * 100_000])
def test_what_is_no_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest.json: is no"):
        Manifest.load(folder)


def test_extra_must_be_plain_json(tmp_path: Path) -> None:
    """A NaN or an object in `extra` would make a checkpoint that cannot be read."""
    for value in (float("nan"), torch.zeros(1), {1, 2}):
        with pytest.raises(CheckpointError, match="extra holds what JSON cannot"):
            Manifest({}, {}, {"value": value}).save(tmp_path)
    Manifest({}, {}, {"ranks": {0: "a", 10: "b", 9: "c"}}).save(tmp_path)
    assert Manifest.load(tmp_path).extra == {"ranks": {"0": "a", "10": "b", "9": "c"}}
