"""The safetensors container: 8 bytes of header length (little-endian), a JSON header, the tensors' bytes.

Tensors lie without gaps, in the order in which they were written; the header may end in spaces, so its room can be
reserved before its contents are known.
"""

import json
import sys

import torch

from model.weights.files import CheckpointError, RegularFile

assert sys.byteorder == "little", "safetensors stores little-endian numbers"

LENGTH_BYTES = 8
HEADER_BYTES = 128 << 10
"""Room that the writer reserves for the JSON header."""
HEADER_LIMIT_BYTES = 100_000_000
"""The longest header that safetensors itself reads."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Header:
    """The JSON header while a file is written: flat tensors, appended one after the other."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._length = len("{}")
        self.data_bytes = 0

    def _part(self, key: str, dtype: str, numel: int, size: int) -> str:
        span = [self.data_bytes, self.data_bytes + size]
        return f"{json.dumps(key)}:" + json.dumps({"dtype": dtype, "shape": [numel], "data_offsets": span})

    def fits(self, key: str, dtype: str, numel: int, size: int) -> bool:
        return self._length + len(self._part(key, dtype, numel, size)) + 1 <= HEADER_BYTES

    def append(self, key: str, dtype: str, numel: int, size: int) -> None:
        part = self._part(key, dtype, numel, size)
        self._parts.append(part)
        self._length += len(part) + 1
        self.data_bytes += size

    def encode(self) -> bytes:
        """Length and header, padded to `LENGTH_BYTES + HEADER_BYTES`."""
        text = ("{" + ",".join(self._parts) + "}").encode("ascii")
        assert len(text) <= HEADER_BYTES
        return HEADER_BYTES.to_bytes(LENGTH_BYTES, "little") + text.ljust(HEADER_BYTES)


class Slots:
    """Where the tensors of a container lie: `slots.find(key, dtype, numel)` is a byte offset in the file."""

    def __init__(self, file: RegularFile) -> None:
        self._file = file.path
        length = int.from_bytes(file.read(0, LENGTH_BYTES), "little")
        limit = min(HEADER_LIMIT_BYTES, file.size - LENGTH_BYTES)
        if length > limit:
            raise CheckpointError(f"{file.path}: header length {length}, wants at most {limit}")
        try:
            header = json.loads(file.read(LENGTH_BYTES, length))
        except ValueError as error:
            raise CheckpointError(f"{file.path}: the safetensors header is no JSON ({error})") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{file.path}: the safetensors header is no JSON object")
        self._start = LENGTH_BYTES + length
        self._data_bytes = file.size - self._start
        self._header = header

    def find(self, key: str, dtype: str, numel: int) -> int:
        """Raises CheckpointError unless the container holds `numel` elements of `dtype` under `key`."""
        size = numel * DTYPES[dtype].itemsize
        found = self._header.get(key)
        if not isinstance(found, dict):
            raise CheckpointError(f"{self._file}: holds no tensor {key!r}, which the manifest lists")
        span = found.get("data_offsets")
        if (
            found.get("dtype") != dtype
            or found.get("shape") != [numel]
            or not isinstance(span, list)
            or len(span) != 2
            or not all(type(n) is int for n in span)
            or not 0 <= span[0] <= span[1] <= self._data_bytes
            or span[1] - span[0] != size
        ):
            raise CheckpointError(f"{self._file}: {key!r} is {found}, the manifest says {numel} elements of {dtype}")
        return self._start + span[0]
