"""Text to token ids and back: SentencePiece models and Hugging Face `tokenizer.json` behind one face.

    tokenizer = load_tokenizer(Path("tokenizer.model"))
    tokenizer.decode(tokenizer.encode(text)) == text

For the models that this project trains that holds for every valid UTF-8 text. SentencePiece writes a space as U+2581,
so a literal U+2581 could not be told from a space: it is encoded as its three byte pieces instead, and ids are decoded
piece by piece (byte pieces as bytes, U+2581 in a piece as a space). In words of other libraries: byte-pair merges over
raw text without normalisation, a vocabulary in which pieces hold real spaces, and byte fallback.
"""

import codecs
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from data.files import DataError, sha256_of

SPACE = "\u2581"
"""How a SentencePiece model spells a space."""

SEGMENT_CHARS = 16 << 10
"""Long texts are encoded in segments of about this length, cut where no piece can reach across."""

LONGEST_SEGMENT_CHARS = 1 << 20
"""Where a text offers no such place for so long, it is cut anyway."""

GROUP_CHARS = 2 << 20
"""How much text is encoded at a time, to bound memory."""

GROUP_IDS = 1 << 20
UNREADABLE = "\N{REPLACEMENT CHARACTER}".encode()
BOUNDARY = re.compile("[^ ](?= )")

BEGIN_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]")
END_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]")
PAD_NAMES = ("<pad>", "<|pad|>", "<|finetune_right_pad_id|>", "[PAD]")


class Backend(Protocol):
    """What a tokenizer library provides. Specials: ids that are no text; they decode to nothing."""

    vocab_size: int
    bos: int
    eos: int
    pad: int

    def segments(self, text: str) -> Iterator[str]:
        """Parts of `text` whose encodings, one after the other, are that of `text`."""
        ...

    def encode(self, segments: Sequence[str], workers: int) -> list[list[int]]: ...

    def decode(self, ids: np.ndarray) -> bytes: ...


class Tokenizer:
    """One face for every tokenizer.

    bos, eos, pad: ids that begin a document, end it and fill a row (a tokenizer without its own uses its end). sha256:
    of the model file.
    """

    def __init__(self, path: Path, backend: Backend) -> None:
        self.path, self.sha256 = path, sha256_of(path)
        self.vocab_size, self.bos, self.eos, self.pad = backend.vocab_size, backend.bos, backend.eos, backend.pad
        self._backend = backend

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text, without specials; names of special tokens in it are plain text. Raises DataError for what is
        not valid UTF-8."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str | bytes], workers: int = 1) -> list[np.ndarray]:
        """Ids of each text, int32, encoded in `workers` threads."""
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        for group in _groups(self._segments(texts)):
            encoded = self._backend.encode([segment for _, segment in group], workers)
            for (index, _), ids in zip(group, encoded, strict=True):
                parts[index].append(np.array(ids, dtype=np.int32))
        return [np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32) for ids in parts]

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes that the ids spell; specials spell nothing, ids outside the vocabulary a replacement character."""
        return self._backend.decode(ids if isinstance(ids, np.ndarray) else np.fromiter(ids, np.int64))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Like `decode_bytes`, with replacement characters for bytes that are no UTF-8. Never raises."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come: holds bytes back until they are whole characters, gives the rest at the end."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            if text := decoder.decode(self.decode_bytes([token])):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def _segments(self, texts: Sequence[str | bytes]) -> Iterator[tuple[int, str]]:
        for index, text in enumerate(texts):
            try:
                whole = text.decode("utf-8") if isinstance(text, bytes) else text
                if whole is text:
                    whole.encode("utf-8")  # refuses half surrogate pairs
                for segment in self._backend.segments(whole):
                    yield index, segment
            except UnicodeError as error:
                raise DataError(f"text: is not valid UTF-8 ({error}); wants valid UTF-8") from None


class SentencePieceBackend:
    """A SentencePiece model.

    exact: the model keeps text as it is and can be cut at the start of a run of spaces, which holds for those trained
    here; texts of other models are encoded whole, with their own normalisation.
    """

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"is no SentencePiece model: {' '.join(str(error).split())}") from None
        model_ids = range(self._model.vocab_size())
        pieces = [self._model.id_to_piece(token) for token in model_ids]
        special = [self._model.is_control(token) or self._model.is_unknown(token) for token in model_ids]
        byte = [self._model.is_byte(token) for token in model_ids]
        self.vocab_size = len(pieces)
        self._bytes = [
            b"" if s else bytes([int(p[3:-1], 16)]) if b else p.replace(SPACE, " ").encode()
            for p, s, b in zip(pieces, special, byte, strict=True)
        ]
        eos = self._model.eos_id()
        if eos < 0:
            raise DataError("has no piece that ends a text, wants a model with an eos piece")
        self.eos = eos
        self.bos = self._model.bos_id() if self._model.bos_id() >= 0 else eos
        self.pad = self._model.pad_id() if self._model.pad_id() >= 0 else eos
        ordinary = [p for p, s, b in zip(pieces, special, byte, strict=True) if not (s or b)]
        self._prefix = b" " if self._model.encode("a", out_type=str)[0].startswith(SPACE) else b""
        self.exact = any(byte) and not any(SPACE in p.lstrip(SPACE) for p in ordinary) and self._keeps_text()
        self._literal = self._bytes_ids(SPACE.encode()) if self.exact else []

    def _bytes_ids(self, data: bytes) -> list[int]:
        return [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in data]

    def _keeps_text(self) -> bool:
        probes = (" a  b ", "a\u00a0\ufb01 \u1100\u1161", "\t\r\n \n", "\u200b\ufeff\x00\x01 e\u0301")
        if self._prefix:
            return False
        return all(self.decode(np.array(self._model.encode(probe))) == probe.encode() for probe in probes)

    def segments(self, text: str) -> Iterator[str]:
        if not self.exact:
            return iter([text] if text else [])
        return (part for segment in _cut(text) for part in _literals_apart(segment))

    def encode(self, segments: Sequence[str], workers: int) -> list[list[int]]:
        if not self.exact:
            return self._model.encode(list(segments), num_threads=workers)
        plain = iter(self._model.encode([s for s in segments if s[0] != SPACE], num_threads=workers))
        return [self._literal * len(s) if s[0] == SPACE else next(plain) for s in segments]

    def decode(self, ids: np.ndarray) -> bytes:
        table, size = self._bytes, self.vocab_size
        parts = []
        for start in range(0, len(ids), GROUP_IDS):
            group = ids[start : start + GROUP_IDS].tolist()
            parts.append(b"".join([table[token] if 0 <= token < size else UNREADABLE for token in group]))
        return b"".join(parts).removeprefix(self._prefix)


class HuggingFaceBackend:
    """A `tokenizer.json`, read by the `tokenizers` library. Its own rules decide whether text survives exactly."""

    def __init__(self, model: bytes) -> None:
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_str(model.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"is no tokenizer.json: {' '.join(str(error).split())}") from None
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        eos = self._first(END_NAMES)
        if eos is None:
            raise DataError(f"has no token that ends a text, wants one of {', '.join(END_NAMES)}")
        bos, pad = self._first(BEGIN_NAMES), self._first(PAD_NAMES)
        self.eos, self.bos, self.pad = eos, eos if bos is None else bos, eos if pad is None else pad

    def _first(self, names: Sequence[str]) -> int | None:
        return next((token for name in names if (token := self._model.token_to_id(name)) is not None), None)

    def segments(self, text: str) -> Iterator[str]:
        return iter([text] if text else [])

    def encode(self, segments: Sequence[str], workers: int) -> list[list[int]]:
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers > 1 else "false"
        return [found.ids for found in self._model.encode_batch(list(segments), add_special_tokens=False)]

    def decode(self, ids: np.ndarray) -> bytes:
        text: list[str] = []
        run: list[int] = []
        for token in ids.tolist():
            if 0 <= token < self.vocab_size:
                run.append(token)
                continue
            text += [self._model.decode(run), UNREADABLE.decode()]
            run = []
        return "".join([*text, self._model.decode(run)]).encode("utf-8")


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads `*.json` as a Hugging Face tokenizer and anything else as a SentencePiece model. Raises DataError."""
    try:
        model = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; wants a tokenizer file") from None
    try:
        backend: Backend = HuggingFaceBackend(model) if path.suffix == ".json" else SentencePieceBackend(model)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return Tokenizer(path, backend)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """A byte-pair model over `texts`: the same bytes from the same texts in the same order.

    texts: a few kilobytes each; what is longer than SentencePiece's limit is left out. Pieces hold newlines, tabs and
    runs of spaces as they are; a space elsewhere can only begin a piece. Ids: 0 unknown (never produced, because of
    byte fallback), 1 begin, 2 end, 3 pad, then 256 bytes. Raises DataError when the texts do not support `vocab_size`.
    """
    import io

    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_trainable(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,
            num_threads=2,
            pad_id=3,
            minloglevel=3,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(_training_problem(str(error), vocab_size)) from None
    return model.getvalue()


def _training_problem(message: str, vocab_size: int) -> str:
    key = "data.tokenizer.vocab_size"
    if found := re.search(r"value <= (\d+)", message):
        return f"{key}: got {vocab_size}, but this text supports at most {found[1]} pieces; lower it or add text"
    if found := re.search(r"\d+ vs (\d+)", message):
        return f"{key}: got {vocab_size}, wants at least {found[1]} (4 specials, 256 bytes, its characters)"
    if "sentences_.empty()" in message:
        return "data.source: holds no text to train a tokenizer on"
    return f"data.tokenizer: SentencePiece cannot train: {' '.join(message.split())}"


def _trainable(texts: Iterable[str]) -> Iterator[str]:
    """Without the characters that SentencePiece keeps for itself (a text with one would be dropped whole)."""
    for text in texts:
        if kept := text.replace(SPACE, "").replace("\u2585", "").replace("\0", ""):
            yield kept


def _cut(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > SEGMENT_CHARS:
        limit = start + LONGEST_SEGMENT_CHARS
        found = BOUNDARY.search(text, start + SEGMENT_CHARS - 1, limit)
        stop = found.end() if found else min(limit, len(text))
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def _literals_apart(segment: str) -> Iterator[str]:
    if SPACE not in segment:
        return iter([segment])
    return (part for part in re.split(f"({SPACE}+)", segment) if part)


def _groups(segments: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    group: list[tuple[int, str]] = []
    size = 0
    for index, segment in segments:
        group.append((index, segment))
        size += len(segment)
        if size >= GROUP_CHARS:
            yield group
            group, size = [], 0
    if group:
        yield group
