"""A folder of prepared data: token files, the tokenizer that made them and a manifest that vouches for all of it.

    shards = ShardSet(Path("prepared/stdlib"), "train")
    shards.verify()                   # every hash, before the first step
    shards.tokens(document=3, start=0, stop=100)

`manifest.json` holds what identifies the data and no path or time, so its fingerprint is the same wherever the folder
lies and whenever it was made.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.files import DataError, fingerprint_of, read_json, sha256_of, write_json
from data.indexed import TokenFile, TokenReader
from data.tokenizer import Tokenizer, load_tokenizer

MANIFEST = "manifest.json"
FORMAT = "braid-shards"
VERSION = 1
SPLITS = ("train", "validation")
FILE_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the tokens: its file in the same folder and its special ids."""

    file: str
    sha256: str
    vocab_size: int
    bos: int
    eos: int
    pad: int


@dataclass(frozen=True)
class Split:
    """Counts of one split. text_bytes: of the documents' text, in UTF-8."""

    files: tuple[TokenFile, ...]
    documents: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True)
class Compression:
    """What general compressors make of `documents` held-out documents, joined: the first ones, in stored order."""

    documents: int
    text_bytes: int
    zlib_bytes: int
    xz_bytes: int

    @property
    def zlib_bits_per_byte(self) -> float:
        return 8 * self.zlib_bytes / self.text_bytes

    @property
    def xz_bits_per_byte(self) -> float:
        return 8 * self.xz_bytes / self.text_bytes


@dataclass(frozen=True)
class Manifest:
    """Everything that is known about a folder of prepared data.

    corpus_sha256: over the SHA-256 of every document's text, in order. skipped: reason -> number of records. inexact:
    held-out documents that the tokenizer does not give back byte for byte. settings: what it was prepared with; the
    fingerprint covers all but these.
    """

    dtype: str
    tokenizer: TokenizerRecord
    splits: dict[str, Split]
    corpus_sha256: str
    skipped: dict[str, int]
    inexact: int
    compression: Compression
    settings: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        identity = asdict(self)
        del identity["settings"]
        return fingerprint_of(identity)

    def write(self, folder: Path) -> None:
        content = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, **asdict(self)}
        write_json(folder / MANIFEST, content)

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """Raises DataError when there is none or when it is not as it was written."""
        path = folder / MANIFEST
        if not path.is_file():
            raise DataError(f"{folder}: holds no {MANIFEST}; wants a folder that `braid prepare` has finished")
        content = read_json(path)
        try:
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                raise DataError(f"{path}: has version {content['version']}, wants {VERSION}; prepare the data again")
            manifest = Manifest(
                dtype=content["dtype"],
                tokenizer=TokenizerRecord(**content["tokenizer"]),
                splits={name: _split(split) for name, split in content["splits"].items()},
                corpus_sha256=content["corpus_sha256"],
                skipped=content["skipped"],
                inexact=content["inexact"],
                compression=Compression(**content["compression"]),
                settings=content["settings"],
            )
            intact = manifest.fingerprint == content["fingerprint"]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: is damaged ({type(error).__name__}: {error}); prepare the data again") from None
        if not intact:
            raise DataError(f"{path}: does not match its own fingerprint; prepare the data again")
        return manifest


def _split(content: dict[str, Any]) -> Split:
    files = tuple(TokenFile(**file) for file in content["files"])
    if not all(FILE_NAME.fullmatch(file.name) for file in files):
        raise TypeError("a file name that leads elsewhere")
    return Split(**{**content, "files": files})


class ShardSet:
    """One split of a folder of prepared data, memory-mapped; documents are numbered over all its files.

    lengths: tokens of each document, int64. Opening checks sizes and indices (DataError); `verify` checks every byte.
    """

    def __init__(self, folder: Path, split: str = "train") -> None:
        self.folder, self.split = folder, split
        self.manifest = Manifest.read(folder)
        if split not in self.manifest.splits:
            raise DataError(f"{folder}: has no split {split!r}, wants one of {', '.join(self.manifest.splits)}")
        self.record = self.manifest.splits[split]
        self._readers = [self._open(file) for file in self.record.files]
        lengths = [reader.lengths for reader in self._readers]
        self.lengths: np.ndarray = np.concatenate([np.zeros(0, np.int64), *lengths])
        self._first = np.cumsum([0, *map(len, lengths)])
        if (len(self.lengths), int(self.lengths.sum())) != (self.record.documents, self.record.tokens):
            raise DataError(f"{folder}: the index files disagree with {MANIFEST}; prepare the data again")

    @property
    def documents(self) -> int:
        return self.record.documents

    @property
    def total_tokens(self) -> int:
        return self.record.tokens

    @property
    def text_bytes(self) -> int:
        return self.record.text_bytes

    @property
    def vocab_size(self) -> int:
        return self.manifest.tokenizer.vocab_size

    @property
    def pad(self) -> int:
        return self.manifest.tokenizer.pad

    @property
    def fingerprint(self) -> str:
        """The same for the same data, wherever it lies."""
        return self.manifest.fingerprint

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / self.manifest.tokenizer.file

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens. Raises DataError when its file is another one."""
        self._check_tokenizer()
        return load_tokenizer(self.tokenizer_path)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Ids [start, stop) of a document in the stored dtype, a view of the file."""
        part = int(np.searchsorted(self._first, document, side="right")) - 1
        reader, local = self._readers[part], document - int(self._first[part])
        begin, length = int(reader.offsets[local]), int(reader.lengths[local])
        return reader.ids[begin + start : begin + (length if stop is None else min(stop, length))]

    def text(self, documents: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> list[bytes]:
        """What the tokens of documents spell."""
        return [tokenizer.decode_bytes(self.tokens(int(document))) for document in documents]

    def verify(self, rank: int = 0, size: int = 1) -> None:
        """Reads every file, or this rank's share of them. Raises DataError naming the one that is not what the manifest
        says."""
        self._check_tokenizer()
        pairs = list(zip(self._readers, self.record.files, strict=True))[rank::size]
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(reader.check_against, file, self.vocab_size) for reader, file in pairs]:
                done.result()

    def _open(self, file: TokenFile) -> TokenReader:
        for suffix, wanted in (("idx", file.idx_bytes), ("bin", file.bin_bytes)):
            path = self.folder / f"{file.name}.{suffix}"
            found = path.stat().st_size if path.is_file() else None
            if found != wanted:
                what = "is missing" if found is None else f"has {found:,} bytes"
                raise DataError(f"{path}: {what}, wants {wanted:,} bytes by {MANIFEST}; prepare the data again")
        reader = TokenReader(self.folder, file.name)
        if reader.ids.dtype != np.dtype(self.manifest.dtype):
            raise DataError(f"{reader.idx}: has dtype {reader.ids.dtype}, wants {self.manifest.dtype} by {MANIFEST}")
        return reader

    def _check_tokenizer(self) -> None:
        found, wanted = sha256_of(self.tokenizer_path), self.manifest.tokenizer.sha256
        if found != wanted:
            raise DataError(
                f"{self.tokenizer_path}: has SHA-256 {found[:12]}, the data was made with {wanted[:12]}; "
                "wants the same tokenizer, or prepare the data again"
            )
