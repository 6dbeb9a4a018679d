"""Raw text to shards: whole or resumable, never mixed, and every mistake is one line."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data.files import exclusive
from data.parts import PartWriter, _batches
from data.prepare import DataConfig, TokenizerConfig, open_prepared, prepare
from data.sampling import held_out, training_sample
from data.shards import ShardSet
from data.sources import Document, Skipped, TextFolder
from data.tokenizer import load_tokenizer
from tests.data.corpus import NASTY, config, make, quiet, text, write_corpus
from tests.data.killed import SHARD_BYTES

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def all_texts(folder: Path) -> dict[str, list[bytes]]:
    splits = {name: ShardSet(folder, name) for name in ("train", "validation")}
    return {name: split.text(range(split.documents), split.tokenizer()) for name, split in splits.items()}


def test_every_document_arrives_once_in_order(tmp_path: Path):
    """Breaks when preparation loses, repeats, reorders or alters text."""
    corpus = write_corpus(tmp_path / "corpus")
    for number, nasty in enumerate(NASTY):
        (corpus / f"nasty{number:02d}.txt").write_bytes(nasty.encode())
    (corpus / "broken.txt").write_bytes(b"\xff")
    prepared = prepare(config(corpus, tmp_path / "out", shard_bytes=5000), log=quiet)
    prepared.train.verify()
    expected: dict[str, list[bytes]] = {"train": [], "validation": []}
    chain = hashlib.sha256().digest()
    for path in sorted(corpus.glob("*.txt"), key=lambda path: path.name):
        content = path.read_bytes()
        if content and content != b"\xff":
            expected["validation" if held_out(content, 0.2) else "train"].append(content)
            chain = hashlib.sha256(chain + hashlib.sha256(content).digest()).digest()
    assert all_texts(prepared.folder) == expected
    manifest = prepared.manifest
    assert manifest.corpus_sha256 == chain.hex()
    assert manifest.skipped == {"empty": 1, "not valid UTF-8": 1}
    assert manifest.inexact == 0
    for name, split in manifest.splits.items():
        assert split.text_bytes == sum(map(len, expected[name]))


def test_a_preparation_killed_anywhere_ends_in_the_same_bytes(tmp_path: Path):
    """Breaks when a kill -9 at some commit would lose, repeat or mix parts."""
    corpus = write_corpus(tmp_path / "corpus", documents=40)
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.killed", str(corpus), str(tmp_path / "killed")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    deaths = int(done.stdout)
    reference = prepare(config(corpus, tmp_path / "reference", shard_bytes=SHARD_BYTES), log=quiet)
    assert len(reference.manifest.splits["train"].files) == 2
    assert deaths > 15
    expected = contents(reference.folder)
    for number in range(deaths):
        assert contents(tmp_path / "killed" / f"{number:03d}") == expected, f"death {number}"


def test_going_on_does_not_repeat_finished_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Breaks when an interruption near the end costs all the work before it."""
    corpus = write_corpus(tmp_path / "corpus")
    settings = config(corpus, tmp_path / "out", shard_bytes=6000)
    write, written = PartWriter.write, []

    def interrupted(self: PartWriter, number: int, *rest: object) -> object:
        if number == 2 and not written.count(2):
            written.append(2)
            raise KeyboardInterrupt
        written.append(number)
        return write(self, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(PartWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(settings, log=quiet)
    trained = (tmp_path / "out" / "tokenizer.model").stat().st_mtime_ns
    log: list[str] = []
    prepare(settings, log=log.append)
    assert written[:4] == [0, 1, 2, 2]
    assert 0 not in written[3:]
    assert (tmp_path / "out" / "tokenizer.model").stat().st_mtime_ns == trained
    assert "going on after part 2" in log[0]


def test_a_finished_folder_is_recognised_without_reading_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Breaks when every start of a run would prepare its data again."""
    prepared = make(tmp_path)
    before = contents(prepared.folder)
    monkeypatch.setattr(TextFolder, "records", lambda self, start=0: pytest.fail("the source was read"))
    log: list[str] = []
    again = prepare(config(tmp_path / "corpus", prepared.folder, workers=1), log=log.append)
    assert again.train.fingerprint == prepared.train.fingerprint
    assert "already prepared" in log[-1]
    shutil.rmtree(tmp_path / "corpus")
    prepare(config(tmp_path / "corpus", prepared.folder), log=log.append)
    assert "no longer there" in log[-2]
    assert contents(prepared.folder) == before


CHANGES = [
    (
        {"tokenizer": TokenizerConfig(vocab_size=350)},
        "data.tokenizer.vocab_size: got 350, but .* with 360",
    ),
    ({"validation_fraction": 0.3}, "data.validation_fraction: got 0.3, but .* with 0.2"),
    ({"source": TextFolder("elsewhere")}, "data.source.path: got 'elsewhere', but"),
    ({"shard_bytes": 1000}, "data.shard_bytes: got 1000, but"),
]


@pytest.mark.parametrize(("change", "wants"), CHANGES)
def test_other_settings_are_refused(change: dict[str, object], wants: str, tmp_path: Path):
    """Breaks when data of two settings would be mixed in one folder, or a recipe trained on data of another."""
    make(tmp_path)
    before = contents(tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    settings = config(tmp_path / "corpus", tmp_path / "out", **change)
    for use in (lambda: prepare(settings, log=quiet), lambda: open_prepared(settings)):
        with pytest.raises(ValueError, match=wants):
            use()
    assert contents(tmp_path / "out") == before


def test_unfinished_work_of_other_settings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Breaks when a changed rerun would complete the parts of the first with its own."""
    corpus = write_corpus(tmp_path / "corpus")
    with monkeypatch.context() as patch:
        patch.setattr("data.prepare._finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config(corpus, tmp_path / "out"), log=quiet)
    with pytest.raises(ValueError, match=r"data.validation_fraction: got 0.3"):
        prepare(config(corpus, tmp_path / "out", validation_fraction=0.3), log=quiet)
    (corpus / "new.txt").write_text("one more")
    with pytest.raises(ValueError, match="data.source: its files are not those that"):
        prepare(config(corpus, tmp_path / "out"), log=quiet)


def test_a_source_that_has_changed_is_refused(tmp_path: Path):
    """Breaks when new documents would silently not be trained on."""
    make(tmp_path)
    (tmp_path / "corpus" / "new.txt").write_text("one more")
    with pytest.raises(ValueError, match="data.source: its files are not those that"):
        prepare(config(tmp_path / "corpus", tmp_path / "out"), log=quiet)


def test_settings_that_fail_can_be_corrected_in_place(tmp_path: Path):
    """Breaks when a user's mistake would leave a folder that refuses the correction."""
    corpus = write_corpus(tmp_path / "corpus", documents=6, words=30)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"vocab_size: got 8192, but this text supports at most \d+ pieces"):
        prepare(config(corpus, out, tokenizer=TokenizerConfig(vocab_size=8192)), log=quiet)
    settings = config(corpus, out, tokenizer=TokenizerConfig(vocab_size=340), shard_bytes=100)
    with pytest.raises(ValueError, match="validation_fraction: 0.01 of 6 documents leaves none for validation"):
        prepare(replace(settings, validation_fraction=0.01), log=quiet)
    prepared = prepare(replace(settings, validation_fraction=0.5), log=quiet)
    prepared.train.verify()
    assert prepared.train.documents + prepared.validation.documents == 6


def test_empty_sources_are_one_clear_line(tmp_path: Path):
    """Breaks when nothing to read ends in a traceback, or in an empty data set."""
    with pytest.raises(ValueError, match="data.source.path: got .*none', wants an existing folder"):
        prepare(config(tmp_path / "none", tmp_path / "out"), log=quiet)
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file that matches"):
        prepare(config(tmp_path / "empty", tmp_path / "out"), log=quiet)
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text to train a tokenizer on"):
        prepare(config(tmp_path / "empty", tmp_path / "out"), log=quiet)
    model = TokenizerConfig(model=str(make(tmp_path / "other").tokenizer))
    with pytest.raises(ValueError, match=r"holds no document \(skipped: 1 empty\)"):
        prepare(config(tmp_path / "empty", tmp_path / "out", tokenizer=model), log=quiet)


def test_a_full_disk_is_one_clear_line_and_can_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Breaks when no space left ends in a traceback, or leaves something that passes for prepared."""
    settings = config(write_corpus(tmp_path / "corpus"), tmp_path / "out", shard_bytes=6000)
    sync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="out cannot be written: No space left on device"):
        prepare(settings, log=quiet)
    with pytest.raises(ValueError, match="holds no prepared data"):
        open_prepared(settings)
    prepare(settings, log=quiet)
    reference = prepare(settings, tmp_path / "reference", log=quiet)
    assert contents(tmp_path / "out") == contents(reference.folder)


def test_two_preparations_of_one_folder_do_not_meet(tmp_path: Path):
    """Breaks when two jobs would write the same files."""
    settings = config(write_corpus(tmp_path / "corpus"), tmp_path / "out")
    (tmp_path / "out").mkdir()
    with (
        exclusive(tmp_path / "out"),
        pytest.raises(ValueError, match=f"is being prepared by process {os.getpid()} on"),
    ):
        prepare(settings, log=quiet)
    prepare(settings, log=quiet)


def test_a_given_tokenizer_is_kept_with_the_data(tmp_path: Path):
    """Breaks when prepared data would need a file that lies elsewhere, or take another tokenizer for the same."""
    first = make(tmp_path / "first")
    model = tmp_path / "given.model"
    shutil.copy(first.tokenizer, model)
    settings = config(tmp_path / "first" / "corpus", tmp_path / "out", tokenizer=TokenizerConfig(model=str(model)))
    second = prepare(settings, log=quiet)
    assert second.tokenizer_sha256 == first.tokenizer_sha256
    assert all_texts(second.folder) == all_texts(first.folder)
    changed = make(tmp_path / "changed", tokenizer=TokenizerConfig(vocab_size=350))
    shutil.copy(changed.tokenizer, model)
    with pytest.raises(ValueError, match="data.tokenizer.model_sha256: got"):
        open_prepared(settings)
    model.unlink()
    assert open_prepared(settings).tokenizer.parent == tmp_path / "out"
    with pytest.raises(ValueError, match="given.model: cannot be read"):
        prepare(replace(settings, path=str(tmp_path / "third")), log=quiet)


def test_a_hugging_face_tokenizer_prepares_too(tmp_path: Path):
    """Breaks when only our own tokenizers work, or text that one does not keep is not counted."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text(0)], trainer)
    made.save(str(tmp_path / "given.json"))
    prepared = make(tmp_path, tokenizer=TokenizerConfig(model=str(tmp_path / "given.json")))
    assert prepared.tokenizer.name == "tokenizer.json"
    lowered = [x.decode().lower().encode() for x in all_texts(make(tmp_path / "ours").folder)["validation"]]
    assert all_texts(prepared.folder)["validation"] == lowered
    originals = all_texts(tmp_path / "ours" / "out")["validation"]
    assert prepared.manifest.inexact == sum(a != b for a, b in zip(lowered, originals, strict=True)) > 0


def test_open_prepared_finds_damage(tmp_path: Path):
    """Breaks when training would start on data that changed on disk."""
    prepared = make(tmp_path)
    path = prepared.folder / "validation-00000.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    settings = config(tmp_path / "corpus", prepared.folder)
    with pytest.raises(ValueError, match=r"validation-00000\.bin: has SHA-256"):
        open_prepared(settings)
    assert open_prepared(settings, verify=False).train.documents == prepared.train.documents


def test_the_vocabulary_must_fit_the_model(tmp_path: Path):
    """Breaks when ids would index outside the embedding."""
    prepared = make(tmp_path)
    prepared.check_vocabulary(360)
    with pytest.raises(ValueError, match="model.vocab_size: got 359, wants at least the 360"):
        prepared.check_vocabulary(359)


@pytest.mark.parametrize(
    "change", [{"validation_fraction": 0.0}, {"validation_fraction": 1.0}, {"shard_bytes": 0}, {"workers": 0}]
)
def test_wrong_values_name_their_key(change: dict[str, float]):
    """Breaks when a recipe's mistake is not found where it is read."""
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: got"):
        DataConfig(**change)  # type: ignore[arg-type]


def test_copies_stay_on_one_side(tmp_path: Path):
    """Breaks when a copy of a held-out document is trained on."""
    corpus = write_corpus(tmp_path / "corpus")
    for path in list(corpus.glob("*.txt")):
        shutil.copy(path, corpus / f"copy-{path.name}")
    prepared = prepare(config(corpus, tmp_path / "out"), log=quiet)
    found = all_texts(prepared.folder)
    assert found["validation"]
    assert not set(found["train"]) & set(found["validation"])


def test_the_tokenizer_never_sees_held_out_text():
    """Breaks when held-out text shapes the pieces that it is measured with."""
    documents = [Document(str(number), text(number).encode()) for number in range(40)]
    seen = "".join(training_sample([*documents, Skipped("x", "empty")], 1 << 20, 0.3))
    for document in documents:
        last_line = document.text.decode().splitlines()[-1]
        assert (f"{last_line}\n" in seen) == (not held_out(document.text, 0.3))


def test_the_sample_is_bounded_and_from_everywhere():
    """Breaks when a large corpus would not fit in memory, or only its beginning shaped the pieces."""

    def documents() -> Iterator[Document]:
        for number in range(300):
            yield Document(str(number), (f"{number:06d} " + "x" * 90 + "\n").encode() * 100)

    tracemalloc.start()
    sample = training_sample(documents(), 100_000, 0.01)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(map(len, sample)) <= 100_000
    assert peak < 2_000_000, "of 3 MB"
    assert sample == training_sample(documents(), 100_000, 0.01)
    numbers = [int(chunk[:6]) for chunk in sample]
    assert min(numbers) < 100
    assert max(numbers) > 200


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Breaks when a million tiny documents, or one large one, would be held in memory at once."""
    tiny = (Document("", b"x") for _ in range(10_000))
    sizes = [len(batch) for batch in _batches(tiny, 1 << 40)]
    assert max(sizes) < 10_000
    assert sum(sizes) == 10_000
    tokenizer = load_tokenizer(make(tmp_path).tokenizer)
    monkeypatch.setattr("data.tokenizer.GROUP_CHARS", 50_000)
    monkeypatch.setattr("data.tokenizer.GROUP_IDS", 10_000)
    large = "    value = item\n" * 50_000
    tracemalloc.start()
    ids = tokenizer.encode_batch([large])[0]
    decoded = tokenizer.decode_bytes(ids)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert decoded == large.encode()
    assert peak < 6 * len(large), "lists of Python integers for all ids at once would take more"
