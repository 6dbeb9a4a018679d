"""A bounded, repeatable sample of a corpus for the tokenizer's training."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator

from data.sources import Record, Skipped

CHUNK_CHARS = 2048
POOL_BYTES = 4 << 30
"""The sample is drawn from this much text at the beginning of a source."""


def held_out(text: bytes, fraction: float) -> bool:
    """Whether a document belongs to validation: a function of its text, so that copies stay on one side."""
    draw = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
    return draw < fraction * 2**64


def training_sample(records: Iterable[Record], size_bytes: int, validation_fraction: float) -> list[str]:
    """Chunks of a few kilobytes from all over the training documents, about `size_bytes` in all.

    Every chunk draws a number from its text and its place; the lowest are kept. Memory is that of the sample.
    """
    kept: list[tuple[int, int, str]] = []
    size = read = 0
    for number, record in enumerate(records):
        if isinstance(record, Skipped) or held_out(record.text, validation_fraction):
            continue
        read += len(record.text)
        for place, chunk in enumerate(_chunks(record.text.decode("utf-8"))):
            draw = hashlib.blake2b(f"{number} {place} ".encode() + chunk.encode(), digest_size=8).digest()
            heapq.heappush(kept, (-int.from_bytes(draw, "big"), -number, chunk))
            size += len(chunk)
            while size > size_bytes and len(kept) > 1:
                size -= len(heapq.heappop(kept)[2])
        if read >= POOL_BYTES:
            break
    return [chunk for *_, chunk in sorted(kept, reverse=True)]


def _chunks(text: str) -> Iterator[str]:
    """Cut after a line where there are lines."""
    start = 0
    while start < len(text):
        line = text.find("\n", start + CHUNK_CHARS, start + 2 * CHUNK_CHARS)
        stop = line + 1 if line >= 0 else start + 2 * CHUNK_CHARS
        yield text[start:stop]
        start = stop
