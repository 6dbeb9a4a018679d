"""Token files as Megatron-LM writes them: `NAME.bin` holds ids, `NAME.idx` where each document lies.

NAME.idx, little-endian: magic (9 bytes), version u64, dtype code u8, number of sequences u64, number of document bounds
u64, then sequence lengths i32, sequence offsets in bytes i64, document bounds i64 (sequence numbers, beginning with 0).
Every document is one sequence here; the reader takes any number.
"""

import hashlib
import itertools
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.files import DataError, commit_file, sha256_of, temporary_name

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CODES = {np.dtype("<u2"): 8, np.dtype("<i4"): 4}
CHECK_TOKENS = 8 << 20
"""How many ids are in memory at once when a file is checked."""


@dataclass(frozen=True)
class TokenFile:
    """One pair of files, as the manifest records it. Sizes in bytes; largest: the largest id."""

    name: str
    documents: int
    tokens: int
    largest: int
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrower of uint16 and int32 that holds every id, by Megatron-LM's rule."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class TokenWriter:
    """Writes `folder/name.bin` and `.idx`; neither has its name before `close`."""

    def __init__(self, folder: Path, name: str, vocab_size: int) -> None:
        self._bin, self._idx = folder / f"{name}.bin", folder / f"{name}.idx"
        self._name, self._vocab_size, self._dtype = name, vocab_size, token_dtype(vocab_size)
        self._file = temporary_name(self._bin).open("wb")
        self._digest = hashlib.sha256()
        self._lengths: list[int] = []
        self._largest = 0

    def add(self, ids: np.ndarray) -> None:
        """Appends a document. ids: at least one, integers in [0, vocab_size)."""
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            raise DataError(f"{self._bin}: got token {low if low < 0 else high}, wants 0 to {self._vocab_size - 1}")
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._lengths.append(len(ids))
        self._largest = max(self._largest, high)

    def close(self) -> TokenFile:
        """Puts both files in place, durably."""
        index = self._index()
        for file, data in ((self._file, b""), (temporary_name(self._idx).open("wb"), index)):
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in (self._bin, self._idx):
            commit_file(temporary_name(path), path)
        tokens = sum(self._lengths)
        return TokenFile(
            name=self._name,
            documents=len(self._lengths),
            tokens=tokens,
            largest=self._largest,
            bin_bytes=tokens * self._dtype.itemsize,
            bin_sha256=self._digest.hexdigest(),
            idx_bytes=len(index),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )

    def abandon(self) -> None:
        """Closes what is open; leaves what `close` finished."""
        self._file.close()

    def _index(self) -> bytes:
        count = len(self._lengths)
        lengths = np.array(self._lengths, dtype="<i4")
        offsets = np.zeros(count, dtype="<i8")
        np.cumsum(lengths[:-1], dtype="<i8", out=offsets[1:])
        bounds = np.arange(count + 1, dtype="<i8")
        header = HEADER.pack(MAGIC, VERSION, CODES[self._dtype], count, count + 1)
        return header + lengths.tobytes() + (offsets * self._dtype.itemsize).tobytes() + bounds.tobytes()


class TokenReader:
    """A pair of files, memory-mapped. Raises DataError when the index contradicts itself or the size of the ids.

    ids: all of them, in order. lengths: tokens of each document, int64. offsets: where each begins in `ids`, int64.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.bin, self.idx = folder / f"{name}.bin", folder / f"{name}.idx"
        try:
            index = np.fromfile(self.idx, dtype=np.uint8)
            size = self.bin.stat().st_size
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None
        dtype, sequences, bounds = self._header(index)
        lengths, starts, limits = self._arrays(index, sequences, bounds)
        ends = starts + lengths * dtype.itemsize
        self._require(bool((lengths >= 0).all()), "has a negative length")
        contiguous = sequences == 0 or (starts[0] == 0 and bool((starts[1:] == ends[:-1]).all()))
        self._require(contiguous, "has offsets that do not follow from its lengths")
        tokens = int(lengths.sum())
        if size != tokens * dtype.itemsize:
            raise DataError(f"{self.bin}: has {size:,} bytes, wants {tokens * dtype.itemsize:,} for {tokens:,} tokens")
        self._require(limits[0] == 0 and limits[-1] == sequences, "has document bounds that miss sequences")
        self._require(bool((np.diff(limits) > 0).all()), "has document bounds that do not rise")
        edges = np.concatenate([starts, [size]])[limits] // dtype.itemsize
        self.offsets, self.lengths = edges[:-1], np.diff(edges)
        self._require(bool((self.lengths > 0).all()), "has an empty document")
        self.ids: np.ndarray = np.memmap(self.bin, dtype=dtype, mode="r") if tokens else np.zeros(0, dtype)

    def _require(self, ok: object, problem: str) -> None:
        if not ok:
            raise DataError(f"{self.idx}: {problem}; wants a token index as it was written, prepare the data again")

    def _header(self, index: np.ndarray) -> tuple[np.dtype[Any], int, int]:
        self._require(len(index) >= HEADER.size, "is too short for a header")
        magic, version, code, sequences, bounds = HEADER.unpack(index[: HEADER.size].tobytes())
        self._require(magic == MAGIC, "does not begin with MMIDIDX")
        self._require(version == VERSION, f"has version {version}")
        self._require(code in DTYPES, f"has the unknown dtype code {code}")
        self._require(bounds >= 1, "has no document bounds")
        self._require(len(index) >= HEADER.size + 12 * sequences + 8 * bounds, "is cut short")
        return np.dtype(DTYPES[code]), sequences, bounds

    def _arrays(self, index: np.ndarray, sequences: int, bounds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        cuts = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences, 8 * bounds])
        lengths, starts, limits = (index[a:b] for a, b in itertools.pairwise(cuts))
        limits = np.frombuffer(limits.tobytes(), "<i8")
        self._require(bool((limits >= 0).all() and (limits <= sequences).all()), "has a document bound out of range")
        return np.frombuffer(lengths.tobytes(), "<i4").astype(np.int64), np.frombuffer(starts.tobytes(), "<i8"), limits

    def check_against(self, record: TokenFile, vocab_size: int) -> None:
        """Raises DataError unless hashes, counts and the largest id are those of the manifest."""
        for path, wanted in ((self.idx, record.idx_sha256), (self.bin, record.bin_sha256)):
            found = sha256_of(path)
            if found != wanted:
                raise DataError(f"{path}: has SHA-256 {found[:12]}, the manifest {wanted[:12]}; prepare the data again")
        starts = range(0, len(self.ids), CHECK_TOKENS)
        largest = max((int(self.ids[start : start + CHECK_TOKENS].max()) for start in starts), default=0)
        if largest != record.largest or largest >= vocab_size:
            limit = min(record.largest, vocab_size - 1)
            raise DataError(f"{self.bin}: holds token {largest}, wants at most {limit} by its manifest")
