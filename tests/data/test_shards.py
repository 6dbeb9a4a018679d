"""The on-disk format is Megatron's, and whatever is damaged is found before the first step."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.indexed import TokenReader, TokenWriter
from data.prepare import PreparedData
from data.shards import Manifest, ShardSet


def written(folder: Path, documents: list[list[int]], vocab_size: int) -> None:
    writer = TokenWriter(folder, "train", vocab_size)
    for ids in documents:
        writer.add(np.array(ids))
    writer.close()


@pytest.mark.parametrize(("vocab_size", "code", "dtype"), [(300, 8, "<u2"), (65499, 8, "<u2"), (65500, 4, "<i4")])
def test_files_are_laid_out_as_megatron_reads_them(vocab_size: int, code: int, dtype: str, tmp_path: Path):
    """Breaks when Megatron-LM, NeoX or datatrove could no longer read the shards, or ids overflow their type."""
    documents = [[1, 7, 2], [1, vocab_size - 1, 5, 2], [1, 2]]
    written(tmp_path, documents, vocab_size)
    index = (tmp_path / "train.idx").read_bytes()
    size = np.dtype(dtype).itemsize
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, 4)
    expected += struct.pack("<3i", 3, 4, 2) + struct.pack("<3q", 0, 3 * size, 7 * size) + struct.pack("<4q", 0, 1, 2, 3)
    assert index == expected
    assert np.fromfile(tmp_path / "train.bin", dtype).tolist() == [token for ids in documents for token in ids]


def test_documents_of_several_sequences_are_read_whole(tmp_path: Path):
    """Breaks when files that Megatron's own tools wrote, one sequence per sentence, are cut into sentences."""
    written(tmp_path, [[1, 2], [3], [4, 5, 6], [7]], 10)
    index = bytearray((tmp_path / "train.idx").read_bytes())
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 4, 3)
    (tmp_path / "train.idx").write_bytes(head + index[len(head) : -5 * 8] + struct.pack("<3q", 0, 3, 4))
    reader = TokenReader(tmp_path, "train")
    assert reader.lengths.tolist() == [6, 1]
    assert reader.offsets.tolist() == [0, 6]


def test_tokens_outside_the_vocabulary_are_not_written(tmp_path: Path):
    """Breaks when a wrong id would wrap around in uint16."""
    for ids, found in (([0, 300], 300), ([-1, 5], -1)):
        with pytest.raises(ValueError, match=f"got token {found}, wants 0 to 299"):
            written(tmp_path, [ids], 300)


def test_documents_are_numbered_over_all_files(tmp_path: Path, prepared: PreparedData):
    """Breaks when a document of a later file is read from the wrong place."""
    from tests.data.corpus import make

    many = make(tmp_path, shard_bytes=3000).train
    one = prepared.train
    assert len(many.record.files) > 3
    assert many.documents == one.documents == len(many.lengths)
    for document in range(many.documents):
        assert np.array_equal(many.tokens(document), one.tokens(document))
        assert np.array_equal(many.tokens(document, 2, 5), one.tokens(document)[2:5])
        assert len(many.tokens(document)) == many.lengths[document]


def test_a_document_is_begin_tokens_end(prepared: PreparedData):
    """Breaks when the first token of a text, or its end, would no longer be predicted."""
    tokenizer = prepared.train.tokenizer()
    for document in range(prepared.train.documents):
        ids = prepared.train.tokens(document).tolist()
        assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos)
        assert tokenizer.encode(tokenizer.decode(ids)) == ids[1:-1]


@pytest.fixture
def copy(prepared: PreparedData, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(prepared.folder, folder)
    return folder


def test_a_moved_folder_is_the_same_data(copy: Path, prepared: PreparedData):
    """Breaks when a run could not resume after its data was moved."""
    moved = ShardSet(copy, "train")
    moved.verify()
    assert moved.fingerprint == prepared.train.fingerprint


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGE = [
    (truncate, "train-00000.bin", "wants .* bytes by manifest"),
    (truncate, "train-00000.idx", "wants .* bytes by manifest"),
    (Path.unlink, "train-00000.bin", "is missing"),
    (flip, "train-00000.bin", "has SHA-256"),
    (flip, "train-00000.idx", "train-00000.idx"),
    (zero, "train-00000.bin", "has SHA-256"),
    (zero, "train-00000.idx", "does not begin with MMIDIDX"),
    (flip, "tokenizer.model", "the data was made with"),
    (Path.unlink, "tokenizer.model", "cannot be read"),
    (truncate, "manifest.json", "is damaged"),
    (zero, "manifest.json", "is damaged"),
    (Path.unlink, "manifest.json", "holds no manifest.json"),
]


@pytest.mark.parametrize(("damage", "name", "wants"), DAMAGE)
def test_damage_is_found_before_the_first_step(damage: Callable[[Path], None], name: str, wants: str, copy: Path):
    """Breaks when a run would train on damaged data."""
    damage(copy / name)
    with pytest.raises(ValueError, match=wants) as error:
        ShardSet(copy, "train").verify()
    assert "\n" not in str(error.value)


def test_every_byte_of_an_index_counts(copy: Path):
    """Breaks when some field of the index is not checked, or checking it fails with anything but a clear error."""
    path = copy / "train-00000.idx"
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        for value in (0x00, 0x80, 0xFF):
            damaged = bytearray(good)
            damaged[place] = value
            if damaged == good:
                continue
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="prepare the data again|wants"):
                ShardSet(copy, "train").verify()


def test_a_manifest_that_was_edited_is_refused(copy: Path):
    """Breaks when counts that decide bits per byte could be wrong unnoticed."""
    content = json.loads((copy / "manifest.json").read_text())
    content["splits"]["train"]["text_bytes"] += 1
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not match its own fingerprint"):
        Manifest.read(copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", ""])
def test_a_manifest_cannot_lead_elsewhere(name: str, copy: Path):
    """Breaks when a manifest from elsewhere could open files outside its folder."""
    content = json.loads((copy / "manifest.json").read_text())
    content["splits"]["train"]["files"][0]["name"] = name
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is damaged"):
        ShardSet(copy, "train")


def test_another_version_is_named(copy: Path):
    """Breaks when data of a later version would be misread."""
    content = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(ValueError, match="has version 2, wants 1"):
        Manifest.read(copy)


def test_an_unknown_split_names_the_known_ones(prepared: PreparedData):
    """Breaks when a misspelt split ends in a KeyError."""
    with pytest.raises(ValueError, match="wants one of train, validation"):
        ShardSet(prepared.folder, "test")
