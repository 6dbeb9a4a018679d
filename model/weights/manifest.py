"""The manifest of a checkpoint: which tensors it holds, which fragment lies where, and the hash of every file.

`manifest.json` is written last; a folder without a valid one is no checkpoint. It carries a hash of itself.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.params import Box, box_numel
from model.weights.container import DTYPES
from model.weights.files import CheckpointError, RegularFile, write_durably
from model.weights.fragments import Fragment, intersect

FORMAT = "braid-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,200}\.safetensors")
SHA256 = re.compile(r"[0-9a-f]{64}")

TensorKey = tuple[str, str]
"""`(kind, logical name)`."""


@dataclass(frozen=True)
class Entry:
    """Elements `[start, stop)` of `box` lie under `key` in `file`."""

    file: str
    key: str
    block: str
    box: Box
    start: int
    stop: int


@dataclass(frozen=True)
class StoredTensor:
    """shape: of the logical tensor. dtype: its name in safetensors ("F32")."""

    shape: tuple[int, ...]
    dtype: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class FileInfo:
    size: int
    sha256: str


@dataclass(frozen=True)
class FileRecord:
    """One file that a rank wrote: what rank 0 needs to know to make the manifest. items: `(fragment, dtype name)`."""

    name: str
    size: int
    sha256: str
    items: tuple[tuple[Fragment, str], ...]


@dataclass(frozen=True)
class Manifest:
    """tensors: by `(kind, name)`. files: by name. extra: a JSON object of the caller's (clock, data state, recipe)."""

    tensors: dict[TensorKey, StoredTensor]
    files: dict[str, FileInfo]
    extra: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_records(
        records: Iterable[FileRecord], shapes: Mapping[TensorKey, tuple[int, ...]], extra: dict[str, Any]
    ) -> "Manifest":
        """shapes: the logical shape of every tensor that the checkpoint must hold. Raises CheckpointError when an
        element of one was written never or twice."""
        files: dict[str, FileInfo] = {}
        entries: dict[TensorKey, list[Entry]] = {key: [] for key in shapes}
        dtypes: dict[TensorKey, set[str]] = {key: set() for key in shapes}
        for record in records:
            if record.name in files:
                raise CheckpointError(f"{record.name}: written by two ranks")
            files[record.name] = FileInfo(record.size, record.sha256)
            for fragment, dtype in record.items:
                key = (fragment.kind, fragment.tensor)
                if key not in shapes:
                    raise CheckpointError(f"{record.name}: holds {_title(key)}, whose shape was not given")
                place = (record.name, fragment.key, fragment.block, fragment.box, fragment.start, fragment.stop)
                entries[key].append(Entry(*place))
                dtypes[key].add(dtype)
        tensors = {}
        for key, shape in shapes.items():
            if len(dtypes[key]) != 1:
                found = " and ".join(sorted(dtypes[key])) or "no element"
                raise CheckpointError(f"{_title(key)}: found {found}, wants one dtype")
            ordered = sorted(entries[key], key=lambda entry: (entry.box, entry.start))
            tensors[key] = StoredTensor(tuple(shape), dtypes[key].pop(), tuple(ordered))
        manifest = Manifest(tensors, files, extra)
        manifest.check()
        return manifest

    def check(self) -> None:
        """Raises CheckpointError unless every element of every tensor has exactly one owner in a listed file."""
        slots = set()
        for key, tensor in self.tensors.items():
            check_coverage(_title(key), tensor)
            for entry in tensor.entries:
                if entry.file not in self.files:
                    raise CheckpointError(f"{_title(key)}: lies in {entry.file!r}, which is not listed under files")
                if (entry.file, entry.key) in slots:
                    raise CheckpointError(f"{_title(key)}: {entry.key!r} in {entry.file!r} is used twice")
                slots.add((entry.file, entry.key))

    @property
    def totals(self) -> dict[str, int]:
        return {
            "tensors": len(self.tensors),
            "elements": sum(math.prod(tensor.shape) for tensor in self.tensors.values()),
            "files": len(self.files),
            "bytes": sum(info.size for info in self.files.values()),
        }

    def save(self, folder: Path) -> None:
        """Writes `manifest.json`, durable when this returns. Raises CheckpointError when `extra` is not plain JSON."""
        try:
            body = self._body()
            text = json.dumps(body | {"sha256": _digest(body)}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / MANIFEST}: extra holds what JSON cannot: {error}") from error
        try:
            write_durably(folder / MANIFEST, text.encode())
        except OSError as error:
            raise CheckpointError(f"{folder / MANIFEST}: cannot be written: {error.strerror}") from error

    def _body(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "tensors": [
                {
                    "kind": kind,
                    "name": name,
                    "shape": list(tensor.shape),
                    "dtype": tensor.dtype,
                    "entries": [vars(entry) | {"box": [list(span) for span in entry.box]} for entry in tensor.entries],
                }
                for (kind, name), tensor in self.tensors.items()
            ],
            "files": {name: vars(info) for name, info in self.files.items()},
            "totals": self.totals,
            "extra": json.loads(json.dumps(self.extra, allow_nan=False)),
        }

    @staticmethod
    def load(folder: Path) -> "Manifest":
        """Reads and validates `manifest.json`. Raises CheckpointError with the reason when it cannot be trusted."""
        path = folder / MANIFEST
        with RegularFile(path) as file:
            data = file.read(0, file.size)
        try:
            document = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: is no valid JSON ({error})") from error
        try:
            manifest = _parse(document)
            manifest.check()
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return manifest


def check_coverage(title: str, tensor: StoredTensor) -> None:
    """Every element has exactly one owner: the ranges of each box join without gap or overlap, the boxes are disjoint
    and together as large as the tensor."""
    ranges: dict[Box, list[tuple[int, int]]] = {}
    for entry in tensor.entries:
        ranges.setdefault(entry.box, []).append((entry.start, entry.stop))
    for box, spans in ranges.items():
        inside = len(box) == len(tensor.shape) and all(
            0 <= low < high <= size for (low, high), size in zip(box, tensor.shape, strict=True)
        )
        if not inside:
            raise CheckpointError(f"{title}: box {box} is empty or outside the shape {tensor.shape}")
        position = 0
        for start, stop in sorted(spans):
            if start != position or stop <= start:
                fault = "are missing" if start > position else "have two owners"
                low, high = sorted((start, position))
                raise CheckpointError(f"{title}: elements [{low}, {high}) of box {box} {fault}")
            position = stop
        if position != box_numel(box):
            raise CheckpointError(f"{title}: box {box} ends at element {box_numel(box)}, found owners up to {position}")
    _check_disjoint(title, sorted(ranges))
    found, wanted = sum(map(box_numel, ranges)), math.prod(tensor.shape)
    if found != wanted:
        raise CheckpointError(f"{title}: its boxes hold {found} elements, the shape {tensor.shape} has {wanted}")


def _check_disjoint(title: str, boxes: list[Box]) -> None:
    """A sweep along axis 0 of sorted boxes: only those that share a row are compared."""
    active: list[Box] = []
    for box in boxes:
        active = [other for other in active if other and other[0][1] > box[0][0]]
        for other in active:
            if intersect(box, other) is not None:
                raise CheckpointError(f"{title}: boxes {other} and {box} overlap")
        active.append(box)


def _parse(document: Any) -> Manifest:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"is no manifest of format {FORMAT!r}")
    if document.get("version") != VERSION:
        raise CheckpointError(f"version {document.get('version')!r}, this program reads version {VERSION}")
    wants = {"format": str, "version": int, "tensors": list, "files": dict, "totals": dict, "extra": dict}
    body = _fields(document, "manifest", wants | {"sha256": str})
    written = body.pop("sha256")
    if (found := _digest(body)) != written:
        raise CheckpointError(f"its contents have SHA-256 {found}, it says {written}")
    files = {name: _parse_file(name, info) for name, info in body["files"].items()}
    tensors: dict[TensorKey, StoredTensor] = {}
    for item in body["tensors"]:
        key, tensor = _parse_tensor(item)
        if key in tensors:
            raise CheckpointError(f"{_title(key)} is listed twice")
        tensors[key] = tensor
    manifest = Manifest(tensors, files, body["extra"])
    if manifest.totals != body["totals"]:
        raise CheckpointError(f"totals are {body['totals']}, the lists have {manifest.totals}")
    return manifest


def _parse_file(name: str, info: Any) -> FileInfo:
    if not FILE_NAME.fullmatch(name):
        raise CheckpointError(f"file name {name!r}, wants a plain name ending in .safetensors")
    found = _fields(info, f"file {name!r}", {"size": int, "sha256": str})
    if found["size"] < 0 or not SHA256.fullmatch(found["sha256"]):
        raise CheckpointError(f"file {name!r}: size {found['size']} and SHA-256 {found['sha256']!r} are impossible")
    return FileInfo(found["size"], found["sha256"])


def _parse_tensor(item: Any) -> tuple[TensorKey, StoredTensor]:
    wants = {"kind": str, "name": str, "shape": list, "dtype": str, "entries": list}
    found = _fields(item, "a tensor", wants)
    title = _title((found["kind"], found["name"]))
    if found["dtype"] not in DTYPES:
        raise CheckpointError(f"{title}: unknown dtype {found['dtype']!r}")
    if not all(_is_count(n) for n in found["shape"]):
        raise CheckpointError(f"{title}: impossible shape {found['shape']}")
    entries = tuple(_parse_entry(title, entry) for entry in found["entries"])
    return (found["kind"], found["name"]), StoredTensor(tuple(found["shape"]), found["dtype"], entries)


def _parse_entry(title: str, item: Any) -> Entry:
    wants = {"file": str, "key": str, "block": str, "box": list, "start": int, "stop": int}
    found = _fields(item, f"an entry of {title}", wants)
    for span in found["box"]:
        if not (isinstance(span, list) and len(span) == 2 and all(_is_count(n) for n in span)):
            raise CheckpointError(f"{title}: impossible box {found['box']}")
    return Entry(**found | {"box": tuple((low, high) for low, high in found["box"])})


def _fields(value: Any, title: str, wants: Mapping[str, type]) -> dict[str, Any]:
    """`value`, an object with exactly these keys and types."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{title} is {type(value).__name__}, wants an object")
    if value.keys() != wants.keys():
        missing, unknown = sorted(wants.keys() - value.keys()), sorted(value.keys() - wants.keys())
        raise CheckpointError(f"{title}: missing keys {missing}, unknown keys {unknown}")
    for key, kind in wants.items():
        if type(value[key]) is not kind:
            raise CheckpointError(f"{title}: {key} is {value[key]!r}, wants {kind.__name__}")
    return dict(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _title(key: TensorKey) -> str:
    return f"{key[0]} {key[1]!r}"


def _digest(body: dict[str, Any]) -> str:
    """Of the contents, however they are spaced and ordered."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
