"""Where text comes from: folders of files, JSONL, Hugging Face `datasets`, Python's standard library.

Each source is a frozen dataclass told apart by `kind`, and yields its records always in the same order:

    for record in source.records():     # Document or Skipped
        ...

A record's place in that order is its number, so that reading can go on at `records(start)` after an interruption.
"""

import gzip
import itertools
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from data.files import DataError, fingerprint_of

MAX_DOCUMENT_BYTES = 1 << 30
NOT_UTF8, EMPTY = "not valid UTF-8", "empty"


@dataclass(frozen=True)
class Document:
    """id: names the document within its source. text: valid UTF-8, not empty."""

    id: str
    text: bytes


@dataclass(frozen=True)
class Skipped:
    """A record that holds no usable text."""

    id: str
    reason: str


Record = Document | Skipped


@dataclass(frozen=True)
class PythonStdlib:
    """The source code of the running Python's standard library, without installed packages: text on every machine."""

    kind: Literal["python_stdlib"] = "python_stdlib"

    def records(self, start: int = 0) -> Iterator[Record]:
        """Each `*.py` file, ordered by relative path."""
        root, names = self._files()
        return _read_files(root, names[start:])

    def listing(self) -> str:
        """Hash over the names and sizes of the files: another one means that the source has changed."""
        return _listing(*self._files())

    def size_bytes(self) -> int | None:
        return _total_bytes(*self._files())

    def _files(self) -> tuple[Path, list[str]]:
        root = Path(sysconfig.get_paths()["stdlib"])
        found: list[str] = []
        for folder, folders, names in os.walk(root):
            folders[:] = set(folders) - {"site-packages", "dist-packages", "__pycache__"}
            found += [Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith(".py")]
        return root, sorted(found)


@dataclass(frozen=True)
class TextFolder:
    """Text files; each is one document.

    path: a folder, or one file. glob: patterns relative to the folder; `**/` is any depth.
    """

    path: str
    glob: tuple[str, ...] = ("**/*.txt",)
    kind: Literal["text"] = "text"

    def records(self, start: int = 0) -> Iterator[Record]:
        """Each matching file, ordered by relative path."""
        root, names = _resolve(self.path, self.glob)
        return _read_files(root, names[start:])

    def listing(self) -> str:
        return _listing(*_resolve(self.path, self.glob))

    def size_bytes(self) -> int | None:
        return _total_bytes(*_resolve(self.path, self.glob))


@dataclass(frozen=True)
class JsonLines:
    """JSON Lines; each line is one document.

    path: a file, or a folder. field: the key whose string is the text. glob: which files of a folder. Names that end
    in `.gz` are decompressed.
    """

    path: str
    field: str = "text"
    glob: tuple[str, ...] = ("**/*.jsonl", "**/*.jsonl.gz")
    kind: Literal["jsonl"] = "jsonl"

    def records(self, start: int = 0) -> Iterator[Record]:
        """Each line that is not blank, files ordered by relative path."""
        root, names = _resolve(self.path, self.glob)
        lines = itertools.chain.from_iterable(self._lines(root, name) for name in names)
        return (self._record(line, place) for place, line in itertools.islice(lines, start, None))

    def listing(self) -> str:
        return _listing(*_resolve(self.path, self.glob))

    def size_bytes(self) -> int | None:
        """None: the text is only a part of the files' bytes."""
        return None

    def _lines(self, root: Path, name: str) -> Iterator[tuple[str, bytes]]:
        path = root / name
        try:
            with _open(path) as file:
                for number, line in enumerate(file, 1):
                    if not line.isspace():
                        yield f"{name}:{number}", line
        except (OSError, EOFError) as error:
            raise DataError(f"data.source.path: {path} cannot be read: {error}") from None

    def _record(self, line: bytes, place: str) -> Record:
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            return Skipped(place, NOT_UTF8)
        except ValueError as error:
            raise DataError(f"data.source.path: {place} is not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise DataError(f"data.source.path: {place} is {_kind_of(value)}, wants a JSON object on each line")
        return _from_row(value, self.field, place)


@dataclass(frozen=True)
class HFDataset:
    """A Hugging Face dataset in local files; each row is one document. Parquet comes in here.

    path: a folder written by `save_to_disk`, a folder of data files, or the name of a file format ("parquet", "json",
    "csv", "arrow", "text") to read `data_files` with. data_files: paths or patterns. split: which split.
    field: the column whose string is the text.
    """

    path: str
    data_files: tuple[str, ...] = ()
    split: str = "train"
    field: str = "text"
    kind: Literal["datasets"] = "datasets"

    FORMATS = ("parquet", "json", "csv", "arrow", "text")

    def __post_init__(self) -> None:
        if self.path in self.FORMATS and not self.data_files:
            raise ValueError(f"data_files: got none, wants the {self.path} files to read")

    def records(self, start: int = 0) -> Iterator[Record]:
        """Each row, streamed."""
        rows = self._open()
        columns = rows.column_names
        if columns is not None and self.field not in columns:
            raise DataError(f"data.source.field: got {self.field!r}, wants one of the columns {', '.join(columns)}")
        rows = rows.skip(start) if start else rows
        return self._read(iter(rows), start)

    def listing(self) -> str:
        return _listing(*self._files())

    def size_bytes(self) -> int | None:
        """None: the text is only a part of the files' bytes."""
        return None

    def _read(self, rows: Iterator[dict[str, Any]], start: int) -> Iterator[Record]:
        for number in itertools.count(start):
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the library's readers raise what their file formats raise
                raise DataError(f"data.source: {self.path} row {number} cannot be read: {_one_line(error)}") from None
            yield _from_row(row, self.field, str(number))

    def _files(self) -> tuple[Path, list[str]]:
        if self.data_files:
            root = Path(self.path) if Path(self.path).is_dir() else Path()
            found: list[str] = []
            for pattern in self.data_files:
                absolute = Path(pattern).is_absolute()
                base, relative = (Path("/"), pattern.lstrip("/")) if absolute else (root, pattern)
                names = [str(base / name) for name in _find(base, (relative,))]
                if not names:
                    raise DataError(f"data.source.data_files: no file matches {pattern!r}, wants existing local files")
                found += names
            return Path(), found
        root = Path(self.path)
        if not root.is_dir():
            formats = ", ".join(self.FORMATS)
            raise DataError(f"data.source.path: got {self.path!r}, wants an existing local folder or one of {formats}")
        return root, _find(root, ("**/*",))

    def _open(self) -> Any:
        import datasets

        _, files = self._files()
        root = Path(self.path)
        saved = any((root / name).is_file() for name in ("state.json", "dataset_dict.json"))
        try:
            if not saved:
                builder = self.path if self.path in self.FORMATS else str(root)
                chosen = files if self.data_files and builder in self.FORMATS else list(self.data_files) or None
                return datasets.load_dataset(builder, data_files=chosen, split=self.split, streaming=True)
            found = datasets.load_from_disk(str(root))
            if isinstance(found, datasets.DatasetDict):
                if self.split not in found:
                    raise ValueError(f"split {self.split!r} is not among {', '.join(found)}")
                found = found[self.split]
            return found.to_iterable_dataset()
        except Exception as error:  # anything may come out of a reader of so many formats
            raise DataError(f"data.source: {self.path} cannot be opened: {_one_line(error)}") from None


Source = PythonStdlib | TextFolder | JsonLines | HFDataset


def _from_row(row: dict[str, Any], field: str, place: str) -> Record:
    if field not in row:
        raise DataError(f"data.source.field: {place} has no {field!r}, wants one of {', '.join(map(str, row))}")
    text = row[field]
    if text is None:
        return Skipped(place, EMPTY)
    if not isinstance(text, str):
        raise DataError(f"data.source.field: {field!r} of {place} is {_kind_of(text)}, wants a string")
    try:
        return _record(place, text.encode("utf-8"))
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return Skipped(place, NOT_UTF8)


def _record(place: str, text: bytes) -> Record:
    if len(text) > MAX_DOCUMENT_BYTES:
        limit = MAX_DOCUMENT_BYTES >> 20
        raise DataError(f"data.source: {place} has {len(text):,} bytes, wants documents of at most {limit} MiB")
    return Document(place, text) if text else Skipped(place, EMPTY)


def _read_files(root: Path, names: Iterable[str]) -> Iterator[Record]:
    for name in names:
        path = root / name
        try:
            size = path.stat().st_size
            if size > MAX_DOCUMENT_BYTES:
                limit = MAX_DOCUMENT_BYTES >> 20
                raise DataError(f"data.source: {path} has {size:,} bytes, wants documents of at most {limit} MiB")
            text = path.read_bytes()
        except OSError as error:
            raise DataError(f"data.source.path: {path} cannot be read: {error.strerror}") from None
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            yield Skipped(name, NOT_UTF8)
            continue
        yield _record(name, text)


def _resolve(path: str, patterns: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder and the names of the files in it. Raises DataError when there is nothing to read."""
    root = Path(path)
    if root.is_file():
        return root.parent, [root.name]
    if not root.is_dir():
        raise DataError(f"data.source.path: got {path!r}, wants an existing folder or file")
    names = _find(root, patterns)
    if not names:
        raise DataError(f"data.source.path: {path} holds no file that matches {' or '.join(patterns)}")
    return root, names


def _find(root: Path, patterns: Sequence[str]) -> list[str]:
    """Relative names of what matches any of the patterns and is no folder (a broken link is kept: an error later)."""
    found = {path for pattern in patterns for path in root.glob(pattern)}
    return sorted(path.relative_to(root).as_posix() for path in found if not path.is_dir())


def _listing(root: Path, names: Sequence[str]) -> str:
    return fingerprint_of([[name, _size(root / name)] for name in names])


def _total_bytes(root: Path, names: Sequence[str]) -> int:
    return sum(_size(root / name) for name in names)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"data.source.path: {path} cannot be read: {error.strerror}") from None


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return names.get(type(value), "null" if value is None else "a number")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
