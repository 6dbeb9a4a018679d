"""What general compressors make of text: the yardstick beside a model's bits per byte."""

import lzma
import zlib
from collections.abc import Iterable

from data.shards import Compression

LIMIT_BYTES = 64 << 20
"""Compressors see whole documents until they have read this much, so that huge held-out sets stay affordable."""


def compressed_sizes(documents: Iterable[bytes]) -> Compression:
    """Sizes by zlib (level 9) and xz (preset 9) of documents joined without separators, streamed."""
    deflate, xz = zlib.compressobj(9), lzma.LZMACompressor(preset=9)
    count = text_bytes = zlib_bytes = xz_bytes = 0
    for text in documents:
        if text_bytes >= LIMIT_BYTES:
            break
        count, text_bytes = count + 1, text_bytes + len(text)
        zlib_bytes += len(deflate.compress(text))
        xz_bytes += len(xz.compress(text))
    zlib_bytes += len(deflate.flush())
    xz_bytes += len(xz.flush())
    return Compression(count, text_bytes, zlib_bytes, xz_bytes)
