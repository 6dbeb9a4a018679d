"""The work of preparing data in numbered parts, each committed by a small record that is written last."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.files import read_json, write_json
from data.indexed import TokenFile, TokenReader, TokenWriter
from data.sampling import held_out
from data.shards import SPLITS, Split
from data.sources import Document, Record, Skipped
from data.tokenizer import Tokenizer

PARTS = "parts"
BATCH_BYTES = 4 << 20
BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class Part:
    """What is known after a part was written.

    next_record: of the source, where the next part begins. corpus: the running hash over all documents so far, in
    hexadecimal. files: split -> its file, where it has documents. text_bytes: split -> bytes. skipped: reason -> count.
    inexact: held-out documents that the tokenizer does not give back byte for byte.
    """

    next_record: int
    corpus: str
    files: dict[str, TokenFile]
    text_bytes: dict[str, int]
    skipped: dict[str, int]
    inexact: int

    @staticmethod
    def read(path: Path) -> "Part":
        content = read_json(path)
        files = {split: TokenFile(**file) for split, file in content["files"].items()}
        return Part(**{**content, "files": files})


NOTHING = Part(0, hashlib.sha256().hexdigest(), {}, dict.fromkeys(SPLITS, 0), {}, 0)


def read_parts(folder: Path) -> list[Part]:
    """The parts that were committed in a folder, in order."""
    return [Part.read(path) for path in sorted((folder / PARTS).glob("[0-9]*.json"))]


@dataclass(frozen=True)
class PartWriter:
    """Writes parts. shard_bytes: text in a part. progress: told the bytes of text that were written."""

    folder: Path
    tokenizer: Tokenizer
    validation_fraction: float
    shard_bytes: int
    workers: int
    progress: Callable[[int], Any]

    def write(self, number: int, previous: Part, records: Iterator[Record]) -> Part | None:
        """Takes records until the part is full and commits it; None when there are none left."""
        work = _Work(self, number, previous)
        try:
            for batch in _batches(work.count(records), self.shard_bytes):
                work.encode(batch)
            if work.next_record == previous.next_record:
                return None
            part = work.finish()
        finally:
            work.abandon()
        write_json(self.folder / PARTS / f"{number:08d}.json", asdict(part))
        return part


class _Work:
    """A part in the making."""

    def __init__(self, plan: PartWriter, number: int, previous: Part) -> None:
        self.next_record = previous.next_record
        self._plan, self._number = plan, number
        self._corpus = bytes.fromhex(previous.corpus)
        self._writers: dict[str, TokenWriter] = {}
        self._text_bytes = dict.fromkeys(SPLITS, 0)
        self._skipped: dict[str, int] = {}
        self._inexact = 0

    def count(self, records: Iterable[Record]) -> Iterator[Document]:
        """The documents among the records; counts what is taken and what is skipped."""
        for record in records:
            self.next_record += 1
            if isinstance(record, Skipped):
                self._skipped[record.reason] = self._skipped.get(record.reason, 0) + 1
            else:
                yield record

    def encode(self, batch: list[Document]) -> None:
        plan, tokenizer = self._plan, self._plan.tokenizer
        begin, end = np.array([tokenizer.bos], np.int32), np.array([tokenizer.eos], np.int32)
        encoded = tokenizer.encode_batch([document.text for document in batch], plan.workers)
        for document, ids in zip(batch, encoded, strict=True):
            split = "validation" if held_out(document.text, plan.validation_fraction) else "train"
            self._writer(split).add(np.concatenate([begin, ids, end]))
            self._text_bytes[split] += len(document.text)
            self._inexact += split == "validation" and tokenizer.decode_bytes(ids) != document.text
            self._corpus = hashlib.sha256(self._corpus + hashlib.sha256(document.text).digest()).digest()
            plan.progress(len(document.text))

    def finish(self) -> Part:
        files = {split: writer.close() for split, writer in sorted(self._writers.items())}
        return Part(self.next_record, self._corpus.hex(), files, self._text_bytes, self._skipped, self._inexact)

    def abandon(self) -> None:
        for writer in self._writers.values():
            writer.abandon()

    def _writer(self, split: str) -> TokenWriter:
        if split not in self._writers:
            name = f"{split}-{self._number:05d}"
            self._writers[split] = TokenWriter(self._plan.folder, name, self._plan.tokenizer.vocab_size)
        return self._writers[split]


def _batches(documents: Iterator[Document], limit_bytes: int) -> Iterator[list[Document]]:
    """Groups to encode at a time, until `limit_bytes` of text are reached; takes no document beyond."""
    batch: list[Document] = []
    waiting = total = 0
    for document in documents:
        batch.append(document)
        waiting += len(document.text)
        total += len(document.text)
        if total >= limit_bytes or waiting >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, waiting = [], 0
        if total >= limit_bytes:
            return
    if batch:
        yield batch


def total(split: str, parts: list[Part]) -> Split:
    """The counts of a split over all parts."""
    files = tuple(part.files[split] for part in parts if split in part.files)
    return Split(
        files=files,
        documents=sum(file.documents for file in files),
        tokens=sum(file.tokens for file in files),
        text_bytes=sum(part.text_bytes[split] for part in parts),
    )


def texts(folder: Path, split: Split, tokenizer: Tokenizer) -> Iterator[bytes]:
    """What the tokens of a split spell, document by document."""
    for file in split.files:
        reader = TokenReader(folder, file.name)
        for start, length in zip(reader.offsets.tolist(), reader.lengths.tolist(), strict=True):
            yield tokenizer.decode_bytes(reader.ids[start : start + length])
